"""Makes a stream before anything else, and keeps two things that no test is about from being done again and again.

The class of streams in `datasets` becomes torch's IterableDataset, too, when the first one is made. If anything asks
before that whether it is one, Python remembers the answer, and DataLoaders of the process take no stream any more.
"""

from __future__ import annotations

import functools
import gc
import importlib.util
import os
import sys
from importlib import metadata
from typing import Any

import pytest

if importlib.util.find_spec("datasets"):
    from datasets import Dataset

    Dataset.from_dict({"text": ["a"]}).to_iterable_dataset()

_read = metadata.entry_points
_files: list[str] = []  # the file of the test that ran last


@functools.cache
def _found(places: tuple[tuple[str, int], ...], wanted: tuple[tuple[str, str], ...]) -> Any:
    return _read(**dict(wanted))


def _changed(place: str) -> int:
    try:
        return os.stat(place or ".").st_mtime_ns
    except OSError:
        return 0


def entry_points(**wanted: str) -> Any:
    """As of the standard library, read again only if a package was installed or removed, or `sys.path` changed.

    Parsing a block looks for packages with scorers a dozen times, and each time reads a file of every package there is.
    """
    return _found(tuple((place, _changed(place)) for place in sys.path), tuple(sorted(wanted.items())))


metadata.entry_points = entry_points


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Leave what was imported to a file's first test out of garbage collections: each would take a third of a second.

    Every training ends with one. What a test makes is still looked at, and so is what lives on from test to test.
    """
    if _files != [item.nodeid.partition("::")[0]]:
        _files[:] = [item.nodeid.partition("::")[0]]
        gc.collect()
        gc.freeze()


def pytest_unconfigure() -> None:
    """Let the process end as it would have."""
    gc.unfreeze()
