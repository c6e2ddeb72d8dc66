"""`dispatch.attention_received` in Triton for CUDA devices, without writing scores to memory.

Importing this module imports Triton; `triton_dispatch` imports it on demand.

Results are deterministic: the order of every sum depends on shapes and block sizes alone, and there are no atomics. The
block sizes are tuned once per head size, dtype, window, rough length and GPU, and cached on disk, because other block
sizes give other last bits.

Dimensions: B batch, T tokens, H query heads, K key/value heads, G = H / K, D head size, n documents.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# (Triton has no types; it reads the annotations of its constants.)

from __future__ import annotations

import subprocess
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.errors import TritonError

from .eager import AttentionSpec
from .triton_logit_stats import moments, tanh

__all__ = ["attention_received", "moments"]

FAILURES = (TritonError, RuntimeError, OSError, subprocess.SubprocessError)  # of compilation
LOG2E = tl.constexpr(1.4426950408889634)
LOOKUP = tl.constexpr(128)  # documents that `_locate` reads at a time
PROGRAMS_PER_PROCESSOR = 4  # with fewer, heads are split between programs to keep processors busy
TILE_BYTES = 96 << 10  # shared memory of the tiles; consumer GPUs have 99 KB

# block sizes of queries and keys, warps, pipeline stages; the last fits every GPU, the first is used without tuning
TILES = [(64, 64, 4, 3), (128, 64, 4, 3), (64, 128, 8, 3), (128, 128, 8, 2), (64, 32, 4, 2), (32, 32, 4, 2)]


@triton.jit
def _locate(program, lengths, starts, documents, BLOCK_K: tl.constexpr):
    """The document of a program, the number of blocks of earlier documents, and of all documents.

    Programs are numbered over the blocks of wanted columns of all documents. The numbers of blocks are known on the
    device alone, so each program looks up its document.
    """
    document = tl.full((), 0, tl.int32)
    before = 0
    total = 0
    for low in range(0, documents, LOOKUP):
        each = low + tl.arange(0, LOOKUP)
        known = each < documents
        columns = tl.load(lengths + each, mask=known, other=0) - 1 - tl.load(starts + each, mask=known, other=0)
        blocks = (tl.maximum(columns.to(tl.int32), 0) + BLOCK_K - 1) // BLOCK_K
        end = total + tl.cumsum(blocks, 0)
        passed = known & (end <= program)
        document += tl.sum(passed.to(tl.int32), 0)
        before = tl.maximum(before, tl.max(tl.where(passed, end, 0), 0))
        total += tl.sum(blocks, 0)
    return document, before, total


def reach(length: int) -> int:
    """The rough length for which block sizes are tuned."""
    return sum(length > bound for bound in (128, 512, 2048))


def fitting(configs: list[Any], arguments: dict[str, Any], **constants: Any) -> list[Any]:
    """The configs that fit, in float32 the last one; under `torch.use_deterministic_algorithms` the first that fits."""
    size = arguments["query"].element_size()
    if size == 4:  # exact float32 products use no tensor cores; larger tiles spill registers
        return configs[-1:]

    def tiles(config: Any) -> int:
        blocks = config.kwargs["BLOCK_K"] + config.num_stages * config.kwargs["BLOCK_Q"]
        return int(blocks * constants["D_PADDED"] * size)

    found = [config for config in configs if tiles(config) <= TILE_BYTES] or configs[-1:]
    return found[:1] if torch.are_deterministic_algorithms_enabled() else found


def milliseconds(call: Callable[[], None], quantiles: tuple[float, ...]) -> list[float]:
    """The median of five runs, for every quantile; Triton's own timer needs 256 MB of free GPU memory."""
    call()
    times = []
    for _ in range(5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return [sorted(times)[2]] * len(quantiles)


@triton.autotune(
    [triton.Config({"BLOCK_Q": q, "BLOCK_K": k}, num_warps=warps, num_stages=stages) for q, k, warps, stages in TILES],
    key=["D_PADDED", "WINDOWED", "reach"],  # Triton adds all dtypes
    prune_configs_by={"early_config_prune": fitting},
    do_bench=milliseconds,
    cache_results=True,
)
@triton.jit(
    do_not_specialize=[
        *("documents", "window", "heads", "kv_heads", "kv_share", "group_share", "group_splits", "reach"),
        *("lse_b", "lse_h", "sums_s", "sums_b"),
    ]
)
def _received(
    query,  # (B, H, T, D)
    key,  # (B, K, T, D)
    logsumexp,  # (B, H, T) float32
    sums,  # (splits, B, T) float32
    lengths,  # (n,)
    begins,  # (n,) where documents begin in their row
    starts,  # (n,) first wanted columns, counted within the document
    documents,  # n
    window,
    heads,
    kv_heads,
    kv_share,  # key/value heads of one program
    group_share,  # query heads of one program per key/value head
    group_splits,
    reach,  # rough length, for tuning alone
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
    sums_b,  # strides
    G: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    program = tl.program_id(0)
    document, before, total = _locate(program, lengths, starts, documents, BLOCK_K)
    if program >= total:
        return
    begin = tl.load(begins + document)
    length = tl.load(lengths + document).to(tl.int32)
    left = (program - before) * BLOCK_K + tl.load(starts + document).to(tl.int32)
    right = length  # later queries see none of the columns
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
        for step in range(0, members * blocks_q):  # one loop over heads and queries keeps the pipeline full
            head = (kv * G + first_member + step // blocks_q).to(tl.int64)
            q = left + 1 + (step % blocks_q) * BLOCK_Q + tl.arange(0, BLOCK_Q)
            real = q < right
            rows = tl.load(
                query + head * query_h + q.to(tl.int64)[:, None] * query_t,
                mask=real[:, None] & inside_d[None, :],
                other=0.0,
            )
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


def attention_received(query: Tensor, key: Tensor, lengths: Tensor, spec: AttentionSpec, logsumexp: Tensor) -> Tensor:
    """Triton implementation of `dispatch.attention_received`; `logsumexp` is required.

    A program sums over all later queries and heads for one block of columns of a document. If there are too few
    programs, heads are split between several, and their parts are added up. Only a last dimension with gaps is copied.
    """
    (B, H, T, D), K = query.shape, key.shape[1]
    packed, device = spec.offsets is not None, query.device
    query, key = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key))
    columns = max(0, T - (0 if packed else spec.start + 1))
    kv_splits, group_splits = _splits(B * triton.cdiv(columns, 64), K, H // K, device)
    sums = torch.full((kv_splits * group_splits, B, T), float("nan"), dtype=torch.float32, device=device)
    if spec.offsets is not None:
        begins, lengths = spec.offsets[:-1].to(device, torch.int64), spec.offsets.diff()
    else:
        begins = torch.zeros(B, dtype=torch.int64, device=device)
    lengths = lengths.to(device, torch.int64).contiguous()
    starts = torch.full_like(lengths, spec.start) if spec.starts is None else spec.starts.to(device, torch.int64)
    if columns == 0 or (documents := len(lengths)) == 0:
        return sums[0]

    factors = (spec.scaling * LOG2E.value, 0.0)
    if spec.softcap is not None:
        factors = (spec.scaling / spec.softcap, spec.softcap * LOG2E.value)

    def grid(meta: dict[str, Any]) -> tuple[int, int]:  # packed documents end within a block
        blocks: int = triton.cdiv(columns, meta["BLOCK_K"])
        return blocks + documents if packed else blocks * B, len(sums)

    with torch.cuda.device_of(query):  # Triton launches on the current device
        _received[grid](
            *(query, key, logsumexp, sums, lengths, begins.contiguous(), starts.contiguous()),
            *(documents, spec.window or 0, H, K, K // kv_splits, H // K // group_splits, group_splits),
            *(reach(T // documents if packed else T),),
            *factors,
            *(stride for x in (query, key, logsumexp) for stride in (0 if packed else x.stride(0), *x.stride()[1:3])),
            *(sums.stride(0), 0 if packed else sums.stride(1)),
            G=H // K,
            D=D,
            D_PADDED=max(16, triton.next_power_of_2(D)),
            WINDOWED=spec.window is not None,
            CAPPED=spec.softcap is not None,
            enable_fp_fusion=True,  # Triton's default may change, and the last bits with it
        )
    return sums[0] if len(sums) == 1 else sums.sum(0)


def _splits(programs: int, K: int, G: int, device: torch.device) -> tuple[int, int]:
    """Into how many parts to split the K key/value heads, and the G query heads of each, to keep the device busy."""

    def parts(heads: int, programs: int) -> int:
        divisors = (count for count in range(1, heads + 1) if heads % count == 0)
        return next((count for count in divisors if count >= _wanted(device) / max(1, programs)), heads)

    kv = parts(K, programs)
    return kv, parts(G, programs * kv)


def _wanted(device: torch.device) -> int:
    """Number of programs that keeps a device busy."""
    if device.type != "cuda":
        return 1
    return PROGRAMS_PER_PROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count
