"""The report as one HTML page: `page_data` collects its data, `render` inserts them into the files of this folder.

The data are the summary, what is dropped and where, the sliders, and a sample of documents, small enough for one page:
numbers are little-endian arrays in base64, and each token's text occurs once. Token text is untrusted: `text_of`
escapes it, and the page inserts it as text only.
"""

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

import numpy as np

from ...config.scores import PRESETS
from ...selection.select import DECISIONS, rule_bits
from .. import dropped, whatif
from ..score_table import ScoreTable
from ..terminal import measure, text_of
from ..whatif import WhatIf
from . import sample
from .shortest_block import minimal

SCRIPTS = ("model.js", "words.js", "view.js", "sliders.js", "documents.js")


def title(path: Path) -> str:
    """The title of a page, from the run's folder: `<output_dir>/xtf/report.html`."""
    folder = path.absolute().parent
    return f"xtf report: {(folder.parent if folder.name == 'xtf' else folder).name or folder.name}"


def render(data: Mapping[str, Any], title: str) -> str:
    """One self-contained page of `page_data`, with a title in plain text.

    It loads nothing, and its content security policy allows only its own script.
    """
    script = "".join(_part_of_page(name) for name in SCRIPTS)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return Template(_part_of_page("page.html")).substitute(  # replaces nothing in what it inserts
        hash=f"sha256-{digest}",
        title=html.escape(title.encode(errors="replace").decode()),
        style=_part_of_page("page.css"),
        data=_harmless(json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))),
        script=script,
    )


def _harmless(text: str) -> str:
    """JSON that cannot end the script element around it, and that is valid UTF-8 without exotic line ends."""
    for char in "<>&\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return text.encode("utf-8", errors="replace").decode()


def page_data(table: ScoreTable, moved: WhatIf | None = None) -> dict[str, Any]:
    """The page's data; `moved` is `whatif.build(table)`, if it is computed already."""
    moved = whatif.build(table) if moved is None else moved
    starts = dropped.unit_starts(table)
    pieces = dropped.pieces(table, starts)
    near, suspects = sample.near_threshold(table, moved), dropped.suspects(table, pieces)
    groups = sample.chosen_documents(table, near, suspects, sample.room_for(len(table.scores), len(moved.sliders)))
    chosen = list(dict.fromkeys(sum(groups.values(), [])))
    shown = [table.token_ids[sample.shown_tokens(table, document)] for document in chosen]
    vocabulary = np.unique(np.concatenate([*shown, np.zeros(0, dtype=np.int32)]))
    spelt = [table.pieces[token] for token in vocabulary.tolist()]
    begins = {document: text for text, documents in reversed(suspects) for document in documents}
    return {
        "summary": {name: value for name, value in table.about.items() if name != "format"},
        "block": minimal(table.config),
        "preset_selectors": sorted(PRESETS[table.config.preset].get("selectors", {})),
        "measures": {name: measure(part.scorer) for name, part in table.config.scores.items()},
        "bits": {**rule_bits(table.config), **DECISIONS},
        "kinds": dropped.kinds(table, pieces),
        "places": dropped.by_place(table),
        "whatif": _whatif(moved),
        "tokens": [text_of(piece) for piece in spelt],
        "odd": {index: odd for index, piece in enumerate(spelt) if (odd := sample.odd(piece)) is not None},
        "groups": {name: [chosen.index(document) for document in own] for name, own in groups.items()},
        "documents": [
            {
                "suspect": begins.get(document, "") if document in groups["format"] else "",
                **sample.document_data(table, moved, document, vocabulary, spelt, near, starts),
            }
            for document in chosen
        ],
    }


def _whatif(moved: WhatIf) -> dict[str, Any]:
    """Sliders and cells for the page; `codes` are by document."""
    facts = [{key: value for key, value in vars(slider).items() if key != "codes"} for slider in moved.sliders]
    return {
        "sliders": facts,
        "cells": sample.packed(moved.cells, "<u1"),
        "flags": sample.packed(moved.flags, "<u1"),
        "weights": moved.weights.tolist(),
        "slack": moved.slack,
    }


@cache
def _part_of_page(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")
