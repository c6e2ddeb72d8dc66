"""How documents are cut into scoring batches, and the count of what a pass did; known to whoever shares passes out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np
import torch
from numpy.typing import NDArray


@dataclass
class ScoringStats:
    """What a scoring pass did: for the log and the summary."""

    documents: int = 0
    tokens: int = 0
    padded_tokens: int = 0
    batches: int = 0
    halvings: int = 0
    seconds: float = 0.0

    @classmethod
    def of_all(cls, ranks: list[list[float]]) -> ScoringStats:
        """Sums over ranks of what each has in its fields; the seconds are the slowest rank's."""
        *counts, seconds = zip(*ranks, strict=True)
        total = cls(*(int(sum(values)) for values in counts))
        total.seconds = max(seconds)
        return total

    def add(self, other: ScoringStats) -> None:
        """Count another pass in."""
        for name, value in asdict(other).items():
            setattr(self, name, getattr(self, name) + value)


def plan_batches(lengths: NDArray[np.int64], budget: int, *, packed: bool = False) -> Iterator[NDArray[np.int64]]:
    """Cut documents, longest first, into batches of at most `budget` padded tokens (a longer document goes alone).

    Longest first: memory runs out at once or not at all, and neighbours in length waste little padding.

    Args:
        lengths: (N,) tokens per document; empty documents are left out.
        packed: documents lie one behind the other, so that there is no padding to count.

    Yields:
        indices into `lengths`, ties in order of index.
    """
    order = np.lexsort((np.arange(len(lengths)), -lengths))
    order = order[lengths[order] > 0]
    ends = np.concatenate([[0], np.cumsum(lengths[order])])
    low = 0
    while low < len(order):
        if packed:
            size = int(np.searchsorted(ends, ends[low] + budget, side="right")) - 1 - low
        else:
            size = budget // int(lengths[order[low]])
        yield order[low : low + max(1, size)]
        low += max(1, size)


def default_batch_tokens(device: torch.device) -> int:
    """Padded tokens per batch for `batch_tokens: auto`."""
    return 16_384 if device.type == "cuda" else 4_096
