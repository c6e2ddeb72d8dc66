"""Triton twins of `kernels.py` for CUDA devices: same names, no score and no float32 logit ever leaves the chip.

The torch twins write blocks of scores to memory and read them again, several times over; on a GPU that traffic, and not
the arithmetic, is what scoring all layers would cost. Importing this module imports Triton; `triton_dispatch` does so.

Every sum is taken in one order that depends on shapes and block sizes alone, without atomics: the same call gives the
same bits. Left out: gradients, which scoring has no use for, and attention itself, for which torch brings kernels.

Dimensions: B batch, T tokens, H query heads, K key/value heads, G = H / K, D head size, n documents.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# (Triton has no types; of its kernels only constants are annotated, because Triton reads those annotations.)

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.errors import TritonError

from .attributes import one_row
from .triton_moments import moments, tanh
from .triton_tiles import INTERPRETED, reach, timed

__all__ = ["attention_received", "moments"]

FAILURES = (TritonError, RuntimeError, OSError, subprocess.SubprocessError)  # of compilers and of what they need
LOG2E = tl.constexpr(1.4426950408889634)
LOOKUP = tl.constexpr(128)  # documents looked through at a time for the one that a program works on
PROGRAMS_PER_PROCESSOR = 4  # fewer would leave processors idle: heads are then split between programs
WIDEN = tl.constexpr(INTERPRETED)  # the interpreter's dot takes the bits of a bfloat16 for an integer


@triton.jit
def _locate(
    program,
    extents,
    starts,
    documents,
    start,
    PACKED: tl.constexpr,
    STARTS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The document that a program works on, how many blocks earlier documents have, and how many there are.

    Programs are numbered through all documents' blocks of wanted columns. How many a document has only the device
    knows, and nothing waits for it: each program looks up where it belongs.
    """
    document = tl.full((), 0, tl.int32)
    before = 0  # blocks of earlier documents
    total = 0
    for low in range(0, documents, LOOKUP):
        each = low + tl.arange(0, LOOKUP)
        known = each < documents
        if PACKED:
            lengths = tl.load(extents + each + 1, mask=known, other=0) - tl.load(extents + each, mask=known, other=0)
        else:
            lengths = tl.load(extents + each, mask=known, other=0)
        if STARTS:
            columns = lengths.to(tl.int32) - 1 - tl.load(starts + each, mask=known, other=0).to(tl.int32)
        else:
            columns = lengths.to(tl.int32) - 1 - start
        blocks = (tl.maximum(columns, 0) + BLOCK_K - 1) // BLOCK_K
        end = total + tl.cumsum(blocks, 0)
        passed = known & (end <= program)
        document += tl.sum(passed.to(tl.int32), 0)
        before = tl.maximum(before, tl.max(tl.where(passed, end, 0), 0))
        total += tl.sum(blocks, 0)
    return document, before, total


