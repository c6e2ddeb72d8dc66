"""The score cache: scores of documents, stored on disk and found by content.

A document is found by its key, the reference and, for attention, the layers, so a new threshold needs no scoring.
Shards are added and never changed. A killed process loses at most the scores of a minute or of 2 million tokens, which
are not written yet. A damaged file is logged and set aside, and its
documents are scored again. If a folder cannot be written, scores stay in memory.

    <root>/v2/<reference>/reference.json          description of the reference, for `xtf cache list`
    <root>/v2/<reference>/<layers>/<hash>.parquet a shard, see shard_format.py; `.damaged` is appended if set aside
    <root>/v2/<reference>/relevance-<hash>.parquet a table over the vocabulary, so that a second run needs no model
    <root>/v2/<reference>/scores-<hash>.parquet  one score of a large dataset, so that a second start finds it at once
"""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from numpy.typing import NDArray

from .. import files
from ..data.keys import KEY_BYTES
from ..data.ragged import Ints
from ..errors import harmless
from . import shard_format
from .records import Lookup, Records, merge
from .shard_format import BadShard, NewerShard

logger = logging.getLogger(__name__)

VERSION_FOLDER = "v2"
DESCRIPTION = "reference.json"
REFERENCE = re.compile(r"[0-9a-f]{8,128}")
LAYER_FOLDER = re.compile(r"none|layers-[0-9a-f,_]+")
_NAME_LIMIT = 100  # file systems allow 255 bytes; an irregular choice among a hundred layers would exceed that

Index = dict[Path, tuple[NDArray[np.uint8], Ints]]  # keys and lengths of the documents in each shard


