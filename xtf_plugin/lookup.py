"""The join of a dataset's documents with stored scores, on whole arrays: a loop over documents would take minutes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .data.documents import KEY_BYTES
from .records import COLUMNS, Records


@dataclass(frozen=True)
class StoredScores:
    """Scores of the documents asked for, in their order.

    Args:
        found: (N,) whether a document's scores are known.
        logprobs: float32, flat over the documents' completion tokens; NaN where undefined or not found.
        entropy, deviation: the same for the mean and the standard deviation of the surprisal expected there.
        attention: the same for attention received; None if it was not asked for.
    """

    found: NDArray[np.bool_]
    logprobs: NDArray[np.float32]
    entropy: NDArray[np.float32]
    deviation: NDArray[np.float32]
    attention: NDArray[np.float32] | None = None


class Lookup:
    """The join of the documents asked for with one shard after another."""

    def __init__(self, keys: NDArray[np.uint8], lengths: NDArray[np.int64], columns: Sequence[str] = COLUMNS) -> None:
        """Ask for `columns` of documents by key (N, 16) and number of completion tokens (N,).

        Raises:
            ValueError: keys and lengths that do not fit together.
        """
        self.lengths = np.ascontiguousarray(lengths, dtype=np.int64)
        if keys.dtype != np.uint8 or keys.shape != (len(self.lengths), KEY_BYTES) or (self.lengths < 0).any():
            raise ValueError(f"keys must be uint8 ({len(self.lengths)}, {KEY_BYTES}), not {keys.dtype} {keys.shape}")
        self.starts = np.cumsum(self.lengths) - self.lengths
        total = int(self.lengths.sum())
        self.found = np.zeros(len(self.lengths), dtype=bool)
        self.columns = {name: np.full(total, np.nan, dtype=np.float32) for name in columns}
        self.wanted, self.first, self.inverse = np.unique(
            _identity(keys, self.lengths), return_index=True, return_inverse=True
        )

    def take(self, records: Records) -> None:
        """Copy the scores of documents that are asked for and not found yet."""
        if not len(self.wanted):
            return
        identity = _identity(records.keys, records.lengths)
        at = np.minimum(np.searchsorted(self.wanted, identity), len(self.wanted) - 1)
        source = np.flatnonzero((self.wanted[at] == identity) & ~self.found[self.first[at]])
        target, once = np.unique(self.first[at[source]], return_index=True)  # a document twice in a shard: its first
        self._copy(target, records.offsets[:-1][source[once]], records.columns)

    def result(self) -> StoredScores:
        """What was found; a document that is asked for twice gets its scores twice."""
        origin = self.first[self.inverse]
        twins = np.flatnonzero((origin != np.arange(len(origin))) & self.found[origin])
        self._copy(twins, self.starts[origin[twins]], self.columns)
        return StoredScores(self.found, **self.columns)

    def _copy(
        self, target: NDArray[np.int64], starts: NDArray[np.int64], columns: Mapping[str, NDArray[np.float32]]
    ) -> None:
        into, out_of = (stretches(begin, self.lengths[target]) for begin in (self.starts[target], starts))
        for name, values in self.columns.items():
            values[into] = columns[name][out_of]
        self.found[target] = True


def _identity(keys: NDArray[np.uint8], lengths: NDArray[np.int64]) -> NDArray[np.bytes_]:
    """Key and length as one fixed-width string each: they sort and compare as a whole, so half a key never matches."""
    joined = np.concatenate([keys, lengths.astype("<i8").reshape(-1, 1).view(np.uint8).reshape(len(keys), 8)], axis=1)
    return joined.view(f"S{KEY_BYTES + 8}").reshape(-1)


def stretches(starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Indices start, start + 1, ..., start + length - 1 of every span, one after the other."""
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(int(lengths.sum()))
