"""Scores of documents as flat arrays: what the scorer gives, a shard holds and the lookup joins.

Apart from `shards.py` so that the scorer knows what to give without knowing files.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

COLUMNS = ("logprobs", "entropy", "deviation", "attention")


@dataclass(frozen=True)
class Records:
    """Scores of n documents with m completion tokens in all; NaN: undefined.

    Args:
        keys: (n, 16) uint8.
        offsets: (n + 1,) int64 into the scores.
        logprobs: (m,) float32 natural-log probabilities.
        entropy: (m,) float32, nats: the surprisal that the reference itself expected there.
        deviation: (m,) float32, nats: the standard deviation of that surprisal.
        attention: (m,) float32 attention received; None: not measured.
    """

    keys: NDArray[np.uint8]
    offsets: NDArray[np.int64]
    logprobs: NDArray[np.float32]
    entropy: NDArray[np.float32]
    deviation: NDArray[np.float32]
    attention: NDArray[np.float32] | None = None

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Completion tokens per document, (n,)."""
        return np.diff(self.offsets)

    @property
    def columns(self) -> dict[str, NDArray[np.float32]]:
        """The scores by name, in the order of `COLUMNS`, those that were not measured left out."""
        found = {name: getattr(self, name) for name in COLUMNS}
        return {name: values for name, values in found.items() if values is not None}

    def part(self, low: int, high: int) -> Records:
        """Documents low to high, as views."""
        a, b = int(self.offsets[low]), int(self.offsets[high])
        columns = {name: values[a:b] for name, values in self.columns.items()}
        return Records(keys=self.keys[low:high], offsets=self.offsets[low : high + 1] - a, **columns)


def merge(parts: list[Records]) -> Records:
    """Records one after the other; at least one part, all with attention or all without."""
    lengths = np.concatenate([part.lengths for part in parts])
    columns = [part.columns for part in parts]
    return Records(
        keys=np.concatenate([part.keys for part in parts]),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        **{name: np.concatenate([column[name] for column in columns]) for name in columns[0]},
    )
