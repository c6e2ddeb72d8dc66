"""Other thresholds on the scores of a table: selected again in Python, or moved by sliders in the report.

A slider is one number of one rule. It has places, in the order of tokens dropped, and for each token the first place at
which the rule fires on it. The rule's own code computes these, so that a slider agrees with a run. Tokens with the same
places on all sliders that are equally protected and forced form one cell, and the page sums the weights of cells. A
number between two places, `min_kept` and characters that are kept whole leave bounds instead of one count; scores that
depend on what is dropped leave none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..config.block import XTFConfig
from ..data.ragged import Bools, Doubles, Floats, Ints, Layout, dataset_quantiles
from ..errors import XTFUserError
from ..scorers import ScoreConfig
from ..selection.rules import fires
from ..selection.select import Scores, Selection, select
from .score_table import ScoreTable

MAX_CELLS = 40_000
MAX_SLIDERS = 4  # the number of cells multiplies with each
MAX_PLACES = 200  # of a slider
NEVER = 255  # place of a token on which a rule never fires, because it has no score
PROTECTED, FORCED = 1, 2
LOOSE = 4  # flag of a token of a character whose tokens differ: it is kept if one of the others is
_RULE_KEYS = {"drop", "max_fraction", "scope", "scale"}  # scores do not depend on them
_SHARES = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)
_USUAL = {
    "quantile": _SHARES,
    "fence": (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0),
    "known_above": (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.999, 0.9999),
    "of_median": (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75, 1.0),
    "unknown_below": (0.0001, 0.0005, 0.001, 0.005, 0.01, 0.02, 0.05, 0.1),
}
_DESCENDING = ("fence", "known_above")  # a larger number drops less
_CAPPED = "This score has two thresholds under one max_fraction, which no single slider can show."
_TOO_MANY = f"The page has at most {MAX_SLIDERS} sliders; this rule cannot be moved."
_RANDOM = "control: random draws the tokens, so a moved threshold would show nothing."


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
        raise XTFUserError(
            f"`{'`, `'.join(other)}` of the block changed after the table was made. Run `xtf score` with this block."
        )
    scores = Scores(table.keys, table.offsets, table.counts, table.token_ids, table.positions, logprobs=table.logprobs)
    return select(scores, config, table.protected, table.forced, seen=table.scores, inside=_inside(table))


def _inside(table: ScoreTable) -> Bools:
    """Which tokens begin inside a character, (M,)."""
    inside = np.zeros(max(table.pieces, default=0) + 1, dtype=bool)
    inside[[i for i, piece in table.pieces.items() if piece and piece[0] & 0xC0 == 0x80]] = True
    found: Bools = inside[table.token_ids] & ~table.opens
    return found


def _scored(config: XTFConfig) -> dict[str, Any]:
    """The settings that a table's columns depend on, without the thresholds."""
    parts = {name: part.model_dump(mode="json", exclude=_RULE_KEYS) for name, part in config.scores.items()}
    return {**parts, "reference": config.reference, "protect": config.protect, "force_drop": config.force_drop}


@dataclass(frozen=True)
class Slider:
    """One number of one rule, and where the rule fires at each of its places.

    Args:
        score: name of the score.
        key: the key of its `drop`; "" for a rule that cannot be moved.
        kind: `line`: the threshold is `line[0] + line[1] * value` for any value; `step`: only the values of places are
            known; `class`: a place is a class, and fires on its own tokens alone; `fixed`: cannot be moved.
        own: the run's own value.
        places: of `line`, thresholds; of other kinds, values of the key. In the order of tokens dropped, fewest first.
        codes: (M,) the first place at which the rule fires on each completion token; `NEVER`: at none.
        limits: the thresholds at each place in units of the score; empty for `line`.
        line: see `kind`.
        dense: no score lies between two places of a `line`, so that any value is counted exactly.
        per_document: every document has its own threshold, and `limits` are their medians.
        note: why the rule cannot be moved.
        rescored: another threshold changes the scores themselves.
    """

    score: str
    key: str
    kind: Literal["line", "step", "class", "fixed"]
    own: float | None
    places: Sequence[float]
    codes: NDArray[np.uint8]
    limits: Sequence[Sequence[float]] = ()
    line: Sequence[float] = ()
    dense: bool = False
    per_document: bool = False
    note: str = ""
    rescored: bool = False

    def threshold(self, value: float) -> float:
        """The threshold of a value of a `line`, as the rule compares it."""
        limit = self.line[0] + self.line[1] * value
        return float(np.float32(limit)) if self.key in ("known_above", "unknown_below") else limit

    @property
    def at(self) -> int:
        """The place of the run's own value."""
        if self.kind != "line" or self.own is None:
            return 0 if self.own is None else list(self.places).index(self.own)
        return int(np.searchsorted(self._ascending(), self._sign() * self.threshold(self.own)))

    def fires(self, place: int) -> Bools:
        """On which tokens the rule fires at a place, (M,)."""
        found: Bools = self.codes == place if self.kind == "class" else self.codes <= place
        return found

    def _sign(self) -> int:
        return -1 if self.key == "unknown_below" else 1  # which drops scores above its threshold

    def _ascending(self) -> Doubles:
        return self._sign() * np.asarray(self.places, dtype=np.float64)


