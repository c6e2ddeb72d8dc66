"""Optimised implementations of `eager.py`, under the same names, without T x T maps of all heads or full logits.

A fused kernel computes attention and the row log-sum-exps; attention received is then the weighted column sum of
`exp(scores - logsumexp)`, block by block over queries. Where no fused kernel returns log-sum-exps (CPUs, a soft cap, a
sliding window shorter than the document, unequal head sizes), a blockwise softmax computes both. On CUDA devices Triton
computes attention received and the statistics of logits where it is available (`triton_dispatch`).

Dimensions: as in `eager.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from . import blockwise, logit_stats, packing, triton_dispatch
from .eager import AttentionSpec

SHORT = 1024  # tokens up to which PyTorch's fused CPU kernel is slower than plain blocks
LOGIT_ELEMENTS = 8 << 20  # logits in memory at once
REUSED_ELEMENTS = 16 << 20  # logits in memory at once if chunks share a buffer
ROWS = 256  # chunks of multiples of it fill a GPU's tiles
TRITON_LOGIT_ELEMENTS = 64 << 20  # no copy in float32; small chunks would spend the time on reading head weights


def attention(query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec) -> Tensor:
    """The output of `attention_and_logsumexp` alone; faster for long documents on a CPU."""
    if query.device.type == "cpu" and spec.offsets is None and query.shape[2] > SHORT and _fusible(query, value, spec):
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=spec.scaling, enable_gqa=True)
    return attention_and_logsumexp(query, key, value, spec)[0]


def attention_and_logsumexp(query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    """Causal attention output and the log-sum-exp of every score row.

    Equals `(attention_map(...) @ value, scores.logsumexp(-1))`. Attention is causal, so right padding needs no mask.

    Args:
        query: (B, H, T, D); key: (B, K, T, D); value: (B, K, T, D').

    Returns:
        output (B, H, T, D') in the dtype of `query`, logsumexp (B, H, T) float32; 0 after the last packed document.
    """
    kernel = _fused_kernel(query) if _fusible(query, value, spec) else None
    if spec.offsets is not None and kernel != "flash":
        alone = partial(attention_and_logsumexp, spec=spec.unpacked())
        return packing.attention(alone, query, key, value, spec.offsets)
    if kernel is not None:
        return _fused(kernel, query, key, value, spec)
    return blockwise.attention(query, key, value, spec)[:2]


def takes_packed(query: Tensor, value: Tensor, spec: AttentionSpec) -> bool:
    """Whether attention takes packed rows directly if no window is shorter than a document.

    Otherwise they are split into padded batches, which costs more than padding them from the start.
    """
    return spec.softcap is None and query.shape[-1] == value.shape[-1] and _fused_kernel(query) == "flash"


def _fusible(query: Tensor, value: Tensor, spec: AttentionSpec) -> bool:
    longest = query.shape[2] if spec.longest is None else spec.longest
    cut = spec.window is not None and spec.window < longest
    return spec.softcap is None and not cut and query.shape[-1] == value.shape[-1]


def _fused_kernel(query: Tensor) -> str | None:
    """The fused kernel that returns log-sum-exps for this query: flash, efficient, or None."""
    if query.device.type != "cuda":
        return None
    available = torch.backends.cuda.is_flash_attention_available()  # some builds lack it
    ampere = torch.cuda.get_device_capability(query.device) >= (8, 0)
    fits = query.dtype is not torch.float32 and query.shape[-1] <= 256 and query.shape[-1] % 8 == 0
    return "flash" if available and ampere and fits else "efficient"


def _fused(kernel: str, query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exps from private operators of ATen.

    No public function of torch 2.9 returns the log-sum-exp outside a compiled graph. If an operator changes, the call
    raises and `test_fused_kernels_return_what_is_expected` fails.
    """
    aten, (T, scale) = torch.ops.aten, (query.shape[2], spec.scaling)
    if spec.offsets is not None:  # tokens first, heads second; key/value heads need no repetition
        rows = [x[0].transpose(0, 1) for x in (query, key, value)]
        ends = spec.offsets.to(query.device, torch.int32).contiguous()
        longest = T if spec.longest is None else spec.longest
        found = aten._flash_attention_forward(*rows, ends, ends, longest, longest, 0.0, True, False, scale=scale)
        output, logsumexp = found[:2]  # (T, H, D), (H, T)
        unwritten = torch.arange(T, device=query.device) >= ends[-1]
        output = output.masked_fill_(unwritten[:, None, None], 0).transpose(0, 1)[None]
        return output, logsumexp.masked_fill_(unwritten, 0)[None]
    key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
    if kernel == "flash":
        found = aten._scaled_dot_product_flash_attention(query, key, value, 0.0, True, False, scale=scale)
    else:
        found = aten._scaled_dot_product_efficient_attention(query, key, value, None, True, 0.0, True, scale=scale)
    return found[0], found[1][..., :T]  # the memory-efficient kernel pads its rows to a multiple of 32


def attention_received(
    query: Tensor, key: Tensor, lengths: Tensor, spec: AttentionSpec, logsumexp: Tensor | None = None
) -> Tensor:
    """Optimised `eager.attention_received`, given the log-sum-exps (B, H, T) of the score rows if they are known.

    Sums are accumulated in float32 for any dtype: errors of bf16 sums, about 1e-2, would move tokens across quantiles.
    """
    if logsumexp is None:
        logsumexp = attention_and_logsumexp(query, key, key, spec)[1]
    if triton_dispatch.head_fits(query):
        received = triton_dispatch.attempt("attention_received", query, key, lengths, spec, logsumexp)
        if received is not None:
            return received
    if spec.offsets is not None:
        return packing.received(attention_received, query, key, logsumexp, spec)
    return blockwise.received(query, key, lengths, logsumexp, spec)


def attention_and_received(
    query: Tensor, key: Tensor, value: Tensor, lengths: Tensor, spec: AttentionSpec
) -> tuple[Tensor, Tensor]:
    """Optimised `eager.attention_and_received`; the output has the dtype of `query`."""
    if query.device.type == "cpu" and spec.offsets is None:  # both from one softmax
        output, _, received = blockwise.attention(query, key, value, spec, lengths)
        assert received is not None
        return output, received
    output, logsumexp = attention_and_logsumexp(query, key, value, spec)
    return output, attention_received(query, key, lengths, spec, logsumexp)


def predictions(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    targets: Tensor,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """Optimised `eager.predictions`: the head runs on chunks of rows. Sums are taken in float32 for any dtype."""
    result = torch.empty(3, len(targets), dtype=torch.float32, device=hidden.device)
    product = logit_stats.reusing(head, hidden)
    at_once = LOGIT_ELEMENTS if product is head else REUSED_ELEMENTS
    rows, low = 64, 0  # the first chunk shows the vocabulary size, which a quantised or wrapped head does not
    while low < len(targets):
        high = min(low + rows, len(targets))
        logits = product(hidden[low:high])  # (n, V)
        picked = targets[low:high].to(logits.device)  # the head may be on another device
        moments = triton_dispatch.attempt("moments", logits, picked, scale=scale, softcap=softcap)
        elements = at_once if moments is None else TRITON_LOGIT_ELEMENTS
        rows = max(1, elements // logits.shape[-1])
        rows = rows // ROWS * ROWS or rows
        if moments is None:
            aliases = logits.untyped_storage().data_ptr() == hidden.untyped_storage().data_ptr()
            moments = logit_stats.moments(logits.clone() if aliases else logits, picked, scale=scale, softcap=softcap)
        result[:, low:high] = moments
        low = high
    return result
