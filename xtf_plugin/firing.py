"""Applying an attribute's rules to a whole dataset: where they fire, on how much, and what the user has to be told.

A rule that is set up sensibly and yet fires on nothing looks like a run that went well, so it is reported here together
with the scores it was given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .config import KnowledgeNoveltyConfig
from .errors import XTFError
from .rules import AttributeConfig, Rule, Rules, prepare
from .scorers import SelectorConfig
from .segments import (
    UNDEFINED_KEY,
    Bools,
    Doubles,
    Floats,
    Ints,
    Layout,
    dataset_quantiles,
    lowest,
    ordered,
    segment_means,
    windowed,
)

MOST = 0.5  # share of the dataset's completion tokens beyond which a rule is told to fire too often
Limits = list[Doubles]
Segments = Mapping[str, Ints]
_SHARES = {"min": 0.0, "5 %": 0.05, "25 %": 0.25, "50 %": 0.5, "75 %": 0.75, "95 %": 0.95, "max": 1.0}


@dataclass(frozen=True)
class Firing:
    """Where an attribute's rules fire: the tokens (M,), their number in the dataset, thresholds, what to tell, the
    rules themselves, to fire on other documents with the same thresholds, and the scores that they saw (M,).
    """

    mask: Bools
    fired: int
    thresholds: dict[str, Any]
    warnings: list[str]
    rules: Rules
    seen: Floats


def evaluate(
    attribute: str,
    values: Floats,
    positions: NDArray[np.int32],
    layout: Layout,
    config: AttributeConfig,
    segments: Segments | None = None,
    rules: Rules | None = None,
    seen: bool = False,
) -> Firing:
    """Apply one attribute's or selector's rules to the whole dataset: window, then rules, then `max_fraction`.

    Args:
        attribute: its name in the block.
        values: (M,) attention received (1.0 = uniform), log-probabilities (nats), task relevance (0 to 1), or a
            selector's scores; NaN and infinite values are undefined.
        positions: (M,) of the tokens within their documents.
        layout: of the documents' completion tokens.
        config: the attribute's part of the block.
        segments: the first tokens of the sentences and lines, by unit; needed if the window is one.
        rules: with thresholds from elsewhere, for a part of a stream; how often they fire here is then no reason to
            warn. None: thresholds are taken from these scores.
        seen: `values` are what the rules see already, after the window and novelty in [0, 1].

    Raises:
        XTFError: the window is a sentence or line, and their first tokens are not given.
    """
    scores, warnings = (values, []) if seen else _ready(attribute, values, positions, layout, config, segments)
    found = prepare(scores, layout, config) if rules is None else rules
    off = _off(attribute, config)
    mask, hits, limits = _apply(found, scores, layout, config.max_fraction)
    fired = layout.occurrences(mask)
    drops = _described(found.rules, limits)
    thresholds = {
        "rule": config.drop.model_dump(mode="json", exclude_none=True),
        "window": config.window,
        "max_fraction": config.max_fraction,
        **found.facts,
        "drops": drops,
    }
    if rules is not None:
        return Firing(mask, fired, thresholds, warnings, found, scores)
    warnings += [f"{attribute}: {warning}" for warning in found.warnings]
    for rule, hit in zip(found.rules, hits, strict=True):
        if hit == 0:
            warnings.append(_inert(attribute, rule, drops, scores, layout, off))
    if any(hits) and fired == 0:
        warnings.append(
            f"{attribute}: max_fraction {config.max_fraction} lets no token of any document through (the longest "
            f"completion has {layout.lengths.max()} tokens); raise it, or {off}"
        )
    warnings += _greedy(attribute, fired, layout, off)
    return Firing(mask, fired, thresholds, warnings, found, scores)


def _ready(
    attribute: str,
    values: Floats,
    positions: NDArray[np.int32],
    layout: Layout,
    config: AttributeConfig,
    segments: Segments | None = None,
) -> tuple[Floats, list[str]]:
    """Scores as rules see them, after the window, log-probabilities as novelty; and what to tell of undefined ones."""
    scores, warnings = _defined(attribute, values, positions, layout, isinstance(config, SelectorConfig))
    averaged = _averaged(scores, layout, config.window, segments)
    return -np.expm1(averaged) if isinstance(config, KnowledgeNoveltyConfig) else averaged, warnings


def fires(config: AttributeConfig, scores: Floats, layout: Layout) -> tuple[Bools, dict[str, Any]]:
    """Where the rules of one attribute fire, (M,), on scores as the rules see them, and the thresholds they come to."""
    found = prepare(scores, layout, config)
    mask, _, limits = _apply(found, scores, layout, config.max_fraction)
    return mask, _described(found.rules, limits)


def _greedy(attribute: str, fired: int, layout: Layout, off: str) -> list[str]:
    """What to tell about a rule that fires on most of the dataset: then it finds no noise, it is noise to the data."""
    total = int(layout.lengths @ layout.counts)
    if fired <= MOST * total:
        return []
    return [
        f"{attribute}: fires on {fired / total:.0%} of all completion tokens. Noise is seldom the larger part: the "
        "reference may not know this kind of text (other language or domain), or the threshold does not suit it. Look "
        f"at `xtf show`; choose another threshold, a `max_fraction` or another `reference.model`, or {off}"
    ]


def _off(attribute: str, config: AttributeConfig) -> str:
    if isinstance(config, SelectorConfig):
        return f"remove the selector `{attribute}` (`{attribute}: false` if it is the preset's)"
    return f"set `{attribute}: false`"


def _averaged(scores: Floats, layout: Layout, window: int | str, segments: Segments | None) -> Floats:
    """Scores after the window."""
    if not isinstance(window, str):
        return windowed(scores, layout, window)
    if segments is None or window not in segments:
        raise XTFError(f"selection: window: {window} needs the first token of every {window}")
    return segment_means(scores, layout, segments[window])


def _defined(
    attribute: str, values: Floats, positions: NDArray[np.int32], layout: Layout, may_be_nan: bool
) -> tuple[Floats, list[str]]:
    """Turn infinite scores into NaN, and tell of undefined scores where none is to be expected.

    With `may_be_nan` NaN is a scorer's way to leave a token alone, and only infinite scores are told.
    """
    infinite = missing = 0
    scores = values
    for tokens, _, part in layout.chunks():
        wild, nan = np.isinf(values[tokens]), np.isnan(values[tokens])
        if wild.any():
            scores = values.copy() if scores is values else scores
            scores[tokens][wild] = np.nan
            infinite += int(part.count(wild) @ part.counts)
        if may_be_nan:
            continue
        nan &= positions[tokens] > 0  # nothing predicts a document's first token
        nan[part.offsets[1:][part.lengths > 0] - 1] = False  # nothing attends to its last one
        missing += int(part.count(nan) @ part.counts)
    if not infinite and not missing:
        return scores, []
    total = int(layout.lengths @ layout.counts)
    told = f"{attribute}: of {total} scores {infinite} are infinite and {missing} are NaN where a number was expected"
    return scores, [f"{told}; {attribute} never drops these tokens"]


def _apply(
    found: Rules, scores: Floats, layout: Layout, max_fraction: float | None
) -> tuple[Bools, list[int], list[Limits]]:
    """Fire the rules chunk by chunk: the tokens, each rule's hits in the dataset, each rule's document thresholds."""
    mask = np.zeros(len(scores), dtype=bool)
    hits, limits = [0] * len(found.rules), [Limits() for _ in found.rules]
    for tokens, _, part in layout.chunks():
        here = scores[tokens]
        for index, rule in enumerate(found.rules):
            fires, limit = rule.test(here, part)
            mask[tokens] |= fires
            hits[index] += int(part.count(fires) @ part.counts)
            if limit is not None:
                limits[index].append(limit)
        if max_fraction is not None:
            mask[tokens] = _capped(mask[tokens], here, found.rank, part, max_fraction)
    return mask, hits, limits


def _capped(
    fires: Bools, scores: Floats, rank: Callable[[Floats], Floats], layout: Layout, max_fraction: float
) -> Bools:
    """At most `floor(max_fraction * tokens)` firings per document: those of lowest rank, of equal ones the earliest."""
    cap = np.floor(max_fraction * layout.lengths).astype(np.int64)
    over = layout.count(fires) > cap
    if not over.any():
        return fires
    keys = ordered(rank(scores))
    keys[~fires] = UNDEFINED_KEY
    let_through, _ = lowest(keys, layout, np.where(over, cap, 0))
    return np.where(layout.spread(over), let_through, fires)


def _described(rules: Sequence[Rule], limits: Sequence[Limits]) -> dict[str, Any]:
    """The rules' thresholds as plain numbers; those of single documents as their median, smallest and largest."""
    result: dict[str, Any] = {}
    for rule, own in zip(rules, limits, strict=True):
        numbers = np.concatenate(own) if own else np.zeros(0)
        numbers = numbers[np.isfinite(numbers)]  # the report is JSON, which has no others
        for bound, value in rule.drops.items():
            if own:
                result[bound] = _spread(numbers) if len(numbers) else None
            else:
                result[bound] = None if value is None or not math.isfinite(value) else float(value)
    return result


