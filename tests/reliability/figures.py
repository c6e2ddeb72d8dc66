"""The table of docs/reliability.md, from what the tests of this folder recorded in their long form.

Counts of records with one name are added up; largest differences and shares (floats) are not, the worst is kept.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from tests.benchmarks.common import publish


def gathered(lines: list[str]) -> dict[str, dict[str, Any]]:
    """Figures by name: integers summed, floats at their largest, anything else as it came last."""
    found: dict[str, dict[str, Any]] = {}
    for line in lines:
        figures = json.loads(line)
        kept = found.setdefault(figures.pop("name"), {})
        for name, value in figures.items():
            before = kept.get(name)
            if isinstance(value, bool) or before is None or not isinstance(value, (int, float)):
                kept[name] = value
            else:
                kept[name] = before + value if isinstance(value, int) else max(before, value)
    return found


def shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("records", type=Path, help="the file that XTF_TEST_FIGURES named")
    parser.add_argument("--write", type=Path, help="also put the table into this page")
    parser.add_argument("--minutes", type=float, help="what the tests took, for the caption")
    given = parser.parse_args()
    found = gathered(given.records.read_text(encoding="utf-8").splitlines())
    rows = [
        [name, "; ".join(f"{what.replace('_', ' ')} {shown(value)}" for what, value in figures.items())]
        for name, figures in sorted(found.items())
    ]
    took = "" if given.minutes is None else f", {given.minutes:.0f} minutes"
    publish("figures", f"`make test-long`{took}", ["test", "found"], rows, given.write)


if __name__ == "__main__":
    main()
