"""The report as one HTML page: its parts are files of this folder, its data is put in by `render`."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

FORMAT = 2  # of the data
SCRIPTS = ("model.js", "words.js", "view.js", "sliders.js", "documents.js")
_PARTS = {
    **{"summary": dict, "block": dict, "preset_selectors": list, "reasons": dict, "tokens": list, "documents": list},
    **{"whatif": dict, "whatif.sliders": list, "whatif.cells": str, "whatif.flags": str, "whatif.weights": list},
    **{"whatif.floored": list, "whatif.lasting": str, "whatif.lasting_tokens": str, "whatif.complete": bool},
}
_COMPLETE = "all counts are of the whole dataset, exactly as a run with it would select from these scores."
_INCOMPLETE = (
    "counts are of the whole dataset, without what the floor (min_kept) would bring back: it may touch too many "
    "documents to look at each. All else is as a run with it would select from these scores."
)


def problem(data: Any) -> str:
    """Why `render` cannot show data that came from a file, as what it does: "has ..."; "" if it can."""
    if not isinstance(data, Mapping):
        return "is no mapping"
    if data.get("format") != FORMAT:
        return f"has the format {data.get('format')!r}, and this xtf-plugin shows {FORMAT}"
    whatif = data.get("whatif")
    inner = {f"whatif.{name}": value for name, value in whatif.items()} if isinstance(whatif, Mapping) else {}
    wrong = [name for name, kind in _PARTS.items() if not isinstance({**data, **inner}.get(name), kind)]
    return f"lacks {', '.join(wrong)}" if wrong else ""


def title(path: Path) -> str:
    """What a page is called, by the run's folder that it lies in: `<output_dir>/xtf/report.html`."""
    folder = path.absolute().parent
    return f"xtf report: {(folder.parent if folder.name == 'xtf' else folder).name or folder.name}"


def _promise(data: Mapping[str, Any]) -> str:
    """What the counts are that sliders lead to."""
    if not any(slider["key"] for slider in data["whatif"]["sliders"]):
        return "this block has none that could be moved."
    told = _COMPLETE if data["whatif"]["complete"] else _INCOMPLETE
    bounded = any(slider["told"] for slider in data["whatif"]["sliders"])
    return told + (" Where a slider says more, that sets bounds to it." if bounded else "")


def render(data: Mapping[str, Any], title: str) -> str:
    """One self-contained page: it loads nothing, and its policy lets nothing run but its own script.

    Args:
        data: of `payload.build`.
        title: of the page; plain text.
    """
    script = "".join(_part(name) for name in SCRIPTS)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    parts = {
        "hash": f"sha256-{digest}",
        "title": html.escape(title.encode(errors="replace").decode()),
        "style": _part("page.css"),
        "complete": _promise(data),
        "data": _harmless(json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))),
        "script": script,
    }
    page = _part("page.html")
    pieces = page.split("$")
    made = [pieces[0]]
    for piece in pieces[1:]:  # one pass: nothing that is put in is looked at again
        name = next(name for name in parts if piece.startswith(name))
        made += [parts[name], piece[len(name) :]]
    return "".join(made)


def _harmless(text: str) -> str:
    """JSON that cannot end the script element it stands in, nor hold what editors and pipes stumble over."""
    for char in "<>&\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return text.encode("utf-8", errors="replace").decode()


@cache
def _part(name: str) -> str:
    return files(__name__).joinpath(name).read_text(encoding="utf-8")
