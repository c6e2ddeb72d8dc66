"""`xtf cache list` and `xtf cache prune`: list the score cache, and delete from it.

Only files with names of ours are deleted, only below the version folder (`<root>/v2`), and no symbolic link is followed
there, so that a wrong cache folder loses no other file.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import stat
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from .. import files
from ..errors import XTFUserError, harmless
from . import shard_format
from .store import DESCRIPTION, REFERENCE, VERSION_FOLDER, entries, layer_folders

logger = logging.getLogger(__name__)

_File = tuple[Path, os.stat_result]
_SHARD = re.compile(r"[0-9a-f]{32}\.parquet")
_CONTENT = re.compile(r"((relevance|scores)-)?[0-9a-f]{32}\.parquet(\.damaged)?")


@dataclass(frozen=True)
class CacheEntry:
    """One score folder: a reference and the layers that attention received is averaged over.

    `documents` and `tokens` count records: a document that was scored twice counts twice. `bytes` of the first entry of
    a reference includes its tables. `modified` is in POSIX seconds.
    """

    reference: str
    description: Mapping[str, Any]
    layers: str | None
    documents: int
    tokens: int
    bytes: int
    modified: float


@dataclass(frozen=True)
class PruneResult:
    """What `prune_cache` removed (in a dry run: would remove), and the paths it refused, each with the reason."""

    removed: tuple[Path, ...]
    bytes: int
    refused: tuple[tuple[Path, str], ...]
    dry_run: bool


def list_cache(root: Path) -> list[CacheEntry]:
    """Every score folder below `root`, by reference; a missing cache is empty. Reads no scores."""
    listed = []
    for folder in _reference_folders(root):
        description = _description(folder)
        inner = [_content(path) for path in layer_folders(folder) if not os.path.islink(path)] or [[]]
        inner[0] = _content(folder) + inner[0]
        listed += [_entry(folder.name, description, own) for own in inner]
    return [entry for entry in listed if entry.bytes]


def warn_of_unused_scores(root: Path, reference: str, description: Mapping[str, Any]) -> None:
    """Warn if the cache holds scores of the same model with other settings; the warning names the difference.

    Args:
        reference, description: of the reference that is about to score.
    """
    for folder in _reference_folders(root):
        other = _description(folder)
        if folder.name == reference or not layer_folders(folder) or _last(other) != _last(description):
            continue
        names = [name for name in description if name not in ("fingerprint", "name", "source")]
        unlike = [f"{name} {other[name]}" for name in names if name in other and other[name] != description[name]]
        logger.warning(
            "xtf: this run scores anew: the cache holds scores of %s, but they were made with %s; this run has %s. "
            "If they were meant for this run, score with its settings.",
            description.get("name"),
            harmless(", ".join(unlike)) or "other files or another version",
            ", ".join(f"{name} {description[name]}" for name in names),
        )


def _last(description: Mapping[str, Any]) -> str:
    """A model's name without its folder, which differs between machines."""
    return Path(str(description.get("name", ""))).name


def prune_cache(
    root: Path, *, older_than_days: float | None, reference: str | None, everything: bool, dry_run: bool
) -> PruneResult:
    """Delete cached scores: those of an age, of a reference, or both; or everything.

    Temporary files of live processes and files with other names are never deleted. A run that is scoring at the same
    time loses the scores that are deleted.

    Args:
        older_than_days: days since a file was written.
        reference: fingerprint, or an unambiguous start of one.

    Raises:
        XTFUserError: neither or both of `everything` and the others, an unknown reference, or a cache that is a link.
    """
    if everything == (older_than_days is not None or reference is not None):
        raise XTFUserError("say what to prune: an age in days, a reference or both; or else everything.")
    if older_than_days is not None and not 0 <= older_than_days < float("inf"):
        raise XTFUserError(f"the age to prune from is {older_than_days} days; it must be 0 or more.")
    if os.path.islink(root / VERSION_FOLDER):
        raise XTFUserError(f"{root / VERSION_FOLDER} is a symbolic link; xtf deletes nothing through links.")
    folders = _reference_folders(root)
    if reference is not None:
        folders = [_matching(folders, reference)]
    cutoff = float("inf") if older_than_days is None else time.time() - 86_400.0 * older_than_days
    removed: list[Path] = []
    refused: list[tuple[Path, str]] = []
    size = 0
    linked = [path for path in entries(root / VERSION_FOLDER) if os.path.islink(path)] if reference is None else []
    for folder in folders:
        doomed, links = _doomed(folder, cutoff)
        linked += links
        for path, status in doomed:
            try:
                if not dry_run:
                    path.unlink()
            except OSError as error:
                refused.append((path, error.strerror or str(error)))
            else:
                removed.append(path)
                size += status.st_size
        if not dry_run:
            _remove_empty(folder)
    refused += [(path, "a symbolic link") for path in linked]
    return PruneResult(tuple(removed), size, tuple(refused), dry_run)


