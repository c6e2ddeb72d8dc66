"""Attention received, recorded inside one ordinary decoder forward, whatever attention implementation the run uses.

transformers lets a package register an attention function and its mask function. For the length of a pass the model's
configs point at ours, which returns the attention output and, on the chosen layers, adds up attention received. Right
padding plus causality needs no mask, so none is built; a model whose mask is more than "causal, maybe within a sliding
window" is refused, because ignoring its mask would give wrong scores without an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from . import attributes, kernels
from .attributes import AttentionSpec
from .errors import XTFError
from .packing import Packed

IMPLEMENTATION = "xtf_received"


@dataclass
class Recorder:
    """Records one forward: the sum of attention received over the chosen layers.

    `plainly`: by the definition in `attributes`, on short documents only.
    """

    model: str
    layers: frozenset[int]
    lengths: Tensor
    start: int = 0
    packed: Packed | None = None
    plainly: bool = False
    received: Tensor | None = None
    seen: list[int] = field(default_factory=list)
    layer_windows: set[int] = field(default_factory=set)
    mask_windows: set[int] = field(default_factory=set)

    def mean(self) -> Tensor | None:
        """Attention received averaged over the chosen layers, (B, T) float32, or None if no layer was chosen."""
        return None if self.received is None else self.received / len(self.layers)

    def record(self, query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec) -> Tensor:
        """Attention output of a chosen layer; the attention its tokens receive is added to the sum."""
        starts = None if self.packed is None else self.packed.starts.to(query.device)
        spec, implementation = replace(spec, start=self.start, starts=starts), attributes if self.plainly else kernels
        found: tuple[Tensor, Tensor]
        found = implementation.attention_and_received(query, key, value, self.lengths.to(query.device), spec)
        output, received = found
        # layers may lie on several devices
        self.received = received if self.received is None else self.received + received.to(self.received.device)
        return output.to(query.dtype)

    def refuse(self, what: str) -> XTFError:
        """The error for an attention we would score wrongly."""
        return XTFError(
            f"{self.model}: {what}, which attention received is not defined for. Set `reasoning_importance: false`, or "
            "name another reference under `reference.model`."
        )


_recorder: ContextVar[Recorder | None] = ContextVar("xtf_recorder", default=None)


def received_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function in transformers' convention: query (B, H, T, D) in, output (B, T, H, D) out."""
    recorder = _recorder.get()
    if recorder is None:
        raise XTFError("XTF's attention function was called outside a scoring pass; please report this.")
    if attention_mask is not None:
        raise recorder.refuse("it builds its own attention mask")
    if is_causal is False or query.shape[2] != key.shape[2]:
        raise recorder.refuse("its attention is not causal self-attention")
    for name in ("s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise recorder.refuse(f"its attention uses `{name}`")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    dtype = value.dtype
    if torch.is_autocast_enabled(query.device.type):  # as autocast does for stock SDPA: rotary embeddings leave float32
        dtype = torch.get_autocast_dtype(query.device.type)
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    packed = recorder.packed
    longest = query.shape[2] if packed is None else packed.longest
    window = sliding_window if sliding_window is not None and sliding_window < longest else None
    spec = AttentionSpec(scaling, window, softcap)
    if packed is not None:
        if packed.whole and not kernels.takes_packed(query, value, spec):
            raise recorder.refuse("its packed rows would have to be taken apart for attention")
        spec = replace(spec, offsets=packed.offsets.to(query.device), longest=longest)
    index = int(getattr(module, "layer_idx", -1))
    recorder.seen.append(index)
    if window is not None:
        recorder.layer_windows.add(window)
    implementation = recorder.record if index in recorder.layers else kernels.attention
    output = implementation(query, key, value, spec)
    return output.transpose(1, 2).contiguous(), None


def received_mask(
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., Tensor],
    attention_mask: Tensor | None = None,
    **_: Any,
) -> None:
    """Mask function: builds nothing, but checks that what the model asked for is causal, maybe within a window."""
    recorder = _recorder.get()
    if recorder is None:
        return
    if attention_mask is not None or q_length != kv_length:
        raise recorder.refuse("it was given a padding mask")
    packed = recorder.packed
    device = recorder.lengths.device if packed is not None else None  # where a packed mask has its documents
    bounds = np.asarray([0, q_length]) if packed is None else packed.bounds
    last_of_longest = bounds[np.diff(bounds).argmax() + 1] - 1
    queries = np.unique([0, q_length // 2, q_length - 1, last_of_longest])  # whose rows of the mask are looked at
    begins = bounds[np.searchsorted(bounds, queries, side="right") - 1]  # of their documents
    zero, keys = torch.tensor(0, device=device), torch.arange(kv_length, device=device)
    last = torch.from_numpy(queries).to(device)[:, None]
    rows = [mask_function(zero, zero, query[0], keys) for query in last]
    found = torch.stack([torch.as_tensor(row, device=device).expand(kv_length) for row in rows])
    widths = found.sum(1)
    alike = (found == ((keys <= last) & (keys > last - widths[:, None]))).all(1)
    on_cpu = torch.stack([widths, alike.long()]).tolist()  # one wait for the device
    for reach, width, causal in zip(queries + 1 - begins, *on_cpu, strict=True):
        if not causal:
            raise recorder.refuse("its attention mask is neither causal nor a causal sliding window")
        if width < reach:
            recorder.mask_windows.add(width)


AttentionInterface.register(IMPLEMENTATION, received_attention)
AttentionMaskInterface.register(IMPLEMENTATION, received_mask)


@contextmanager
def attention_switched(model: nn.Module) -> Iterator[None]:
    """Point every config below `model` at our attention function; put back exactly what each one held.

    Sets `_attn_implementation`, which is private: `set_attn_implementation` is refused by some classes for a name that
    they do not know. Without the attribute no layer is recorded, and `check_recorded` raises; tests/test_scorer.py.
    """
    configs: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation"):
            parts = [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", {}))]
            configs |= {id(part): part for part in parts if part is not None}
    # setting a config also sets its sub-configs, so all are read before any is written, and restored twice
    before = [(config, config._attn_implementation) for config in configs.values()]
    try:
        for config, _ in before:
            config._attn_implementation = IMPLEMENTATION
        yield
    finally:
        for _ in range(2):
            for config, implementation in before:
                config._attn_implementation = implementation


@contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """Record into `recorder` for the length of one forward."""
    token = _recorder.set(recorder)
    try:
        yield
    finally:
        _recorder.reset(token)


def check_recorded(recorder: Recorder, num_layers: int, layer_types: list[str] | None) -> None:
    """Refuse a forward in which not every layer came through our attention function, once, as the mask described it."""
    if sorted(recorder.seen) != list(range(num_layers)):
        which = f"only layers {sorted(set(recorder.seen))}" if recorder.seen else "none"
        raise recorder.refuse(
            f"{which} of {num_layers} layers use transformers' attention interface (the rest have their own, or it was "
            "replaced, as Unsloth does for all models of a class)"
        )
    unused = recorder.mask_windows - recorder.layer_windows
    if unused and (layer_types is None or "sliding_attention" in layer_types):
        raise recorder.refuse(f"its mask has a sliding window of {sorted(unused)} that its layers do not pass on")
    unknown = recorder.layer_windows - recorder.mask_windows
    if unknown:
        raise recorder.refuse(f"its layers pass on a sliding window of {sorted(unknown)} that its mask does not have")