@timed
@triton.jit(
    do_not_specialize=[
        *("documents", "start", "window", "heads", "kv_heads", "kv_share", "group_share", "group_splits", "reach"),
        *("lse_b", "lse_h", "sums_s", "sums_b"),
    ]
)
def _received(
    query,  # (B, H, T, D)
    key,  # (B, K, T, D)
    logsumexp,  # (B, H, T) float32
    sums,  # (splits, B, T) float32
    extents,  # (n,) lengths, or with PACKED (n + 1,) offsets
    starts,  # (n,) first columns wanted, with STARTS
    documents,  # n
    start,
    window,
    heads,
    kv_heads,
    kv_share,  # key/value heads of one program
    group_share,  # query heads of one program per key/value head
    group_splits,
    reach,  # rough length, for the choice of blocks only
    factor,
    cap,
    query_b,
    query_h,
    query_t,
    key_b,
    key_h,
    key_t,
    lse_b,
    lse_h,
    lse_t,
    sums_s,
    sums_b,
    G: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    PACKED: tl.constexpr,
    STARTS: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    program = tl.program_id(0)
    document, before, total = _locate(program, extents, starts, documents, start, PACKED, STARTS, BLOCK_K)
    if program >= total:
        return
    extent = tl.load(extents + document).to(tl.int64)
    if PACKED:
        begin = extent
        length = (tl.load(extents + document + 1).to(tl.int64) - begin).to(tl.int32)
    else:
        begin = extent * 0
        length = extent.to(tl.int32)
    left = (program - before) * BLOCK_K
    if STARTS:
        left += tl.load(starts + document).to(tl.int32)
    else:
        left += start
    right = length  # queries behind it see none of the columns
    if WINDOWED:
        right = tl.minimum(length, left + BLOCK_K - 1 + window)
    row = document.to(tl.int64)
    column = left + tl.arange(0, BLOCK_K)
    d = tl.arange(0, D_PADDED)
    inside_d = d < D
    key += row * key_b + (begin + column)[:, None] * key_t + d[None, :]
    key_mask = (column < length)[:, None] & inside_d[None, :]
    query += row * query_b + begin * query_t + d[None, :]
    logsumexp += row * lse_b + begin * lse_t
    split = tl.program_id(1)
    first_kv = (split // group_splits) * kv_share
    first_member = (split % group_splits) * group_share
    members = tl.minimum(group_share, G - first_member)
    blocks_q = tl.maximum(right - left - 1 + BLOCK_Q - 1, 0) // BLOCK_Q
    received = tl.zeros((BLOCK_K,), tl.float32)
    key += first_kv.to(tl.int64) * key_h
    for kv in range(first_kv, tl.minimum(first_kv + kv_share, kv_heads)):
        k = tl.load(key, mask=key_mask, other=0.0)
        if WIDEN:
            k = k.to(tl.float32)
        for step in range(0, members * blocks_q):  # one loop over heads and queries keeps the pipeline full
            head = (kv * G + first_member + step // blocks_q).to(tl.int64)
            q = left + 1 + (step % blocks_q) * BLOCK_Q + tl.arange(0, BLOCK_Q)
            real = q < right
            rows = tl.load(
                query + head * query_h + q.to(tl.int64)[:, None] * query_t,
                mask=real[:, None] & inside_d[None, :],
                other=0.0,
            )
            if WIDEN:
                rows = rows.to(tl.float32)
            lse = tl.load(logsumexp + head * lse_h + q.to(tl.int64) * lse_t, mask=real, other=0.0)
            bias = tl.where(real, tl.log2(q + 1.0) - lse * LOG2E, float("-inf"))
            scores = tl.dot(k, tl.trans(rows), input_precision="ieee") * factor  # (BLOCK_K, BLOCK_Q)
            if CAPPED:
                scores = cap * tanh(scores)
            distance = q[None, :] - column[:, None]
            seen = distance > 0
            if WINDOWED:
                seen = seen & (distance < window)
            received += tl.sum(tl.where(seen, tl.exp2(scores + bias[None, :]), 0.0), 1)
        key += key_h
    later = tl.maximum(length - 1 - column, 1)
    tl.store(
        sums + split.to(tl.int64) * sums_s + row * sums_b + begin + column,
        received / (later.to(tl.float32) * heads),
        mask=column < length - 1,
    )


def attention_received(
    query: Tensor,
    key: Tensor,
    lengths: Tensor,
    *,
    scaling: float,
    start: int = 0,
    window: int | None = None,
    softcap: float | None = None,
    logsumexp: Tensor,
    offsets: Tensor | None = None,
    starts: Tensor | None = None,
) -> Tensor:
    """Triton twin of `kernels.attention_received`; the row log-sum-exps must be given.

    A program owns one block of one document's columns, goes through the queries behind it of all its heads, and writes
    once. Where that makes too few programs, heads are split between several, whose parts are then added up.

    Arguments, shapes and result: see `attributes.attention_received`. A last dimension with gaps is copied; any other
    layout is read as it lies.
    """
    (B, H, T, D), K = query.shape, key.shape[1]
    packed = offsets is not None
    if packed:
        one_row(query)
    query, key = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key))
    columns = max(0, T - (0 if packed else start + 1))
    kv_splits, group_splits = _splits(B * triton.cdiv(columns, 64), K, H // K, query.device)
    sums = torch.full((kv_splits * group_splits, B, T), float("nan"), dtype=torch.float32, device=query.device)
    extents = (lengths if offsets is None else offsets).to(query.device).contiguous()
    starts = None if starts is None else starts.to(query.device).contiguous()
    documents = len(extents) - packed
    if columns == 0 or documents == 0:
        return sums[0]

    def grid(meta: dict[str, Any]) -> tuple[int, int]:  # packed: a document ends in the middle of a block
        blocks: int = triton.cdiv(columns, meta["BLOCK_K"])
        return blocks + documents if packed else blocks * B, len(sums)

    with torch.cuda.device_of(query):  # Triton launches on the current device, whatever its arguments lie on
        _received[grid](
            *(query, key, logsumexp, sums, extents, extents if starts is None else starts),
            *(documents, start, window or 0, H, K, K // kv_splits, H // K // group_splits, group_splits),
            *(reach(T // documents if packed else T),),
            *((scaling * LOG2E.value, 0.0) if softcap is None else (scaling / softcap, softcap * LOG2E.value)),
            *(stride for x in (query, key, logsumexp) for stride in (0 if packed else x.stride(0), *x.stride()[1:3])),
            *(sums.stride(0), 0 if packed else sums.stride(1)),
            G=H // K,
            D=D,
            D_PADDED=max(16, triton.next_power_of_2(D)),
            PACKED=packed,
            STARTS=starts is not None,
            WINDOWED=window is not None,
            CAPPED=softcap is not None,
            enable_fp_fusion=True,  # Triton's default is about to change, and with it the last bits
        )
    return sums[0] if len(sums) == 1 else sums.sum(0)


def _splits(programs: int, K: int, G: int, device: torch.device) -> tuple[int, int]:
    """Into how many parts to split the K key/value heads, and the G query heads of each, so that all are kept busy."""
    wanted = _wanted(device)
    kv = next(_parts(K, wanted / max(1, programs)))
    return kv, next(_parts(G, wanted / max(1, programs * kv)))


def _parts(heads: int, at_least: float) -> Iterator[int]:
    """Divisors of `heads` from `at_least` on; `heads` itself is always one."""
    return (parts for parts in range(1, heads + 1) if parts == heads or (parts >= at_least and heads % parts == 0))


def _wanted(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return PROGRAMS_PER_PROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count
