"""Other thresholds on the scores of a table: selected again in Python, or moved by sliders in the report.

A slider is one number of one rule, and its stops are the values to choose from. The rule's own code computes where each
stop fires, so that a slider always agrees with a run. Tokens that fire at the same stops of all sliders and are equally
protected and forced form one cell. The page sums the cells' weights to count any setting. The floor `min_kept` and
the rule that no character is cut depend on single documents, so the counts leave out the tokens that these keep.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..config.block import XTFConfig
from ..data.ragged import Bools, Floats, Ints, Layout, dataset_quantiles
from ..errors import XTFUserError
from ..scorers import ScoreConfig
from ..selection.rules import fires
from ..selection.select import Scores, Selection, select
from .score_table import ScoreTable

MAX_CELLS = 40_000
MAX_SLIDERS = 4  # the number of cells multiplies with each
PROTECTED, FORCED = 1, 2
OFF = None
_RULE_KEYS = {"drop", "max_fraction", "scope", "scale"}  # scores do not depend on them
_SHARES = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)
_ALL_SHARES = (0.0005, 0.001, 0.0025, *_SHARES)
_USUAL = {
    "quantile": _SHARES,
    "fence": (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0),
    "known_above": (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.999, 0.9999),
    "of_median": (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75),
    "unknown_below": (0.0001, 0.0005, 0.001, 0.005, 0.01, 0.02, 0.05, 0.1),
}
_DESCENDING = ("fence", "known_above")  # a larger number drops less
_CAPPED = "This score has two thresholds under one max_fraction, which no single slider can show."
_TOO_MANY = f"The page has at most {MAX_SLIDERS} sliders; this rule cannot be moved."
_RESCORED = "The scores were computed without the text that this run drops; a run with another threshold rescores."
_ASKED = "Only units that `{}` finds doubtful have a score; a run with another threshold there asks about others."
_RANDOM = "control: random draws the tokens, so a moved threshold would show nothing."

Stop = float | int | None


def reselect(table: ScoreTable, config: XTFConfig) -> Selection:
    """What a run with another block selects from the same scores, `min_kept` and `control` included.

    Scores that depend on what other text is dropped (`explained`, `influence`) keep the values that
    they have in the table.

    Raises:
        XTFUserError: the block needs scores, protected or forced tokens that the table does not hold.
    """
    wanted, held = _scored(config), _scored(table.config)
    other = [name for name, settings in wanted.items() if held.get(name) != settings]
    if other:
        raise XTFUserError(f"{', '.join(other)}: not as this score table was scored; run `xtf score` with that block.")
    scores = Scores(table.keys, table.offsets, table.counts, table.token_ids, table.positions, logprobs=table.logprobs)
    inside = np.zeros(max(table.pieces, default=0) + 1, dtype=bool)  # token ids that begin inside a character
    inside[[i for i, piece in table.pieces.items() if piece and piece[0] & 0xC0 == 0x80]] = True
    return select(scores, config, table.protected, table.forced, seen=table.scores, inside=inside[table.token_ids])


def _scored(config: XTFConfig) -> dict[str, Any]:
    """The settings that a table's columns depend on, without the thresholds."""
    parts = {name: part.model_dump(mode="json", exclude=_RULE_KEYS) for name, part in config.scores.items()}
    return {**parts, "reference": config.reference, "protect": config.protect, "force_drop": config.force_drop}


@dataclass(frozen=True)
class Slider:
    """One number of one rule, and where the rule fires at each of its stops.

    Args:
        score: name of the score.
        key: the key of its `drop`; "" for a rule that cannot be moved.
        stops: values of the key in the order of tokens dropped, fewest first; for `cluster`, the classes. None: off.
        at: index of the run's own stop.
        patterns: (P, S) each distinct set of stops at which some token fires.
        codes: (M,) index of each completion token's pattern.
        limits: thresholds of each stop in units of the score; empty where no score is defined.
        per_document: every document has its own threshold, and `limits` are their medians.
        note: what the counts leave out, or why the rule cannot be moved.
    """

    score: str
    key: str
    stops: Sequence[Stop]
    at: int
    patterns: Bools
    codes: NDArray[np.uint8]
    limits: Sequence[Sequence[float]]
    per_document: bool
    note: str = ""


@dataclass(frozen=True)
class WhatIf:
    """The sliders of a report and the cells that their counts are sums of.

    Args:
        sliders: in the block's order.
        cells: (C, sliders) index of the pattern of each slider.
        flags: (C,) PROTECTED and FORCED; weights: (C,) occurrences in the dataset.
    """

    sliders: list[Slider]
    cells: NDArray[np.uint8]
    flags: NDArray[np.uint8]
    weights: Ints


def build(table: ScoreTable) -> WhatIf:
    """Sliders and cells of a score table; beyond `MAX_CELLS` cells, sliders with fewer stops."""
    sliders = make_sliders(table.config, table.scores, table.layout)
    flags, weights = flags_of(table.protected, table.forced), table.weights
    while True:
        found = WhatIf(sliders, *_cells(sliders, flags, weights))
        if len(found.cells) <= MAX_CELLS or all(len(slider.stops) <= 3 for slider in sliders):
            return found
        sliders = [thinned(slider) for slider in sliders]