@dataclass(frozen=True)
class WhatIf:
    """The sliders of a report and the cells that their counts are sums of.

    Args:
        sliders: in the block's order.
        cells: (C, sliders) the place of each slider.
        flags: (C,) PROTECTED, FORCED and LOOSE; weights: (C,) occurrences in the dataset.
        slack: how many of the tokens that the cells count as dropped `min_kept` may keep at most.
    """

    sliders: list[Slider]
    cells: NDArray[np.uint8]
    flags: NDArray[np.uint8]
    weights: Ints
    slack: int = 0


def build(table: ScoreTable) -> WhatIf:
    """Sliders and cells of a score table; beyond `MAX_CELLS` cells, sliders with fewer places."""
    sliders = make_sliders(table.config, table.scores, table.layout)
    flags, weights = flags_of(table.protected, table.forced), table.weights
    flags |= _loose(table, [flags, *(slider.codes for slider in sliders)]) * np.uint8(LOOSE)
    slack = 0 if table.config.control else _slack(table)
    while True:
        found = WhatIf(sliders, *_cells(sliders, flags, weights), slack)
        if len(found.cells) <= MAX_CELLS or all(len(slider.places) <= 3 for slider in sliders):
            return found
        sliders = [thinned(slider) for slider in sliders]


def flags_of(protected: Bools, forced: Bools) -> NDArray[np.uint8]:
    """PROTECTED and FORCED of each token."""
    return protected.astype(np.uint8) * PROTECTED | forced.astype(np.uint8) * FORCED


def _slack(table: ScoreTable) -> int:
    """`WhatIf.slack`: what documents without enough protected tokens lack."""
    layout, trainable = table.layout, table.positions > 0
    wanted = np.minimum(min(table.config.min_kept, 1 << 62), layout.count(trainable))
    lacking = np.maximum(0, wanted - layout.count(trainable & table.protected))
    return int(lacking @ layout.counts)


def _loose(table: ScoreTable, columns: Sequence[NDArray[np.uint8]]) -> Bools:
    """Tokens of characters whose tokens differ in a column, (M,)."""
    starts = np.flatnonzero(~_inside(table))
    if len(starts) == len(table.token_ids):
        return np.zeros(len(starts), dtype=bool)
    parts = [np.minimum.reduceat(each, starts) < np.maximum.reduceat(each, starts) for each in columns]
    return np.repeat(np.logical_or.reduce(parts), np.diff(starts, append=len(table.token_ids)))


def _cells(
    sliders: Sequence[Slider], flags: NDArray[np.uint8], weights: Ints
) -> tuple[NDArray[np.uint8], NDArray[np.uint8], Ints]:
    """Distinct (places, flags) among the tokens, and the occurrences of each."""
    key = flags.astype(np.int64)
    for slider in sliders:
        key = key * (NEVER + 1) + slider.codes
    _, first, cell = np.unique(key, return_index=True, return_inverse=True)
    sums = np.zeros(len(first), dtype=np.int64)
    np.add.at(sums, cell.reshape(-1), weights)
    columns = [slider.codes[first] for slider in sliders]
    cells = np.stack(columns, axis=1) if columns else np.zeros((len(first), 0), dtype=np.uint8)
    return cells, flags[first], sums


def make_sliders(config: XTFConfig, scores: Mapping[str, Floats], layout: Layout) -> list[Slider]:
    """The sliders of a block, in its order, for scores (M,) as the rules saw them."""
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
    read = {getattr(part, "among", None) for part in config.scores.values()}
    return [replace(slider, rescored=slider.rescored or slider.score in read) for slider in made]


