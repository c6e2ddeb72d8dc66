"""Scores of documents as flat arrays: what the scorer gives, a shard holds, and documents are looked up in.

Independent of files. Everything works on whole arrays: a loop over the documents of a large dataset takes minutes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..data.documents import KEY_BYTES
from ..data.ragged import stretches

COLUMNS = ("logprobs", "entropy", "deviation", "attention")


def column_names(*, attention: bool) -> tuple[str, ...]:
    """The columns that every scoring pass fills, with attention received or without."""
    return COLUMNS if attention else COLUMNS[:-1]


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
        """The measured scores by name, in the order of `COLUMNS`."""
        found = {name: getattr(self, name) for name in COLUMNS}
        return {name: values for name, values in found.items() if values is not None}

    def part(self, low: int, high: int) -> Records:
        """Documents low to high, as views."""
        a, b = int(self.offsets[low]), int(self.offsets[high])
        columns = {name: values[a:b] for name, values in self.columns.items()}
        return Records(keys=self.keys[low:high], offsets=self.offsets[low : high + 1] - a, **columns)

    def to_bytes(self) -> bytes:
        """Serialised for another process; `from_bytes` reads it."""
        about = json.dumps([len(self.keys), len(self.logprobs), list(self.columns)]).encode()
        arrays = [self.keys, self.offsets.astype("<i8"), *(values.astype("<f4") for values in self.columns.values())]
        return b"\n".join([about, b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)])

    @classmethod
    def from_bytes(cls, sent: bytes) -> Records:
        """The records that `to_bytes` was called on."""
        about, _, data = sent.partition(b"\n")
        n, m, names = json.loads(about)
        keys, low = np.frombuffer(data, np.uint8, 16 * n).reshape(n, 16), 16 * n
        offsets, low = np.frombuffer(data, "<i8", n + 1, low).astype(np.int64), low + 8 * (n + 1)
        values = np.frombuffer(data, "<f4", m * len(names), low).astype(np.float32).reshape(len(names), m)
        return cls(keys, offsets, **dict(zip(names, values, strict=True)))


def merge(parts: list[Records]) -> Records:
    """Records one after the other; at least one part, all with attention or all without."""
    lengths = np.concatenate([part.lengths for part in parts])
    columns = [part.columns for part in parts]
    return Records(
        keys=np.concatenate([part.keys for part in parts]),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        **{name: np.concatenate([column[name] for column in columns]) for name in columns[0]},
    )


@dataclass(frozen=True)
class StoredScores:
    """Scores of the requested documents, in their order.

    Args:
        found: (N,) whether a document's scores are known.
        logprobs: float32, flat over the documents' completion tokens; NaN where undefined or not found.
        entropy, deviation: the same for the mean and the standard deviation of the surprisal expected there.
        attention: the same for attention received; None if it was not requested.
    """

    found: NDArray[np.bool_]
    logprobs: NDArray[np.float32]
    entropy: NDArray[np.float32]
    deviation: NDArray[np.float32]
    attention: NDArray[np.float32] | None = None


class Lookup:
    """Joins the requested documents with one set of records after another. The first scores of a document count."""

    def __init__(self, keys: NDArray[np.uint8], lengths: NDArray[np.int64], columns: Sequence[str] = COLUMNS) -> None:
        """Request `columns` of documents by key (N, 16) and number of completion tokens (N,).

        Raises:
            ValueError: keys and lengths that do not fit together.
        """
        self.keys, self.lengths = keys, np.ascontiguousarray(lengths, dtype=np.int64)
        if keys.dtype != np.uint8 or keys.shape != (len(self.lengths), KEY_BYTES) or (self.lengths < 0).any():
            raise ValueError(f"keys must be uint8 ({len(self.lengths)}, {KEY_BYTES}), not {keys.dtype} {keys.shape}")
        self.starts = np.cumsum(self.lengths) - self.lengths
        total = int(self.lengths.sum())
        self.found = np.zeros(len(self.lengths), dtype=bool)
        self.columns = {name: np.full(total, np.nan, dtype=np.float32) for name in columns}
        identity = identities(keys, self.lengths)
        self._order = np.argsort(identity, kind="stable")
        self._sorted = identity[self._order]

    @property
    def scores(self) -> StoredScores:
        """Everything found so far, without copying."""
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

    def records(self, wanted: NDArray[np.int64]) -> Records:
        """The scores of some of the requested documents, by index."""
        lengths = self.lengths[wanted]
        out_of = stretches(self.starts[wanted], lengths)
        columns = {name: values[out_of] for name, values in self.columns.items()}
        return Records(self.keys[wanted], np.concatenate([[0], np.cumsum(lengths)]), **columns)

    def _places(self, identity: NDArray[np.bytes_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Where requested documents of these identities begin and end in `_order`."""
        return np.searchsorted(self._sorted, identity, "left"), np.searchsorted(self._sorted, identity, "right")


def identities(keys: NDArray[np.uint8], lengths: NDArray[np.int64]) -> NDArray[np.bytes_]:
    """Key and length as one fixed-width string each: they sort and compare as a whole, so half a key never matches."""
    joined = np.concatenate([keys, lengths.astype("<i8").reshape(-1, 1).view(np.uint8).reshape(len(keys), 8)], axis=1)
    return joined.view(f"S{KEY_BYTES + 8}").reshape(-1)
