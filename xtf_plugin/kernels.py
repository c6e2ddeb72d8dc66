"""Fast twins of `attributes.py`: same names, same signatures, no T x T map for all heads, no full-vocabulary logits for
all tokens. On CUDA devices Triton's twins of these do what fills the time, where there is Triton (`triton_dispatch`).

Attention runs once through a fused kernel that also hands out the row log-sum-exp; attention received is then the
weighted column sum of `exp(scores - logsumexp)`, taken block by block over queries. Where no fused kernel gives a
log-sum-exp (soft cap, a sliding window shorter than the document, unequal head sizes) a blockwise softmax does both.

Dimensions: B batch, T tokens, H query heads, K key/value heads, G = H / K, D head or hidden size, V vocabulary, N
    picked tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import packing, triton_dispatch
from .attributes import one_row

QUERY_BLOCK = 128
SCORE_ELEMENTS = 1 << 20  # scores alive at once: cache-sized blocks beat big ones on CPU, and memory stays flat in T
LOGIT_ELEMENTS = 8 << 20  # logits alive at once, likewise
TRITON_LOGIT_ELEMENTS = 32 << 20  # without copies in float32; few rows per chunk would leave a GPU reading head weights
MOMENT_ELEMENTS = 1 << 20  # of these, on a CPU, as many at a time as its cache holds through several passes
IMPOSSIBLE = -1e4  # nats below the most probable token: exp of it is 0 in float32


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
        if fused and _has_flash(query):
            return _packed_flash(query, key, value, scaling, offsets, reach)
        return packing.attention(partial(attention, **options), query, key, value, offsets)
    if fused:
        return _fused_attention(query, key, value, scaling)
    return _blockwise_attention(query, key, value, **options)


def _has_flash(query: Tensor) -> bool:
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
    return _blockwise_attention(query, key, value, scaling=scaling)


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


def _blockwise_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    B, H, T, _ = query.shape
    output = query.new_empty(B, H, T, value.shape[-1])
    logsumexp = torch.empty(B, H, T, dtype=torch.float32, device=query.device)
    for low, high, rows in _query_blocks(query, 0):
        left = 0 if window is None else max(0, low - window + 1)
        for b in rows:
            scores = _scores(query[b], key[b], low, high, left, high, scaling, softcap)  # (b, K, G, q, k) fp32
            scores.masked_fill_(_hidden(low, high, left, high, window, query.device), float("-inf"))
            lse = scores.logsumexp(-1)  # (b, K, G, q)
            weights = scores.sub_(lse[..., None]).exp_().to(value.dtype)
            block = weights.flatten(2, 3) @ value[b][:, :, left:high]  # (b, K, G * q, D')
            output[b, :, low:high] = block.view(*weights.shape[:-1], -1).flatten(1, 2)
            logsumexp[b, :, low:high] = lse.flatten(1, 2)
    return output, logsumexp


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

    Only columns from `start` on and queries behind it are computed: a query before the first completion token cannot
    see any completion token. Sums are accumulated in float32 whatever the dtype of `query` and `key`: bf16 sums are off
    by about 1e-2, which moves tokens across quantiles.

    Arguments, shapes and result: see `attributes.attention_received`.
    """
    options: dict[str, Any] = {"scaling": scaling, "window": window, "softcap": softcap}
    if logsumexp is None:
        logsumexp = attention(query, key, key, **options, offsets=offsets)[1]
    packed = {"offsets": offsets, "starts": starts, "logsumexp": logsumexp}
    received = triton_dispatch.attempt("attention_received", query, key, lengths, start=start, **options, **packed)
    if received is not None:
        return received
    if offsets is not None:
        one_row(query)
        starts = torch.full_like(offsets[1:], start) if starts is None else starts
        return packing.received(partial(attention_received, **options), query, key, logsumexp, offsets, starts)
    B, H, T, _ = query.shape
    position = torch.arange(T, device=query.device)
    inside = position < lengths[:, None]  # (B, T)
    weight = torch.where(inside, (position + 1.0).log(), float("-inf"))  # (B, T): (q + 1), 0 on padding
    bias = weight[:, None] - logsumexp  # (B, H, T): added to the exponent, so the weighting costs no pass of its own
    sums = torch.zeros(B, T - start, dtype=torch.float32, device=query.device)
    for low, high, rows in _query_blocks(query, start):
        left = start if window is None else max(start, low - window + 1)
        hidden = _hidden(low, high, left, high, window, query.device, strict=True)
        for b in rows:
            scores = _scores(query[b], key[b], low, high, left, high, scaling, softcap)  # (b, K, G, q, k) fp32
            scores.add_(bias[b, :, low:high].reshape(*scores.shape[:-1], 1)).exp_()
            received = scores.sum((1, 2))  # (b, q, k)
            sums[b, left - start : high - start] += received.masked_fill_(hidden, 0.0).sum(1)
    later = lengths[:, None] - 1 - position[start:]  # (B, T - start): queries behind each column
    received = (sums / (H * later.clamp(min=1))).masked_fill(later < 1, float("nan"))
    return torch.nn.functional.pad(received, (start, 0), value=float("nan"))


