"""The reference model that scores: the model being trained with its adapters off, or a separate quantised one.

`Reference.scoring()` brings a model into the state of a scoring pass and puts back every flag it touched, so that the
first training step afterwards is the one that would have happened without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from peft import PeftModel
from torch import Tensor, nn

from . import kernels
from .capture import Recorder, attention_switched, check_recorded, recording
from .errors import XTFError, XTFUserError
from .fused import bypass_fused_kernels
from .narrowing import last_feed_forward, only_where
from .packing import Packed

T = TypeVar("T")

# LoRA initialisations that change the base weights: with the adapter off, what is left is not the base model.
_BASE_CHANGING_INITS = ("pissa", "olora", "loftq", "corda", "lora_ga", "mica")


@dataclass
class Reference:
    """A causal language model that can be scored with.

    Args:
        model: the bare causal LM (no PEFT, DDP or FSDP wrapper around it).
        name: what to call it in messages.
        adapters_off: context that turns the adapters off, if there are any.
        autocast: context of the trainer's mixed precision.
    """

    model: Any  # transformers is untyped here
    name: str
    adapters_off: Callable[[], AbstractContextManager[Any]] = nullcontext
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    checked: frozenset[str] = field(default=frozenset(), init=False)  # these three: see `trial`
    packs: bool = field(default=False, init=False)
    narrows: bool = field(default=False, init=False)
    narrowed: bool = field(default=False, init=False)  # whether the last forward was

    @property
    def lockstep(self) -> bool:
        """Whether every forward is a collective of all ranks, which must then run the same number of them."""
        return False

    def whole(self, run: Callable[[], T]) -> T:
        """What `run` gives; it runs where all of the model's own weights are at hand."""
        return run()

    @property
    def text_config(self) -> Any:
        """The config of the language model, also inside a multimodal one."""
        return self.model.config.get_text_config()

    @property
    def device(self) -> torch.device:
        """Where input ids go."""
        weight: Tensor = self.model.get_input_embeddings().weight
        return weight.device

    @property
    def decoder(self) -> nn.Module:
        """The stack of layers below the LM head. TRL patches `model.forward`, never this."""
        decoder: nn.Module = self.model.get_decoder()
        return decoder

    @property
    def embeddings(self) -> nn.Module:
        """The input embedding layer."""
        embeddings: nn.Module = self.model.get_input_embeddings()
        return embeddings

    def check_ids(self, highest: int) -> None:
        """Raise XTFError if a token id lies beyond the input embeddings."""
        rows = self.model.get_input_embeddings().weight.shape[0]
        if highest >= rows:
            raise XTFError(
                f"the data holds token id {highest}, but {self.name} has only {rows} embeddings. Tokenizer and model "
                "do not belong together."
            )

    def layers(self, choice: str | list[int]) -> tuple[int, ...]:
        """Layer indices that `reasoning_importance.layers` names in this model; see `resolve_layers`."""
        return resolve_layers(choice, self.text_config)

    @contextmanager
    def scoring(self, record: bool) -> Iterator[None]:
        """Adapters off, evaluation mode, no gradients, the trainer's autocast; all put back afterwards.

        With `record` attention is ours, so that `forward` can record it; without, the model's own.

        4-bit layers stay in training mode: on CPUs with AVX512-BF16, bitsandbytes repacks their weights in evaluation
        mode into a layout that has no gradient, and does not repack them back.
        """
        training = [(module, module.training) for module in self.model.modules()]
        gradients = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        with ExitStack() as stack:
            stack.callback(_restore, training, gradients)
            stack.callback(_restore_rotary, _rotary_state(self.model))
            stack.enter_context(self.adapters_off())
            stack.enter_context(bypass_fused_kernels(self.model))
            for module, _ in training:
                module.training = type(module).__name__ in ("Linear4bit", "LinearNF4", "LinearFP4")
            stack.enter_context(torch.no_grad())
            stack.enter_context(self.autocast())
            if record:
                stack.enter_context(attention_switched(self.model))
            yield

    def forward(
        self,
        input_ids: Tensor,
        lengths: Tensor,
        layers: tuple[int, ...],
        start: int = 0,
        *,
        packed: Packed | None = None,
        wanted: Tensor | None = None,
        plainly: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """One decoder forward; call it inside `scoring(record=bool(layers) or packed is not None)`.

        Args:
            input_ids: (B, T), right-padded; lengths: (B,) on the same device. Packed: (1, T) and (n,).
            layers: layers whose attention is recorded, possibly none.
            start: first column of attention received that is wanted.
            packed: where the documents of a packed row are; None: each row is one.
            wanted: (P,) indices into the flattened rows of the states that somebody reads: the others may come out as
                anything. None: all.
            plainly: record attention by its definition, on short documents only.

        Returns:
            last hidden states (B, T, D); attention received (B, T) float32, or None without layers.
        """
        feed_forward = last_feed_forward(self.decoder) if self.narrows and wanted is not None else None
        with ExitStack() as stack:
            if wanted is not None:
                told = stack.enter_context(only_where(feed_forward, wanted, input_ids.numel()))
                stack.callback(lambda: setattr(self, "narrowed", told.happened))
            if not layers and packed is None:
                return self._hidden(input_ids), None
            recorder = Recorder(self.name, frozenset(layers), lengths, start, packed, plainly)
            stack.enter_context(recording(recorder))
            hidden = self._hidden(input_ids, None if packed is None else packed.positions(input_ids.numel()))
        check_recorded(recorder, self.text_config.num_hidden_layers, getattr(self.text_config, "layer_types", None))
        return hidden, recorder.mean()

    def _hidden(self, input_ids: Tensor, positions: Tensor | None = None) -> Tensor:
        given = {} if positions is None else {"position_ids": positions}
        hidden: Tensor = self.decoder(input_ids=input_ids, use_cache=False, **given).last_hidden_state
        if hidden.shape[:2] != input_ids.shape:
            raise XTFError(
                f"{self.name} was given {input_ids.shape[1]} tokens and read {hidden.shape[1]}: it cuts its input off "
                "(Unsloth does, at the max_seq_length that the model was loaded with). Load it with a higher one, or "
                "shorten the rows (max_length)."
            )
        return hidden

    def predictions(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Log-probabilities of `targets` (N,) at hidden states (N, D), and what was to be expected; (3, N) float32.

        Rows: see `attributes.predictions`.
        """
        scale, softcap = logit_transform(self.text_config)
        head = self.model.get_output_embeddings()
        return kernels.predictions(hidden, head, targets, scale=scale, softcap=softcap)


def _restore(training: list[tuple[nn.Module, bool]], gradients: list[tuple[nn.Parameter, bool]]) -> None:
    for module, flag in training:
        module.training = flag
    for parameter, flag in gradients:  # PEFT turns adapters back on with requires_grad=True, also where it was False
        if parameter.requires_grad is not flag:
            parameter.requires_grad_(flag)


def _rotary_state(model: nn.Module) -> list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]]:
    """What rotary embeddings hold: some types set it anew in every forward, in place, by its longest document.

    For each: one of its dictionaries, what that holds, and copies of the tensors.
    """
    modules = [module for module in model.modules() if hasattr(module, "rope_type")]
    held = [part for module in modules for part in (module._buffers, vars(module))]
    return [
        (part, dict(part), {name: value.clone() for name, value in part.items() if isinstance(value, Tensor)})
        for part in held
    ]


def _restore_rotary(states: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]]) -> None:
    for part, values, copies in states:
        for name in part.keys() - values.keys():
            del part[name]
        part.update(values)
        for name, value in copies.items():
            values[name].copy_(value)


def resolve_layers(choice: str | list[int] | tuple[int, ...], text_config: Any) -> tuple[int, ...]:
    """Turn first | middle | last | all | indices into sorted layer indices; negative ones count from the end.

    Raises:
        XTFUserError: an index beyond the model's layers.
    """
    count = int(text_config.num_hidden_layers)
    named = {"first": [0], "middle": [count // 2], "last": [count - 1], "all": list(range(count))}
    indices = named[choice] if isinstance(choice, str) else list(choice)
    wrong = [i for i in indices if not -count <= i < count]
    if wrong:
        raise XTFUserError(
            f"layers: {wrong} beyond the reference model's {count} layers. "
            f"Legal: first, middle, last, all, or indices from {-count} to {count - 1}."
        )
    return tuple(sorted({i % count for i in indices}))


def rotary_switch(text_config: Any) -> tuple[str, int] | None:
    """Length beyond which rotary embeddings change for a whole batch, and how they do; None: they never do.

    `longrope`: two sets of frequencies, chosen by the longest document in the batch. `dynamic`: frequencies that follow
    the longest document so far.
    """
    given = getattr(text_config, "rope_parameters", None) or getattr(text_config, "rope_scaling", None) or {}
    for rope in [given, *(part for part in given.values() if isinstance(part, dict))]:
        kind = str(rope.get("rope_type") or rope.get("type") or "")
        if "dynamic" in kind:
            return kind, int(text_config.max_position_embeddings)
        if kind == "longrope":
            original = rope.get("original_max_position_embeddings")
            original = original or getattr(text_config, "original_max_position_embeddings", None)
            return kind, int(original or text_config.max_position_embeddings)
    return None


def logit_transform(text_config: Any) -> tuple[float, float | None]:
    """Factor and soft cap between LM head and softmax, from the config keys that transformers' models use for them."""
    keys = text_config.to_dict()
    scale = 1.0
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if keys.get(name) is not None:
            scale = float(keys[name])
    if keys.get("logits_scaling") is not None:
        factor = float(keys["logits_scaling"])
        scale = factor if text_config.model_type == "hyperclovax" else 1.0 / factor
    softcap = keys.get("final_logit_softcapping")
    return scale, None if softcap is None else float(softcap)


def borrow(model: Any, autocast: Callable[[], AbstractContextManager[Any]] = nullcontext) -> Reference:
    """The model being trained, adapters off, as the reference: no second copy, no extra memory.

    Args:
        model: a transformers causal LM or a PEFT model around one, unwrapped from DDP.
        autocast: the trainer's mixed-precision context.

    Raises:
        XTFError: no LM head, or an adapter whose initialisation changed the base weights.
    """
    adapters_off: Callable[[], AbstractContextManager[Any]] = nullcontext
    base = model
    if getattr(model, "_hf_peft_config_loaded", False):
        raise XTFUserError(
            "xtf: this model carries adapters of transformers' own (add_adapter or an adapter folder), which cannot be "
            "told from its base. Use peft.get_peft_model, or name the base under `reference.model`."
        )
    if isinstance(model, PeftModel):
        for adapter in model.peft_config.values():
            init = getattr(adapter, "init_lora_weights", None)
            if isinstance(init, str) and init.lower().startswith(_BASE_CHANGING_INITS):
                raise XTFUserError(
                    f"init_lora_weights={init!r} changes the base weights, so the model with its adapter off is not "
                    "the "
                    "base model. Name the base model under xtf `reference.model`, or use another initialisation."
                )
        base = model.get_base_model()
        adapters_off = model.disable_adapter
    name = str(getattr(base.config, "_name_or_path", "")) or type(base).__name__
    if not hasattr(base, "get_output_embeddings") or base.get_output_embeddings() is None:
        raise XTFError(f"{name} ({type(base).__name__}) has no LM head; xtf needs a causal language model.")
    return Reference(base, name, adapters_off, autocast)
