"""Optimised implementations of `eager.py`, under the same names: no T x T map for all heads, and no full logits.
On CUDA devices Triton replaces the slowest parts where it is available (`triton_dispatch`).

Attention runs once through a fused kernel that also returns the row log-sum-exp; attention received is then the
weighted column sum of `exp(scores - logsumexp)`, block by block over queries. A blockwise softmax does both where no
fused kernel returns a log-sum-exp (on CPUs, with a soft cap, a sliding window shorter than the document, or unequal
head sizes).

Dimensions: B batch, T tokens, H query heads, K key/value heads, D head or hidden size, V vocabulary, N picked tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..kernels import blockwise, logit_stats, packing, triton_dispatch
from .eager import AttentionSpec

SHORT = 1024  # tokens up to which PyTorch's fused kernel for CPUs takes longer than plain blocks
LOGIT_ELEMENTS = 8 << 20  # logits alive at once
REUSED_ELEMENTS = 16 << 20  # likewise, where they share a buffer: fewer and larger products
ROWS = 256  # chunks of whole multiples of it fill a GPU's tiles
TRITON_LOGIT_ELEMENTS = 64 << 20  # without copies in float32; few rows per chunk would leave a GPU reading head weights


def attention(query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec) -> Tensor:
    """The output of `attention_and_logsumexp` alone, which takes less time for long documents on a CPU."""
    if query.device.type == "cpu" and spec.offsets is None and query.shape[2] > SHORT and _fusible(query, value, spec):
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=spec.scaling, enable_gqa=True)
    return attention_and_logsumexp(query, key, value, spec)[0]


def attention_and_logsumexp(query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    """Causal attention output together with the log-sum-exp of every score row.

    Equals `(attention_map(...) @ value, scores.logsumexp(-1))` on unpadded rows; with right padding the rows of real
    tokens are unaffected, because causality already hides what lies behind them.

    Args:
        query: (B, H, T, D); key: (B, K, T, D); value: (B, K, T, D').

    Returns:
        output (B, H, T, D') in the dtype of `query`, logsumexp (B, H, T) float32. 0 in both behind the last packed
        document.

    Raises:
        ValueError: documents are packed, and B is not 1.
    """
    spec.check_rows(query)
    kernel = _fused_kernel(query) if _fusible(query, value, spec) else None
    if spec.offsets is not None and kernel != "flash":
        alone = partial(attention_and_logsumexp, spec=spec.unpacked())
        return packing.attention(alone, query, key, value, spec.offsets)
    if kernel is not None:
        return _fused(kernel, query, key, value, spec)
    return blockwise.attention(query, key, value, spec)[:2]


def takes_packed(query: Tensor, value: Tensor, spec: AttentionSpec) -> bool:
    """Whether packed rows go through attention as they are, given documents that no window cuts; else they are split
    into padded batches, which costs more than padding them from the start.
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
    ampere = torch.cuda.get_device_capability(query.device) >= (8, 0)
    fits = query.dtype is not torch.float32 and query.shape[-1] <= 256 and query.shape[-1] % 8 == 0
    available = torch.backends.cuda.is_flash_attention_available()  # left out of some builds
    return "flash" if available and ampere and fits else "efficient"


def _fused(kernel: str, query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exps from operators of ATen, which are private.

    No public function of torch 2.9 returns the log-sum-exp outside a compiled graph. `torch.nn.attention.varlen`, which
    later versions have, calls the same operator, and its own arguments still change from version to version. If an
    operator changes, the call raises; `test_fused_kernels_return_what_is_expected` in tests/scoring/test_kernels.py fails.
    """
    aten, (T, scale) = torch.ops.aten, (query.shape[2], spec.scaling)
    if spec.offsets is not None:  # tokens first, heads second; groups key/value heads by itself
        rows = [x[0].transpose(0, 1) for x in (query, key, value)]
        ends = spec.offsets.to(query.device, torch.int32).contiguous()
        longest = T if spec.longest is None else spec.longest
        found = aten._flash_attention_forward(*rows, ends, ends, longest, longest, 0.0, True, False, scale=scale)
        output, logsumexp = found[:2]  # (T, H, D), (H, T)
        behind = torch.arange(T, device=query.device) >= ends[-1]  # left unwritten: anything may stand there
        output = output.masked_fill_(behind[:, None, None], 0).transpose(0, 1)[None]
        return output, logsumexp.masked_fill_(behind, 0)[None]
    key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
    if kernel == "flash":
        found = aten._scaled_dot_product_flash_attention(query, key, value, 0.0, True, False, scale=scale)
    else:
        found = aten._scaled_dot_product_efficient_attention(query, key, value, None, True, 0.0, True, scale=scale)
    return found[0], found[1][..., :T]  # the memory-efficient kernel pads its rows to a multiple of 32


def attention_received(
    query: Tensor, key: Tensor, lengths: Tensor, spec: AttentionSpec, logsumexp: Tensor | None = None
) -> Tensor:
    """Optimised `eager.attention_received`: weighted column sums, no T x T map.

    Sums are accumulated in float32 whatever the dtype of `query` and `key`: bf16 sums are off by about 1e-2, which
    moves tokens across quantiles.
    """
    if logsumexp is None:
        logsumexp = attention_and_logsumexp(query, key, key, spec)[1]
    if triton_dispatch.head_fits(query):
        received = triton_dispatch.attempt("attention_received", query, key, lengths, spec, logsumexp)
        if received is not None:
            return received
    if spec.offsets is not None:
        spec.check_rows(query)
        return packing.received(attention_received, query, key, logsumexp, spec)
    return blockwise.received(query, key, lengths, logsumexp, spec)


def attention_and_received(
    query: Tensor, key: Tensor, value: Tensor, lengths: Tensor, spec: AttentionSpec
) -> tuple[Tensor, Tensor]:
    """Optimised `eager.attention_and_received`; the output has the dtype of `query`."""
    if query.device.type == "cpu" and spec.offsets is None:  # both from one set of weights
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
    """Optimised `eager.predictions`: the head runs in chunks of rows, so full logits never exist.

    Every sum is taken in float32, whatever the dtype of the logits.
    """
    result = torch.empty(3, len(targets), dtype=torch.float32, device=hidden.device)
    product = logit_stats.reusing(head, hidden)
    at_once = LOGIT_ELEMENTS if product is head else REUSED_ELEMENTS
    rows = 64  # the first chunk also gives the vocabulary size, which a quantised or wrapped head does not show
    low = 0
    while low < len(targets):
        high = min(low + rows, len(targets))
        logits = product(hidden[low:high])  # (n, V)
        picked = targets[low:high].to(logits.device)  # a head may lie on another device than embeddings
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
