"""Attention and attention received in plain PyTorch, block by block over queries, in memory that is constant in T.

On a CPU one pass for both takes about as long as PyTorch's fused kernel, which returns no weights, and less for short
documents. Soft caps, sliding windows and unequal head sizes are supported on any device.

Dimensions: as in `eager.py`; b documents of a block, q its queries, k keys.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...data.ragged import chunks
from .eager import AttentionSpec
from .logit_stats import LOG2E

QUERY_BLOCK = 64
FEW_ROWS = 1 << 10  # with fewer rows of scores in a block, up to twice as many queries are faster
SCORE_ELEMENTS = 1 << 21  # largest block of scores of several documents
ALONE_ELEMENTS = 1 << 22  # largest block of scores of one document, unless one query has more
IDLE = 0.25  # with a larger ratio of idle to working threads, one product per query head is faster

Block = tuple[int, int, list[slice]]  # first query, end of queries, slices of documents


def attention(
    query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Causal attention, its log-sum-exps and, given `lengths`, the attention received.

    Arguments: see `dispatch.attention_and_received`; documents are not packed.

    Returns:
        output (B, H, T, D'), logsumexp (B, H, T) float32, received (B, T) float32 or None.
    """
    B, H, T, _ = query.shape
    blocks = _query_blocks(query, 0, spec.window)
    value = _shared_out(value, blocks, H)
    output = query.new_empty(B, T, H, value.shape[-1]).transpose(1, 2)  # the next layer reads tokens first
    logsumexp = torch.empty(B, H, T, dtype=torch.float32, device=query.device)
    sums = torch.zeros(B, T, dtype=torch.float32, device=query.device)
    weight = None if lengths is None else _weight(lengths, T)  # (B, T)
    for b, low, high, left, scores in _scored(query, key, blocks, 0, spec):
        by_head = scores.view(-1, H, high - low, high - left)
        peak = scores.amax(-1, keepdim=True)
        scores.sub_(peak).exp2_()
        total = scores.sum(-1, keepdim=True)
        half = value.dtype is torch.float16  # undivided sums would overflow
        weights, rest = (scores / total, 1.0) if half else (scores, total)
        block = (weights.to(value.dtype) @ value[b, :, left:high]).float().div_(rest)
        output[b, :, low:high] = block.view(-1, H, high - low, value.shape[-1])
        logsumexp[b, :, low:high] = (peak + total.log2()).div_(LOG2E).view(-1, H, high - low)
        if weight is not None and high > spec.start:
            by_head[..., low - left :].diagonal(dim1=-2, dim2=-1).zero_()  # attention to the token itself
            shares = weight[b, None, None, low:high] / total.view(-1, H, 1, high - low)
            sums[b, left:high] += (shares @ by_head).sum((1, 2))
    return output, logsumexp, None if lengths is None else _received(sums, lengths, H, spec.start)


def received(query: Tensor, key: Tensor, lengths: Tensor, logsumexp: Tensor, spec: AttentionSpec) -> Tensor:
    """Attention received, (B, T) float32, from given log-sum-exps. Queries before `start` see no wanted column."""
    B, H, T, _ = query.shape
    bias = _weight(lengths, T).log2()[:, None] - logsumexp * LOG2E  # (B, H, T), weights included
    sums = torch.zeros(B, T, dtype=torch.float32, device=query.device)
    blocks = _query_blocks(query, spec.start, spec.window)
    for b, low, high, left, scores in _scored(query, key, blocks, spec.start, spec, strict=True):
        by_head = scores.view(-1, H, high - low, high - left).add_(bias[b, :, low:high, None])
        sums[b, left:high] += by_head.exp2_().sum((1, 2))
    return _received(sums, lengths, H, spec.start)


