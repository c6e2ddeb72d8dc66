"""Other thresholds on the scores of a table: selected again in Python, or moved by sliders in the report.

A slider is one number of one rule. Where the rule fires at each of its stops is asked of the rule's own code, so a
slider cannot disagree with a run. Tokens that fire at the same stops of all sliders, and are protected or forced
alike, are one cell, with the number of their occurrences in the dataset: counts of any setting are sums over cells.
They leave out what `min_kept` brings back, which is a matter of single documents.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..config.block import XTFConfig
from ..errors import XTFUserError
from ..selection.rules import fires
from ..scorers import ScoreConfig
from ..data.ragged import Bools, Floats, Ints, Layout, dataset_quantiles
from ..selection.select import Scores, Selection, select
from .score_table import ScoreTable

MAX_CELLS = 40_000
MAX_SLIDERS = 4  # combinations multiply; the rules of further sliders stay as they are
PROTECTED, FORCED = 1, 2
OFF = None
_OF_RULES = {"drop", "max_fraction", "scope", "scale"}  # keys that scores do not depend on
_SHARES = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)
_ALL = (0.0005, 0.001, 0.0025, *_SHARES)
_KNOWN = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.999, 0.9999)
_UNKNOWN = (0.0001, 0.0005, 0.001, 0.005, 0.01, 0.02, 0.05, 0.1)
_FENCES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0)
_DESCENDING = ("fence", "known_above")  # a larger number drops less
_CAPPED = "two rules share one max_fraction, which no single slider can show"
_FURTHER = f"no more than {MAX_SLIDERS} sliders fit one page; this rule stays as it is"
_LOOKS = "scores behind dropped noise are those of this run's threshold: a run with another would look anew"
_DRAWN = "control: random draws the tokens, so that a moved threshold would show nothing"

Stop = float | int | None


def reselect(table: ScoreTable, config: XTFConfig) -> Selection:
    """What a run with another block selects from the same scores, `min_kept` and `control` included.

    A selector with `context: kept` keeps the scores of the table's own thresholds.

    Raises:
        XTFUserError: the block asks for scores, protected or forced tokens that the table does not hold.
    """
    asked, held = _scored(config), _scored(table.config)
    other = [name for name, settings in asked.items() if held.get(name) != settings]
    if other:
        raise XTFUserError(f"{', '.join(other)}: not as this score table was scored; run `xtf score` with that block.")
    scores = Scores(table.keys, table.offsets, table.counts, table.token_ids, table.positions, logprobs=table.logprobs)
    return select(scores, config, table.protected, table.forced, seen=table.scores)


def _scored(config: XTFConfig) -> dict[str, Any]:
    """The settings that a table's columns depend on, thresholds aside."""
    parts = {name: part.model_dump(mode="json", exclude=_OF_RULES) for name, part in config.scores.items()}
    return {**parts, "reference": config.reference, "protect": config.protect, "force_drop": config.force_drop}


@dataclass(frozen=True)
class Slider:
    """One number of one rule, and where the rule fires at each of its stops.

    Args:
        voter: the attribute or selector.
        key: the key of its `drop`; "" for a rule that stays as it is.
        stops: values of the key, from the laxest on (those of `cluster` are classes); None: the rule is off.
        at: index of the run's own stop.
        patterns: (P, S) each set of stops at which some token fires.
        codes: (M,) the pattern of each completion token.
        limits: the thresholds that each stop comes to, in units of the score; none where no score is known.
        own: every document has its own threshold, and `limits` are their medians.
        note: what its counts leave out, or why it cannot be moved.
    """

    voter: str
    key: str
    stops: Sequence[Stop]
    at: int
    patterns: Bools
    codes: NDArray[np.uint8]
    limits: Sequence[Sequence[float]]
    own: bool
    note: str = ""


@dataclass(frozen=True)
class WhatIf:
    """All that counting needs.

    Args:
        sliders: in the block's order.
        cells: (C, sliders) the pattern of each slider.
        flags: (C,) PROTECTED, FORCED; weights: (C,) occurrences in the dataset.
    """

    sliders: list[Slider]
    cells: NDArray[np.uint8]
    flags: NDArray[np.uint8]
    weights: Ints


def build(table: ScoreTable) -> WhatIf:
    """Sliders and cells of a score table; with very many cells, sliders of fewer stops."""
    sliders = make_sliders(table.config, table.scores, table.layout)
    while True:
        found = WhatIf(sliders, *_cells(sliders, marks(table), table.weights))
        if len(found.cells) <= MAX_CELLS or all(len(slider.stops) <= 3 for slider in sliders):
            return found
        sliders = [thinned(slider) for slider in sliders]


