"""Attention received, recorded during a decoder forward, whatever attention implementation the run uses.

transformers lets a package register an attention function and a mask function. During a scoring pass, the model's
configs name ours: it returns the attention output and, on the chosen layers, adds up attention received. With right
padding, causal attention needs no mask, so none is built. A model whose mask is neither causal nor a causal sliding
window is refused, since its scores would be wrong without an error.
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

from ..errors import XTFError
from .kernels import dispatch, eager
from .kernels.eager import AttentionSpec
from .kernels.packing import Packed

IMPLEMENTATION = "xtf_received"


@dataclass
class Recorder:
    """Records the sum of attention received over the chosen layers in one forward.

    Args:
        model: its name, for messages.
        layers: the chosen layers; may be empty.
        lengths: (n,) tokens of each document.
        start: first column of attention received to compute.
        packed: the documents of a packed row, if they are packed.
        plainly: use the definition in `eager`; for short documents only.
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
        """Attention received averaged over the chosen layers, (B, T) float32; None without layers."""
        return None if self.received is None else self.received / len(self.layers)

    def record(self, query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec) -> Tensor:
        """Compute the attention output of a chosen layer, and add its attention received to the sum."""
        starts = None if self.packed is None else self.packed.starts.to(query.device)
        compute: Callable[..., tuple[Tensor, Tensor]]
        compute = (eager if self.plainly else dispatch).attention_and_received
        spec = replace(spec, start=self.start, starts=starts)
        output, received = compute(query, key, value, self.lengths.to(query.device), spec)
        # layers may be on several devices
        self.received = received if self.received is None else self.received + received.to(self.received.device)
        return output.to(query.dtype)

    def refusal(self, what: str) -> XTFError:
        """The error for attention that would get wrong scores."""
        return XTFError(
            f"{self.model}: {what}, for which attention received is not defined. Remove the scores with "
            "`scorer: attention_received` (usual in `reasoning_importance`), or name another `reference.model`."
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
        raise XTFError("XTF's attention function was called outside a scoring pass. Please report this.")
    if attention_mask is not None:
        raise recorder.refusal("it builds its own attention mask")
    if is_causal is False or query.shape[2] != key.shape[2]:
        raise recorder.refusal("its attention is not causal self-attention")
    for name in ("s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise recorder.refusal(f"its attention uses `{name}`")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    dtype = value.dtype
    if torch.is_autocast_enabled(query.device.type):  # as for SDPA: rotary embeddings return float32
        dtype = torch.get_autocast_dtype(query.device.type)
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    packed = recorder.packed
    longest = query.shape[2] if packed is None else packed.longest
    window = sliding_window if sliding_window is not None and sliding_window < longest else None
    spec = AttentionSpec(scaling, window, softcap)
    if packed is not None:
        if packed.whole and not dispatch.takes_packed(query, value, spec):
            raise recorder.refusal("its packed rows would have to be taken apart for attention")
        spec = replace(spec, offsets=packed.offsets.to(query.device), longest=longest)
    index = int(getattr(module, "layer_idx", -1))
    recorder.seen.append(index)
    if window is not None:
        recorder.layer_windows.add(window)
    implementation = recorder.record if index in recorder.layers else dispatch.attention
    return implementation(query, key, value, spec).transpose(1, 2).contiguous(), None


def received_mask(
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., Tensor],
    attention_mask: Tensor | None = None,
    **_: Any,
) -> None:
    """Mask function that builds no mask, but checks that the model's is causal or a causal sliding window."""
    recorder = _recorder.get()
    if recorder is None:
        return
    if attention_mask is not None or q_length != kv_length:
        raise recorder.refusal("it was given a padding mask")
    packed = recorder.packed
    device = recorder.lengths.device if packed is not None else None  # of the documents of a packed mask
    bounds = np.asarray([0, q_length]) if packed is None else packed.bounds
    last_of_longest = bounds[np.diff(bounds).argmax() + 1] - 1
    queries = np.unique([0, q_length // 2, q_length - 1, last_of_longest])  # the rows of the mask that are checked
    begins = bounds[np.searchsorted(bounds, queries, side="right") - 1]  # where their documents begin
    zero, keys = torch.tensor(0, device=device), torch.arange(kv_length, device=device)
    last = torch.from_numpy(queries).to(device)[:, None]
    rows = [mask_function(zero, zero, query[0], keys) for query in last]
    found = torch.stack([torch.as_tensor(row, device=device).expand(kv_length) for row in rows])
    widths = found.sum(1)
    alike = (found == ((keys <= last) & (keys > last - widths[:, None]))).all(1)
    on_cpu = torch.stack([widths, alike.long()]).tolist()  # one wait for the device
    for reach, width, causal in zip(queries + 1 - begins, *on_cpu, strict=True):
        if not causal:
            raise recorder.refusal("its attention mask is neither causal nor a causal sliding window")
        if width < reach:
            recorder.mask_windows.add(width)


AttentionInterface.register(IMPLEMENTATION, received_attention)
AttentionMaskInterface.register(IMPLEMENTATION, received_mask)


@contextmanager
def attention_switched(model: nn.Module, chosen: str = IMPLEMENTATION) -> Iterator[None]:
    """Set an attention function, XTF's by default, in every config of `model`, and restore each one's own on exit.

    Sets the private `_attn_implementation`, since some classes refuse unknown names in `set_attn_implementation`. If
    the attribute is renamed, no layer is recorded, `check_recorded` raises, and tests/scoring/test_engine.py fails.
    """
    configs: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation"):
            parts = [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", {}))]
            configs |= {id(part): part for part in parts if part is not None}
    # setting a config also sets its sub-configs: all are read before any is set, and restored twice
    before = [(config, config._attn_implementation) for config in configs.values()]
    try:
        for config, _ in before:
            config._attn_implementation = chosen
        yield
    finally:
        for _ in range(2):
            for config, implementation in before:
                config._attn_implementation = implementation


@contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """Record one forward into `recorder`."""
    token = _recorder.set(recorder)
    try:
        yield
    finally:
        _recorder.reset(token)


def check_recorded(recorder: Recorder, num_layers: int, layer_types: list[str] | None) -> None:
    """Raise XTFError unless every layer called our attention function once, with the window of the model's mask."""
    if sorted(recorder.seen) != list(range(num_layers)):
        which = f"only layers {sorted(set(recorder.seen))}" if recorder.seen else "none"
        raise recorder.refusal(
            f"{which} of {num_layers} layers use transformers' attention interface (the others do not, or it was "
            "replaced, as Unsloth does for all models of a class)"
        )
    unused = recorder.mask_windows - recorder.layer_windows
    if unused and (layer_types is None or "sliding_attention" in layer_types):
        raise recorder.refusal(f"its mask has a sliding window of {sorted(unused)} that its layers do not pass on")
    unknown = recorder.layer_windows - recorder.mask_windows
    if unknown:
        raise recorder.refusal(f"its layers pass on a sliding window of {sorted(unknown)} that its mask does not have")
