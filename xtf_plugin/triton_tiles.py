"""Block sizes of the Triton kernel of attention received: which there are, which fit, and how the best one is found.

The best one depends on head size, dtype, window and GPU. It is looked for once for each of these and a rough length,
not for every length, and remembered on disk: another choice adds in another order and so gives other last bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton

INTERPRETED = bool(triton.knobs.runtime.interpret)
TILE_BYTES = 96 << 10  # shared memory that the tiles may take; consumer GPUs have 99 KB

# block sizes of queries and keys, warps, pipeline stages; the last one fits everywhere, the first is taken untimed
TILES = [(64, 64, 4, 3), (128, 64, 4, 3), (64, 128, 8, 3), (128, 128, 8, 2), (64, 32, 4, 2), (32, 32, 4, 2)]
if INTERPRETED:
    TILES = [(64, 64, 1, 1)]
CONFIGS = [
    triton.Config({"BLOCK_Q": q, "BLOCK_K": k}, num_warps=warps, num_stages=stages) for q, k, warps, stages in TILES
]


def reach(length: int) -> int:
    """The rough length by which block sizes are remembered; up to 128: the one document that a model is checked on."""
    return sum(length > bound for bound in (128, 512, 2048))


def fitting(configs: list[Any], arguments: dict[str, Any], **constants: Any) -> list[Any]:
    """The configs worth a compilation; the first of them alone where torch was asked for the same bits in every run."""
    size = arguments["query"].element_size()
    if size == 4:  # exact float32 products have no tensor cores: larger tiles spill registers
        return configs[-1:]

    def tiles(config: Any) -> int:
        blocks = config.kwargs["BLOCK_K"] + config.num_stages * config.kwargs["BLOCK_Q"]
        return int(blocks * constants["D_PADDED"] * size)

    found = [config for config in configs if tiles(config) <= TILE_BYTES] or configs[-1:]
    return found[:1] if torch.are_deterministic_algorithms_enabled() else found


def milliseconds(call: Callable[[], None], quantiles: tuple[float, ...]) -> list[float]:
    """The median of five runs, for every quantile: Triton's own timer takes 256 MB, which a GPU in use may not have."""
    call()
    times = []
    for _ in range(5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return [sorted(times)[2]] * len(quantiles)


timed = triton.autotune(
    CONFIGS,
    key=["D_PADDED", "WINDOWED", "reach"],  # and, by Triton, all dtypes
    prune_configs_by={"early_config_prune": fitting},
    do_bench=milliseconds,
    cache_results=True,
)
