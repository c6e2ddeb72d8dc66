"""What a folder's results were made with, so that results of two laboratories never stand in one table.

Runs are found again by their key, and a key does not hold the scale, the base models' settings or the texts of the
worlds. Those are in `scale.json`, and a folder that has another one is refused.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .models import LIMIT

if TYPE_CHECKING:
    from .models import BaseSettings
    from .runs import Scale

GENERATORS = ("worlds.py", "noise.py", "grammar.py", "data.py")  # what all text comes from
FREE = ("workers", "seeds", "commit")  # change how fast and how many, not what a run is


def texts(folder: Path = Path(__file__).parent) -> str:
    """Digest of the sources that write problems, noise and base text."""
    digest = hashlib.sha1()
    for name in GENERATORS:
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()[:12]


def head() -> str:
    """The commit that is checked out, `?` outside a repository."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "?"


def claim(folder: Path, scale: Scale, base: BaseSettings) -> None:
    """Write the folder's `scale.json`; ValueError if what is there already was made with other settings."""
    path = folder / "scale.json"
    asked = {**asdict(scale), "base": asdict(base), "completion_limit": LIMIT, "texts": texts()}
    asked["commit"] = head()
    if path.exists():
        asked["commit"] = json.loads(path.read_text()).get("commit", asked["commit"])  # of what began the folder
        wanted, found = _flat(asked), _flat(json.loads(path.read_text()))
        differing = [name for name in sorted(wanted.keys() | found.keys()) if wanted.get(name) != found.get(name)]
        if differing:
            raise ValueError(
                f"{folder} was made with other settings, and results must not be mixed: "
                + "; ".join(f"{name} is {_said(found, name)} there, {_said(wanted, name)} here" for name in differing)
                + f". Give another --folder, or delete {folder}."
            )
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asked))


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}.")
        elif prefix or name not in FREE:
            found[prefix + name] = value
    return found


def _said(settings: Mapping[str, Any], name: str) -> str:
    return str(settings[name]) if name in settings else "not said"
