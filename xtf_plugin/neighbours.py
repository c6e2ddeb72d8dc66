"""Other processes that score the same documents into the same cache without being ranks of one run.

Nobody waits for another and there is no lock: a process that is killed, or whose machine is cut off, must not stop the
others. Each says by an empty file that it is there, begins in a place of its own, and looks before every batch at what
has come to be stored. So a document is scored twice only while it is in flight in two of them.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from . import files, shards
from .layout import entries
from .lookup import Lookup
from .store import ScoreStore

RENEW_SECONDS = 3_600.0  # a day makes a sign stale, see `files.is_stale`


class Neighbours:
    """What other processes do in the folder of `store`. A context manager: inside it, this process is seen by others.

    Args:
        store: where this process puts its scores.
        keys: (N, 16) of all documents.
        lengths: (N,) completion tokens of each.

    Attributes:
        begin: where to begin to score, as a part of the tokens: 0 for the first process, 1/2 for the second, then 1/4,
            3/4, 1/8 and so on.
        inside: where to go on within what nobody has done, having come to what others did; the next of these parts.
    """

    def __init__(self, store: ScoreStore, keys: NDArray[np.uint8], lengths: NDArray[np.int64]) -> None:
        """Take what is in the folder as known."""
        self.begin, self.inside = 0.0, 0.5
        self._store, self._keys, self._lengths = store, keys, lengths
        self._sign = files.presence_path(store.directory)
        self._known = {path.name for path in entries(store.directory)}
        self._changed, self._touched = 0, time.monotonic()
        self._theirs: Lookup | None = None

    def __enter__(self) -> Neighbours:
        """Say that this process is there, and see who was before."""
        with contextlib.suppress(OSError):  # where nothing can be written nobody shares anything
            self._store.directory.mkdir(parents=True, exist_ok=True)
            before = self._signs()
            self._sign.touch(exist_ok=False)
            after = self._signs()
            own = after.pop(self._sign.name, None)
            if own is None:  # a folder that cannot be listed, or not yet: some network file systems are late
                return self
            # of two that come at once, both must agree on who was first: by the clock of the file system
            between = {name for name, when in after.items() if (when, name) < (own, self._sign.name)}
            index = len(before.keys() & after.keys() | between)
            self.begin, self.inside = _halves(index), _halves(index + 1)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the sign away."""
        files.discard(self._sign)

    def stored(self, documents: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of the documents, by index, others have stored since this process looked first."""
        self._renew()
        for path in self._new():
            records = self._store.read(path)
            if records is not None:
                self._theirs = self._theirs or Lookup(self._keys, self._lengths, ())
                self._theirs.take(records)
        if self._theirs is None:
            return np.zeros(len(documents), dtype=bool)
        return self._theirs.found[documents]

    def _renew(self) -> None:
        """Keep the sign young: on another host its age is all that tells whether this process is still at work."""
        if time.monotonic() - self._touched > RENEW_SECONDS:
            self._touched = time.monotonic()
            with contextlib.suppress(OSError):
                self._sign.touch()

    def _signs(self) -> dict[str, int]:
        """Names and times of the signs in the folder."""
        found = {}
        for path in entries(self._store.directory):
            with contextlib.suppress(OSError):  # gone since
                if files.is_presence(path):
                    found[path.name] = path.stat().st_mtime_ns
        return found

    def _new(self) -> list[Path]:
        """Shards that have come into the folder since the last look and are not this process's own."""
        try:
            changed = self._store.directory.stat().st_mtime_ns
        except OSError:
            return []
        if changed == self._changed:
            return []
        self._changed = changed
        found = [path for path in entries(self._store.directory) if path.suffix == shards.SUFFIX]
        new = [path for path in found if path.name not in self._known and path.name not in self._store.written]
        self._known.update(path.name for path in found)
        return new


def _halves(index: int) -> float:
    """0, 1/2, 1/4, 3/4, 1/8, ...: the bits of `index` behind the point, the lowest first."""
    part, weight = 0.0, 0.5
    while index:
        part += weight * (index & 1)
        index, weight = index >> 1, weight / 2
    return part
