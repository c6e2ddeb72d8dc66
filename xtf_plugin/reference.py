"""The reference model that scores: the model being trained with its adapters off, or a separate quantised one.

`Reference.scoring()` brings a model into the state of a scoring pass and restores every flag it touched, so that the
first training step afterwards is the one that would have happened without it.

A `ShardedReference` is split between ranks (FSDP). A rank holds a part of every weight. The wrapper gathers what a
module needs when that module's forward begins, and what belongs to no wrapped layer (embeddings, last norm, LM head)
only while its own forward runs. So decoder and head are called there, and each forward is a collective, of which all
ranks run the same number; see `sharing`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from types import MethodType
from typing import Any, TypeVar

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from . import kernels
from .capture import Recorder, attention_switched, check_recorded, recording
from .errors import XTFError, XTFUserError
from .packing import Packed

T = TypeVar("T")

LAYERS = ("layers", "h", "blocks")
FEED_FORWARD = ("mlp", "feed_forward", "ffn")
_KERNELS = "axolotl.kernels.lora"
_PATCHES = "axolotl.monkeypatch.lora_kernels"
_PROJECTIONS = {"apply_qkv": "original_apply_qkv_optional_v", "apply_o": "original_apply_o"}

# PEFT's adapters that leave the base weights alone, as `test_scorer.TestAdapters` shows of each: with the adapter off,
# what is left is the base model. Others may not (PiSSA and its like do not), so they are refused.
ADAPTERS = frozenset(
    "ADALORA ADAPTION_PROMPT BEFT BOFT C3A CARTRIDGE CPT DEFT DELORA FOURIERFT FROD GLORA GRALORA HIRA HRA IA3 LILY "
    "LN_TUNING LOHA LOKR LORA MISS MULTITASK_PROMPT_TUNING OFT OSF PEANUT POLY PREFIX_TUNING PROMPT_TUNING PSOFT PVERA "
    "P_TUNING RANDLORA ROAD SHADOW SHIRA SUPERTUNING TINYLORA TRAINABLE_TOKENS UNILORA VBLORA VERA WAVEFT".split()
)
ADAPTER_INITS: dict[str, tuple[Any, ...]] = {
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal", "mica"),
    "init_weights": (
        *(True, False, None),
        *("gaussian", "kaiming_uniform", "xavier_uniform", "lycoris", "bat", "mini", "zero"),
    ),
}


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

    def with_full_weights(self, run: Callable[[], T]) -> T:
        """Call `run` where the model's weights are complete; returns its result."""
        return run()

    @property
    def text_config(self) -> Any:
        """The config of the language model, also inside a multimodal one."""
        return self.model.config.get_text_config()

    @property
    def device(self) -> torch.device:
        """Where input ids go."""
        device: torch.device = self.embeddings.weight.device
        return device

    @property
    def decoder(self) -> nn.Module:
        """The stack of layers below the LM head. TRL patches `model.forward`, never this."""
        decoder: nn.Module = self.model.get_decoder()
        return decoder

    @property
    def embeddings(self) -> Any:
        """The input embedding layer."""
        return self.model.get_input_embeddings()

    def check_ids(self, highest: int) -> None:
        """Raise XTFError if a token id lies beyond the input embeddings."""
        rows = self.embeddings.weight.shape[0]
        if highest >= rows:
            raise XTFError(
                f"the data holds token id {highest}, but {self.name} has only {rows} embeddings. Tokenizer and model "
                "do not belong together."
            )

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
            wanted: (P,) indices into the flattened rows of the states that are read: the others are undefined. None:
                all are read.
            plainly: record attention by its definition, on short documents only.

        Returns:
            last hidden states (B, T, D); attention received (B, T) float32, or None without layers.
        """
        feed_forward = last_feed_forward(self.decoder) if self.narrows and wanted is not None else None
        with ExitStack() as stack:
            if wanted is not None:
                narrowing = stack.enter_context(only_where(feed_forward, wanted, input_ids.numel()))
                stack.callback(lambda: setattr(self, "narrowed", narrowing.happened))
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


@dataclass
class ShardedReference(Reference):
    """A `Reference` under FSDP.

    Args:
        root: the outermost wrapper, which gathers the weights; the causal language model itself may be it (FSDP2).
    """

    root: Any = None

    @property
    def lockstep(self) -> bool:
        """Every forward gathers weights from all ranks."""
        return True

    @contextmanager
    def scoring(self, record: bool) -> Iterator[None]:
        """As any reference's; afterwards no rank keeps the full weights that the root's forward leaves gathered."""
        with super().scoring(record):
            yield
        for module in self.root.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def with_full_weights(self, run: Callable[[], T]) -> T:
        """Call `run` in place of the model's forward, inside the wrapper's forward; returns its result."""
        found: list[T] = []

        def forward(*_: Any, **__: Any) -> Tensor:
            found.append(run())
            return torch.zeros((), device=self.device)

        with _forward_replaced(self.model, forward):
            self.root(input_ids=torch.zeros((1, 1), dtype=torch.int64, device=self.device))
        return found[0]


@contextmanager
def _forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    own = vars(module).get("forward")  # TRL, accelerate and PEFT put theirs on the instance
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def last_feed_forward(decoder: nn.Module) -> nn.Module | None:
    """The feed-forward module of a decoder's last layer, by the names that transformers' models give it, or None."""
    for name in LAYERS:
        layers = getattr(decoder, name, None)
        if isinstance(layers, nn.ModuleList) and len(layers):
            found = (getattr(layers[-1], part, None) for part in FEED_FORWARD)
            return next((module for module in found if isinstance(module, nn.Module)), None)
    return None


@dataclass
class Narrowed:
    """Whether any token was left out."""

    happened: bool = False


@contextmanager
def only_where(module: nn.Module | None, wanted: Tensor, tokens: int) -> Iterator[Narrowed]:
    """Within this, the module computes only the `wanted` tokens, and returns 0 for the others.

    For the feed-forward part of the last layer, behind which nothing reads the other tokens: two thirds of a layer. A
    call with anything but one tensor of such tokens, and a module that returns anything but one tensor, run unchanged.

    Args:
        wanted: (P,) indices into the flattened tokens (B * T,); tokens: B * T.
    """
    state = Narrowed()
    if module is None:
        yield state
        return
    forward = module.forward

    def narrowed(*given: Any, **options: Any) -> Any:
        hidden = given[0] if len(given) == 1 and not options else None
        if not isinstance(hidden, Tensor) or hidden.shape[:-1].numel() != tokens or not len(wanted):
            return forward(*given, **options)
        at = wanted.to(hidden.device)  # a model may be spread over devices
        result = forward(hidden.flatten(0, -2)[at][None])
        if not isinstance(result, Tensor):
            return forward(hidden)
        state.happened = True
        output = torch.zeros(tokens, result.shape[-1], dtype=result.dtype, device=result.device)
        return output.index_copy_(0, at, result[0]).view(*hidden.shape[:-1], -1)

    with _forward_replaced(module, narrowed):
        yield state


@contextmanager
def bypass_fused_kernels(model: nn.Module) -> Iterator[None]:
    """Run the model without Axolotl's fused LoRA kernels where they do not give the base model.

    They replace the forward of feed-forward parts and embeddings on each instance, and that of attention on its class.
    With adapters off, Gemma's embeddings would lose their factor, its feed-forward parts would get the exact GELU
    instead of the tanh approximation, and attention of a model without kernels (a separate reference) would lack the
    two methods that the class's new forward calls. Kernels for the projections of attention are right, and stay.

    Knows Axolotl's module and function names, which are private. If they change, scores of fused models differ from
    those without kernels; tests/axolotl/test_lora_kernels.py.
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


