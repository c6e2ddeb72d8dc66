"""Scores of documents as flat arrays: what scoring produces, a shard holds, and `Lookup` searches.

Independent of files. All operations are on whole arrays, because a loop over the documents of a large dataset takes
minutes.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..data.documents import KEY_BYTES
from ..data.ragged import Bools, Floats, Ints, stretches

COLUMNS = ("logprobs", "entropy", "deviation", "attention")


def column_names(*, attention: bool) -> tuple[str, ...]:
    """The columns of a scoring pass, with or without attention received."""
    return COLUMNS if attention else COLUMNS[:-1]


@dataclass(frozen=True)
class Records:
    """Scores of n documents with m completion tokens in all; NaN: undefined.

    Args:
        keys: (n, 16) uint8.
        offsets: (n + 1,) int64 into the scores.
        logprobs: (m,) float32 natural-log probabilities.
        entropy: (m,) float32, nats: mean surprisal of a token drawn from the reference's distribution.
        deviation: (m,) float32, nats: standard deviation of that surprisal.
        attention: (m,) float32 attention received; None: not measured.
    """

    keys: NDArray[np.uint8]
    offsets: Ints
    logprobs: Floats
    entropy: Floats
    deviation: Floats
    attention: Floats | None = None

    @property
    def lengths(self) -> Ints:
        """Completion tokens per document, (n,)."""
        return np.diff(self.offsets)

    @property
    def columns(self) -> dict[str, Floats]:
        """The measured scores by name, in the order of `COLUMNS`."""
        found = {name: getattr(self, name) for name in COLUMNS}
        return {name: values for name, values in found.items() if values is not None}

    def part(self, low: int, high: int) -> Records:
        """Documents [low, high), as views."""
        a, b = int(self.offsets[low]), int(self.offsets[high])
        columns = {name: values[a:b] for name, values in self.columns.items()}
        return Records(keys=self.keys[low:high], offsets=self.offsets[low : high + 1] - a, **columns)

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
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        **{name: np.concatenate([column[name] for column in columns]) for name in columns[0]},
    )


@dataclass(frozen=True)
class StoredScores:
    """Scores of the requested documents, in their order; NaN where undefined or not found.

    Args:
        found: (N,) whether a document's scores are known.
        logprobs, entropy, deviation: as in `Records`, over the completion tokens of the requested documents.
        attention: likewise; None if it was not requested.
    """

    found: Bools
    logprobs: Floats
    entropy: Floats
    deviation: Floats
    attention: Floats | None = None


class Lookup:
    """Searches records for the requested documents. The first scores found of a document are used."""

    def __init__(self, keys: NDArray[np.uint8], lengths: Ints, columns: Sequence[str] = COLUMNS) -> None:
        """Request `columns` of documents by key (N, 16) and number of completion tokens (N,).

        Raises:
            ValueError: the shapes of keys and lengths do not match.
        """
        self.keys, self.lengths = keys, np.ascontiguousarray(lengths, dtype=np.int64)
        if keys.dtype != np.uint8 or keys.shape != (len(self.lengths), KEY_BYTES) or (self.lengths < 0).any():
            raise ValueError(f"keys must be uint8 ({len(self.lengths)}, {KEY_BYTES}), not {keys.dtype} {keys.shape}")
        self.starts = np.cumsum(self.lengths) - self.lengths
        self.found = np.zeros(len(self.lengths), dtype=bool)
        self.columns = {name: np.full(int(self.lengths.sum()), np.nan, dtype=np.float32) for name in columns}
        identity = identities(keys, self.lengths)
        self._order = np.argsort(identity, kind="stable")
        self._sorted = identity[self._order]

    @property
    def scores(self) -> StoredScores:
        """Everything found so far, as views."""
        return StoredScores(self.found, **self.columns)

    def wants(self, identity: NDArray[np.bytes_]) -> bool:
        """Whether any of these `identities` is requested and not found yet."""
        low, high = self._places(identity)
        return not self.found[self._order[low[high > low]]].all()

    def take(self, records: Records) -> None:
        """Copy the scores of documents that are requested and not found yet."""
        identity, source = np.unique(identities(records.keys, records.lengths), return_index=True)
        low, high = self._places(identity)
        target, source = self._order[stretches(low, high - low)], np.repeat(source, high - low)
        new = ~self.found[target]
        target, starts = target[new], records.offsets[source[new]]
        into, out_of = (stretches(begin, self.lengths[target]) for begin in (self.starts[target], starts))
        for name, values in self.columns.items():
            values[into] = records.columns[name][out_of]
        self.found[target] = True

    def records(self, wanted: Ints) -> Records:
        """The scores of some of the requested documents, by index."""
        lengths = self.lengths[wanted]
        out_of = stretches(self.starts[wanted], lengths)
        columns = {name: values[out_of] for name, values in self.columns.items()}
        return Records(self.keys[wanted], np.concatenate([[0], np.cumsum(lengths)]), **columns)

    def _places(self, identity: NDArray[np.bytes_]) -> tuple[Ints, Ints]:
        """First and end position in `_order` of each identity."""
        return np.searchsorted(self._sorted, identity, "left"), np.searchsorted(self._sorted, identity, "right")


def identities(keys: NDArray[np.uint8], lengths: Ints) -> NDArray[np.bytes_]:
    """Key and length of each document as one fixed-width string, (N,), to sort and compare."""
    joined = np.concatenate([keys, lengths.astype("<i8").reshape(-1, 1).view(np.uint8).reshape(len(keys), 8)], axis=1)
    return joined.view(f"S{KEY_BYTES + 8}").reshape(-1)
