"""Other thresholds, counted exactly as a run would select: the data behind the report's sliders.

Tokens that fire at the same stops of all sliders, and are protected or forced alike, are one cell of a table, with the
number of their occurrences in the dataset: the counts of any setting are sums over cells. Only the floor (`min_kept`)
is a matter of single documents. Of each that could come to it, the tokens that it would keep longest are listed: a
token that is dropped no sooner than `min_kept` others cannot matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .config.block import XTFConfig
from .selection.rules import Segments
from .data.ragged import Bools, Ints, Layout
from .selection.select import Scores, votes_needed
from .sliders import Slider, fired, make_sliders, thinned

MAX_CELLS = 40_000
MAX_FLOORED = 10_000  # distinct documents that are looked at one by one
MAX_LASTING = 60_000  # tokens listed of all of them, at most 0.6 MB of the page
MAX_PATTERNS = 2_000  # distinct ones of a document, which are compared in pairs
PROTECTED, FORCED = 1, 2


@dataclass(frozen=True)
class Floored:
    """Documents that the floor may touch and that are alike in this.

    Args:
        occurrences: of them in the dataset.
        kept: tokens that train and stay anyway: protected ones, and those that no rule ever fires on.
        wanted: the floor, or how many tokens train if these are fewer.
        tokens: (K, sliders + 1) patterns of the tokens that are kept longest, and their number.
    """

    occurrences: int
    kept: int
    wanted: int
    tokens: NDArray[np.int64]


@dataclass(frozen=True)
class WhatIf:
    """All that counting needs; see the module.

    Args:
        sliders: in the block's order.
        cells: (C, sliders) the pattern of each slider.
        flags: (C,) PROTECTED, FORCED; weights: (C,) occurrences in the dataset.
        floored: documents that may come to the floor.
        complete: False if there were too many of these: then what the floor brings back is not counted.
    """

    sliders: list[Slider]
    cells: NDArray[np.uint8]
    flags: NDArray[np.uint8]
    weights: Ints
    floored: list[Floored]
    complete: bool


def build(
    scores: Scores, config: XTFConfig, protected: Bools, forced: Bools | None, segments: Segments | None = None
) -> WhatIf:
    """Sliders, cells and floored documents of a selection; the arguments are those of `selection.select`."""
    layout = Layout(scores.offsets, scores.counts)
    sliders = make_sliders(scores, config, segments)
    flags = protected.astype(np.uint8) * PROTECTED
    if forced is not None:
        flags |= forced.astype(np.uint8) * FORCED
    weights = layout.spread(scores.counts)
    cells, kinds, sums = _cells(sliders, flags, weights)
    while len(cells) > MAX_CELLS and any(len(slider.stops) > 3 for slider in sliders):
        sliders = [thinned(slider) for slider in sliders]
        cells, kinds, sums = _cells(sliders, flags, weights)
    found = _floored(sliders, flags, scores, layout, config.min_kept)
    return WhatIf(sliders, cells, kinds, sums, found or [], found is not None)


def count(whatif: WhatIf, at: Sequence[int], config: XTFConfig) -> dict[str, Any]:
    """Occurrences in the dataset with the sliders at `at`: tokens, dropped, rescued by the floor, fired and dropped by
    voter. The report's page counts the same way.
    """
    by_voter = fired(whatif.sliders, list(whatif.cells.T), at)
    on = [s.voter for s, place in zip(whatif.sliders, at, strict=True) if not s.key or s.stops[place] is not None]
    needed = votes_needed(config, len(set(on)))  # a rule that is off is none: its voter is not counted
    votes = sum((mask.astype(int) for mask in by_voter.values()), np.zeros(len(whatif.cells), dtype=int))
    forced = (whatif.flags & FORCED) > 0
    dropped = ((votes >= needed) | forced) & ((whatif.flags & PROTECTED) == 0)
    rescued = sum(_rescued(whatif, documents, at, needed) for documents in whatif.floored)
    return {
        "tokens": int(whatif.weights.sum()),
        "dropped": int(whatif.weights[dropped].sum()) - rescued,
        "rescued": rescued,
        "fired": {voter: int(whatif.weights[mask].sum()) for voter, mask in by_voter.items()},
    }


def _rescued(whatif: WhatIf, documents: Floored, at: Sequence[int], needed: int) -> int:
    by_voter = fired(whatif.sliders, list(documents.tokens[:, :-1].T), at)
    votes = sum((mask.astype(int) for mask in by_voter.values()), np.zeros(len(documents.tokens), dtype=int))
    kept = documents.kept + int(documents.tokens[votes < needed, -1].sum())
    return documents.occurrences * max(0, documents.wanted - kept)


def _cells(
    sliders: Sequence[Slider], flags: NDArray[np.uint8], weights: Ints
) -> tuple[NDArray[np.uint8], NDArray[np.uint8], Ints]:
    """Distinct (patterns, flags) among the tokens, and the occurrences of each."""
    key = flags.astype(np.int64)
    for slider in sliders:
        key = key * len(slider.patterns) + slider.codes
    _, first, places = np.unique(key, return_index=True, return_inverse=True)
    sums = np.zeros(len(first), dtype=np.int64)
    np.add.at(sums, places.reshape(-1), weights)
    columns = [slider.codes[first] for slider in sliders]
    cells = np.stack(columns, axis=1) if columns else np.zeros((len(first), 0), dtype=np.uint8)
    return cells, flags[first], sums


def _floored(
    sliders: Sequence[Slider], flags: NDArray[np.uint8], scores: Scores, layout: Layout, min_kept: int
) -> list[Floored] | None:
    """The documents that the floor may touch, alike ones together; None: there are too many."""
    trainable = scores.positions > 0
    never = flags == 0  # no rule fires on it, wherever the sliders stand
    for slider in sliders:
        never &= ~np.asarray(slider.patterns.any(axis=1))[slider.codes]
    stays = never | ((flags & PROTECTED) > 0)
    safe = layout.count(trainable & stays)
    wanted = np.minimum(layout.count(trainable), min(min_kept, 1 << 62))
    which = np.flatnonzero(safe < wanted)
    if len(which) > MAX_FLOORED:
        return None
    open_tokens = trainable & (flags == 0) & ~never
    sets = [slider.patterns @ (np.uint64(1) << np.arange(len(slider.stops), dtype=np.uint64)) for slider in sliders]
    groups: dict[tuple[int, int, bytes], int] = {}
    width, room = len(sliders) + 1, MAX_LASTING
    for index in which.tolist():
        place = slice(int(layout.offsets[index]), int(layout.offsets[index + 1]))
        here = np.flatnonzero(open_tokens[place]) + place.start
        tokens = _lasting(sliders, sets, here, int(wanted[index] - safe[index]))
        if tokens is None:
            return None
        key = (int(safe[index]), int(wanted[index]), tokens.tobytes())
        room -= len(tokens) if key not in groups else 0
        if room < 0:
            return None
        groups[key] = groups.get(key, 0) + int(scores.counts[index])
    return [
        Floored(occurrences, kept, most, np.frombuffer(data, dtype=np.int64).reshape(-1, width))
        for (kept, most, data), occurrences in groups.items()
    ]


def _lasting(sliders: Sequence[Slider], sets: Sequence[NDArray[np.uint64]], tokens: Ints, needed: int) -> Ints | None:
    """The tokens of a document that are kept longest, (K, sliders + 1): distinct patterns, and how many have them.

    None if there are too many patterns to compare. `sets` are the sliders' patterns as bits: a token outlasts another
    if it fires nowhere where that one does not.
    """
    key = np.zeros(len(tokens), dtype=np.int64)
    for slider in sliders:
        key = key * len(slider.patterns) + slider.codes[tokens]
    _, first, numbers = np.unique(key, return_index=True, return_counts=True)
    distinct = tokens[first]
    if len(distinct) > MAX_PATTERNS:
        return None
    outlasts = np.ones((len(distinct), len(distinct)), dtype=bool)  # [a, b]: a is kept wherever b is
    for slider, bits in zip(sliders, sets, strict=True):
        here = bits[slider.codes[distinct]]
        outlasts &= (here[:, None] & ~here[None, :]) == 0
    np.fill_diagonal(outlasts, False)
    lasting = (outlasts * numbers[:, None]).sum(axis=0) < needed
    columns = [slider.codes[distinct[lasting]] for slider in sliders]
    return np.column_stack([*columns, np.minimum(numbers[lasting], needed)]).astype(np.int64)