def _scored(
    query: Tensor, key: Tensor, blocks: list[Block], start: int, spec: AttentionSpec, *, strict: bool = False
) -> Iterator[tuple[slice, int, int, int, Tensor]]:
    """For each block: documents b, queries [low, high), their first visible key, and masked scores in bits.

    Scores (b, K, G * q, k) cover the keys from the first one to `high`. All blocks share one buffer, because allocating
    memory takes as long as the sums. `strict` also hides the token itself.
    """
    H, device = query.shape[1], query.device
    rows_and_keys = ((rows, hi - lo, _reach(hi - lo, hi - start, spec.window)) for lo, hi, rows in blocks)
    sizes = (max(b.stop - b.start for b in rows) * q * k for rows, q, k in rows_and_keys if rows)
    buffer = torch.empty(H * max(sizes, default=0), dtype=torch.float32, device=device)
    keys = _shared_out(key.float(), blocks, H)
    for low, high, rows in blocks:
        left = start if spec.window is None else max(start, low - spec.window + 1)
        seen = low if spec.window is None else left  # every query sees the keys before it
        q = torch.arange(low, high, device=device)[:, None]
        k = torch.arange(seen, high, device=device)[None, :]
        hidden = k >= q if strict else k > q
        hidden = hidden if spec.window is None else hidden | (k <= q - spec.window)
        mask = torch.zeros(hidden.shape, device=device).masked_fill_(hidden, float("-inf"))
        for b in rows:
            scores = _scores(query[b], keys[b], low, high, left, spec, buffer)
            scores.view(-1, H, high - low, high - left)[..., seen - left :].add_(mask)
            yield b, low, high, left, scores


def _received(sums: Tensor, lengths: Tensor, H: int, start: int) -> Tensor:
    """Means over heads and later queries; NaN where there are none, and before `start`."""
    position = torch.arange(sums.shape[1], device=sums.device)
    later = lengths[:, None] - 1 - position  # (B, T): number of later queries
    undefined = (later < 1) | (position < start)
    return (sums / (H * later.clamp(min=1))).masked_fill(undefined, float("nan"))


def _weight(lengths: Tensor, T: int) -> Tensor:
    """The weight of each query: q + 1, and 0 on padding, (B, T) float32."""
    position = torch.arange(T, device=lengths.device)
    return torch.where(position < lengths[:, None], position + 1.0, 0.0)


def _shared_out(key: Tensor, blocks: list[Block], H: int) -> Tensor:
    """Keys or values, repeated for each query head on a CPU if threads would be idle otherwise.

    A batched product has one matrix for each document and key/value head, and each matrix runs on one thread: three
    matrices take two threads as long as four. Repetition gives more and smaller matrices, and takes memory.
    """
    largest = blocks[-1][2][:1] if blocks else []
    matrices, groups = sum(len(key[b]) for b in largest) * key.shape[1], H // key.shape[1]
    threads = torch.get_num_threads()
    if key.device.type != "cpu" or groups == 1 or matrices <= threads:
        return key

    def idle(count: int) -> float:
        return -count % threads / count

    return key.repeat_interleave(groups, 1) if idle(matrices) - idle(matrices * groups) > IDLE else key


def _reach(queries: int, keys: int, window: int | None) -> int:
    """Number of keys that a block of queries sees, of the `keys` up to its last query."""
    return keys if window is None else min(keys, queries - 1 + window)


def _query_blocks(query: Tensor, start: int, window: int | None) -> list[Block]:
    """Cut queries from `start` on, and documents, into blocks within the limits above."""
    B, H, T, _ = query.shape
    blocks, size, keys = [], QUERY_BLOCK, max(1, _reach(2 * QUERY_BLOCK, T - start, window))
    if B * H * size < FEW_ROWS:
        size = min(max(size, SCORE_ELEMENTS // max(1, B * H * keys)), 2 * size)
    size = max(1, min(size, ALONE_ELEMENTS // (H * keys)))
    for low in range(start, T, size):
        high = min(low + size, T)
        step = max(1, SCORE_ELEMENTS // (H * (high - low) * _reach(high - low, high - start, window)))
        blocks.append((low, high, list(chunks(B, step))))
    return blocks


def _scores(query: Tensor, key: Tensor, low: int, high: int, left: int, spec: AttentionSpec, buffer: Tensor) -> Tensor:
    """Scores in bits of queries [low, high) and float32 keys [left, high), (b, K, G * q, k), in the buffer."""
    (B, H, _, D), K = query.shape, key.shape[1]
    rows, k = H // K * (high - low), high - left
    factor = spec.scaling * LOG2E if spec.softcap is None else spec.scaling / spec.softcap
    scaled = (query[:, :, low:high].float() * factor).contiguous()
    scores = buffer[: B * K * rows * k].view(B * K, rows, k)
    torch.bmm(scaled.view(B * K, rows, D), key[:, :, left:high].reshape(B * K, k, D).transpose(1, 2), out=scores)
    if spec.softcap is not None:
        scores.tanh_().mul_(spec.softcap * LOG2E)
    return scores.view(B, K, rows, k)
