"""What the report's sliders move: one number of one rule, and at which of its stops the rule fires on each token.

Where a rule fires is asked of the rule's own code, stop by stop, so a slider cannot disagree with a run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .config.block import KnowledgeNoveltyConfig, XTFConfig
from .selection.rules import Segments, fires, ready
from .selection.rules import AttributeConfig
from .data.ragged import Bools, Doubles, Floats, Layout, Scale, dataset_quantiles, identity
from .selection.select import Scores

MAX_SLIDERS = 4  # combinations multiply; the rules of further sliders stay as they are
OFF = None
_FEW = (0.0005, 0.001, 0.0025)
_SHARES = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)
_KNOWN = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.999, 0.9999)
_UNKNOWN = (0.0001, 0.0005, 0.001, 0.005, 0.01, 0.02, 0.05, 0.1)
_FENCES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0)
_DESCENDING = ("fence", "known_above")  # a larger number drops less
_CAPPED = "two rules share one max_fraction, which no single slider can show"
_FURTHER = f"no more than {MAX_SLIDERS} sliders fit one page; this rule stays as it is"
_LOOKS = "scores behind dropped noise are those of this run's threshold: a run with another would look anew"

Stop = float | int | None


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
        limits: the thresholds that each stop comes to, in units of `facts.distributions`; none where no score is known.
        own: every document has its own threshold, and `limits` are their medians.
        told: what its counts leave out, or why it cannot be moved.
    """

    voter: str
    key: str
    stops: Sequence[Stop]
    at: int
    patterns: Bools
    codes: NDArray[np.uint8]
    limits: Sequence[Sequence[float]]
    own: bool
    told: str = ""


def make_sliders(scores: Scores, config: XTFConfig, segments: Segments | None = None) -> list[Slider]:
    """The sliders of a selection, in the block's order; rules that cannot be moved have one stop.

    Args:
        scores, config, segments: as they were given to `selection.select`.
    """
    layout, made = Layout(scores.offsets, scores.counts), list[Slider]()
    for voter in config.voters:
        values = scores.of(voter)
        assert values is not None
        part = config.part(voter)
        ready_scores, _ = ready(voter, values, scores.positions, layout, part, segments)
        keys = [key for key in type(part.drop).model_fields if getattr(part.drop, key) is not None and key != "of"]
        movable = sum(bool(slider.key) for slider in made)
        if len(keys) > 1 and part.max_fraction is not None:
            made.append(_fixed(voter, part, ready_scores, layout, _CAPPED))
        elif movable + len(keys) > MAX_SLIDERS:
            made.append(_fixed(voter, part, ready_scores, layout, _FURTHER))
        else:
            made += [_slider(voter, key, part, ready_scores, layout) for key in keys]
    return made


def thinned(slider: Slider) -> Slider:
    """Every second stop left out, but not the run's own nor the first."""
    keep = [index for index in range(len(slider.stops)) if index % 2 == 0 or index == slider.at]
    if len(keep) == len(slider.stops):
        return slider
    masks = slider.patterns[:, keep]
    patterns, places = np.unique(masks, axis=0, return_inverse=True)
    codes = places.reshape(-1).astype(np.uint8)[slider.codes]
    stops = [slider.stops[index] for index in keep]
    limits = [slider.limits[index] for index in keep]
    return replace(slider, stops=stops, at=keep.index(slider.at), patterns=patterns, codes=codes, limits=limits)


def _fixed(voter: str, part: AttributeConfig, scores: Floats, layout: Layout, told: str) -> Slider:
    mask, drops = fires(part, scores, layout)
    patterns = np.asarray([[False], [True]])
    return Slider(voter, "", [OFF], 0, patterns, mask.astype(np.uint8), [_limits(part, drops)], _own([drops]), told)


def _slider(voter: str, key: str, part: AttributeConfig, scores: Floats, layout: Layout) -> Slider:
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
    told = _LOOKS if getattr(part, "context", None) == "kept" else ""
    limits = [_limits(part, came_to) for came_to in drops]
    return Slider(voter, key, stops, stops.index(own), patterns, codes.astype(np.uint8), limits, _own(drops), told)


def _limits(part: AttributeConfig, drops: Mapping[str, Any]) -> list[float]:
    """Thresholds as the histograms show scores: novelty as probability; of the documents' own ones the median."""
    numbers = (value["median"] if isinstance(value, Mapping) else value for value in drops.values())
    known = (value for value in numbers if value is not None and math.isfinite(value))
    novelty = isinstance(part, KnowledgeNoveltyConfig)
    return [float(f"{1 - value if novelty else value:.5g}") for value in known]


def _own(drops: Sequence[Mapping[str, Any]]) -> bool:
    return any(isinstance(value, Mapping) for came_to in drops for value in came_to.values())


def _at(part: AttributeConfig, key: str, stop: Stop) -> AttributeConfig:
    """The attribute's part of the block with one key of `drop` at a stop, and no other rule."""
    others = {name: None for name in type(part.drop).model_fields if name not in (key, "of")}
    drop = part.drop.model_copy(update={**others, key: stop})
    return part.model_copy(update={"drop": drop})


def _stops(key: str, own: float, part: AttributeConfig, scores: Floats, layout: Layout) -> list[Any]:
    """Values of a key from the laxest on, the run's own among them; some by how much of the dataset they fire on."""
    if key == "cluster":
        return list(range(1, part.drop.of + 1))  # type: ignore[union-attr]
    usual: tuple[float, ...] = {"quantile": _SHARES, "fence": _FENCES, "known_above": _KNOWN}.get(key, ())
    if key == "below":
        usual = _at_shares(scores, layout)
    elif key == "known_above":
        usual += _at_shares(scores, layout, _probability)
    elif key == "unknown_below":
        usual = _UNKNOWN + _at_shares(-scores, layout, lambda negative: _probability(-negative))
    return sorted({*usual, own}, reverse=key in _DESCENDING)


def _at_shares(scores: Floats, layout: Layout, scale: Scale = identity) -> tuple[float, ...]:
    """Thresholds below which a share of the scores lies, to three digits."""
    found = scale(np.asarray(dataset_quantiles(scores, layout, (*_FEW, *_SHARES)), dtype=np.float64))
    return tuple(float(f"{value:.3g}") for value in found if np.isfinite(value))


def _probability(surprisal: Doubles) -> Doubles:
    return np.exp(-surprisal)


def fired(sliders: Sequence[Slider], codes: Sequence[NDArray[np.uint8]], at: Sequence[int]) -> dict[str, Bools]:
    """For each voter, where it fires with the sliders at `at`; `codes` are of any selection of tokens or cells."""
    result: dict[str, Bools] = {}
    for slider, code, place in zip(sliders, codes, at, strict=True):
        here = slider.patterns[code, place]
        result[slider.voter] = result[slider.voter] | here if slider.voter in result else here
    return result
