"""Reads the documentation for tests/test_docs.py: its fenced blocks, commands, links and inline code. Runs nothing."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "recipes" / "README.md",
]

_FENCE = re.compile(r"\s*(?P<fence>`{3,}|~{3,})\s*(?P<language>[^\s`]*)")
_LINK = re.compile(r"\]\(\s*<?([^)\s>]+)")


@dataclass(frozen=True)
class Block:
    """A fenced or indented block of a page; `language` is what the fence says, "indented" without a fence."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path, text: str | None = None) -> list[Block]:
    """Every fenced and every indented block. Raises ValueError for a fence that is never closed."""
    found: list[Block] = []
    body: list[str] = []
    opened: tuple[int, str, str] | None = None
    lines = (page.read_text(encoding="utf-8") if text is None else text).splitlines()
    for number, line in enumerate(lines, start=1):
        fence = _FENCE.match(line)
        if opened is None and fence:
            opened, body = (number, fence["language"], fence["fence"]), []
        elif opened is not None and line.strip() == opened[2]:
            found.append(Block(page, opened[0], opened[1], "\n".join(body)))
            opened = None
        elif opened is not None:
            body.append(line)
        elif line.startswith("    ") and (number == 1 or not lines[number - 2].strip()):
            rest = lines[number - 1 :]
            end = next((i for i, later in enumerate(rest) if later.strip() and not later.startswith("    ")), len(rest))
            found.append(Block(page, number, "indented", "\n".join(later.strip() for later in rest[:end]).strip()))
    if opened is not None:
        raise ValueError(f"{page}:{opened[0]}: this fence is never closed")
    return found


def prose(page: Path) -> str:
    """The page without its fenced and indented blocks."""
    text = page.read_text(encoding="utf-8")
    text = re.sub(r"^\s*(`{3,}|~{3,}).*?^\s*\1\s*$", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"^    .*$", "", text, flags=re.MULTILINE)


def inline_code(page: Path) -> list[str]:
    """What stands between single backticks outside blocks, each text once."""
    return list(dict.fromkeys(re.findall(r"`([^`\n]+)`", prose(page))))


def relative_links(page: Path) -> list[Path]:
    """The files that a page links to inside the repository."""
    targets = (target.split("#")[0] for target in _LINK.findall(prose(page)) if not re.match(r"[a-z]+:", target))
    return [page.parent / target for target in targets if target]


def commands(text: str) -> Iterator[list[str]]:
    """The words of every command of a shell block; a backslash at the end of a line joins it with the next."""
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        words = shlex.split(line, comments=True)
        if words:
            yield words
