"""The report as one HTML page: `page_data` collects its data, `render` inserts them into the files of this folder.

The data are the summary, the sliders, and a sample of documents. The sample is the same for the same data, and small
enough for one page: numbers are little-endian arrays in base64, and each token's text occurs once. Token text is
untrusted: `text_of` escapes it, and the page inserts it as text only.
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
from numpy.typing import NDArray

from ...config.block import XTFConfig
from ...config.scores import PRESETS
from ...data.token_text import characters
from ...selection.select import DECISIONS, rule_bits
from .. import whatif
from ..score_table import ScoreTable
from ..summary import by_key
from ..terminal import measure, text_of
from ..whatif import WhatIf

SCRIPTS = ("model.js", "words.js", "view.js", "sliders.js", "documents.js")
DOCUMENTS = 300  # at most
BYTES = 1_000_000  # of the page for all documents
LONGEST = 4_000  # completion tokens shown of one document
KEPT = 4  # flag beside whatif.PROTECTED and whatif.FORCED


def title(path: Path) -> str:
    """The title of a page, from the run's folder: `<output_dir>/xtf/report.html`."""
    folder = path.absolute().parent
    return f"xtf report: {(folder.parent if folder.name == 'xtf' else folder).name or folder.name}"


def render(data: Mapping[str, Any], title: str) -> str:
    """One self-contained page of `page_data`, with a title in plain text.

    It loads nothing, and its content security policy allows only its own script.
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


def page_data(table: ScoreTable, moved: WhatIf | None = None) -> dict[str, Any]:
    """The page's data; `moved` is `whatif.build(table)`, if it is computed already."""
    moved = whatif.build(table) if moved is None else moved
    chosen = _chosen(table, room_for(len(table.scores), len(moved.sliders)))
    shown = [table.token_ids[_tokens(table, document)] for document in chosen]
    vocabulary = np.unique(np.concatenate([*shown, np.zeros(0, dtype=np.int32)]))
    pieces = [table.pieces[token] for token in vocabulary.tolist()]
    return {
        "summary": {name: value for name, value in table.about.items() if name != "format"},
        "block": minimal(table.config),
        "preset_selectors": sorted(PRESETS[table.config.preset].get("selectors", {})),
        "measures": {name: measure(part.scorer) for name, part in table.config.scores.items()},
        "bits": {**rule_bits(table.config), **DECISIONS},
        "whatif": _whatif(moved),
        "tokens": [text_of(piece) for piece in pieces],
        "documents": [
            {"why": why, **_document(table, moved, document, vocabulary, pieces)} for document, why in chosen.items()
        ],
    }


def minimal(config: XTFConfig) -> dict[str, Any]:
    """The shortest block that equals a config: its preset and the keys that differ from it."""
    usual = XTFConfig.model_validate({"preset": config.preset, "force_drop": ["."]}).to_dict() | {"force_drop": []}
    changed = {key: value for key, value in config.to_dict().items() if value != usual.get(key)}
    return {"preset": config.preset, **changed}


def _whatif(moved: WhatIf) -> dict[str, Any]:
    """Sliders and cells for the page; patterns as strings of 0 and 1."""
    sliders = []
    for slider in moved.sliders:
        patterns = ["".join("01"[bit] for bit in row) for row in slider.patterns.astype(int).tolist()]
        facts = {name: value for name, value in vars(slider).items() if name != "codes"}  # those are by document
        sliders.append({**facts, "patterns": patterns})
    return {
        "sliders": sliders,
        "cells": packed(moved.cells, "<u1"),
        "flags": packed(moved.flags, "<u1"),
        "weights": moved.weights.tolist(),
    }


def room_for(scores: int, sliders: int) -> int:
    """Number of tokens of documents that fit; `_document` lists what each takes, in base64."""
    return min(BYTES * 3 // 4 // (5 + 4 * scores + sliders), 1 << 16)  # `ids` has 16 bits


def _chosen(table: ScoreTable, tokens: int) -> dict[int, str]:
    """Indices of documents, and why: a third of the room for those that lose the largest share, the rest at random."""
    sizes, dropped = table.layout.lengths, table.layout.count(~table.keep)
    random = by_key(table)
    random = random[sizes[random] > 0]
    losing = random[dropped[random] > 0]
    worst = losing[np.argsort(-dropped[losing] / sizes[losing], kind="stable")]
    found: dict[int, str] = {}
    room = tokens
    for queue, why, most, until in (
        (worst, "loses most", min(DOCUMENTS, len(random)) // 3, tokens // 3 * 2),
        (random, "at random", DOCUMENTS, 0),
    ):
        for index in queue[: 4 * DOCUMENTS].tolist():
            cost = min(int(sizes[index]), LONGEST)
            if len(found) >= most or (found and room - cost < until):
                break
            if index not in found:
                found[index], room = why, room - cost
    return found


def _tokens(table: ScoreTable, document: int) -> slice:
    """The completion tokens of a document that are shown."""
    start, end = table.offsets[document : document + 2].tolist()
    return slice(start, min(end, start + LONGEST))


def _document(
    table: ScoreTable, moved: WhatIf, document: int, vocabulary: NDArray[np.int32], pieces: list[bytes]
) -> dict[str, Any]:
    """One document of the sample.

    For each token shown: `ids` (index in `tokens`), `scores` by name, `codes` by slider, `flags` and `reasons`. `gaps`
    are (token, number of prompt tokens before it); `joined` are (first token, number of tokens, text) where one
    character is spread over several tokens.
    """
    here = _tokens(table, document)
    places = np.searchsorted(vocabulary, table.token_ids[here])
    skipped = np.diff(table.positions[here], prepend=-1) - 1
    flags = whatif.flags_of(table.protected[here], table.forced[here]) | table.keep[here] * np.uint8(KEPT)
    return {
        "row": int(table.rows[document]),
        "key": table.key(document),
        "occurrences": int(table.counts[document]),
        "length": int(table.offsets[document + 1] - table.offsets[document]),
        "ids": packed(places, "<u2"),
        "scores": {name: packed(values[here], "<f4") for name, values in table.scores.items()},
        "codes": [packed(slider.codes[here], "<u1") for slider in moved.sliders],
        "flags": packed(flags, "<u1"),
        "reasons": packed(table.reasons[here], "<u2"),
        "gaps": [(at, int(skipped[at])) for at in np.flatnonzero(skipped > 0).tolist()],
        "joined": _joined([pieces[place] for place in places.tolist()]),
    }


def _joined(pieces: list[bytes]) -> list[tuple[int, int, str]]:
    return [(place, number, text_of(text)) for place, number, text in characters(pieces) if number > 1]


def packed(values: Any, kind: str) -> str:
    """Numbers as base64 of a little-endian array."""
    return base64.b64encode(np.ascontiguousarray(values).astype(kind).tobytes()).decode()


@cache
def _part(name: str) -> str:
    return files(__name__).joinpath(name).read_text(encoding="utf-8")
