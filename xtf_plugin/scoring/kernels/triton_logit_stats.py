"""`logit_stats.moments` in Triton for CUDA devices, in one pass over the logits.

PyTorch reads a chunk about six times and copies it to float32; the copy limits the number of rows in a chunk.

Dimensions: n rows, V vocabulary.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# (Triton has no types; it reads the annotations of its constants.)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

IMPOSSIBLE = tl.constexpr(-1e4)  # as in logit_stats
VOCABULARY_BLOCK = 4096


@triton.jit
def tanh(x):
    """tanh, which Triton's interpreter lacks; exact at +inf and -inf."""
    return 1.0 - 2.0 / (tl.exp2(x * 2.8853900817779268) + 1.0)  # 2 log2(e)


@triton.jit
def _row_moments(
    logits,  # (n, V)
    targets,  # (n,)
    result,  # (3, n) float32
    V,
    rows,
    logits_n,
    logits_v,
    targets_n,  # strides
    scale,
    cap,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * logits_n
    peak = tl.full((), float("-inf"), tl.float32)
    # sums of p, p x and p x^2 per lane, with x a logit minus the largest one so far and p = exp(x)
    zeroth = tl.zeros((BLOCK,), tl.float32)
    first = tl.zeros((BLOCK,), tl.float32)
    second = tl.zeros((BLOCK,), tl.float32)
    for low in range(0, V, BLOCK):
        token = low + tl.arange(0, BLOCK)
        x = tl.load(logits + token.to(tl.int64) * logits_v, mask=token < V, other=0.0).to(tl.float32) * scale
        if CAPPED:
            x = cap * tanh(x / cap)
        x = tl.where(token < V, x, float("-inf"))
        undefined = (x != x) | (x == float("inf"))
        highest = tl.maximum(peak, tl.max(tl.where(undefined, float("-inf"), x), 0))
        base = tl.where(highest == float("-inf"), 0.0, highest)  # all -inf so far
        # x -> x + shift in all three sums; shift <= 0 and x <= 0, so nothing cancels
        shift = tl.maximum(peak - base, IMPOSSIBLE)  # the square of a larger step would overflow
        decay = tl.exp(shift)
        x = tl.maximum(x - base, IMPOSSIBLE)
        p = tl.where(undefined, float("nan"), tl.exp(x))  # reaches all three results
        second = decay * (second + shift * (2.0 * first + shift * zeroth)) + p * x * x
        first = decay * (first + shift * zeroth) + p * x
        zeroth = decay * zeroth + p
        peak = highest
    total = tl.sum(zeroth, 0)
    mean = tl.sum(first, 0) / total
    variance = tl.sum(second, 0) / total - mean * mean
    variance = tl.where(variance < 0.0, 0.0, variance)  # maximum() may drop a NaN
    target = tl.load(targets + row * targets_n).to(tl.int64)
    known = (target >= 0) & (target < V)
    picked = tl.load(logits + target * logits_v, mask=known, other=float("nan")).to(tl.float32) * scale
    if CAPPED:
        picked = cap * tanh(picked / cap)
    result += row
    tl.store(result, picked - peak - tl.log(total))
    tl.store(result + rows, tl.log(total) - mean)
    tl.store(result + rows + rows, tl.sqrt(variance))


def moments(logits: Tensor, targets: Tensor, *, scale: float = 1.0, softcap: float | None = None) -> Tensor:
    """`eager.predictions(logits, lambda x: x, targets, scale=scale, softcap=softcap)`, in one pass over the logits.

    Args:
        logits: (n, V) in bfloat16, float16 or float32; not changed.
        targets: (n,); a target outside [0, V) has a log-probability of NaN.
    """
    n, V = logits.shape
    result = torch.empty(3, n, dtype=torch.float32, device=logits.device)
    if n == 0:
        return result
    block = min(VOCABULARY_BLOCK, triton.next_power_of_2(V))
    with torch.cuda.device_of(logits):
        _row_moments[(n,)](
            *(logits, targets, result, V, n, *logits.stride(), *targets.stride(), float(scale), float(softcap or 0)),
            CAPPED=softcap is not None,
            BLOCK=block,
            enable_fp_fusion=True,  # see triton_attention
            num_warps=8 if block >= 2048 else 4,
        )
    return result