def thinned(slider: Slider) -> Slider:
    """The slider without every second place; keeps the run's own."""
    if slider.kind not in ("line", "step") or len(slider.places) < 3:
        return slider
    own = slider.at
    keep = [index for index in range(len(slider.places)) if index % 2 == 0 or index == own]
    codes = np.append(np.searchsorted(keep, np.arange(NEVER)), NEVER).astype(np.uint8)[slider.codes]
    limits = [slider.limits[index] for index in keep] if slider.limits else ()
    return replace(slider, places=[slider.places[index] for index in keep], codes=codes, limits=limits, dense=False)


def _fixed(name: str, part: ScoreConfig, scores: Floats, layout: Layout, note: str) -> Slider:
    mask, drops = fires(part, scores, layout)
    limits, per_document = _limits(drops)
    codes = np.where(mask, 0, NEVER).astype(np.uint8)
    return Slider(name, "", "fixed", None, (0,), codes, [limits], per_document=per_document, note=note)


def _slider(name: str, key: str, part: ScoreConfig, scores: Floats, layout: Layout) -> Slider:
    own = getattr(part.drop, key)
    rescored = part.scorer == "explained"
    line = _line(key, scores, layout) if part.max_fraction is None else None
    if line is not None:
        made = Slider(name, key, "line", own, (), np.zeros(0, dtype=np.uint8), line=line, rescored=rescored)
        return _with_places(made, scores)
    others = {other: None for other in type(part.drop).model_fields if other not in (key, "of")}
    places = _values(key, own, part, scores, layout)
    codes, limits, own_limits = np.full(len(scores), NEVER, dtype=np.uint8), [], False
    for place, value in reversed(list(enumerate(places))):
        drop = part.drop.model_copy(update={**others, key: value})
        mask, drops = fires(part.model_copy(update={"drop": drop}), scores, layout)
        codes[mask] = place
        numbers, per_document = _limits(drops)
        limits.append(numbers)
        own_limits |= per_document
    kind: Literal["class", "step"] = "class" if key == "cluster" else "step"
    return Slider(name, key, kind, own, places, codes, limits[::-1], per_document=own_limits, rescored=rescored)


def _line(key: str, scores: Floats, layout: Layout) -> tuple[float, float] | None:
    """Start and slope of the threshold over the values of a key; None if it is not a line."""
    if key == "of_median":
        median = float(dataset_quantiles(scores, layout, [0.5])[0])
        return (0.0, median) if median > 0 else None
    return {"below": (0.0, 1.0), "known_above": (1.0, -1.0), "unknown_below": (1.0, -1.0)}.get(key)


def _with_places(slider: Slider, scores: Floats) -> Slider:
    """A `line` with its places: all distinct scores if they are few, else scores at even shares of the dataset."""
    sign, known = slider._sign(), ~np.isnan(scores)
    values, number = np.unique(sign * scores[known].astype(np.float64), return_counts=True)
    places = values
    if not (dense := len(values) < MAX_PLACES):
        shares = np.arange(1, MAX_PLACES) / MAX_PLACES
        shares = np.asarray([*_SHARES[:4], *shares]) / 2  # most rules drop less than half
        places = values[np.searchsorted(np.cumsum(number), shares * number.sum())]
        usual = [sign * slider.threshold(value) for value in _USUAL.get(slider.key, ())]
        places = np.unique([*places, *usual, sign * slider.threshold(slider.own or 0.0)])
    codes = np.full(len(scores), NEVER, dtype=np.uint8)
    codes[known] = np.searchsorted(places, sign * scores[known].astype(np.float64), side="right")
    return replace(slider, places=(sign * places).tolist(), codes=codes, dense=dense)


def _limits(drops: Mapping[str, Any]) -> tuple[list[float], bool]:
    """Thresholds as numbers; the median where documents have their own, and whether they have."""
    per_document = any(isinstance(value, Mapping) for value in drops.values())
    numbers = (value["median"] if isinstance(value, Mapping) else value for value in drops.values())
    return [float(f"{value:.5g}") for value in numbers if value is not None and math.isfinite(value)], per_document


def _values(key: str, own: float, part: ScoreConfig, scores: Floats, layout: Layout) -> list[Any]:
    """Values of a key whose thresholds are not a line, the run's own among them."""
    if key == "cluster":
        return list(range(1, part.drop.of + 1))
    values = {*_USUAL.get(key, ()), own}
    if key == "below":
        limits = dataset_quantiles(scores, layout, _SHARES)
        values |= {float(f"{value:.3g}") for value in limits if math.isfinite(value)}
    return sorted(values, reverse=key in _DESCENDING)
