"""Attention, and what tokens receive of it, block by block over queries in plain torch: memory stays flat in T.

On a CPU one pass that gives both takes about as long as PyTorch's fused kernel, which hands out no weights, takes
alone, and less for short documents. It also serves soft caps, sliding windows and unequal head sizes on any device.

Dimensions: see `kernels.py`; b documents of a block, q its queries, k keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .heads import LOG2E

QUERY_BLOCK = 64
FEW_ROWS = 1 << 10  # rows of scores in a block below which up to twice as many queries are faster
SCORE_ELEMENTS = 1 << 21  # scores alive at once, of several documents; memory stays flat in T
ALONE_ELEMENTS = 1 << 22  # likewise of one document, and at least of one query
IDLE = 0.25  # turns of threads that wait, as a share of those that work, beyond which smaller products are faster

Block = tuple[int, int, list[slice]]  # queries from, to, documents


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    lengths: Tensor | None = None,
    start: int = 0,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Causal attention, its log-sum-exps, and with `lengths` what tokens receive, from one set of weights.

    Equals `kernels.attention` and `kernels.attention_received`, whose arguments these are.

    Returns:
        output (B, H, T, D'), logsumexp (B, H, T) float32, received (B, T) float32 or None.
    """
    B, H, T, _ = query.shape
    blocks = _query_blocks(query, 0, window)
    keys, value = _shared_out(key.float(), blocks, H), _shared_out(value, blocks, H)
    output = query.new_empty(B, T, H, value.shape[-1]).transpose(1, 2)  # tokens first, as layers go on with it
    logsumexp = torch.empty(B, H, T, dtype=torch.float32, device=query.device)
    sums = torch.zeros(B, T, dtype=torch.float32, device=query.device)
    weight = None if lengths is None else _weight(lengths, T)  # (B, T)
    buffer = _buffer(query, blocks, 0, window)
    for low, high, rows in blocks:
        left = 0 if window is None else max(0, low - window + 1)
        seen = low if window is None else left  # keys before it are seen by every query of the block
        mask = _mask(low, high, seen, high, window, query.device)
        for b in rows:
            scores = _scores(query[b], keys[b], low, high, left, high, scaling, softcap, buffer)  # (b, K, G * q, k)
            by_head = scores.view(-1, H, high - low, high - left)
            by_head[..., seen - left :].add_(mask)
            peak = scores.amax(-1, keepdim=True)
            scores.sub_(peak).exp2_()
            total = scores.sum(-1, keepdim=True)
            half = value.dtype is torch.float16  # sums of up to T of its values, before they are divided, overflow
            weights, rest = (scores / total, 1.0) if half else (scores, total)
            block = (weights.to(value.dtype) @ value[b, :, left:high]).float().div_(rest)
            output[b, :, low:high] = block.view(-1, H, high - low, value.shape[-1])
            logsumexp[b, :, low:high] = (peak + total.log2()).div_(LOG2E).view(-1, H, high - low)
            if weight is not None and high > start:
                by_head[..., low - left :].diagonal(dim1=-2, dim2=-1).zero_()  # attention to itself is left out
                shares = weight[b, None, None, low:high] / total.view(-1, H, 1, high - low)
                sums[b, left:high] += (shares @ by_head).sum((1, 2))
    return output, logsumexp, None if lengths is None else _received(sums, lengths, H, start)


