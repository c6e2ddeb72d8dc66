"""Fast twins of `attributes.py`: same names, same signatures, no T x T map for all heads, no full-vocabulary logits for
all tokens. On CUDA devices Triton's twins of these do what fills the time, where there is Triton (`triton_dispatch`).

Attention runs once through a fused kernel that also hands out the row log-sum-exp; attention received is then the
weighted column sum of `exp(scores - logsumexp)`, taken block by block over queries. Where no fused kernel gives a
log-sum-exp (soft cap, a sliding window shorter than the document, unequal head sizes), and on a CPU wherever that is
faster, a blockwise softmax does both.

Dimensions: B batch, T tokens, H query heads, K key/value heads, G = H / K, D head or hidden size, V vocabulary, N
    picked tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import blockwise, heads, packing, triton_dispatch
from .attributes import one_row

SHORT = 1024  # tokens up to which PyTorch's fused kernel for CPUs takes longer than plain blocks
LOGIT_ELEMENTS = 8 << 20  # logits alive at once
REUSED_ELEMENTS = 16 << 20  # likewise, where they share a buffer: fewer and larger products
ROWS = 256  # chunks of whole multiples of it fill a GPU's tiles
TRITON_LOGIT_ELEMENTS = 64 << 20  # without copies in float32; few rows per chunk would leave a GPU reading head weights


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    offsets: Tensor | None = None,
    longest: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal attention output together with the log-sum-exp of every score row.

    Equals `(attention_map(...) @ value, scores.logsumexp(-1))` on unpadded rows; with right padding the rows of real
    tokens are unaffected, because causality already hides what lies behind them.

    Args:
        query: (B, H, T, D); key: (B, K, T, D); value: (B, K, T, D').
        scaling, window, softcap: see `attributes.attention_map`.
        offsets: of packed documents, see `attributes.attention_received`; none sees another.
        longest: tokens of the longest packed document, if the caller has it as a number: saves waiting for the device.

    Returns:
        output (B, H, T, D') in the dtype of `query`, logsumexp (B, H, T) float32. 0 in both behind the last packed
        document.

    Raises:
        ValueError: documents are packed, and B is not 1.
    """
    options: dict[str, Any] = {"scaling": scaling, "window": window, "softcap": softcap}
    reach = query.shape[2] if longest is None else longest
    fused = softcap is None and (window is None or window >= reach) and query.shape[-1] == value.shape[-1]
    if offsets is not None:
        one_row(query)
        if fused and takes_packed(query, value):
            return _packed_flash(query, key, value, scaling, offsets, reach)
        return packing.attention(partial(attention, **options), query, key, value, offsets)
    if fused and not (query.device.type == "cpu" and query.shape[2] <= SHORT):
        return _fused_attention(query, key, value, scaling)
    return blockwise.attention(query, key, value, **options)[:2]


def takes_packed(query: Tensor, value: Tensor, *, softcap: float | None = None) -> bool:
    """Whether packed rows go through attention as they are, given documents that no window cuts; else they are taken
    apart into padded batches, which costs more than padding them from the start.
    """
    return softcap is None and query.shape[-1] == value.shape[-1] and _has_flash(query)


def _has_flash(query: Tensor) -> bool:
    if not torch.backends.cuda.is_flash_attention_available():  # left out of some builds
        return False
    ampere = query.device.type == "cuda" and torch.cuda.get_device_capability(query.device) >= (8, 0)
    return ampere and query.dtype is not torch.float32 and query.shape[-1] <= 256 and query.shape[-1] % 8 == 0


def _fused_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    T = query.shape[2]
    if query.device.type == "cpu":
        cpu_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # groups key/value heads by itself
        output, logsumexp = cpu_flash(query, key, value, 0.0, True, scale=scaling)
        return output, logsumexp
    if query.device.type == "cuda":
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        if _has_flash(query):
            flash = torch.ops.aten._scaled_dot_product_flash_attention
            output, logsumexp = flash(query, key, value, 0.0, True, False, scale=scaling)[:2]
        else:
            efficient = torch.ops.aten._scaled_dot_product_efficient_attention
            output, logsumexp = efficient(query, key, value, None, True, 0.0, True, scale=scaling)[:2]
        return output, logsumexp[..., :T]  # the memory-efficient kernel pads its rows to a multiple of 32
    return blockwise.attention(query, key, value, scaling=scaling)[:2]


