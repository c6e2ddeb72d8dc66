"""Makes a stream before anything else, and keeps garbage collections short.

The class of streams in `datasets` becomes torch's IterableDataset, too, when the first one is made. If anything asks
before that whether it is one, Python remembers the answer, and DataLoaders of the process take no stream any more.
"""

from __future__ import annotations

import gc
import importlib.util

import pytest

if importlib.util.find_spec("datasets"):
    from datasets import Dataset

    Dataset.from_dict({"text": ["a"]}).to_iterable_dataset()

_files: list[str] = []  # the file of the test that ran last


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
