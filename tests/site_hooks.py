"""Hooks of mkdocs: the site knows the pages of docs/ only, so links to other files of the repository go to its address.

The address stands in pyproject.toml alone, under `[project.urls]`. In the pages such links stay relative, so that
tests/test_docs.py and readers of a clone can follow them.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
_UP = re.compile(r"\]\((?P<path>(?:\.\./)+[^)#\s]*)(?P<anchor>#[^)\s]*)?\)")


def repository() -> str:
    """The address of the repository."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return re.search(r'^Repository = "(.+?)/?"$', text, re.MULTILINE)[1]


def on_config(config: Any) -> Any:
    """Link to the repository from the foot of every page."""
    config.extra["social"] = [{"icon": "fontawesome/brands/git-alt", "link": repository(), "name": "Repository"}]
    return config


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The page with links out of docs/ made absolute."""
    folder = posixpath.join("docs", posixpath.dirname(page.file.src_uri))

    def absolute(link: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(folder, link["path"]))
        if path.startswith("docs/"):
            return link[0]
        if not (ROOT / path).exists():
            raise FileNotFoundError(f"{page.file.src_uri}: there is no {path}")
        return f"]({repository()}/blob/main/{path}{link['anchor'] or ''})"

    return _UP.sub(absolute, markdown)
