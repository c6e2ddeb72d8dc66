"""Scores of documents as flat arrays: what the scorer gives, a shard holds and the lookup joins.

Apart from `shards.py` so that the scorer knows what to give without knowing files.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

COLUMNS = ("logprobs", "entropy", "deviation", "attention")


def column_names(*, attention: bool) -> tuple[str, ...]:
    """The scores that every pass gives, with attention received or without."""
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
        """The scores by name, in the order of `COLUMNS`, those that were not measured left out."""
        found = {name: getattr(self, name) for name in COLUMNS}
        return {name: values for name, values in found.items() if values is not None}

    def part(self, low: int, high: int) -> Records:
        """Documents low to high, as views."""
        a, b = int(self.offsets[low]), int(self.offsets[high])
        columns = {name: values[a:b] for name, values in self.columns.items()}
        return Records(keys=self.keys[low:high], offsets=self.offsets[low : high + 1] - a, **columns)

    def to_bytes(self) -> bytes:
        """For another process; `from_bytes` reads it."""
        about = json.dumps([len(self.keys), len(self.logprobs), list(self.columns)]).encode()
        arrays = [self.keys, self.offsets.astype("<i8"), *(values.astype("<f4") for values in self.columns.values())]
        return b"\n".join([about, b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)])

    @classmethod
    def from_bytes(cls, sent: bytes) -> Records:
        """What `to_bytes` was called on."""
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
