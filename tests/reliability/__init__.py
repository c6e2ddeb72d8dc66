"""What the plugin survives. Short forms run in `make test`, full ones in `make test-long`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TypeVar

LONG = os.environ.get("XTF_TEST_LONG") == "1"
FIGURES = os.environ.get("XTF_TEST_FIGURES")  # a file to which the figures of docs/reliability.md are added

T = TypeVar("T")


def amount(short: T, long: T) -> T:
    """How much to try: `short` in every test run, `long` in `make test-long`."""
    return long if LONG else short


def record(name: str, **figures: object) -> None:
    """Keep what was found, for docs/reliability.md; nothing unless `make test-long` asks for it."""
    if FIGURES:
        with Path(FIGURES).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"name": name, **figures}) + "\n")
