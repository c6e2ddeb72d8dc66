"""Scores on disk: what a reference once said about a document is kept and found again by content.

Scores are facts and thresholds are choices, so nothing but the document and the reference is part of the key: changing
a threshold reads, it never scores. Shards are only ever added. A kill loses at most the one being written; a damaged
file is told, set aside and scored again; an unwritable folder costs the next run time, never this run its scores.

    <root>/v2/<reference>/reference.json          what the reference is, for `xtf cache list`
    <root>/v2/<reference>/<layers>/<hash>.parquet a shard, see shards.py; `.damaged` behind it: set aside, never read
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import files, shards
from .documents import KEY_BYTES
from .errors import harmless
from .layout import DESCRIPTION, EARLIER_FOLDERS, entries, layer_folders, layers_tag, reference_folder
from .lookup import Lookup, StoredScores
from .records import Records, column_names, merge
from .shards import BadShard, NewerShard

logger = logging.getLogger(__name__)

__all__ = ["ScoreStore", "StoredScores"]


class ScoreStore:
    """Equals a dictionary from document to its scores, see `records.Records`, that outlives the process.

    Args:
        root: the cache folder; made when the first shard is written.
        reference: hex fingerprint of the scoring reference, see fingerprint.py.
        layers: the layers that attention is averaged over, as in "0,1,2,3"; None: no attention, and log-probabilities
            stored beside any attention will do.
        description: what to tell about the reference in `xtf cache list`; no text of the data.
        shard_tokens: a shard is written when this many tokens have come in ...
        shard_seconds: ... or when the oldest of them has waited this long.

    Attributes:
        directory: where the shards go.
        persistent: False while scores are held in memory because the folder cannot be written.

    Raises:
        ValueError: `reference` or `layers` is not of the form above.
    """

    def __init__(
        self,
        root: Path,
        reference: str,
        layers: str | None,
        *,
        description: Mapping[str, Any] | None = None,
        shard_tokens: int = 2_000_000,
        shard_seconds: float = 60.0,
    ) -> None:
        """Open the store and tidy up after killed processes; touches nothing else on disk."""
        self.root, self.reference, self.layers, self.description = Path(root), reference, layers, description
        self.shard_tokens, self.shard_seconds = shard_tokens, shard_seconds
        self.directory = reference_folder(root, reference) / layers_tag(layers)
        self.persistent = True
        self._held: list[Records] = []
        self._buffer: list[Records] = []
        self._buffered = 0  # tokens
        self._since = 0.0  # when the oldest of them came in
        self._told: set[Path] = set()
        for folder in (self.directory.parent, *layer_folders(self.directory.parent)):
            files.remove_stale(folder)
        _tell_earlier(self.root, reference)

    def __enter__(self) -> ScoreStore:
        """Return the store itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Write what is left, also when the block ends with an error."""
        self.close()

    def load(self, keys: NDArray[np.uint8], lengths: NDArray[np.int64]) -> StoredScores:
        """Find scores on disk and among those added to this store.

        A record counts only if its key and its number of completion tokens agree. Of several, the first one in sorted
        file order wins. A file that fails a check is told, set aside, and its documents count as not found.

        Args:
            keys: (N, 16) uint8 document keys. lengths: (N,) completion tokens of each.
        """
        lookup = Lookup(keys, lengths, column_names(attention=self.layers is not None))
        for path in self._candidates():
            if lookup.found.all():
                break
            records = self.read(path)
            if records is not None:
                lookup.take(records)
        for records in (*self._held, *self._buffer):
            lookup.take(records)
        return lookup.result()

    def hold(self, records: Records) -> None:
        """Remember scores that another process has or writes, in memory alone; `load` finds them."""
        if len(records.keys):
            self._held.append(records)

    def add(self, records: Records) -> None:
        """Take in scores of documents; they are copied, and written a shard at a time.

        Args:
            records: offsets from 0; attention exactly if the store has layers.

        Raises:
            ValueError: arrays that do not fit together. Never for a folder that cannot be written: that is told once.
        """
        records = _checked(records, self.layers)
        if not len(records.keys):
            return
        if not self._buffer:
            self._since = time.monotonic()
        self._buffer.append(records)
        self._buffered += len(records.logprobs)
        due = self._buffered >= self.shard_tokens or time.monotonic() - self._since >= self.shard_seconds
        if due and self.persistent:
            self.flush()

    def flush(self) -> None:
        """Write what has come in; what cannot be written stays in memory, and the next flush tries again."""
        if not self._buffer:
            return
        pending = list(_cut(self._buffer, self.shard_tokens))
        try:
            if self.description is not None:
                _describe(self.directory.parent, self.description)
            while pending:
                name, data = shards.encode(pending[0], self.reference, self.layers)
                files.write_whole(self.directory / name, data)
                del pending[0]
            self.persistent = True
        except OSError as error:
            if self.persistent:
                logger.warning(
                    "xtf: scores cannot be written to %s (%s). They are kept in memory: this run goes on, the next "
                    "one scores again. Name a writable folder with free space under xtf `cache_dir`, or in XTF_CACHE.",
                    self.directory,
                    error.strerror or error,
                )
            self.persistent = False
        finally:
            self._buffer = pending
            self._buffered = sum(len(records.logprobs) for records in pending)

    def close(self) -> None:
        """Write what is left."""
        self.flush()

    def _candidates(self) -> Iterator[Path]:
        folders = [self.directory]
        if self.layers is None:  # its own first: what this store wrote must not depend on what others write later
            folders += [folder for folder in layer_folders(self.directory.parent) if folder != self.directory]
        for folder in folders:
            yield from (path for path in entries(folder) if path.suffix == shards.SUFFIX)

    def read(self, path: Path) -> Records | None:
        """The records of a shard, or None: then it was told why, and set aside if the file itself is at fault."""
        try:
            layers, records = shards.read(path, self.reference)
            if layers_tag(layers) != path.parent.name or (records.attention is None) != (layers is None):
                raise BadShard(f"scores for other layers, {layers}")
            return records
        except FileNotFoundError:  # set aside or pruned by another process since it was listed
            if path.is_symlink():
                self._tell(path, "a link to a file that is not there; ignored")
            return None
        except BadShard as error:
            self._tell(path, f"{error}; {files.set_aside(path)}")
        except (NewerShard, OSError) as error:
            # a permission or a network file system's hiccup says nothing against the file: it stays where it is
            self._tell(path, f"{error}; ignored")
        return None

    def _tell(self, path: Path, what: str) -> None:
        if path not in self._told:
            self._told.add(path)
            logger.warning("xtf: score file %s. Its documents count as not scored.", harmless(f"{path}: {what}"))


def _checked(added: Records, layers: str | None) -> Records:
    """Own copies of what was added."""
    if (added.attention is None) != (layers is None):
        raise ValueError(f"attention must be given exactly if the store has layers; the store has {layers}")
    records = Records(
        keys=np.array(added.keys, dtype=np.uint8),
        offsets=np.array(added.offsets, dtype=np.int64),
        **{name: np.array(values, dtype=np.float32) for name, values in added.columns.items()},
    )
    n, m = len(records.keys), len(records.logprobs)
    fits = records.keys.shape == (n, KEY_BYTES) and records.offsets.shape == (n + 1,)
    fits = fits and records.offsets[0] == 0 and records.offsets[-1] == m and bool((records.lengths >= 0).all())
    if not fits or any(values.shape != (m,) for values in records.columns.values()):
        raise ValueError(f"keys {records.keys.shape}, offsets and scores ({m},) do not fit together")
    return records


def _cut(added: list[Records], shard_tokens: int) -> Iterator[Records]:
    """Shards of about `shard_tokens` tokens and about the same size, cut between additions wherever that can be.

    An addition is a scoring batch. Stored whole or not at all, it is scored again in the same company after a kill, and
    its scores are the same to the last bit.
    """
    total = sum(len(records.logprobs) for records in added)
    size = -(-total // max(1, round(total / shard_tokens)))
    begun: list[Records] = []
    room = size
    for records in added:
        begun.append(records)
        room -= len(records.logprobs)
        if room <= 0:
            yield from _pieces(merge(begun), shard_tokens)
            begun, room = [], size
    if begun:
        yield from _pieces(merge(begun), shard_tokens)


def _pieces(records: Records, shard_tokens: int) -> Iterator[Records]:
    """The records, in pieces of about `shard_tokens` if there are more than twice as many (a longer document alone)."""
    total = len(records.logprobs)
    size = total if total <= 2 * shard_tokens else -(-total // (total // shard_tokens))
    low = 0
    while low < len(records.keys):
        limit = records.offsets[low] + size
        high = max(low + 1, int(np.searchsorted(records.offsets, limit, side="right")) - 1)
        yield records.part(low, high)
        low = high


def _tell_earlier(root: Path, reference: str) -> None:
    """Say that scores of an earlier format are there and not used; they stay, for whoever still runs that version."""
    for name in EARLIER_FOLDERS:
        folder = root / name / reference
        if layer_folders(folder):
            logger.warning(
                "xtf: the scores in %s were written by an earlier xtf-plugin and lack what this one records; they "
                "count as not there. `xtf cache prune --all` removes them with all others.",
                folder,
            )


def _describe(folder: Path, description: Mapping[str, Any]) -> None:
    """Write a reference's description, unless there is one; a failure is told, not fatal."""
    target = folder / DESCRIPTION
    if target.exists():
        return
    try:
        files.write_whole(target, json.dumps(dict(description), default=str, indent=2).encode())
    except OSError as error:
        logger.info("xtf: %s cannot be written (%s); `xtf cache list` will not know the name", target, error)
