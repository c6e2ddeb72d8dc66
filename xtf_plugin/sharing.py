"""Scoring shared out between ranks: who scores what, and how every rank ends with all of it.

A rank scores its own documents and hands the scores round every few seconds, so that none waits in silence for another,
and none needs to see another's disk. With a sharded model (FSDP) each forward is a collective of all ranks: then they
run the same number of them, whatever their documents are.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .errors import XTFError
from .fingerprint import weights_sample
from .lookup import Lookup, StoredScores
from .ranks import BEAT_SECONDS, Ranks
from .records import COLUMNS, Records, merge

if TYPE_CHECKING:
    from .data.documents import DocumentSet
    from .reference import Reference
    from .store import ScoreStore

LOCKSTEP_BATCHES = 16  # forwards between two meetings of ranks that go in step anyway
PIECE_TOKENS = 2_000_000  # stored scores handed on at a time


def share_out(lengths: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """The rank of each document, (n,): tokens are balanced to within one document, and so are lengths.

    Equals dealing the documents, longest first, to ranks 0, 1, ..., size - 1, size - 1, ..., 1, 0, 0, 1, ...
    """
    order = np.lexsort((np.arange(len(lengths)), -lengths))
    place = np.arange(len(lengths)) % (2 * size)
    rank = np.empty(len(lengths), dtype=np.int64)
    rank[order] = np.where(place < size, place, 2 * size - 1 - place)
    return rank


def open_on_all(ranks: Ranks, reference: Callable[[], Reference]) -> Reference:
    """The reference, opened by every rank. A collective.

    Raises:
        XTFError: it has other weights on some rank, though ranks agreed on what to load; or see `Ranks.each`.
    """
    opened = ranks.each(reference)
    if ranks.size > 1 and not opened.lockstep:  # in step, each holds a part
        ranks.agree(weights_sample(opened.model), "weights of the reference")
    return opened


@dataclass
class Message:
    """What one rank tells the others at a meeting."""

    finished: bool
    failed: str
    counts: list[float]
    records: Records | None

    def to_bytes(self) -> bytes:
        """For the others."""
        head = json.dumps([self.finished, self.failed, self.counts]).encode()
        return head + b"\n" + (b"" if self.records is None else self.records.to_bytes())

    @classmethod
    def from_bytes(cls, sent: bytes) -> Message:
        """What another rank told."""
        head, _, data = sent.partition(b"\n")
        finished, failed, counts = json.loads(head)
        return cls(finished, failed, counts, Records.from_bytes(data) if data else None)


def meet(
    ranks: Ranks,
    own: Iterator[Records],
    counts: Callable[[], list[float]],
    take: Callable[[Records, bool], None],
    *,
    lockstep: bool,
) -> list[list[float]]:
    """Work through `own` and hand every rank's records to `take`, until all ranks are through.

    Equals `for records in own: take(records, True)` on every rank, and `take(records, False)` for those of the others.

    Args:
        ranks: of the run.
        own: scores this rank's batches, one after the other.
        counts: what this rank has done, asked for once it is through.
        take: gets records, and whether they are this rank's own.
        lockstep: meet after a fixed number of batches, not of seconds.

    Returns:
        every rank's counts.

    Raises:
        XTFError: another rank failed. What fails here is raised once the others know.
    """
    finished = False
    while True:
        deadline, outbox = time.monotonic() + BEAT_SECONDS, list[Records]()
        while not finished and (len(outbox) < LOCKSTEP_BATCHES if lockstep else time.monotonic() < deadline):
            try:
                records = next(own, None)
                if records is not None:
                    take(records, True)
            except BaseException as error:
                if isinstance(error, Exception) and not lockstep:  # in step, the others are inside a forward
                    failed = f"{type(error).__name__}: {error}"  # never empty, as a MemoryError's own text is
                    ranks.gather(Message(True, failed, counts(), None).to_bytes())
                raise
            if records is None:
                finished = True
            else:
                outbox.append(records)
        message = Message(finished, "", counts(), merge(outbox) if outbox else None)
        heard = [Message.from_bytes(sent) for sent in ranks.gather(message.to_bytes())]
        for rank, theirs in enumerate(heard):
            if theirs.failed:
                raise XTFError(f"rank {rank} failed while scoring: {theirs.failed}")
            if rank != ranks.rank and theirs.records is not None:
                take(theirs.records, False)
        if all(theirs.finished for theirs in heard):
            return [theirs.counts for theirs in heard]


def pool(ranks: Ranks, store: ScoreStore, documents: DocumentSet, stored: StoredScores) -> StoredScores:
    """Stored scores, with those that only other ranks have on their disks; equal on every rank. A collective.

    Where ranks have different scores of a document (each scored it once, in other batches), the lowest rank's count: a
    plan must not differ between ranks by so much as a rounding.
    """
    if ranks.size == 1:
        return stored
    sizes = np.diff(documents.completion_offsets)
    sent = ranks.gather(np.packbits(stored.found).tobytes())
    found = np.stack([np.unpackbits(np.frombuffer(bits, np.uint8), count=len(sizes)) for bits in sent]).astype(bool)
    partial = np.flatnonzero(found.any(0) & ~found.all(0))
    owner = found.argmax(0)
    before = np.concatenate([[0], np.cumsum(sizes[partial])])
    low = 0
    while low < len(partial):
        high = max(low + 1, int(np.searchsorted(before, before[low] + PIECE_TOKENS, side="right")) - 1)
        piece = partial[low:high]
        mine = _records(documents, stored, piece[owner[piece] == ranks.rank])
        for rank, theirs in enumerate(ranks.gather(mine.to_bytes())):
            if rank != ranks.rank:
                store.hold(Records.from_bytes(theirs))
        low = high
    return store.load(documents.keys, sizes) if len(partial) else stored


def alike(ranks: Ranks, stored: StoredScores) -> StoredScores:
    """The scores themselves, or rank 0's if some rank's differ. A collective."""
    columns = {name: getattr(stored, name) for name in COLUMNS}
    columns = {name: None if values is None else ranks.same(values) for name, values in columns.items()}
    return StoredScores(stored.found, **columns)


def _records(documents: DocumentSet, stored: StoredScores, wanted: NDArray[np.int64]) -> Records:
    """What is stored about the `wanted` documents."""
    offsets = documents.completion_offsets
    known = {name: getattr(stored, name) for name in COLUMNS if getattr(stored, name) is not None}
    lookup = Lookup(documents.keys[wanted], np.diff(offsets)[wanted], tuple(known))
    lookup.take(Records(documents.keys, offsets, **known))
    found = lookup.result()
    columns = {name: getattr(found, name) for name in known}
    return Records(documents.keys[wanted], np.concatenate([[0], np.cumsum(lookup.lengths)]), **columns)
