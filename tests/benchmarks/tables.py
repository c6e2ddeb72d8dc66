"""Markdown tables, their caption, and pages that they are put into."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

BEGIN, END = "<!-- tables -->", "<!-- /tables -->"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first are right-aligned."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def write_into(page: Path, text: str, mark: str = BEGIN, end_mark: str = END) -> None:
    """Put text between the marks of a page, or of the one page of a folder that has them; ValueError without marks."""
    if page.is_dir():
        page = next((one for one in sorted(page.glob("*.md")) if mark in one.read_text(encoding="utf-8")), page)
        if page.is_dir():
            raise ValueError(f"no page in {page} has a line {mark}")
    before, begin, rest = page.read_text(encoding="utf-8").partition(mark)
    _, end, after = rest.partition(end_mark)
    if not begin or not end:
        raise ValueError(f"{page} has no lines {mark} and {end_mark} to put the tables between")
    page.write_text(f"{before}{mark}\n\n{text.strip()}\n\n{end_mark}{after}", encoding="utf-8")