def _doomed(folder: Path, cutoff: float) -> tuple[list[_File], list[Path]]:
    """Files of one reference to delete, and links; its description is deleted with the last of its content."""
    inner = [path for path in layer_folders(folder) if not os.path.islink(path)]
    own = [found for each in (folder, *inner) for found in _own_files(each)]
    content = [file for kind, file in own if kind == "content"]
    doomed = [file for file in content if file[1].st_mtime < cutoff]
    description = folder / DESCRIPTION
    if len(doomed) == len(content) and os.path.isfile(description) and not os.path.islink(description):
        doomed.append((description, description.lstat()))
    doomed += [file for kind, file in own if kind == "stale"]
    return doomed, [path for kind, (path, _) in own if kind == "link"]


def _own_files(folder: Path) -> Iterator[tuple[str, _File]]:
    """Our files in a folder, and links, each as `content`, `stale` or `link`."""
    for path in entries(folder):
        try:
            status = path.lstat()
        except OSError:  # deleted by another process
            continue
        if stat.S_ISLNK(status.st_mode):
            yield "link", (path, status)
        elif stat.S_ISREG(status.st_mode) and _CONTENT.fullmatch(path.name):
            yield "content", (path, status)
        elif files.is_stale(path):
            yield "stale", (path, status)


def _content(folder: Path) -> list[_File]:
    return [file for kind, file in _own_files(folder) if kind == "content"]


def _entry(reference: str, description: Mapping[str, Any], own: list[_File]) -> CacheEntry:
    headers = [_header(path) for path, _ in own if _SHARD.fullmatch(path.name)]
    return CacheEntry(
        reference=reference,
        description=description,
        layers=next((layers for _, _, layers in headers if layers is not None), None),
        documents=sum(documents for documents, _, _ in headers),
        tokens=sum(tokens for _, tokens, _ in headers),
        bytes=sum(status.st_size for _, status in own),
        modified=max((status.st_mtime for _, status in own), default=0.0),
    )


def _header(path: Path) -> tuple[int, int, str | None]:
    """Documents, tokens and layers of a shard's header; 0, 0 and None if it cannot be read."""
    try:
        metadata = pq.read_metadata(files.for_arrow(path))
        header = json.loads((metadata.metadata or {}).get(shard_format.HEADER, b"{}"))
        return int(metadata.num_rows), int(header["tokens"]), header["layers"]
    except (OSError, pa.ArrowException, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return 0, 0, None


def _description(folder: Path) -> Mapping[str, Any]:
    path = folder / DESCRIPTION
    try:
        value = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}  # a pipe would block
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _reference_folders(root: Path) -> list[Path]:
    return [
        path
        for path in entries(root / VERSION_FOLDER)
        if REFERENCE.fullmatch(path.name) and os.path.isdir(path) and not os.path.islink(path)
    ]


def _matching(folders: list[Path], reference: str) -> Path:
    """The folder of one reference."""
    hits = [path for path in folders if path.name.startswith(reference)] if reference else []
    hits = [path for path in hits if path.name == reference] or hits
    if len(hits) != 1:
        known = ", ".join(path.name for path in hits or folders) or "none"
        problem = "matches several references" if hits else "is not a reference in the cache"
        raise XTFUserError(f"{reference!r} {problem}. Known: {known}. See `xtf cache list`.")
    return hits[0]


def _remove_empty(folder: Path) -> None:
    for path in (*layer_folders(folder), folder):
        with contextlib.suppress(OSError):  # not empty, or a link
            path.rmdir()
