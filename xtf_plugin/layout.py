"""Where things lie in a score cache: a folder for a format, in it one for each reference, in it one for layers."""

from __future__ import annotations

import logging
import os
import re
from functools import lru_cache
from pathlib import Path

import xxhash

from . import shards

logger = logging.getLogger(__name__)

VERSION_FOLDER = "v2"
EARLIER_FOLDERS = ("v1",)  # v1: without entropy and deviation
DESCRIPTION = "reference.json"
REFERENCE = re.compile(r"[0-9a-f]{8,128}")
LAYER_FOLDER = re.compile(r"none|layers-[0-9a-f,_]+")
_NAME_LIMIT = 100  # file systems allow 255 bytes; an odd choice among a hundred layers would pass that


def reference_folder(root: Path, reference: str) -> Path:
    """Folder of a reference; ValueError if `reference` is no lower-case hex string (it becomes a path)."""
    if not REFERENCE.fullmatch(reference):
        raise ValueError(f"a reference fingerprint is 8 to 128 lower-case hex digits, not {reference!r}")
    return Path(root) / VERSION_FOLDER / reference


def layers_tag(layers: str | None) -> str:
    """Folder name for the layers that attention is averaged over: `layers-0_3,7` for "0,1,2,3,7", `none` for None."""
    if layers is None:
        return "none"
    if not shards.LAYERS.fullmatch(layers):
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
    """What is in a folder, sorted by name; nothing if there is none, or (told) if it cannot be listed."""
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        _tell_unlisted(folder, error.strerror)
        return []


@lru_cache(maxsize=1024)
def _tell_unlisted(folder: Path, why: str) -> None:
    """Once: a run looks before every batch."""
    logger.warning("xtf: %s cannot be listed (%s); what it holds counts as not there", folder, why)


def layer_folders(folder: Path) -> list[Path]:
    """The score folders of a reference, sorted by name."""
    return [path for path in entries(folder) if LAYER_FOLDER.fullmatch(path.name) and os.path.isdir(path)]