def _spread(numbers: Doubles) -> dict[str, float]:
    median = 2 * float(np.median(numbers / 2))  # the sum of two in the middle could exceed every number
    return {"median": median, "min": float(numbers.min()), "max": float(numbers.max())}


def _inert(
    attribute: str, rule: Rule, drops: Mapping[str, Any], scores: Floats, layout: Layout, off: str
) -> str:
    """The warning about a rule that fires on nothing, with the scores it was given."""
    values = dataset_quantiles(scores, layout, list(_SHARES.values()))
    if np.isnan(values).all():
        return f"{attribute}: the rule {{{rule.name}}} drops nothing, because no score is defined"
    spread = ", ".join(f"{name} {value:.4g}" for name, value in zip(_SHARES, values, strict=True))
    bounds = ", ".join(f"{bound} {_number(drops[bound])}" for bound in rule.drops if drops[bound] is not None)
    return (
        f"{attribute}: the rule {{{rule.name}}} fires on nothing in the whole dataset. Scores: {spread}; the rule asks "
        f"for: {bounds or 'less than one token of any document'}. Choose a threshold within the scores, or "
        f"{off}"
    )


def _number(value: float | Mapping[str, float]) -> str:
    if isinstance(value, Mapping):
        return f"{value['median']:.4g} (median over documents, {value['min']:.4g} to {value['max']:.4g})"
    return f"{value:.4g}"
