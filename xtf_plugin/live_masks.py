"""Keep flags of a stream's documents: those of the calibration sample for good, the others while they are under way.

A stream may have no end, so documents are forgotten some rows after they were read. One that is asked for after that
stops the run: training on it unmasked, or on a guess, is what this table prevents.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .data.documents import DocumentSet
from .errors import XTFError
from .selection.select import Selection
from .verification import Candidate, Ids, token_hash

Tally = NDArray[np.int64]


@dataclass
class Entry:
    """A document under way."""

    ids: NDArray[np.int32]  # (T,)
    completion: NDArray[np.bool_]  # (T,)
    keep: NDArray[np.bool_]  # flags of the completion tokens
    best: int  # see `MaskTable`
    tally: Tally  # counts of its tokens
    row: int = 0  # the last row of the stream that held it


class LiveMasks:
    """A dictionary from document key to keep flags that forgets a document `retained` rows after its last row."""

    def __init__(self, retained: int) -> None:
        self.retained = retained
        self._sample: dict[bytes, Entry] = {}
        self._entries: OrderedDict[bytes, Entry] = OrderedDict()  # by last row, oldest first
        self._by_tokens: defaultdict[int, dict[bytes, Entry]] = defaultdict(dict)

    def __len__(self) -> int:
        """How many documents beyond the sample are held."""
        return len(self._entries)

    def lookup(self, key: bytes) -> tuple[NDArray[np.bool_], int]:
        """See `MaskTable.lookup`; XTFError for a document that was never read from the stream, or too long ago."""
        entry = self._entries.get(key) or self._sample.get(key)
        if entry is None:
            raise XTFError(
                "a training row holds a document that xtf did not read from the stream, or read more than "
                f"{self.retained} rows earlier. Attach xtf after the last change to trainer.train_dataset, and let "
                "no dataloader of your own buffer or rebuild its rows."
            )
        return entry.keep, entry.best

    def seen(self, key: bytes, row: int) -> Tally | None:
        """Note that a row holds a document; its tally, or None if it has to be added first."""
        entry = self._entries.get(key) or self._sample.get(key)
        if entry is None:
            return None
        entry.row = row
        if key in self._entries:
            self._entries.move_to_end(key)
        return entry.tally

    def add(self, key: bytes, entry: Entry, *, sample: bool = False) -> None:
        """Take in a document; one of the sample is never forgotten."""
        (self._sample if sample else self._entries)[key] = entry
        self._by_tokens[token_hash(entry.ids)][key] = entry

    def add_all(self, documents: DocumentSet, selection: Selection, tallies: Tally, *, sample: bool = False) -> None:
        """Take in documents and what was decided for them."""
        offsets = documents.completion_offsets
        for index, key in enumerate(documents.keys):
            parts = (*documents.document(index), selection.keep[offsets[index] : offsets[index + 1]])
            ids, completion, keep = (part.copy() for part in parts)  # views would hold on to the whole stretch
            entry = Entry(ids, completion, keep, int(selection.best[index]), tallies[index].copy())
            self.add(key.tobytes(), entry, sample=sample)

    def forget(self, row: int) -> None:
        """Drop documents whose last row is more than `retained` rows before `row`."""
        while self._entries and next(iter(self._entries.values())).row < row - self.retained:
            key, entry = self._entries.popitem(last=False)
            alike = self._by_tokens[token_hash(entry.ids)]
            del alike[key]
            if not alike:
                del self._by_tokens[token_hash(entry.ids)]

    @property
    def lengths(self) -> set[int]:
        """See `verification.Planned`."""
        return {len(entry.ids) for held in (self._sample, self._entries) for entry in held.values()}

    def find(self, ids: Ids) -> Iterator[Candidate]:
        """See `verification.Planned`."""
        for entry in self._by_tokens.get(token_hash(ids), {}).values():
            if np.array_equal(entry.ids, ids):
                yield entry.completion, entry.keep