def marks(table: ScoreTable) -> NDArray[np.uint8]:
    """PROTECTED and FORCED of each completion token, (M,)."""
    return table.protected.astype(np.uint8) * PROTECTED | table.forced.astype(np.uint8) * FORCED


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
    """The sliders of a selection, in the block's order; rules that cannot be moved have one stop.

    Args:
        config: the block.
        scores: (M,) by name, as the rules saw them.
        layout: of the documents' completion tokens.
    """
    made = list[Slider]()
    for voter, values in scores.items():
        part = config.scores[voter]
        keys = [key for key in type(part.drop).model_fields if getattr(part.drop, key) is not None and key != "of"]
        if config.control is not None:
            made.append(_fixed(voter, part, values, layout, _DRAWN))
        elif len(keys) > 1 and part.max_fraction is not None:
            made.append(_fixed(voter, part, values, layout, _CAPPED))
        elif sum(bool(slider.key) for slider in made) + len(keys) > MAX_SLIDERS:
            made.append(_fixed(voter, part, values, layout, _FURTHER))
        else:
            made += [_slider(voter, key, part, values, layout) for key in keys]
    return made


def thinned(slider: Slider) -> Slider:
    """Every second stop left out, but not the run's own nor the first."""
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


def _fixed(voter: str, part: ScoreConfig, scores: Floats, layout: Layout, note: str) -> Slider:
    mask, drops = fires(part, scores, layout)
    patterns = np.asarray([[False], [True]])
    return Slider(voter, "", [OFF], 0, patterns, mask.astype(np.uint8), [_limits(drops)], _own([drops]), note)


def _slider(voter: str, key: str, part: ScoreConfig, scores: Floats, layout: Layout) -> Slider:
    own = getattr(part.drop, key)
    stops = [OFF, *_stops(key, own, part, scores, layout)]
    bits = np.zeros(len(scores), dtype=np.uint32)
    drops = list[Mapping[str, Any]]()
    for index, stop in enumerate(stops):
        mask, came_to = fires(_at(part, key, stop), scores, layout) if stop is not OFF else (np.False_, {})
        bits |= np.asarray(mask, dtype=np.uint32) << np.uint32(index)
        drops.append(came_to)
    found, codes = np.unique(bits, return_inverse=True)
    patterns = (found[:, None] >> np.arange(len(stops), dtype=np.uint32)) & 1 > 0
    note = _LOOKS if getattr(part, "context", None) == "kept" else ""
    limits = [_limits(came_to) for came_to in drops]
    return Slider(voter, key, stops, stops.index(own), patterns, codes.astype(np.uint8), limits, _own(drops), note)


def _limits(drops: Mapping[str, Any]) -> list[float]:
    """Thresholds as numbers; of the documents' own ones the median."""
    numbers = (value["median"] if isinstance(value, Mapping) else value for value in drops.values())
    return [float(f"{value:.5g}") for value in numbers if value is not None and math.isfinite(value)]


def _own(drops: Sequence[Mapping[str, Any]]) -> bool:
    return any(isinstance(value, Mapping) for came_to in drops for value in came_to.values())


def _at(part: ScoreConfig, key: str, stop: Stop) -> ScoreConfig:
    """The attribute's part of the block with one key of `drop` at a stop, and no other rule."""
    others = {name: None for name in type(part.drop).model_fields if name not in (key, "of")}
    drop = part.drop.model_copy(update={**others, key: stop})
    return part.model_copy(update={"drop": drop})


def _stops(key: str, own: float, part: ScoreConfig, scores: Floats, layout: Layout) -> list[Any]:
    """Values of a key from the laxest on, the run's own among them; some by how much of the dataset they fire on."""
    if key == "cluster":
        return list(range(1, part.drop.of + 1))
    usual: tuple[float, ...] = {"quantile": _SHARES, "fence": _FENCES, "known_above": _KNOWN}.get(key, ())
    if key == "below":
        usual = _at_shares(scores, layout)
    elif key == "known_above":
        usual += _probabilities(scores, layout, _ALL)
    elif key == "unknown_below":
        usual = _UNKNOWN + _probabilities(scores, layout, [1 - share for share in _ALL])
    return sorted({*usual, own}, reverse=key in _DESCENDING)


def _at_shares(scores: Floats, layout: Layout) -> tuple[float, ...]:
    """Thresholds below which a share of the scores lies, to three digits."""
    return tuple(_short(value) for value in dataset_quantiles(scores, layout, _ALL) if np.isfinite(value))


def _probabilities(novelty: Floats, layout: Layout, shares: Sequence[float]) -> tuple[float, ...]:
    """One minus quantiles of the novelty, as far as a rule takes them."""
    found = (_short(1 - value) for value in dataset_quantiles(novelty, layout, shares))
    return tuple(value for value in found if 0 < value < 1)


def _short(value: float) -> float:
    return float(f"{value:.3g}")
