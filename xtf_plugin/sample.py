"""The documents that a report shows: a sample that is the same for the same data, packed small enough for one page.

Numbers travel as little-endian arrays in base64, token texts once each. Token text is data from strangers: it is made
harmless here (`view.visible`), and the page only ever shows it as text.
"""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .data import token_text as spans
from . import view
from .selection.text_rules import Marks
from .plan import Plan
from .data.ragged import Layout
from .selection.select import rescue_order
from .view import LONGEST_TEXT
from .whatif import FORCED, PROTECTED, WhatIf

DOCUMENTS = 300  # at most
BYTES = 1_000_000  # of the page for all of them
LONGEST = 4_000  # tokens of one document; of longer ones the beginning is shown
TRAINS = 4  # flag of tokens that something predicts


def documents(plan: Plan, whatif: WhatIf, marks: Marks, tokenizer: Any) -> dict[str, Any]:
    """The sample: `tokens` (texts) and `documents`, see `_document`."""
    layout = Layout(plan.scores.offsets, plan.scores.counts)
    flags = marks.protected.astype(np.uint8) * PROTECTED
    if marks.forced is not None:
        flags |= marks.forced.astype(np.uint8) * FORCED
    chosen = _chosen(plan, layout, room_for(len(plan.config.voters), len(whatif.sliders)))
    shown = [plan.documents.document(index)[0][:LONGEST] for index, _ in chosen]
    vocabulary = np.unique(np.concatenate([*shown, np.zeros(0, dtype=np.int32)]))
    pieces = spans.token_bytes(tokenizer, vocabulary.tolist())
    rows = _rows(plan, [index for index, _ in chosen])
    made = [
        {"row": row, "why": why, **_document(plan, whatif, flags, index, vocabulary, pieces)}
        for (index, why), row in zip(chosen, rows, strict=True)
    ]
    return {"tokens": [text_of(piece) for piece in pieces], "documents": made}


def room_for(voters: int, sliders: int) -> int:
    """How many tokens of documents fit: see `_document` for what each takes, in base64."""
    return min(BYTES * 3 // 4 // (10 + 2 * voters + sliders), 1 << 16)  # no more distinct ones than `ids` can name


def text_of(piece: bytes) -> str:
    """A token for the page: whitespace shown, control and bidirectional characters escaped, bytes that are no text in
    hexadecimal, and of very long ones the beginning and the length.
    """
    try:
        text = piece.decode()
    except UnicodeDecodeError:
        more = f"… {len(piece):,} bytes" if len(piece) > LONGEST_TEXT else ""
        return "⟨" + piece[:LONGEST_TEXT].hex(" ") + more + "⟩"
    if len(text) > LONGEST_TEXT:
        return view.visible(text[:LONGEST_TEXT]) + f"… ⟨{len(text):,} characters⟩"
    return view.visible(text)


def _chosen(plan: Plan, layout: Layout, tokens: int) -> list[tuple[int, str]]:
    """Indices of documents with a completion, and why: a third of the room for those that lose most, the rest by
    chance (keys are hashes).
    """
    sizes, dropped = layout.lengths, layout.count(~plan.selection.keep)
    by_chance = np.argsort(np.ascontiguousarray(plan.scores.keys).view("S16").reshape(-1), kind="stable")
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
            cost = min(int(plan.documents.lengths[index]), LONGEST)
            if len(found) >= most or (found and room - cost < until):
                break
            if index not in found:
                found[index], room = why, room - cost
    return list(found.items())


def _rows(plan: Plan, indices: list[int]) -> list[int]:
    """The first dataset row of each document."""
    documents = plan.documents
    distinct, first = np.unique(documents.row_documents, return_index=True)
    at = first[np.searchsorted(distinct, indices)]
    return [int(row) for row in np.searchsorted(documents.row_offsets, at, side="right") - 1]


def _document(
    plan: Plan, whatif: WhatIf, flags: NDArray[np.uint8], index: int, vocabulary: NDArray[np.int32], pieces: list[bytes]
) -> dict[str, Any]:
    """One document: `ids` (of the sample's tokens), `at` (which of them are completion tokens), and for each of those
    `scores` by voter, `codes` by slider, `flags`, `reasons`, `order` (who the floor brings back first).
    """
    ids, completion = plan.documents.document(index)
    places = np.searchsorted(vocabulary, ids[:LONGEST])
    at = np.flatnonzero(completion[:LONGEST])
    start = int(plan.scores.offsets[index])
    here = slice(start, start + len(at))
    order = np.empty(len(at), dtype=np.int64)  # among those shown
    order[np.argsort(rescue_order(plan.scores, here), kind="stable")] = np.arange(len(at))
    voters = {name: plan.scores.of(name) for name in plan.config.voters}
    return {
        "key": plan.documents.keys[index].tobytes().hex(),
        "occurrences": int(plan.documents.counts[index]),
        "length": len(ids),
        "whole": len(ids) <= LONGEST,
        "completion_tokens": int(plan.scores.offsets[index + 1]) - start,
        "ids": packed(places, "<u2"),
        "at": packed(at, "<u2"),
        "scores": {name: packed(_small(values[here]), "<f2") for name, values in voters.items() if values is not None},
        "codes": [packed(slider.codes[here], "<u1") for slider in whatif.sliders],
        "flags": packed(flags[here] | (plan.scores.positions[here] > 0) * np.uint8(TRAINS), "<u1"),
        "kept": packed(plan.selection.keep[here], "<u1"),
        "reasons": packed(plan.selection.reasons[here], "<u2"),
        "order": packed(order, "<u2"),
        "joined": _joined([pieces[place] for place in places.tolist()]),
    }


def _small(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Scores as half floats hold them: three digits, and nothing beyond 65504."""
    return np.clip(values, -65_504, 65_504)


def _joined(pieces: list[bytes]) -> list[tuple[int, int, str]]:
    """What the page shows in place of several tokens: (first token, number of tokens, the text)."""
    return [(place, number, text_of(text)) for place, number, text in spans.characters(pieces) if number > 1]


def packed(values: Any, kind: str) -> str:
    """Numbers as base64 of a little-endian array."""
    return base64.b64encode(np.ascontiguousarray(values).astype(kind).tobytes()).decode()
