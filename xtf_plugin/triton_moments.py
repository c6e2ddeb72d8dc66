"""`heads.moments` in Triton for CUDA devices, in one pass over the logits and without a copy.

In PyTorch a chunk is read about six times and copied to float32; that copy limits how many rows an LM head can take at
once, and few rows make it slow.

Dimensions: n rows, V vocabulary.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# (Triton has no types; of its kernels only constants are annotated, because Triton reads those annotations.)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

IMPOSSIBLE = tl.constexpr(-1e4)  # nats below the most probable token: exp of it is 0 in float32
VOCABULARY_BLOCK = 4096


@triton.jit
def tanh(x):
    """tanh, which Triton's interpreter lacks; exact at both infinities."""
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
    targets_n,
    scale,
    cap,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * logits_n
    peak = tl.full((), float("-inf"), tl.float32)
    # sums of p, p x and p x^2 per lane, with x a logit's distance to the largest one so far and p = exp(x)
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
        base = tl.where(highest == float("-inf"), 0.0, highest)  # nothing possible so far
        # x -> x + shift in all three sums; shift <= 0 and x <= 0, so no terms of unlike sign meet and nothing cancels
        shift = tl.maximum(peak - base, IMPOSSIBLE)  # a larger step would overflow its square; exp is 0 all the same
        decay = tl.exp(shift)
        x = tl.maximum(x - base, IMPOSSIBLE)
        p = tl.where(undefined, float("nan"), tl.exp(x))  # stays in the sum, and so reaches all three results
        second = decay * (second + shift * (2.0 * first + shift * zeroth)) + p * x * x
        first = decay * (first + shift * zeroth) + p * x
        zeroth = decay * zeroth + p
        peak = highest
    total = tl.sum(zeroth, 0)
    mean = tl.sum(first, 0) / total
    variance = tl.sum(second, 0) / total - mean * mean
    variance = tl.where(variance < 0.0, 0.0, variance)  # not maximum(), which may swallow a NaN
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
    """`attributes.predictions` from logits, in one pass over them.

    Equals `attributes.predictions(logits, lambda x: x, targets, scale=scale, softcap=softcap)`. A running maximum, and
    sums that are rescaled with it, replace a softmax: logits are read once, in their own dtype, and not changed.

    Args:
        logits: (n, V) in bfloat16, float16 or float32.
        targets, scale, softcap: see `attributes.predictions`; a target that is no token has a log-probability of NaN.

    Returns:
        (3, n) float32, see `attributes.predictions`.
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
            enable_fp_fusion=True,  # see triton_kernels
            num_warps=8 if block >= 2048 else 4,
        )
    return result