class ScoreStore:
    """A persistent dictionary from documents to their scores, see `records.Records`.

    Opening a store deletes stale temporary files of the reference.

    Args:
        root: the cache folder; created when the first shard is written.
        reference: hex fingerprint of the scoring reference, see fingerprint.py.
        layers: the layers that attention is averaged over, as in "0,1,2,3"; None: no attention is needed, so shards of
            any layers are read.
        description: of the reference, for `xtf cache list`; no text of the data.
        shard_tokens: a shard is written as soon as this many tokens were added ...
        shard_seconds: ... or the oldest of them were added so long ago.
        index: filled with the documents of all shards that are read or written. A shard in it is read again only for a
            document that it holds, so stores that share an index read each shard once.

    Attributes:
        directory: the folder of new shards.
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
        self.root, self.reference, self.layers, self.description = Path(root), reference, layers, description
        self.shard_tokens, self.shard_seconds = shard_tokens, shard_seconds
        self.directory = reference_folder(root, reference) / layers_tag(layers)
        self.persistent = True
        self._index: Index = {} if index is None else index
        self._buffer: list[Records] = []
        self._since = 0.0  # when the oldest record in the buffer was added
        self._warned: set[Path] = set()
        for folder in (self.directory.parent, *layer_folders(self.directory.parent)):
            files.remove_stale(folder)

    def __enter__(self) -> ScoreStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.flush()

    def lookup(self, keys: NDArray[np.uint8], lengths: NDArray[np.int64]) -> Lookup:
        """Find scores on disk and in memory.

        A record is found if its key and its number of completion tokens match. Of several, the first one in sorted file
        order is used. A file that fails a check is logged and set aside, and its documents are not found.

        Args:
            keys: (N, 16) uint8 document keys. lengths: (N,) completion tokens of each.
        """
        found = Lookup(keys, lengths, attention=self.layers is not None)
        for records in self._shards(found):
            found.take(records)
        for records in self._buffer:
            found.take(records)
        return found

    def add(self, records: Records) -> None:
        """Copy scores of documents, and write them as soon as there are enough for a shard.

        A folder that cannot be written is logged once, and no error is raised.

        Args:
            records: offsets from 0; with attention if and only if the store has layers.

        Raises:
            ValueError: the arrays do not match.
        """
        records = _checked(records, self.layers)
        if not len(records.keys):
            return
        if not self._buffer:
            self._since = time.monotonic()
        self._buffer.append(records)
        full = sum(len(records.logprobs) for records in self._buffer) >= self.shard_tokens
        if self.persistent and (full or time.monotonic() - self._since >= self.shard_seconds):
            self.flush()

    def flush(self) -> None:
        """Write the scores in memory. What cannot be written stays in memory until the next flush."""
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
                self._index[self.directory / name] = records.keys, records.lengths
            self.persistent = True
        except OSError as error:
            if self.persistent:
                logger.warning(
                    "xtf: scores cannot be written to %s (%s). This run keeps them in memory; the next run scores "
                    "again. Set xtf `cache_dir` or XTF_CACHE to a writable folder with free space.",
                    self.directory,
                    error.strerror or error,
                )
            self.persistent = False
        finally:
            self._buffer = pending

    def _shards(self, found: Lookup) -> Iterator[Records]:
        """Shards that may hold what is not found yet; while one is used, the next is read on another core."""
        reading: list[tuple[Path, Future[Records | None]]] = []
        with ThreadPoolExecutor(1) as reader:
            for path in self._candidates():
                if found.found.all():
                    break
                if path not in self._index or found.wants(*self._index[path]):
                    reading.append((path, reader.submit(self.read, path)))
                if len(reading) > 1:
                    yield from self._indexed(*reading.pop(0))
            for path, shard in reading:
                yield from self._indexed(path, shard)

    def _indexed(self, path: Path, shard: Future[Records | None]) -> Iterator[Records]:
        records = shard.result()
        if records is not None:
            self._index[path] = records.keys, records.lengths
            yield records

    def _candidates(self) -> Iterator[Path]:
        folders = [self.directory]
        if self.layers is None:  # shards of any layers have the log-probabilities
            folders += [folder for folder in layer_folders(self.directory.parent) if folder != self.directory]
        for folder in folders:
            yield from (path for path in entries(folder) if path.suffix == shard_format.SUFFIX)

    def read(self, path: Path) -> Records | None:
        """The records of a shard. None: the reason is logged, and an invalid file is set aside."""
        try:
            layers, records = shard_format.read(path, self.reference)
            if layers_tag(layers) != path.parent.name or (records.attention is None) != (layers is None):
                raise BadShard(f"scores for other layers, {layers}")
            return records
        except FileNotFoundError:  # set aside or pruned by another process since it was listed
            if path.is_symlink():
                self._warn(path, "a broken link; ignored")
            return None
        except BadShard as error:
            self._warn(path, f"{error}; {files.set_aside(path)}")
        except (NewerShard, OSError) as error:
            # the file may be valid: it is not set aside
            self._warn(path, f"{error}; ignored")
        return None

    def _warn(self, path: Path, what: str) -> None:
        if path not in self._warned:
            self._warned.add(path)
            logger.warning("xtf: score file %s. Its documents are scored again.", harmless(f"{path}: {what}"))


def _checked(added: Records, layers: str | None) -> Records:
    """Copies of the arrays; raises ValueError if they do not match."""
    if (added.attention is None) != (layers is None):
        raise ValueError(f"attention must be given if and only if the store has layers; the store has {layers}")
    records = Records(
        keys=np.array(added.keys, dtype=np.uint8),
        offsets=np.array(added.offsets, dtype=np.int64),
        **{name: np.array(values, dtype=np.float32) for name, values in added.columns.items()},
    )
    n, m = len(records.keys), len(records.logprobs)
    fits = records.keys.shape == (n, KEY_BYTES) and records.offsets.shape == (n + 1,)
    fits = fits and records.offsets[0] == 0 and records.offsets[-1] == m and bool((records.lengths >= 0).all())
    if not fits or any(values.shape != (m,) for values in records.columns.values()):
        raise ValueError(f"keys {records.keys.shape}, offsets and scores ({m},) do not match")
    return records


def _cut(added: list[Records], shard_tokens: int) -> Iterator[Records]:
    """Merge additions into shards of at least `shard_tokens` tokens; the last one may have fewer.

    An addition is a scoring batch and is never split: after a kill the same batch is scored again, so that its scores
    are equal to the last bit.
    """
    parts: list[Records] = []
    for records in added:
        parts.append(records)
        if sum(len(part.logprobs) for part in parts) >= shard_tokens:
            yield merge(parts)
            parts = []
    if parts:
        yield merge(parts)


def _describe(folder: Path, description: Mapping[str, Any]) -> None:
    """Write a reference's description unless there is one; a failure is logged."""
    target = folder / DESCRIPTION
    if target.exists():
        return
    try:
        files.write_whole(target, json.dumps(dict(description), default=str, indent=2).encode())
    except OSError as error:
        logger.info("xtf: %s cannot be written (%s); `xtf cache list` will not show the name", target, error)


