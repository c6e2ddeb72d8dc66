"""Keep flags of documents, looked up by content in dataloader workers: one bit per token, and cheap to pickle."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..data.keys import KEY_BYTES
from ..data.ragged import Layout, offsets_of


@dataclass(frozen=True)
class MaskTable:
    """Which completion tokens of which document are kept, looked up by document key.

    Args:
        keys: (N, 2) big-endian uint64 halves of the document keys, sorted.
        offsets: (N + 1,) first bit of each document.
        bits: packed keep flags, one bit per completion token.
        best: (N,) the token to keep when a batch would lose all labels, as an index among the document's completion
            tokens; -1: none.
    """

    keys: NDArray[np.uint64]
    offsets: NDArray[np.int64]
    bits: NDArray[np.uint8]
    best: NDArray[np.int64]

    @classmethod
    def build(
        cls, keys: NDArray[np.uint8], offsets: NDArray[np.int64], keep: NDArray[np.bool_], best: NDArray[np.int64]
    ) -> MaskTable:
        """Build from document keys (N, 16), offsets (N + 1,) into `keep` (M,), and `best` (N,)."""
        flat = np.ascontiguousarray(keys).reshape(-1, KEY_BYTES)
        halves = flat.view(">u8").reshape(-1, 2).astype(np.uint64)
        order = np.lexsort((halves[:, 1], halves[:, 0]))
        sizes = np.diff(offsets)[order]
        ends = offsets_of(sizes)
        flags = np.empty(ends[-1], dtype=bool)
        first = offsets[:-1][order] - ends[:-1]
        for tokens, run, part in Layout(ends, sizes).chunks():  # an index of all tokens would take 8 times the flags
            flags[tokens] = keep[part.spread(first[run]) + np.arange(tokens.start, tokens.stop)]
        return cls(halves[order], ends, np.packbits(flags), best[order].astype(np.int64))

    def lookup(self, key: bytes) -> tuple[NDArray[np.bool_], int] | None:
        """Keep flags of a document's completion tokens and its `best`; None: it is not in the table."""
        high, low = np.frombuffer(key, dtype=">u8").astype(np.uint64)
        left, right = (int(np.searchsorted(self.keys[:, 0], high, side=side)) for side in ("left", "right"))
        at = left + int(np.searchsorted(self.keys[left:right, 1], low))
        if at == right or self.keys[at, 1] != low:
            return None
        first, last = int(self.offsets[at]), int(self.offsets[at + 1])
        bits = np.unpackbits(self.bits[first // 8 : (last + 7) // 8])
        return bits[first % 8 : first % 8 + last - first].astype(bool), int(self.best[at])
