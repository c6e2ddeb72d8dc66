"""How documents are cut into scoring batches, and the count of what a pass did; known to whoever shares passes out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np
import torch
from numpy.typing import NDArray

# What one more forward counts as, in tokens. An estimate on the safe side: kernel launches and a wait for the host are
# a millisecond or two on a GPU, in which a model of a billion weights reads a few hundred tokens, a larger one fewer.
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


def plan_wanted(
    lengths: NDArray[np.int64],
    wanted: NDArray[np.int64],
    budget: int,
    *,
    packed: bool = False,
    apart: int | None = None,
) -> list[NDArray[np.int64]]:
    """`plan_batches` for the `wanted` documents, with the batches that all documents would have wherever that can be.

    A score depends by a rounding on what else is in its batch. When a killed run goes on, whole batches are missing;
    they are made again as they would have been, and give the same scores to the last bit.

    Args:
        lengths: (N,) tokens of each document.
        wanted: (n,) indices into `lengths`.
        packed, apart: see `plan_batches`.

    Returns:
        indices into `lengths`; batches of documents that were together in no missing batch come last.
    """
    chosen = np.zeros(len(lengths), dtype=bool)
    chosen[wanted] = True
    planned = plan_batches(lengths, budget, packed=packed, apart=apart)
    whole = [batch for batch in planned if chosen[batch].all()]
    for batch in whole:
        chosen[batch] = False
    rest = np.flatnonzero(chosen)
    return [*whole, *(rest[part] for part in plan_batches(lengths[rest], budget, packed=packed, apart=apart))]


def plan_batches(
    lengths: NDArray[np.int64], budget: int, *, packed: bool = False, apart: int | None = None
) -> Iterator[NDArray[np.int64]]:
    """Cut documents, longest first, into batches of at most `budget` padded tokens (a longer document goes alone).

    Equals, over all ways to cut the sorted documents that respect the budget: the one with the fewest padded tokens, a
    forward counted as `FORWARD_TOKENS` more. Filling every batch would put documents of unlike length together where
    a budget is large and documents are few. Longest first: when memory is too small, that shows early.

    Args:
        lengths: (N,) tokens per document; empty documents are left out.
        packed: documents lie one behind the other, so that there is no padding to count.
        apart: documents longer than this share no batch with others.

    Yields:
        indices into `lengths`, ties in order of index.
    """
    order = np.lexsort((np.arange(len(lengths)), -lengths))
    order = order[lengths[order] > 0]
    longer = 0 if apart is None else int((lengths[order] > apart).sum())
    for part in (order[:longer], order[longer:]):
        sizes = _filled(lengths[part], budget) if packed else _cheapest(lengths[part].astype(np.int64), budget)
        low = 0
        while low < len(part):
            yield part[low : low + int(sizes[low])]
            low += int(sizes[low])


def _filled(lengths: NDArray[np.int64], budget: int) -> NDArray[np.int64]:
    """For each document, how many a packed batch holds that begins with it, (N,)."""
    ends = np.concatenate([[0], np.cumsum(lengths)])
    last = np.searchsorted(ends, ends[:-1] + budget, side="right") - 1
    sizes: NDArray[np.int64] = np.maximum(last - np.arange(len(lengths)), 1)
    return sizes


def _cheapest(longest: NDArray[np.int64], budget: int) -> NDArray[np.int64]:
    """For each document, how many a padded batch holds that begins with it, in the cheapest cut from there on, (N,)."""
    n = len(longest)
    sizes = np.clip(budget // np.maximum(longest, 1), 1, np.arange(n, 0, -1))
    counts = np.arange(1, int(sizes.max(initial=1)) + 1)
    cost = np.zeros(n + 1, dtype=np.int64)  # of everything from there on
    best = np.ones(n, dtype=np.int64)
    for low in range(n - 1, -1, -1):
        size = int(sizes[low])
        after = counts[:size] * longest[low] + cost[low + 1 : low + 1 + size]
        chosen = int(after.argmin())
        cost[low], best[low] = after[chosen] + FORWARD_TOKENS, chosen + 1
    return best


def default_batch_tokens(device: torch.device) -> int:
    """Padded tokens per batch for `batch_tokens: auto`."""
    return 16_384 if device.type == "cuda" else 4_096
