"""The report as one HTML page: its parts are the files of this folder, and `render` inserts its data."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

SCRIPTS = ("model.js", "words.js", "view.js", "sliders.js", "documents.js")


def title(path: Path) -> str:
    """The title of a page, from the run's folder: `<output_dir>/xtf/report.html`."""
    folder = path.absolute().parent
    return f"xtf report: {(folder.parent if folder.name == 'xtf' else folder).name or folder.name}"


def render(data: Mapping[str, Any], title: str) -> str:
    """One self-contained page. It loads nothing, and its content security policy allows only its own script.

    Args:
        data: of `page_data.page_data`.
        title: of the page; plain text.
    """
    script = "".join(_part(name) for name in SCRIPTS)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return Template(_part("page.html")).substitute(  # replaces nothing in what it inserts
        hash=f"sha256-{digest}",
        title=html.escape(title.encode(errors="replace").decode()),
        style=_part("page.css"),
        data=_harmless(json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))),
        script=script,
    )


def _harmless(text: str) -> str:
    """JSON that cannot end the script element around it, and that is valid UTF-8 without exotic line ends."""
    for char in "<>&\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return text.encode("utf-8", errors="replace").decode()


@cache
def _part(name: str) -> str:
    return files(__name__).joinpath(name).read_text(encoding="utf-8")
