"""The score cache: what a reference said about a document is stored and found again by content.

The key is the document and the reference and nothing else: changing a threshold reads scores and never makes them.
Shards are only added. A kill loses at most the shard being written. A damaged file is logged, set aside and scored
again. A folder that cannot be written costs the next run time, never this run its scores.

    <root>/v2/<reference>/reference.json          what the reference is, for `xtf cache list`
    <root>/v2/<reference>/<layers>/<hash>.parquet a shard, see shard_format.py; with `.damaged` appended: set aside
"""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from .. import files
from ..data.documents import KEY_BYTES
from ..errors import harmless
from ..store import shard_format
from .records import Lookup, Records, StoredScores, column_names, identities, merge
from .shard_format import BadShard, NewerShard

logger = logging.getLogger(__name__)

VERSION_FOLDER = "v2"
DESCRIPTION = "reference.json"
REFERENCE = re.compile(r"[0-9a-f]{8,128}")
LAYER_FOLDER = re.compile(r"none|layers-[0-9a-f,_]+")
_NAME_LIMIT = 100  # file systems allow 255 bytes; an irregular choice among a hundred layers would exceed that

Index = dict[Path, NDArray[np.bytes_]]  # `records.identities` of the documents in each shard


class ScoreStore:
    """A dictionary from document to its scores, see `records.Records`, that outlives the process.

    Args:
        root: the cache folder; made when the first shard is written.
        reference: hex fingerprint of the scoring reference, see fingerprint.py.
        layers: the layers that attention is averaged over, as in "0,1,2,3"; None: no attention, and log-probabilities
            stored beside any attention will do.
        description: of the reference, for `xtf cache list`; no text of the data.
        shard_tokens: a shard is written when this many tokens have come in ...
        shard_seconds: ... or when the oldest of them has waited this long.
        index: filled with what the shards that are read or written hold. A shard in it is read again only for a
            document that it has, so stores that share an index do not read a cache twice.

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
        index: Index | None = None,
    ) -> None:
        """Open the store and tidy up after killed processes; touches nothing else on disk."""
        self.root, self.reference, self.layers, self.description = Path(root), reference, layers, description
        self.shard_tokens, self.shard_seconds = shard_tokens, shard_seconds
        self.directory = reference_folder(root, reference) / layers_tag(layers)
        self.persistent = True
        self._index: Index = {} if index is None else index
        self._buffer: list[Records] = []
        self._since = 0.0  # when the oldest record in the buffer came in
        self._warned: set[Path] = set()
        for folder in (self.directory.parent, *layer_folders(self.directory.parent)):
            files.remove_stale(folder)

    def __enter__(self) -> ScoreStore:
        """Return the store itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Write what is left, also when the block ends with an error. The store stays usable."""
        self.flush()

    def load(self, keys: NDArray[np.uint8], lengths: NDArray[np.int64]) -> StoredScores:
        """The scores of `lookup`."""
        return self.lookup(keys, lengths).scores

    def lookup(self, keys: NDArray[np.uint8], lengths: NDArray[np.int64]) -> Lookup:
        """Find scores on disk and among those added to this store.

        A record counts only if its key and its number of completion tokens agree. Of several, the first one in sorted
        file order wins. A file that fails a check is logged and set aside, and its documents count as not found.

        Args:
            keys: (N, 16) uint8 document keys. lengths: (N,) completion tokens of each.
        """
        found = Lookup(keys, lengths, column_names(attention=self.layers is not None))
        for path in self._candidates():
            if found.found.all():
                break
            if path in self._index and not found.wants(self._index[path]):
                continue
            records = self.read(path)
            if records is not None:
                self._index[path] = identities(records.keys, records.lengths)
                found.take(records)
        for records in self._buffer:
            found.take(records)
        return found

    def add(self, records: Records) -> None:
        """Take in scores of documents; they are copied, and written a shard at a time.

        Args:
            records: offsets from 0; attention exactly if the store has layers.

        Raises:
            ValueError: arrays that do not fit together. A folder that cannot be written is logged once, never raised.
        """
        records = _checked(records, self.layers)
        if not len(records.keys):
            return
        if not self._buffer:
            self._since = time.monotonic()
        self._buffer.append(records)
        if self.persistent and (
            sum(len(records.logprobs) for records in self._buffer) >= self.shard_tokens
            or time.monotonic() - self._since >= self.shard_seconds
        ):
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
                name, data = shard_format.encode(pending[0], self.reference, self.layers)
                files.write_whole(self.directory / name, data)
                records = pending.pop(0)
                self._index[self.directory / name] = identities(records.keys, records.lengths)
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

    def _candidates(self) -> Iterator[Path]:
        folders = [self.directory]
        if self.layers is None:  # the folder that this store writes to comes first
            folders += [folder for folder in layer_folders(self.directory.parent) if folder != self.directory]
        for folder in folders:
            yield from (path for path in entries(folder) if path.suffix == shard_format.SUFFIX)

    def read(self, path: Path) -> Records | None:
        """The records of a shard; None: the reason is logged, and a file that is itself at fault is set aside."""
        try:
            layers, records = shard_format.read(path, self.reference)
            if layers_tag(layers) != path.parent.name or (records.attention is None) != (layers is None):
                raise BadShard(f"scores for other layers, {layers}")
            return records
        except FileNotFoundError:  # set aside or pruned by another process since it was listed
            if path.is_symlink():
                self._warn(path, "a link to a file that is not there; ignored")
            return None
        except BadShard as error:
            self._warn(path, f"{error}; {files.set_aside(path)}")
        except (NewerShard, OSError) as error:
            # a permission or a network file system's hiccup says nothing against the file: it stays where it is
            self._warn(path, f"{error}; ignored")
        return None

    def _warn(self, path: Path, what: str) -> None:
        if path not in self._warned:
            self._warned.add(path)
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
    """Shards of at least `shard_tokens` tokens, the last one aside, each of whole additions.

    An addition is a scoring batch. Stored whole or not at all, it is scored again in the same company after a kill, and
    its scores are the same to the last bit.
    """
    begun: list[Records] = []
    for records in added:
        begun.append(records)
        if sum(len(part.logprobs) for part in begun) >= shard_tokens:
            yield merge(begun)
            begun = []
    if begun:
        yield merge(begun)


def _describe(folder: Path, description: Mapping[str, Any]) -> None:
    """Write a reference's description, unless there is one; a failure is logged, not fatal."""
    target = folder / DESCRIPTION
    if target.exists():
        return
    try:
        files.write_whole(target, json.dumps(dict(description), default=str, indent=2).encode())
    except OSError as error:
        logger.info("xtf: %s cannot be written (%s); `xtf cache list` will not know the name", target, error)


