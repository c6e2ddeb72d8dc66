"""All that report.html shows, as one JSON-able mapping: the summary, what sliders need, and a sample of documents.

The sample is the same for the same data, and packed small enough for one page: numbers travel as little-endian arrays
in base64, token texts once each. Token text is data from strangers: it is made harmless here (`text_of`), and the page
only ever shows it as text.
"""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..config.block import XTFConfig
from ..config.scores import PRESETS
from ..data.token_text import characters
from ..report import whatif
from ..selection.select import DECISIONS, rule_bits
from .score_table import ScoreTable
from .statistics import by_key
from .terminal import text_of
from .whatif import WhatIf

DOCUMENTS = 300  # at most
BYTES = 1_000_000  # of the page for all of them
LONGEST = 4_000  # completion tokens of one document; of longer ones the beginning is shown
KEPT = 4  # flag beside PROTECTED and FORCED


def page_data(table: ScoreTable, moved: WhatIf | None = None) -> dict[str, Any]:
    """The page's data.

    Args:
        table: of a run, or of a file.
        moved: what `whatif.build` gives for it, if that is at hand.
    """
    moved = whatif.build(table) if moved is None else moved
    chosen = _chosen(table, room_for(len(table.scores), len(moved.sliders)))
    shown = [table.token_ids[_tokens(table, document)] for document in chosen]
    vocabulary = np.unique(np.concatenate([*shown, np.zeros(0, dtype=np.int32)]))
    pieces = [table.pieces[token] for token in vocabulary.tolist()]
    return {
        "summary": {name: value for name, value in table.about.items() if name != "format"},  # the file has its own
        "block": minimal(table.config),
        "preset_selectors": sorted(PRESETS[table.config.preset].get("selectors", {})),
        "bits": {**rule_bits(table.config), **DECISIONS},
        "whatif": _whatif(moved),
        "tokens": [text_of(piece) for piece in pieces],
        "documents": [
            {"why": why, **_document(table, moved, document, vocabulary, pieces)} for document, why in chosen.items()
        ],
    }


def minimal(config: XTFConfig) -> dict[str, Any]:
    """The shortest block that equals a config: its preset, and what differs from it."""
    usual = XTFConfig.model_validate({"preset": config.preset, "force_drop": ["."]}).to_dict() | {"force_drop": []}
    return {
        "preset": config.preset,
        **{key: value for key, value in config.to_dict().items() if value != usual.get(key)},
    }


def _whatif(moved: WhatIf) -> dict[str, Any]:
    """Sliders and cells for the page; patterns as text of 0 and 1."""
    return {
        "sliders": [
            {
                "voter": slider.voter,
                "key": slider.key,
                "stops": list(slider.stops),
                "at": slider.at,
                "patterns": ["".join("01"[bit] for bit in row) for row in slider.patterns.astype(int).tolist()],
                "limits": [list(limits) for limits in slider.limits],
                "own": slider.own,
                "note": slider.note,
            }
            for slider in moved.sliders
        ],
        "cells": packed(moved.cells, "<u1"),
        "flags": packed(moved.flags, "<u1"),
        "weights": moved.weights.tolist(),
    }


def room_for(scores: int, sliders: int) -> int:
    """How many tokens of documents fit: see `_document` for what each takes, in base64."""
    return min(BYTES * 3 // 4 // (5 + 4 * scores + sliders), 1 << 16)  # no more distinct ones than `ids` can name


def _chosen(table: ScoreTable, tokens: int) -> dict[int, str]:
    """Indices of documents, and why: a third of the room for those that lose most, the rest by chance."""
    sizes, dropped = table.layout.lengths, table.layout.count(~table.keep)
    by_chance = by_key(table)
    by_chance = by_chance[sizes[by_chance] > 0]
    losing = by_chance[dropped[by_chance] > 0]
    worst = losing[np.argsort(-dropped[losing] / sizes[losing], kind="stable")]
    found: dict[int, str] = {}
    room = tokens
    for queue, why, most, until in (
        (worst, "loses most", min(DOCUMENTS, len(by_chance)) // 3, tokens // 3 * 2),
        (by_chance, "by chance", DOCUMENTS, 0),
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
    """One document: for each completion token that is shown `ids` (of the sample's tokens), `scores` by name, `codes`
    by slider, `flags`, `reasons`; and `gaps`: (token, how many prompt tokens stand before it).
    """
    here = _tokens(table, document)
    places = np.searchsorted(vocabulary, table.token_ids[here])
    skipped = np.diff(table.positions[here], prepend=-1) - 1
    flags = whatif.marks(table)[here] | table.keep[here] * np.uint8(KEPT)
    return {
        "row": int(table.rows[document]),
        "key": table.key(document),
        "occurrences": int(table.counts[document]),
        "length": int(np.diff(table.offsets)[document]),
        "ids": packed(places, "<u2"),
        "scores": {name: packed(values[here], "<f4") for name, values in table.scores.items()},
        "codes": [packed(slider.codes[here], "<u1") for slider in moved.sliders],
        "flags": packed(flags, "<u1"),
        "reasons": packed(table.reasons[here], "<u2"),
        "gaps": [(at, int(skipped[at])) for at in np.flatnonzero(skipped > 0).tolist()],
        "joined": _joined([pieces[place] for place in places.tolist()]),
    }


def _joined(pieces: list[bytes]) -> list[tuple[int, int, str]]:
    """What the page shows in place of several tokens: (first token, number of tokens, the text)."""
    return [(place, number, text_of(text)) for place, number, text in characters(pieces) if number > 1]


def packed(values: Any, kind: str) -> str:
    """Numbers as base64 of a little-endian array."""
    return base64.b64encode(np.ascontiguousarray(values).astype(kind).tobytes()).decode()
