"""Keep flags of a stream's documents: those of the calibration sample for good, the others while they are under way.

A stream has no end, so what has been collated must be forgotten again. A document that is asked for after that stops
the run: training on it unmasked, or on a guess, is what this table is there to prevent.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .collator import MaskTable
from .data.documents import DocumentSet
from .errors import XTFError
from .selection.select import Selection
from .verification import Candidate, PlannedDocuments

Tally = NDArray[np.int64]


@dataclass
class Entry:
    """A document under way.

    Args:
        ids, completion: (T,) its tokens and which of them are completion.
        keep: flags of the completion tokens.
        best: see `MaskTable`.
        tally: counts of its tokens, see `streaming.tallies`.
        row: the last row of the stream that held it.
    """

    ids: NDArray[np.int32]
    completion: NDArray[np.bool_]
    keep: NDArray[np.bool_]
    best: int
    tally: Tally
    row: int


class LiveMasks:
    """Equals a dictionary from document key to keep flags that forgets a document `retained` rows after its last row.

    Args:
        sample: the calibration sample; selection, tallies: of its documents.
        retained: how many rows of the stream a document is kept for after the last row that held it.
    """

    def __init__(self, sample: DocumentSet, selection: Selection, tallies: Tally, retained: int) -> None:
        self.retained = retained
        self._table = MaskTable.build(sample.keys, sample.completion_offsets, selection.keep, selection.best)
        self._tallies = np.empty_like(tallies)
        self._tallies[[self._table.find(key.tobytes()) for key in sample.keys]] = tallies
        self._sample = PlannedDocuments(sample, selection.keep)
        self._entries: OrderedDict[bytes, Entry] = OrderedDict()  # by last row, oldest first

    def __len__(self) -> int:
        """How many documents beyond the sample are held."""
        return len(self._entries)

    def lookup(self, key: bytes) -> tuple[NDArray[np.bool_], int]:
        """See `MaskTable.lookup`; a document that is not known here cannot be trained on.

        Raises:
            XTFError: it was never read from the stream, or too long ago.
        """
        entry = self._entries.get(key)
        if entry is not None:
            return entry.keep, entry.best
        found = self._table.lookup(key)
        if found is None:
            raise XTFError(
                "a training row holds a document that xtf did not read from the stream, or read more than "
                f"{self.retained} rows earlier. Attach xtf after the last change to trainer.train_dataset, and let "
                "no dataloader of your own buffer or rebuild its rows."
            )
        return found

    def seen(self, key: bytes, row: int) -> Tally | None:
        """Note that a row holds a document; its tally, or None if it has to be added first."""
        entry = self._entries.get(key)
        if entry is not None:
            entry.row = row
            self._entries.move_to_end(key)
            return entry.tally
        index = self._table.find(key)
        return None if index < 0 else self._tallies[index]

    def add(self, documents: DocumentSet, selection: Selection, tallies: Tally, row: int) -> None:
        """Take in documents and what was decided for them, held by rows up to `row`."""
        offsets = documents.completion_offsets
        for index, key in enumerate(documents.keys):
            ids, completion = documents.document(index)
            keep = selection.keep[offsets[index] : offsets[index + 1]]
            parts = (ids.copy(), completion.copy(), keep.copy())  # views would hold on to the whole chunk
            self._entries[key.tobytes()] = Entry(*parts, int(selection.best[index]), tallies[index].copy(), row)

    def add_unlabelled(self, key: bytes, ids: NDArray[np.int64], width: int, row: int) -> None:
        """Take in a document without any completion token: there is nothing to decide."""
        nothing = np.zeros(0, dtype=bool)
        parts = (ids.astype(np.int32), np.zeros(len(ids), dtype=bool), nothing)
        self._entries[key] = Entry(*parts, -1, np.zeros(width, dtype=np.int64), row)

    def forget(self, row: int) -> None:
        """Drop documents whose last row is more than `retained` rows before `row`."""
        while self._entries:
            key, entry = next(iter(self._entries.items()))
            if entry.row >= row - self.retained:
                break
            del self._entries[key]

    def lengths(self) -> set[int]:
        """See `verification.Planned`."""
        return self._sample.lengths() | {len(entry.ids) for entry in self._entries.values()}

    def of_length(self, length: int) -> Iterator[Candidate]:
        """See `verification.Planned`."""
        yield from self._sample.of_length(length)
        for entry in self._entries.values():
            if len(entry.ids) == length:
                yield entry.ids, entry.completion, entry.keep