def reference_folder(root: Path, reference: str) -> Path:
    """Folder of a reference; ValueError if `reference` is no lower-case hex string (it becomes a path)."""
    if not REFERENCE.fullmatch(reference):
        raise ValueError(f"a reference fingerprint is 8 to 128 lower-case hex digits, not {reference!r}")
    return Path(root) / VERSION_FOLDER / reference


def layers_tag(layers: str | None) -> str:
    """Folder name for the layers that attention is averaged over: `layers-0_3,7` for "0,1,2,3,7", `none` for None."""
    if layers is None:
        return "none"
    if not shard_format.LAYERS.fullmatch(layers):
        raise ValueError(f"layers are numbers joined by commas, not {layers!r}")
    runs: list[list[int]] = []
    for layer in map(int, layers.split(",")):
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    text = ",".join(str(first) if first == last else f"{first}_{last}" for first, last in runs)
    return "layers-" + (text if len(text) <= _NAME_LIMIT else xxhash.xxh3_128_hexdigest(layers.encode()))


def entries(folder: Path) -> list[Path]:
    """The content of a folder, sorted by name; empty if there is none or (logged) if it cannot be listed."""
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        _warn_unlisted(folder, error.strerror)
        return []


@lru_cache(maxsize=1024)
def _warn_unlisted(folder: Path, why: str) -> None:
    """Log this once: a run lists a folder several times."""
    logger.warning("xtf: %s cannot be listed (%s); what it holds counts as not there", folder, why)


def layer_folders(folder: Path) -> list[Path]:
    """The score folders of a reference, sorted by name."""
    return [path for path in entries(folder) if LAYER_FOLDER.fullmatch(path.name) and os.path.isdir(path)]
