"""Scores of documents as flat arrays: what scoring produces, a shard holds, and `Lookup` searches.

Independent of files. All operations are on whole arrays, because a loop over the documents of a large dataset takes
minutes.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..data.keys import KEY_BYTES, halves, key_order
from ..data.predictions import Predictions
from ..data.ragged import Floats, Ints, gathered, offsets_of, stretches

COLUMNS = ("logprobs", "entropy", "deviation", "attention")


@dataclass(frozen=True)
class StoredScores(Predictions):
    """All scores of completion tokens; NaN where undefined or not found.

    Args:
        attention: (M,) float32 attention received; None: not measured, or not requested.
    """

    attention: Floats | None = None


@dataclass(frozen=True, kw_only=True)
class Records(StoredScores):
    """Scores of n documents.

    Args:
        keys: (n, 16) uint8.
        offsets: (n + 1,) int64 into the scores.
    """

    keys: NDArray[np.uint8]
    offsets: Ints

    @property
    def lengths(self) -> Ints:
        """Completion tokens per document, (n,)."""
        return np.diff(self.offsets)

    @property
    def columns(self) -> dict[str, Floats]:
        """The measured scores by name, in the order of `COLUMNS`."""
        found = {name: getattr(self, name) for name in COLUMNS}
        return {name: values for name, values in found.items() if values is not None}

    def to_bytes(self) -> bytes:
        """Serialise for another process; `from_bytes` is the inverse."""
        arrays: dict[str, Any] = {"keys": self.keys, "offsets": self.offsets, **self.columns}
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, sent: bytes) -> Records:
        """Inverse of `to_bytes`."""
        with np.load(io.BytesIO(sent)) as arrays:
            return cls(**arrays)


def merge(parts: list[Records]) -> Records:
    """Concatenate one or more records, all with attention or all without."""
    columns = [part.columns for part in parts]
    lengths = np.concatenate([part.lengths for part in parts])
    return Records(
        keys=np.concatenate([part.keys for part in parts]),
        offsets=offsets_of(lengths),
        **{name: np.concatenate([column[name] for column in columns]) for name in columns[0]},
    )


class Lookup:
    """Searches records for the requested documents. The first scores found of a document are used.

    Args:
        keys: (N, 16) uint8, of the requested documents.
        lengths: (N,) completion tokens of each.
        attention: request attention received, too.

    Attributes:
        found: (N,) whether a document's scores are known.
        columns: the scores by name, over the completion tokens of the requested documents; NaN where not found.

    Raises:
        ValueError: the shapes of keys and lengths do not match.
    """

    def __init__(self, keys: NDArray[np.uint8], lengths: Ints, *, attention: bool) -> None:
        self.keys, self.lengths = keys, np.ascontiguousarray(lengths, dtype=np.int64)
        if keys.dtype != np.uint8 or keys.shape != (len(self.lengths), KEY_BYTES) or (self.lengths < 0).any():
            raise ValueError(f"keys must be uint8 ({len(self.lengths)}, {KEY_BYTES}), not {keys.dtype} {keys.shape}")
        self.starts = np.cumsum(self.lengths) - self.lengths
        self.found = np.zeros(len(self.lengths), dtype=bool)
        names, total = COLUMNS if attention else COLUMNS[:-1], int(self.lengths.sum())
        self.columns = {name: np.full(total, np.nan, dtype=np.float32) for name in names}
        self._halves = halves(keys)
        self._order = key_order(self._halves)
        self._sorted = self._halves[self._order, 0]

    def wants(self, keys: NDArray[np.uint8], lengths: Ints) -> bool:
        """Whether any of these documents is requested and not found yet."""
        return not self.found[self._pairs(keys, lengths)[0]].all()

    def take(self, records: Records) -> None:
        """Copy the scores of documents that are requested and not found yet."""
        target, source = self._pairs(records.keys, records.lengths)
        new = ~self.found[target]
        target, first = np.unique(target[new], return_index=True)
        source = source[new][first]
        starts = records.offsets[source]
        into, out_of = (stretches(begin, self.lengths[target]) for begin in (self.starts[target], starts))
        for name, values in self.columns.items():
            values[into] = records.columns[name][out_of]
        self.found[target] = True

    def records(self, wanted: Ints) -> Records:
        """The scores of some of the requested documents, by index."""
        lengths = self.lengths[wanted]
        columns = {name: gathered(values, self.starts[wanted], lengths) for name, values in self.columns.items()}
        return Records(keys=self.keys[wanted], offsets=offsets_of(lengths), **columns)

    def _pairs(self, keys: NDArray[np.uint8], lengths: Ints) -> tuple[Ints, Ints]:
        """Indices of equal documents, of equal length: the requested ones, and those given; ascending for each."""
        numbers = halves(keys)
        order = key_order(numbers)
        low, high = (np.searchsorted(self._sorted, numbers[order, 0], side) for side in ("left", "right"))
        target, source = self._order[stretches(low, high - low)], np.repeat(order, high - low)
        equal = (self._halves[target] == numbers[source]).all(axis=1) & (self.lengths[target] == lengths[source])
        return target[equal], source[equal]