def flags_of(protected: Bools, forced: Bools) -> NDArray[np.uint8]:
    """PROTECTED and FORCED of each token."""
    return protected.astype(np.uint8) * PROTECTED | forced.astype(np.uint8) * FORCED


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


def make_sliders(config: XTFConfig, scores: Mapping[str, Floats], layout: Layout) -> list[Slider]:
    """The sliders of a block, in its order, for scores (M,) as the rules saw them.

    A rule that cannot be moved has one stop.
    """
    made = list[Slider]()
    for name, values in scores.items():
        part = config.scores[name]
        keys = [key for key in part.drop.model_dump() if key != "of"]
        if config.control is not None:
            made.append(_fixed(name, part, values, layout, _RANDOM))
        elif len(keys) > 1 and part.max_fraction is not None:
            made.append(_fixed(name, part, values, layout, _CAPPED))
        elif sum(bool(slider.key) for slider in made) + len(keys) > MAX_SLIDERS:
            made.append(_fixed(name, part, values, layout, _TOO_MANY))
        else:
            made += [_slider(name, key, part, values, layout) for key in keys]
    return made


def thinned(slider: Slider) -> Slider:
    """The slider without every second stop; keeps the first one and the run's own."""
    keep = [index for index in range(len(slider.stops)) if index % 2 == 0 or index == slider.at]
    patterns, places = np.unique(slider.patterns[:, keep], axis=0, return_inverse=True)
    return replace(
        slider,
        stops=[slider.stops[index] for index in keep],
        at=keep.index(slider.at),
        patterns=patterns,
        codes=places.reshape(-1).astype(np.uint8)[slider.codes],
        limits=[slider.limits[index] for index in keep],
    )


def _fixed(name: str, part: ScoreConfig, scores: Floats, layout: Layout, note: str) -> Slider:
    mask, drops = fires(part, scores, layout)
    limits, per_document = _limits(drops)
    patterns = np.asarray([[False], [True]])
    return Slider(name, "", [OFF], 0, patterns, mask.astype(np.uint8), [limits], per_document, note)


def _slider(name: str, key: str, part: ScoreConfig, scores: Floats, layout: Layout) -> Slider:
    own = getattr(part.drop, key)
    others = {other: None for other in type(part.drop).model_fields if other not in (key, "of")}
    stops = [OFF, *_stops(key, own, part, scores, layout)]
    bits = np.zeros(len(scores), dtype=np.uint32)
    limits, own_limits = [list[float]()], False
    for index, stop in enumerate(stops[1:], start=1):
        drop = part.drop.model_copy(update={**others, key: stop})
        mask, drops = fires(part.model_copy(update={"drop": drop}), scores, layout)
        bits |= mask.astype(np.uint32) << np.uint32(index)
        numbers, per_document = _limits(drops)
        limits.append(numbers)
        own_limits |= per_document
    found, codes = np.unique(bits, return_inverse=True)
    patterns = (found[:, None] >> np.arange(len(stops), dtype=np.uint32)) & 1 > 0
    return Slider(name, key, stops, stops.index(own), patterns, codes.astype(np.uint8), limits, own_limits, _note(part))


def _note(part: ScoreConfig) -> str:
    """What the counts of a slider leave out, because the scores depend on more than the model."""
    if part.scorer == "explained":
        return _RESCORED
    among = getattr(part, "among", None)
    return "" if among is None else _ASKED.format(among)


def _limits(drops: Mapping[str, Any]) -> tuple[list[float], bool]:
    """Thresholds as numbers; the median where documents have their own, and whether they have."""
    per_document = any(isinstance(value, Mapping) for value in drops.values())
    numbers = (value["median"] if isinstance(value, Mapping) else value for value in drops.values())
    return [float(f"{value:.5g}") for value in numbers if value is not None and math.isfinite(value)], per_document


def _stops(key: str, own: float, part: ScoreConfig, scores: Floats, layout: Layout) -> list[Any]:
    """Values of a key, the run's own among them; fixed thresholds are chosen by the share of tokens that they drop."""
    if key == "cluster":
        return list(range(1, part.drop.of + 1))
    stops = set(_USUAL.get(key, ()))
    if key in ("below", "known_above", "unknown_below"):
        shares = [1 - share for share in _ALL_SHARES] if key == "unknown_below" else _ALL_SHARES
        limits = dataset_quantiles(scores, layout, shares)
        if key == "below":
            stops |= {float(f"{value:.3g}") for value in limits if math.isfinite(value)}
        else:  # a probability, of which the novelty is the complement
            stops |= {value for value in (float(f"{1 - limit:.3g}") for limit in limits) if 0 < value < 1}
    return sorted({*stops, own}, reverse=key in _DESCENDING)