def _query_blocks(query: Tensor, start: int) -> list[tuple[int, int, list[slice]]]:
    """Cut queries from `start` on, and documents, so that a block of scores stays within SCORE_ELEMENTS."""
    B, H, T, _ = query.shape
    blocks = []
    size = max(1, min(QUERY_BLOCK, SCORE_ELEMENTS // (H * max(1, T - start))))
    for low in range(start, T, size):
        high = min(low + size, T)
        step = max(1, SCORE_ELEMENTS // (H * (high - low) * (high - start)))
        blocks.append((low, high, [slice(b, min(b + step, B)) for b in range(0, B, step)]))
    return blocks


def _scores(
    query: Tensor, key: Tensor, low: int, high: int, left: int, right: int, scaling: float, softcap: float | None
) -> Tensor:
    """Float32 scores of queries [low, high) against keys [left, right), (B, K, G, q, k); safe to change in place."""
    B, H, _, D = query.shape
    K = key.shape[1]
    q = query[:, :, low:high].reshape(B, K, H // K * (high - low), D)
    scores = (q.float() * scaling) @ key[:, :, left:right].float().transpose(-1, -2)
    scores = scores.view(B, K, H // K, high - low, right - left)
    if softcap is not None:
        scores.div_(softcap).tanh_().mul_(softcap)
    return scores


def _hidden(
    low: int, high: int, left: int, right: int, window: int | None, device: torch.device, *, strict: bool = False
) -> Tensor:
    """True where query [low, high) may not see key [left, right), (q, k); `strict` hides the token itself too."""
    q = torch.arange(low, high, device=device)[:, None]
    k = torch.arange(left, right, device=device)[None, :]
    hidden = k >= q if strict else k > q
    return hidden if window is None else hidden | (k <= q - window)


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
    rows = 64  # the first chunk also tells the vocabulary size, which a quantised or wrapped head does not show
    low = 0
    while low < len(targets):
        high = min(low + rows, len(targets))
        logits, picked = head(hidden[low:high]), targets[low:high]  # (n, V), (n,)
        moments = triton_dispatch.attempt("moments", logits, picked, scale=scale, softcap=softcap)
        elements = LOGIT_ELEMENTS if moments is None else TRITON_LOGIT_ELEMENTS
        rows = max(1, elements // logits.shape[-1])
        result[:, low:high] = _moments_in_parts(logits, picked, scale, softcap) if moments is None else moments
        low = high
    return result


def _moments_in_parts(logits: Tensor, targets: Tensor, scale: float, softcap: float | None) -> Tensor:
    if scale != 1.0:
        logits = logits * scale
    if softcap is not None:
        logits = logits.float().div_(softcap).tanh_().mul_(softcap)
    elements = MOMENT_ELEMENTS if logits.device.type == "cpu" else LOGIT_ELEMENTS
    rows = max(1, elements // logits.shape[-1])
    parts = [slice(low, low + rows) for low in range(0, len(targets), rows)]
    return torch.cat([_moments(logits[part], targets[part]) for part in parts], 1)


def _moments(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-probabilities of the targets, entropies and deviations of rows of logits, (n, V) -> (3, n) float32.

    With x a logit's distance to the row's maximum and P the largest probability, log p = x + log P; so the entropy is
    -log P - sum p x, and the variance sum p x^2 - (sum p x)^2. Distances to the maximum, and not log p, because one
    fused softmax then gives all that needs an exponential; and the mean of -x is at most the entropy, so that little
    cancels in the variance, and all of it in float32.
    """
    exact = logits.float()
    p = exact.softmax(-1)
    log_peak = p.amax(-1).log()
    peak = exact.amax(-1, keepdim=True)
    picked = exact.gather(-1, targets[:, None]) - peak
    x = exact.sub(peak) if exact is logits else exact.sub_(peak)
    x.clamp_(min=IMPOSSIBLE)  # p is 0 all the same, and 0 * x stays 0
    mean = p.mul_(x).sum(-1)
    deviation = (p.mul_(x).sum(-1) - mean * mean).clamp_(min=0).sqrt_()
    return torch.stack([picked[:, 0] + log_peak, -log_peak - mean, deviation])