def received(
    query: Tensor,
    key: Tensor,
    lengths: Tensor,
    logsumexp: Tensor,
    *,
    scaling: float,
    start: int = 0,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """What tokens receive, from log-sum-exps that are there; see `kernels.attention_received`.

    Only columns from `start` on and queries behind it are computed: a query before the first completion token cannot
    see any completion token.
    """
    B, H, T, _ = query.shape
    bias = _weight(lengths, T).log2()[:, None] - logsumexp * LOG2E  # (B, H, T): so the weighting costs no pass
    sums = torch.zeros(B, T, dtype=torch.float32, device=query.device)
    blocks = _query_blocks(query, start, window)
    keys, buffer = _shared_out(key.float(), blocks, H), _buffer(query, blocks, start, window)
    for low, high, rows in blocks:
        left = start if window is None else max(start, low - window + 1)
        seen = low if window is None else left
        mask = _mask(low, high, seen, high, window, query.device, strict=True)
        for b in rows:
            scores = _scores(query[b], keys[b], low, high, left, high, scaling, softcap, buffer)
            by_head = scores.view(-1, H, high - low, high - left)
            by_head.add_(bias[b, :, low:high, None])
            by_head[..., seen - left :].add_(mask)
            sums[b, left:high] += scores.exp2_().sum((1, 2))
    return _received(sums, lengths, H, start)


def _received(sums: Tensor, lengths: Tensor, H: int, start: int) -> Tensor:
    """Means over heads and later queries, NaN where there are none, and before `start`."""
    position = torch.arange(sums.shape[1], device=sums.device)
    later = lengths[:, None] - 1 - position  # (B, T): queries behind each column
    undefined = (later < 1) | (position < start)
    return (sums / (H * later.clamp(min=1))).masked_fill(undefined, float("nan"))


def _weight(lengths: Tensor, T: int) -> Tensor:
    """What a query counts: q + 1, and 0 on padding, (B, T) float32."""
    position = torch.arange(T, device=lengths.device)
    return torch.where(position < lengths[:, None], position + 1.0, 0.0)


def _shared_out(key: Tensor, blocks: list[Block], H: int) -> Tensor:
    """Keys, or values, for each query head on a CPU, if threads would wait for each other otherwise; else as they are.

    Batched products go to threads matrix by matrix, one for each key/value head of each document in a block: three take
    two threads as long as four would (measured with two; one alone they share). The price is memory for keys and values
    of all heads.
    """
    largest = blocks[-1][2][:1] if blocks else []
    matrices, groups = sum(len(key[b]) for b in largest) * key.shape[1], H // key.shape[1]
    threads = torch.get_num_threads()
    if key.device.type != "cpu" or groups == 1 or matrices <= threads:
        return key

    def idle(count: int) -> float:
        return -count % threads / count

    return key.repeat_interleave(groups, 1) if idle(matrices) - idle(matrices * groups) > IDLE else key


def _groups(query: Tensor, key: Tensor) -> tuple[int, int]:
    return key.shape[1], query.shape[1] // key.shape[1]


def _buffer(query: Tensor, blocks: list[Block], start: int, window: int | None) -> Tensor:
    """Memory for the scores of any block: fresh memory for each would take as long to come by as its sums."""
    sizes = (
        (b.stop - b.start) * (hi - lo) * _reach(hi - lo, hi - start, window) for lo, hi, rows in blocks for b in rows
    )
    return torch.empty(query.shape[1] * max(sizes, default=0), dtype=torch.float32, device=query.device)


def _reach(queries: int, keys: int, window: int | None) -> int:
    """How many of the keys up to theirs a block of queries sees."""
    return keys if window is None else min(keys, queries - 1 + window)


def _query_blocks(query: Tensor, start: int, window: int | None) -> list[Block]:
    """Cut queries from `start` on, and documents, so that a block of scores stays within the limits above."""
    B, H, T, _ = query.shape
    blocks, size, keys = [], QUERY_BLOCK, max(1, _reach(2 * QUERY_BLOCK, T - start, window))
    if B * H * size < FEW_ROWS:
        size = min(max(size, SCORE_ELEMENTS // max(1, B * H * keys)), 2 * size)
    size = max(1, min(size, ALONE_ELEMENTS // (H * keys)))
    for low in range(start, T, size):
        high = min(low + size, T)
        step = max(1, SCORE_ELEMENTS // (H * (high - low) * _reach(high - low, high - start, window)))
        blocks.append((low, high, [slice(b, min(b + step, B)) for b in range(0, B, step)]))
    return blocks


def _scores(
    query: Tensor,
    key: Tensor,
    low: int,
    high: int,
    left: int,
    right: int,
    scaling: float,
    softcap: float | None,
    buffer: Tensor,
) -> Tensor:
    """Scores in bits of queries [low, high) against float32 keys [left, right), (b, K, G * q, k), in the buffer."""
    K, G = _groups(query, key)
    B, _, _, D = query.shape
    q, k = high - low, right - left
    rows = (query[:, :, low:high].float() * (scaling * LOG2E if softcap is None else scaling / softcap)).contiguous()
    scores = buffer[: B * K * G * q * k].view(B * K, G * q, k)
    columns = key[:, :, left:right].reshape(B * K, k, D)
    torch.bmm(rows.view(B * K, G * q, D), columns.transpose(1, 2), out=scores)
    if softcap is not None:
        scores.tanh_().mul_(softcap * LOG2E)
    return scores.view(B, K, G * q, k)


def _mask(
    low: int, high: int, left: int, right: int, window: int | None, device: torch.device, *, strict: bool = False
) -> Tensor:
    """Minus infinity where query [low, high) may not see key [left, right), else 0, (q, k); `strict` hides the token
    itself too.
    """
    q = torch.arange(low, high, device=device)[:, None]
    k = torch.arange(left, right, device=device)[None, :]
    hidden = k >= q if strict else k > q
    hidden = hidden if window is None else hidden | (k <= q - window)
    return torch.zeros(hidden.shape, device=device).masked_fill_(hidden, float("-inf"))