def _restore(training: list[tuple[nn.Module, bool]], gradients: list[tuple[nn.Parameter, bool]]) -> None:
    for module, flag in training:
        module.training = flag
    for parameter, flag in gradients:  # PEFT turns adapters back on with requires_grad=True, also where it was False
        if parameter.requires_grad is not flag:
            parameter.requires_grad_(flag)


_Attributes = dict[str, tuple[Any, Tensor | None]]


def _rotary_state(model: nn.Module) -> list[tuple[nn.Module, _Attributes]]:
    """Attributes of rotary embeddings, with copies of the tensors: some types change theirs in every forward, in place,
    by its longest document.
    """
    modules = [module for module in model.modules() if hasattr(module, "rope_type")]
    return [
        (module, {k: (v, v.clone() if isinstance(v, Tensor) else None) for k, v in _attributes(module).items()})
        for module in modules
    ]


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {**vars(module), **dict(module.named_buffers(recurse=False, remove_duplicate=False))}


def _restore_rotary(states: list[tuple[nn.Module, _Attributes]]) -> None:
    for module, before in states:
        for name in _attributes(module).keys() - before.keys():
            delattr(module, name)
        for name, (value, copy) in before.items():
            setattr(module, name, value)
            if copy is not None:
                value.copy_(copy)


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


def _check_adapter(adapter: Any) -> None:
    """Refuse a PEFT config with a type or initialisation that is not known to leave the base weights alone."""
    kind = str(getattr(adapter.peft_type, "value", adapter.peft_type))
    found = [("peft_type", kind, tuple(sorted(ADAPTERS)))]
    found += [(name, getattr(adapter, name), legal) for name, legal in ADAPTER_INITS.items() if hasattr(adapter, name)]
    for name, value, legal in found:
        if value not in legal:
            raise XTFUserError(
                f"xtf: an adapter with {name}={value!r} may change the base weights: the model with its adapter off is "
                f"then not the base model. Legal: {', '.join(map(str, legal))}. Use one of them, or name the base "
                "model under xtf `reference.model`."
            )


def borrow(model: Any, autocast: Callable[[], AbstractContextManager[Any]] = nullcontext) -> Reference:
    """The model being trained, adapters off, as the reference: no second copy, no extra memory.

    Args:
        model: a transformers causal LM or a PEFT model around one, unwrapped from DDP.
        autocast: the trainer's mixed-precision context.

    Raises:
        XTFError: no LM head, or an adapter of which it is not known that it leaves the base weights alone.
    """
    adapters_off: Callable[[], AbstractContextManager[Any]] = nullcontext
    base = model
    if not isinstance(model, PeftModel) and any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise XTFUserError(
            "xtf: this model carries adapters but is no PeftModel (add_adapter, or an adapter folder), so that they "
            "cannot be turned off. Use peft.get_peft_model, or name the base under `reference.model`."
        )
    if isinstance(model, PeftModel):
        for adapter in model.peft_config.values():
            _check_adapter(adapter)
        base = model.get_base_model()
        adapters_off = model.disable_adapter
    name = str(getattr(base.config, "name_or_path", "")) or type(base).__name__
    if not hasattr(base, "get_output_embeddings") or base.get_output_embeddings() is None:
        raise XTFError(f"{name} ({type(base).__name__}) has no LM head; xtf needs a causal language model.")
    return Reference(base, name, adapters_off, autocast)