def _packed_flash(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, offsets: Tensor, longest: int
) -> tuple[Tensor, Tensor]:
    flash = torch.ops.aten._flash_attention_forward  # tokens first, heads second; groups key/value heads by itself
    rows = [x[0].transpose(0, 1) for x in (query, key, value)]
    ends = offsets.to(query.device, torch.int32).contiguous()
    output, logsumexp = flash(*rows, ends, ends, longest, longest, 0.0, True, False, scale=scaling)[:2]  # (H, T)
    behind = torch.arange(query.shape[2], device=query.device) >= ends[-1]  # left unwritten: anything may stand there
    output = output.masked_fill_(behind[:, None, None], 0).transpose(0, 1)[None]
    return output, logsumexp.masked_fill_(behind, 0)[None]


def attention_received(
    query: Tensor,
    key: Tensor,
    lengths: Tensor,
    *,
    scaling: float,
    start: int = 0,
    window: int | None = None,
    softcap: float | None = None,
    logsumexp: Tensor | None = None,
    offsets: Tensor | None = None,
    starts: Tensor | None = None,
) -> Tensor:
    """Fast twin of `attributes.attention_received`: weighted column sums, no T x T map.

    Sums are accumulated in float32 whatever the dtype of `query` and `key`: bf16 sums are off by about 1e-2, which
    moves tokens across quantiles.

    Arguments, shapes and result: see `attributes.attention_received`.
    """
    options: dict[str, Any] = {"scaling": scaling, "window": window, "softcap": softcap}
    if logsumexp is None:
        logsumexp = attention(query, key, key, **options, offsets=offsets)[1]
    packed = {"offsets": offsets, "starts": starts, "logsumexp": logsumexp}
    if triton_dispatch.head_fits(query):
        received = triton_dispatch.attempt("attention_received", query, key, lengths, start=start, **options, **packed)
        if received is not None:
            return received
    if offsets is not None:
        one_row(query)
        starts = torch.full_like(offsets[1:], start) if starts is None else starts
        return packing.received(partial(attention_received, **options), query, key, logsumexp, offsets, starts)
    return blockwise.received(query, key, lengths, logsumexp, start=start, **options)


def attention_and_received(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor,
    *,
    scaling: float,
    start: int = 0,
    window: int | None = None,
    softcap: float | None = None,
    offsets: Tensor | None = None,
    starts: Tensor | None = None,
    longest: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Fast twin of `attributes.attention_and_received`: on a CPU both come from one set of weights.

    Arguments, shapes and results: see `attention` and `attention_received`.
    """
    options: dict[str, Any] = {"scaling": scaling, "window": window, "softcap": softcap}
    if query.device.type == "cpu" and offsets is None:
        output, _, received = blockwise.attention(query, key, value, lengths=lengths, start=start, **options)
        assert received is not None
        return output, received
    output, logsumexp = attention(query, key, value, offsets=offsets, longest=longest, **options)
    options |= {"offsets": offsets, "starts": starts, "logsumexp": logsumexp}
    return output, attention_received(query, key, lengths, start=start, **options)


def predictions(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    targets: Tensor,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """Fast twin of `attributes.predictions`: the head runs in chunks of rows, so full logits never exist.

    Every sum is taken in float32, whatever the dtype of the logits.
    Arguments, shapes and result: see `attributes.predictions`.
    """
    result = torch.empty(3, len(targets), dtype=torch.float32, device=hidden.device)
    product = heads.reusing(head, hidden)
    at_once = LOGIT_ELEMENTS if product is head else REUSED_ELEMENTS
    rows = 64  # the first chunk also tells the vocabulary size, which a quantised or wrapped head does not show
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
            moments = heads.moments(logits.clone() if aliases else logits, picked, scale=scale, softcap=softcap)
        result[:, low:high] = moments
        low = high
    return result