def reference_folder(root: Path, reference: str) -> Path:
    """Folder of a reference; ValueError if `reference` is no lower-case hex string."""
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
    """Paths in a folder, sorted by name; none if the folder is missing or (logged once) cannot be listed."""
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        _warn_unlisted(folder, error.strerror)
        return []


@lru_cache(maxsize=1024)
def _warn_unlisted(folder: Path, why: str) -> None:
    logger.warning("xtf: %s cannot be listed (%s); its files are ignored", folder, why)


def layer_folders(folder: Path) -> list[Path]:
    """The score folders of a reference, sorted by name."""
    return [path for path in entries(folder) if LAYER_FOLDER.fullmatch(path.name) and os.path.isdir(path)]


def cached_table(path: Path, reference: str) -> NDArray[np.float32] | None:
    """The table that `store_table` wrote to `path`; None if it is missing, damaged or of another reference (logged)."""
    try:
        if not path.is_file():
            if os.path.lexists(path):
                logger.warning("xtf: %s: no regular file; %s; it is computed again", path, files.set_aside(path))
            return None
        table = pq.read_table(files.for_arrow(path), memory_map=False)
        values: NDArray[np.float32] = table.column("relevance").to_numpy().astype(np.float32, copy=False)
        checksum = (table.schema.metadata or {}).get(b"checksum", b"").decode()
    except (OSError, pa.ArrowException, KeyError, ValueError, TypeError) as error:
        logger.warning("xtf: %s cannot be read (%s); it is computed again", path, error)
        return None
    if checksum != _checksum(path, reference, values):
        logger.warning("xtf: %s does not match its checksum; it is computed again", path)
        return None
    return values


def store_table(path: Path, reference: str, values: NDArray[np.float32]) -> None:
    """Write a table; a folder that cannot be written is logged."""
    metadata = {"checksum": _checksum(path, reference, values)}
    buffer = pa.BufferOutputStream()
    table = pa.table({"relevance": values}).replace_schema_metadata(metadata)
    # a dictionary of scores takes time, and one group of rows is read without a copy
    pq.write_table(table, buffer, compression="lz4", use_dictionary=False, row_group_size=max(1, len(values)))
    try:
        files.write_whole(path, memoryview(buffer.getvalue()))
    except OSError as error:
        logger.warning("xtf: %s cannot be written (%s); the next run computes it again", path, error)


def _checksum(path: Path, reference: str, values: NDArray[np.float32]) -> str:
    """Digest of values, name and reference, which a table of another reference does not match."""
    content = xxhash.xxh3_128_hexdigest(np.ascontiguousarray(values).data)
    return files.digest({"table": path.name, "reference": reference, "values": content})


def table_name(key: str, kind: str = "relevance") -> str:
    """File name of a stored table: `relevance` over the vocabulary, or `scores` of a dataset; `key` is hex."""
    if not re.fullmatch(r"[0-9a-f]{32}", key):
        raise ValueError(f"not a table key: {key!r}")
    return f"{kind}-{key}.parquet"
