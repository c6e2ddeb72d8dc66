"""One base model and one plain run of each kind of data, shared by the tests of a process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.axolotl import stock


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    return stock.base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def plain(base, tmp_path_factory) -> Callable[..., Path]:
    """The output folder of the plain run of a kind of data: one process, one document per row, no packing."""
    known: dict[str, Path] = {}

    def find(kind: str, **changes) -> Path:
        key = f"{kind} {changes}"
        if key not in known:
            out = tmp_path_factory.mktemp("plain") / "out"
            stock.train(stock.write(base, out, kind, **changes), out, out.parent / "cache")
            known[key] = out
        return known[key]

    return find
