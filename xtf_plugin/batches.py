"""How documents are cut into scoring batches, and the count of what a pass did; known to whoever shares passes out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np
import torch
from numpy.typing import NDArray

# What one more forward counts as, in tokens. An estimate on the safe side: on a GPU its launches and one wait for the
# host are a millisecond or two, in which a model of a billion weights reads a few hundred tokens, a larger one fewer.
FORWARD_TOKENS = 512


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


def plan_batches(lengths: NDArray[np.int64], budget: int) -> Iterator[NDArray[np.int64]]:
    """Cut documents, longest first, into batches of at most `budget` padded tokens (a longer document goes alone).

    Equals, over all ways to cut the sorted documents that respect the budget: the one with the fewest padded tokens, a
    forward counted as `FORWARD_TOKENS` more. Filling every batch would put documents of unlike length together where
    a budget is large and documents are few. Longest first: when memory is too small, that shows early.

    Args:
        lengths: (N,) tokens per document; empty documents are left out.

    Yields:
        indices into `lengths`, ties in order of index.
    """
    order = np.lexsort((np.arange(len(lengths)), -lengths))
    order = order[lengths[order] > 0]
    longest = lengths[order].astype(np.int64)  # of a batch that begins there
    sizes = np.clip(budget // np.maximum(longest, 1), 1, np.arange(len(order), 0, -1))
    counts = np.arange(1, int(sizes.max(initial=1)) + 1)
    cost = np.zeros(len(order) + 1, dtype=np.int64)  # of everything from there on
    best = np.ones(len(order), dtype=np.int64)
    for low in range(len(order) - 1, -1, -1):
        size = int(sizes[low])
        after = counts[:size] * longest[low] + cost[low + 1 : low + 1 + size]
        chosen = int(after.argmin())
        cost[low], best[low] = after[chosen] + FORWARD_TOKENS, chosen + 1
    low = 0
    while low < len(order):
        yield order[low : low + int(best[low])]
        low += int(best[low])


def default_batch_tokens(device: torch.device) -> int:
    """Padded tokens per batch for `batch_tokens: auto`."""
    return 16_384 if device.type == "cuda" else 4_096
