"""Planted faults: small wrong changes of the package, each of which some test has to find.

`python -m tests.faults` plants them one at a time in a copy of the tree and runs the tests that should find them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """A wrong change of one place.

    Args:
        name: unique.
        file: in which it is planted; if the text is not there, it is looked for in the whole package.
        old: text that occurs exactly once; new: what takes its place.
        tests: files under `tests/`, found by their names wherever they are, each possibly with `::test`; the quickest
            first.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


def fault(name: str, file: str, old: str, new: str, *tests: str) -> Fault:
    return Fault(name, f"xtf_plugin/{file}", old, new, tests)
