"""The documents that a page shows: which of the data set's, and their tokens as small arrays.

The sample is the same for the same data. A quarter of its room is for the documents that lose most, for those with text
near a threshold, and for those with a suspected format each; the rest is drawn at random.
"""

from __future__ import annotations

import base64
import itertools
import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...data.ragged import Bools, Ints
from ...data.token_text import characters, match_run
from ...errors import escaped
from ...selection.recurring import written
from .. import dropped, whatif
from ..score_table import ScoreTable
from ..terminal import LONGEST_TEXT, text_of
from ..whatif import Slider, WhatIf

DOCUMENTS = 300  # at most
BYTES = 1_000_000  # of the page for all documents
LONGEST = 4_000  # completion tokens shown of one document
KEPT, NEAR, GIVEN = 4, 8, 16  # flags beside whatif.PROTECTED and whatif.FORCED; GIVEN: protected by the block itself
NEAR_SHARE = 0.02  # of the dataset's scored tokens, on each side of a threshold
OF_ONE = 3  # documents shown of each suspected format
GROUPS = ("most", "near", "format", "random")


def room_for(scores: int, sliders: int) -> int:
    """Number of tokens of documents that fit; `document_data` lists what each takes, in base64."""
    return min(BYTES * 3 // 4 // (5 + 4 * scores + sliders), 1 << 16)  # `ids` has 16 bits


def near_threshold(table: ScoreTable, moved: WhatIf) -> Bools:
    """Tokens whose score is near the threshold of its rule, on either side, (M,)."""
    found = np.zeros(len(table.keep), dtype=bool)
    for slider in moved.sliders:
        found |= _near(slider, table)
    return found


def _near(slider: Slider, table: ScoreTable) -> Bools:
    near = np.zeros(len(table.keep), dtype=bool)
    if slider.kind == "step":
        near = np.isin(slider.codes, (slider.at, slider.at + 1))
    if slider.kind != "line" or slider.own is None:
        return near
    values = table.scores[slider.score].astype(np.float64)
    ordered = np.sort(values[~np.isnan(values)])
    at, reach = np.searchsorted(ordered, slider.threshold(slider.own)), int(NEAR_SHARE * len(ordered))
    if 0 < at < len(ordered):
        near = (values >= ordered[max(0, at - reach)]) & (values <= ordered[min(len(ordered) - 1, at + reach)])
    return near


def chosen_documents(
    table: ScoreTable, near: Bools, suspects: list[tuple[str, list[int]]], tokens: int
) -> dict[str, list[int]]:
    """Indices of documents by group, first those to look at first; a group but the last has a quarter of the room.

    `tokens` is the room, see `room_for`. The text of prompts takes some of it.
    """
    sizes, random = table.layout.lengths, by_key(table)
    random = random[sizes[random] > 0]
    queues = [_highest(table, ~table.keep, random), _highest(table, near, random)]
    rounds = [documents[turn : turn + 1] for turn in range(OF_ONE) for _, documents in suspects]
    queues += [np.asarray(list(dict.fromkeys(sum(rounds, []))), dtype=np.int64), random]
    groups: dict[str, list[int]] = {name: [] for name in GROUPS}
    found, used = set[int](), 0
    for place, (name, queue) in enumerate(zip(GROUPS, queues, strict=True), start=1):
        for index in queue[: DOCUMENTS // len(GROUPS) if place < len(GROUPS) else 4 * DOCUMENTS].tolist():
            cost = _cost(table, index, tokens) if index not in found else 0
            if cost and found and (len(found) >= DOCUMENTS or used + cost > tokens * place // len(GROUPS)):
                break
            groups[name].append(index)
            found.add(index)
            used += cost
    return groups


def _cost(table: ScoreTable, document: int, tokens: int) -> int:
    """Tokens of a document that are shown, and as many as take the room of its prompts."""
    here = shown_tokens(table, document)
    prompts = sum(len(text.encode(errors="replace")) for text in table.prompts(here).values())
    return int(here.stop - here.start) + prompts * tokens // BYTES


def by_key(table: ScoreTable) -> Ints:
    """Indices of the documents in the order of their keys; keys are hashes, so this order is random but fixed."""
    return np.argsort(np.ascontiguousarray(table.keys).view("S16").reshape(-1), kind="stable")


def _highest(table: ScoreTable, marks: Bools, documents: Ints) -> Ints:
    """The documents of which the largest share is marked, without those of which nothing is."""
    number, sizes = table.layout.count(marks)[documents], table.layout.lengths[documents]
    order = np.argsort(-number / sizes, kind="stable")
    return documents[order[number[order] > 0]]


def shown_tokens(table: ScoreTable, document: int) -> slice:
    """The completion tokens of a document that are shown."""
    start, end = table.offsets[document : document + 2].tolist()
    return slice(start, min(end, start + LONGEST))


def document_data(
    table: ScoreTable,
    moved: WhatIf,
    document: int,
    vocabulary: NDArray[np.int32],
    pieces: list[bytes],
    near: Bools,
    starts: Ints,
) -> dict[str, Any]:
    """One document of the sample.

    For each token shown: `ids` (index in `tokens`), `scores` by name, `codes` by slider, `flags` and `reasons`. `units`
    are the first tokens of sentences or lines. `gaps` are (token, the end of the prompt before it); `joined` are (first
    token, number of tokens, text, regular expression or null) where one character is spread over several tokens.
    """
    here = shown_tokens(table, document)
    places = np.searchsorted(vocabulary, table.token_ids[here])
    flags = whatif.flags_of(table.protected[here], table.forced[here])
    flags = flags | table.keep[here] * np.uint8(KEPT) | near[here] * np.uint8(NEAR)
    flags = flags | _given(table, document)[: here.stop - here.start] * np.uint8(GIVEN)
    units = starts[slice(*np.searchsorted(starts, [here.start, here.stop]))] - here.start
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
        "units": packed(units, "<u2"),
        "gaps": list(_prompts(table, here).items()),
        "joined": _joined([pieces[place] for place in places.tolist()]),
    }


def _prompts(table: ScoreTable, here: slice) -> dict[int, str]:
    """The ends of the prompts in a document as they are shown, by the token after them."""
    found = table.prompts(here).items()
    return {at: _with_spaces(text) for at, text in found if text}


def _with_spaces(text: str) -> str:
    """A text with plain white space, and escapes for everything else that is not a printable character."""
    return "".join(char if char in " \n\t" else escaped(char) for char in text)


def _given(table: ScoreTable, document: int) -> Bools:
    """Tokens of a document that force_drop does not drop: protected, but not as format alone."""
    protect, here = table.config.protect, slice(*table.offsets[document : document + 2].tolist())
    if protect.formats is None:
        return table.protected[here]
    found: Bools = np.isin(table.token_ids[here], dropped.special_tokens(table)) & table.protected[here]
    pieces, patterns = (
        [table.pieces[i] for i in table.token_ids[here].tolist()],
        list(map(re.compile, protect.patterns)),
    )
    bounds = [*np.flatnonzero(table.opens[here]).tolist(), len(pieces)]
    for start, end in itertools.pairwise(bounds):
        for _, marks in match_run(pieces[start:end], patterns):
            found[start:end] |= marks
    return found


def _joined(pieces: list[bytes]) -> list[tuple[int, int, str, str | None]]:
    groups = (group for group in characters(pieces) if group[1] > 1)
    return [(place, number, text_of(text), _expression(text)) for place, number, text in groups]


def odd(piece: bytes) -> tuple[str, str | None] | None:
    """How a token is shown with plain whitespace, and the regular expression that matches it; None: as it seems."""
    shown, text = text_of(piece), piece.decode(errors="replace")
    seems = shown.replace("·", " ").replace("↵\n", "\n").replace("⇥", "\t")
    if seems.encode() == piece:
        return None
    plain = _with_spaces(text)
    return (plain if len(text) <= LONGEST_TEXT and "\ufffd" not in text else shown), _expression(piece)


def _expression(piece: bytes) -> str | None:
    """A regular expression for a token that is text and shown in full; whitespace stands for itself."""
    try:
        text = piece.decode()
    except UnicodeDecodeError:
        return None
    return "".join(char if char in " \n\t" else written(char) for char in text) if len(text) <= LONGEST_TEXT else None


def packed(values: Any, kind: str) -> str:
    """Numbers as base64 of a little-endian array."""
    return base64.b64encode(np.ascontiguousarray(values).astype(kind).tobytes()).decode()
