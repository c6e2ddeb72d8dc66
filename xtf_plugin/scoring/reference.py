"""The reference model: the model being trained with its adapters off, or a separate, possibly quantised model.

`Reference.scoring()` prepares a model for a scoring pass and restores every flag afterwards, so that the first training
step is the same as without the pass.

A `ShardedReference` is split between ranks by FSDP. The wrapper gathers the weights of a module when that module's
forward starts, and those outside wrapped layers (embeddings, last norm, LM head) only during its own forward. Decoder
and head therefore run inside the wrapper's forward. Each forward is a collective: all ranks must run as many.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from types import MethodType
from typing import Any, ClassVar, TypeVar

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from ..errors import XTFError, XTFUserError
from .adapters import check_adapter
from .attention_capture import Recorder, attention_switched, check_recorded, recording
from .kernels import dispatch
from .kernels.packing import Packed

T = TypeVar("T")

MASKED = ("sdpa", "eager")  # attention functions that take masks of four dimensions

_KERNELS = "axolotl.kernels.lora"
_PATCHES = "axolotl.monkeypatch.lora_kernels"
_PROJECTIONS = {"apply_qkv": "original_apply_qkv_optional_v", "apply_o": "original_apply_o"}


@dataclass
class Reference:
    """A causal language model that scores.

    Args:
        model: the causal LM itself, without a PEFT, DDP or FSDP wrapper.
        name: of the model, for messages.
        adapters_off: context in which adapters are off.
        autocast: context of the trainer's mixed precision.

    Attributes:
        lockstep: whether every forward is a collective, of which all ranks must run the same number.
        checked, packs: results of the self-check: what was checked; whether documents may be packed.
        branches: whether documents may share the keys and values of their beginning; None: not tried yet.
        warnings: what to tell the user of it.
    """

    lockstep: ClassVar[bool] = False
    model: Any  # transformers is untyped here
    name: str
    adapters_off: Callable[[], AbstractContextManager[Any]] = nullcontext
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    checked: frozenset[str] = field(default=frozenset(), init=False)
    packs: bool = field(default=False, init=False)
    branches: bool | None = field(default=None, init=False)
    warnings: list[str] = field(default_factory=list, init=False)

    def take_warnings(self) -> list[str]:
        """The warnings, which are then forgotten."""
        found, self.warnings = self.warnings, []
        return found

    def with_full_weights(self, run: Callable[[], T]) -> T:
        """Call `run` where the model's weights are complete, and return its result."""
        return run()

    @property
    def text_config(self) -> Any:
        """The config of the language model, also inside a multimodal one."""
        return self.model.config.get_text_config()

    @property
    def device(self) -> torch.device:
        """The device of input ids."""
        return self.embeddings.weight.device  # type: ignore[no-any-return]

    @property
    def decoder(self) -> nn.Module:
        """The layers below the LM head. TRL patches `model.forward`, but not the decoder's."""
        found: nn.Module = self.model.get_decoder()
        if found is not self.model and not isinstance(found, nn.Linear):
            return found
        # transformers finds none in Llama 4, and the head in others
        parts: list[nn.Module] = list(self.model.children())
        return next(part for part in parts if any(each is self.embeddings for each in part.modules()))

    @property
    def embeddings(self) -> Any:
        """The input embedding layer."""
        return self.model.get_input_embeddings()

    def check_ids(self, highest: int) -> None:
        """Raise XTFError if the token id `highest` has no input embedding."""
        rows = self.embeddings.weight.shape[0]
        if highest >= rows:
            raise XTFError(
                f"the data holds token id {highest}, but {self.name} has only {rows} embeddings. Use the model's own "
                "tokenizer."
            )

    @contextmanager
    def scoring(self, record: bool, *, masked: bool = False) -> Iterator[None]:
        """Adapters off, evaluation mode, no gradients, the trainer's autocast; everything is restored on exit.

        4-bit layers stay in training mode: on CPUs with AVX512-BF16, bitsandbytes repacks their weights in evaluation
        mode into a layout without gradients, and does not undo it.

        Args:
            record: use XTF's attention function, which can record attention; otherwise the model's own.
            masked: use one that takes any mask, where the model's own does not.
        """
        with ExitStack() as stack:
            stack.enter_context(_restored(self.model))
            stack.enter_context(self.adapters_off())
            stack.enter_context(bypass_fused_kernels(self.model))
            for module in self.model.modules():
                module.training = type(module).__name__ in ("Linear4bit", "LinearNF4", "LinearFP4")
            stack.enter_context(torch.no_grad())
            stack.enter_context(self.autocast())
            if record:
                stack.enter_context(attention_switched(self.model))
            elif masked and self.text_config._attn_implementation not in MASKED:
                soft = getattr(self.text_config, "attn_logit_softcapping", None)  # SDPA would refuse it
                plain = soft or not getattr(self.model, "_supports_sdpa", True)
                stack.enter_context(attention_switched(self.model, "eager" if plain else "sdpa"))
            yield

    def forward(
        self,
        input_ids: Tensor,
        lengths: Tensor,
        layers: tuple[int, ...],
        start: int = 0,
        *,
        packed: Packed | None = None,
        plainly: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """One decoder forward, inside `scoring(record=bool(layers) or packed is not None)`.

        Args:
            input_ids: (B, T), right-padded; packed: (1, T).
            lengths: (n,) tokens of each document, on the same device.
            layers: layers whose attention is recorded; may be empty.
            start: first column of attention received to compute.
            packed: the documents of a packed row; None: each row is one document.
            plainly: compute attention received by its definition; for short documents only.

        Returns:
            last hidden states (B, T, D); attention received (B, T) float32, or None without layers.
        """
        recorder = Recorder(self.name, frozenset(layers), lengths, start, packed, plainly)
        record = bool(layers) or packed is not None
        with recording(recorder) if record else nullcontext():
            hidden = self._hidden(input_ids, None if packed is None else packed.positions(input_ids.numel()))
        if record:
            check_recorded(recorder, self.text_config.num_hidden_layers, getattr(self.text_config, "layer_types", None))
        return hidden, recorder.mean()

    def _hidden(self, input_ids: Tensor, positions: Tensor | None) -> Tensor:
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
        """Log-probability of each target, entropy and deviation of its prediction; see `kernels.eager.predictions`.

        Args:
            hidden: (N, D) the states that predict.
            targets: (N,) token ids.

        Returns:
            (3, N) float32.
        """
        scale, softcap = logit_transform(self.text_config)
        head = self.model.get_output_embeddings()
        return dispatch.predictions(hidden, head, targets, scale=scale, softcap=softcap)


@dataclass
class ShardedReference(Reference):
    """A `Reference` under FSDP, with a part of every weight on each rank.

    Args:
        root: the outermost wrapper, which gathers the weights; with FSDP2 possibly the causal LM itself.
    """

    lockstep: ClassVar[bool] = True
    root: Any = None

    @contextmanager
    def scoring(self, record: bool, *, masked: bool = False) -> Iterator[None]:
        """As of any reference; on exit, weights that the root's forward left gathered are sharded again."""
        with super().scoring(record, masked=masked):
            yield
        for module in self.root.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def with_full_weights(self, run: Callable[[], T]) -> T:
        """Call `run` in place of the model's forward, inside the wrapper's forward, and return its result."""
        found: list[T] = []

        def forward(*_: Any, **__: Any) -> Tensor:
            found.append(run())
            return torch.zeros((), device=self.device)

        own = vars(self.model).get("forward")  # TRL, accelerate and PEFT set theirs on the instance
        self.model.forward = forward
        try:
            self.root(input_ids=torch.zeros((1, 1), dtype=torch.int64, device=self.device))
        finally:
            del self.model.forward
            if own is not None:
                self.model.forward = own
        return found[0]


@contextmanager
def bypass_fused_kernels(model: nn.Module) -> Iterator[None]:
    """Bypass Axolotl's fused LoRA kernels where, with adapters off, they do not compute the base model.

    Axolotl replaces the forward of feed-forward modules and embeddings on each instance, and that of attention on its
    class. With adapters off, Gemma's embeddings lose their factor and its feed-forward modules use the exact GELU
    instead of the tanh approximation. Attention of a model without kernels (a separate reference) lacks two methods
    that the class's new forward calls. The kernels for attention projections are correct and remain.

    Depends on Axolotl's private module and function names. If they change, scores of fused models differ from those
    without kernels, and tests/axolotl/test_lora_kernels.py fails.
    """
    patches = sys.modules.get(_PATCHES)
    if patches is None:
        yield
        return
    with ExitStack() as stack:
        for module in model.modules():
            own = vars(module)
            if getattr(own.get("forward"), "__module__", None) == _KERNELS:
                stack.callback(own.__setitem__, "forward", own.pop("forward"))
            if getattr(type(module).forward, "__module__", None) != _PATCHES:
                continue
            for name in _PROJECTIONS.keys() - own.keys():
                own[name] = MethodType(getattr(patches, _PROJECTIONS[name]), module)
                stack.callback(own.pop, name)
        yield


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Restore training mode, gradients and rotary embeddings, some of which change in place in every forward."""
    training = [(module, module.training) for module in model.modules()]
    gradients = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    rotary = [
        (module, {k: (v, v.clone() if isinstance(v, Tensor) else None) for k, v in _attributes(module).items()})
        for module in model.modules()
        if hasattr(module, "rope_type")
    ]
    try:
        yield
    finally:
        for module, before in rotary:
            for name in _attributes(module).keys() - before.keys():
                delattr(module, name)
            for name, (value, copy) in before.items():
                setattr(module, name, value)
                if copy is not None:
                    value.copy_(copy)
        for module, flag in training:
            module.training = flag
        for parameter, flag in gradients:  # PEFT enables adapters with requires_grad=True, even if it was False before
            if parameter.requires_grad is not flag:
                parameter.requires_grad_(flag)


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {**vars(module), **dict(module.named_buffers(recurse=False, remove_duplicate=False))}


def resolve_layers(choice: str | list[int] | tuple[int, ...], text_config: Any) -> tuple[int, ...]:
    """Sorted layer indices of first | middle | last | all | a list of indices; negative ones count from the end.

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
    """Type and length of rotary embeddings that change for a batch with a longer document; None: they do not.

    `longrope` has two sets of frequencies, chosen by the longest document of the batch. The frequencies of `dynamic`
    depend on the longest document so far.
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
    """Factor and soft cap on the logits, from the config keys that transformers' models use."""
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
    """Use the model being trained, with its adapters off, as the reference: it takes no extra memory.

    Args:
        model: a transformers causal LM or a PEFT model around one, unwrapped from DDP.
        autocast: the trainer's mixed-precision context.

    Raises:
        XTFUserError: adapters that cannot be turned off, or that may change the base weights.
        XTFError: the model has no LM head.
    """
    adapters_off: Callable[[], AbstractContextManager[Any]] = nullcontext
    base = model
    if isinstance(model, PeftModel):
        for adapter in model.peft_config.values():
            check_adapter(adapter)
        base, adapters_off = model.get_base_model(), model.disable_adapter
    elif any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise XTFUserError(
            "xtf: this model has adapters but is no PeftModel (add_adapter, or an adapter folder), so they cannot be "
            "turned off. Use peft.get_peft_model, or name the base model under xtf `reference.model`."
        )
    name = str(getattr(base.config, "name_or_path", "")) or type(base).__name__
    if not hasattr(base, "get_output_embeddings") or base.get_output_embeddings() is None:
        raise XTFError(f"{name} ({type(base).__name__}) has no LM head. Train a causal language model with xtf.")
    return Reference(base, name, adapters_off, autocast)
