"""Applies the rule of a score: from the scorer's numbers to the tokens that the rule fires on, over a dataset.

The steps are the same for all scores: average over the unit or window, map to what the rule sees, fire the rule, cap.
Low scores are dropped, except by `unknown_below`, which drops high novelty, and by `cluster`, which drops the class
that it names. `select.py` decides which tokens are dropped. An undefined score (NaN) fires no rule. A
rule that fires on nothing or on most tokens gives a warning, because the run would look successful all the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..data import ragged
from ..data.ragged import UNDEFINED_KEY, Bools, Doubles, Floats, Ints, Layout, Scale, identity, lowest, sort_keys
from ..errors import XTFError
from ..scorers import ScoreConfig, registry
from .otsu import UndefinedSplit, multi_otsu

MOST = 0.5  # a rule that fires on more than this share of the dataset's completion tokens gives a warning
Limits = list[Doubles]
Segments = Mapping[str, Ints]
Test = Callable[[Floats, Layout], tuple[Bools, Doubles | None]]
_TINY = float(np.finfo(np.float32).tiny)
_SHARES = {"min": 0.0, "5 %": 0.05, "25 %": 0.25, "50 %": 0.5, "75 %": 0.75, "95 %": 0.95, "max": 1.0}


@dataclass(frozen=True)
class Rule:
    """One rule, ready for any chunk of documents.

    Args:
        name: as in the block, "fence: 1.0".
        test: (scores, layout) -> the tokens it fires on, and each document's own threshold where it has one.
        drops: what it drops, in units of the score: `below` and `above` are exclusive, `up_to` inclusive; None: no such
            bound, or one per document.
    """

    name: str
    test: Test
    drops: Mapping[str, float | None]


@dataclass(frozen=True)
class Rules:
    """The rules of one score with their thresholds, ready for any chunk of documents.

    Args:
        rules: one for most scores; two for `known_above` beside `unknown_below`.
        rank: the order in which `max_fraction` lets tokens through, lowest first.
        facts: what else to report.
        warnings: about the thresholds.
    """

    rules: Sequence[Rule]
    rank: Callable[[Floats], Floats] = lambda scores: scores
    facts: Mapping[str, Any] = field(default_factory=dict)
    warnings: Sequence[str] = ()


@dataclass(frozen=True)
class RuleResult:
    """What the rules of one score drop.

    Args:
        mask: (M,) the tokens they fire on.
        fired: the number of these tokens in the dataset.
        thresholds: what to report of the rule, in units of `seen`.
        warnings: for the user.
        rules: to apply to other documents with the same thresholds.
        seen: (M,) the scores that the rules saw.
    """

    mask: Bools
    fired: int
    thresholds: dict[str, Any]
    warnings: list[str]
    rules: Rules
    seen: Floats


def evaluate(
    name: str,
    values: Floats,
    layout: Layout,
    config: ScoreConfig,
    segments: Segments | None = None,
    rules: Rules | None = None,
    *,
    averaged: bool = False,
) -> RuleResult:
    """Apply the rule of one score to the dataset: unit or window, then rule, then `max_fraction`.

    Args:
        values: (M,) as the scorer gave them; NaN and infinite values are undefined.
        layout: of the documents' completion tokens.
        segments: the first tokens of the sentences and lines, by unit; needed if the unit is one.
        rules: use these thresholds, and do not warn of how often they fire; for a part of a stream. None: thresholds
            are computed from these scores.
        averaged: the values are already what the rule sees.

    Raises:
        XTFError: the unit is a sentence or line, and their first tokens are not given.
    """
    values, warnings = _finite(name, values, layout)
    seen = values if averaged else _seen(name, values, layout, config, segments)
    found = _prepared(seen, layout, config) if rules is None else rules
    mask, hits, limits = _apply(found, seen, layout, config.max_fraction)
    fired, drops = layout.occurrences(mask), _described(found.rules, limits)
    thresholds = {
        "scorer": config.scorer,
        "rule": config.drop.model_dump(),
        **config.model_dump(include={"unit", "window", "max_fraction"}),
        **found.facts,
        "drops": drops,
    }
    if rules is None:
        off = f"remove it (`{name}: false` if it is a slot or the preset's)"
        warnings += [f"{name}: {warning}" for warning in found.warnings]
        for rule, hit in zip(found.rules, hits, strict=True):
            if hit == 0 and not registry.find(config.scorer).finds_nothing:
                warnings.append(_fires_on_nothing(name, rule, drops, seen, layout, off))
        if any(hits) and fired == 0:
            warnings.append(
                f"{name}: max_fraction {config.max_fraction} lets no token of any document through (the longest "
                f"completion has {layout.lengths.max()} tokens); raise it, or {off}"
            )
        warnings += _fires_on_most(name, fired, layout, off)
    return RuleResult(mask, fired, thresholds, warnings, found, seen)


def fires(config: ScoreConfig, seen: Floats, layout: Layout) -> tuple[Bools, dict[str, Any]]:
    """Where the rule of one score fires, (M,), on scores as it sees them, and its thresholds."""
    found = _prepared(seen, layout, config)
    mask, _, limits = _apply(found, seen, layout, config.max_fraction)
    return mask, _described(found.rules, limits)


def _prepared(seen: Floats, layout: Layout, config: ScoreConfig) -> Rules:
    """The rules of one score with their thresholds over the dataset."""
    drop = config.drop
    if drop.cluster is not None:
        return _cluster(seen, layout, drop.cluster, drop.of)
    if drop.fence is not None:
        facts = {"scope": config.scope, "scale": config.scale}
        return Rules([_fence(seen, layout, drop.fence, config)], facts=facts)
    if drop.quantile is not None:
        return Rules([_quantile(seen, layout, drop.quantile, config.scope)], facts={"scope": config.scope})
    if drop.of_median is not None:
        return _of_median(seen, layout, drop.of_median)
    rules, bounds = [], {}
    for key, side, value in drop.bounds():
        # `below` as written, the others as a float32 score holds them: a probability equal to one is on neither side
        limit = value if key == "below" else float(np.float32(value))
        test = _under(limit) if side == "below" else _over(limit)
        rules.append(Rule(f"{key}: {getattr(drop, key)}", test, {side: value}))
        bounds[side] = value
    return Rules(rules, _rank(bounds))


def _rank(bounds: Mapping[str, float]) -> Callable[[Floats], Floats]:
    """The rank of scores beyond a bound, the most extreme first."""
    below, above = bounds.get("below"), bounds.get("above")
    if above is None:
        return lambda scores: scores
    if below is None:
        return lambda scores: -scores

    def rank(scores: Floats) -> Floats:
        """The distance to the nearer end of [0, 1], as a share of the threshold's distance to that end."""
        exact = scores.astype(np.float64)
        return np.minimum(exact / max(below, _TINY), (1 - exact) / max(1 - above, _TINY)).astype(np.float32)

    return rank


def _under(limit: float, scale: Scale = identity) -> Test:
    return lambda scores, layout: (scale(scores.astype(np.float64)) < limit, None)


def _over(limit: float) -> Test:
    return lambda scores, layout: (scores.astype(np.float64) > limit, None)


def _log(values: Doubles) -> Doubles:
    return np.log(np.maximum(values, _TINY))  # a score of 0 is finite, and far below all others


def _fence(seen: Floats, layout: Layout, k: float, config: ScoreConfig) -> Rule:
    """Eq. (5), `S < Q1 - k * (Q3 - Q1)`, over each document or the dataset, on a linear or logarithmic scale."""
    scale, unscale = (_log, np.exp) if config.scale == "log" else (identity, identity)

    def of_document(scores: Floats, layout: Layout) -> tuple[Bools, Doubles]:
        q1, q3 = ragged.document_quantiles(scores, layout, [0.25, 0.75], scale)
        fence = q1 - k * (q3 - q1)
        return scale(scores.astype(np.float64)) < layout.spread(fence), unscale(fence)

    if config.scope == "document":
        return Rule(f"fence: {k}", of_document, {"below": None})
    q1, q3 = ragged.dataset_quantiles(seen, layout, [0.25, 0.75], scale)
    fence = q1 - k * (q3 - q1)
    return Rule(f"fence: {k}", _under(float(fence), scale), {"below": float(unscale(fence))})


def _quantile(seen: Floats, layout: Layout, share: float, scope: str) -> Rule:
    """The lowest share of each document's scores, or of the dataset's."""

    def of_document(scores: Floats, layout: Layout) -> tuple[Bools, Doubles]:
        number = np.floor(share * layout.count(~np.isnan(scores))).astype(np.int64)
        fires, keys = lowest(sort_keys(scores), layout, number)
        return fires, ragged.from_sort_keys(keys)

    if scope == "document":
        return Rule(f"quantile: {share}", of_document, {"up_to": None})
    limit = float(ragged.dataset_quantiles(seen, layout, [share])[0])
    return Rule(f"quantile: {share}", _under(limit), {"below": limit})


def _of_median(seen: Floats, layout: Layout, share: float) -> Rules:
    """Scores below a share of the dataset's median; a median that is not positive gives no threshold."""
    name, median = f"of_median: {share}", float(ragged.dataset_quantiles(seen, layout, [0.5])[0])
    if median <= 0:
        why = f"the median is {median:.4g}, and a share of it is no lower bound. Use {{below: x}} or {{quantile: q}}"
        return Rules([], facts={"median": median}, warnings=[f"the rule {{{name}}} drops nothing: {why}"])
    limit = share * median  # NaN without a defined score, and below NaN is nothing
    return Rules(
        [Rule(name, _under(limit), {"below": limit})], facts={"median": None if math.isnan(median) else median}
    )


def _cluster(seen: Floats, layout: Layout, cluster: int, of: int) -> Rules:
    """Eq. (7): one class of a Multi-Otsu split of all scores, each counted as often as it occurs."""
    name = f"cluster: {cluster}, of: {of}"
    undefined = np.isnan(seen)
    known = ~undefined if undefined.any() else slice(None)  # a view, not a copy of the dataset
    weights = None if (layout.counts == 1).all() else layout.spread(layout.counts.astype(np.float32))[known]
    try:
        cuts = multi_otsu(seen[known], weights, of)
    except UndefinedSplit as error:
        warning = f"the rule {{{name}}} is undefined and drops nothing: {error}. Use fewer classes, or {{quantile: q}}"
        return Rules([], facts={"undefined": str(error)}, warnings=[warning])
    low = float(cuts[cluster - 2]) if cluster > 1 else None
    high = float(cuts[cluster - 1]) if cluster < of else None
    facts = {"classes": {"thresholds": cuts.tolist(), "sizes": _class_sizes(seen, layout, cuts)}}
    return Rules([Rule(name, _within(low, high), {"above": low, "up_to": high})], facts=facts)


def _within(low: float | None, high: float | None) -> Test:
    def test(scores: Floats, layout: Layout) -> tuple[Bools, None]:
        exact = scores.astype(np.float64)
        return (exact > (-np.inf if low is None else low)) & (exact <= (np.inf if high is None else high)), None

    return test


def _class_sizes(scores: Floats, layout: Layout, cuts: Doubles) -> list[int]:
    """Occurrences in the dataset of each class's tokens."""
    sizes = np.zeros(len(cuts) + 1)
    for tokens, _, part in layout.chunks():
        known = ~np.isnan(scores[tokens])
        classes = np.searchsorted(cuts, scores[tokens][known].astype(np.float64))
        sizes += np.bincount(classes, part.spread(part.counts)[known], len(sizes))
    return [int(size) for size in sizes]


def _seen(name: str, values: Floats, layout: Layout, config: ScoreConfig, segments: Segments | None) -> Floats:
    """Scores as the rule sees them, after unit and window; a unit of the scorer's own (`both`) is averaged by it."""
    if config.unit not in ("sentence", "line"):
        means = ragged.windowed(values, layout, config.window)
    elif segments is None or config.unit not in segments:
        raise XTFError(f"selection: {name}.unit: {config.unit} needs the first token of every {config.unit}.")
    else:
        means = ragged.segment_means(values, layout, segments[config.unit])
    mapping = registry.find(config.scorer).seen
    scores = mapping(means) if mapping else means
    return np.where(np.isinf(scores), np.float32(np.nan), scores) if mapping else scores


def _finite(name: str, values: Floats, layout: Layout) -> tuple[Floats, list[str]]:
    """Infinite scores as NaN, with a warning that counts them."""
    infinite = np.isinf(values)
    if not infinite.any():
        return values, []
    counts = f"{layout.occurrences(infinite)} of {layout.lengths @ layout.counts}"
    warning = f"{name}: {counts} scores are infinite; {name} never drops these tokens"
    return np.where(infinite, np.float32(np.nan), values), [warning]


def _apply(
    found: Rules, scores: Floats, layout: Layout, max_fraction: float | None
) -> tuple[Bools, list[int], list[Limits]]:
    """Apply rules chunk by chunk: the tokens, each rule's hits in the dataset, each rule's thresholds per document."""
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
    keys = sort_keys(rank(scores))
    keys[~fires] = UNDEFINED_KEY
    let_through, _ = lowest(keys, layout, np.where(over, cap, 0))
    return np.where(layout.spread(over), let_through, fires)


def _described(rules: Sequence[Rule], limits: Sequence[Limits]) -> dict[str, Any]:
    """The rules' thresholds as plain numbers; those of single documents as their median, smallest and largest."""
    result: dict[str, Any] = {}
    for rule, own in zip(rules, limits, strict=True):
        for bound, value in rule.drops.items():
            if own:
                numbers = np.concatenate(own)
                result[bound] = _median_min_max(numbers[np.isfinite(numbers)])
            else:  # JSON, which the report is, has finite numbers only
                result[bound] = None if value is None or not math.isfinite(value) else float(value)
    return result


def _median_min_max(numbers: Doubles) -> dict[str, float] | None:
    if not len(numbers):
        return None
    median = 2 * float(np.median(numbers / 2))  # the sum of the two middle numbers could overflow
    return {"median": median, "min": float(numbers.min()), "max": float(numbers.max())}


def _fires_on_nothing(name: str, rule: Rule, drops: Mapping[str, Any], scores: Floats, layout: Layout, off: str) -> str:
    """The warning about a rule that fires on nothing, with the scores it saw."""
    values = ragged.dataset_quantiles(scores, layout, list(_SHARES.values()))
    if np.isnan(values).all():
        return f"{name}: the rule {{{rule.name}}} drops nothing, because no score is defined; {off}"
    spread = ", ".join(f"{share} {value:.4g}" for share, value in zip(_SHARES, values, strict=True))
    bounds = ", ".join(f"{bound} {_number(drops[bound])}" for bound in rule.drops if drops[bound] is not None)
    return (
        f"{name}: the rule {{{rule.name}}} fires on nothing in the dataset. Scores: {spread}; the rule drops: "
        f"{bounds or 'less than one token of any document'}. Choose a threshold within the scores, or {off}"
    )


def _number(value: float | Mapping[str, float]) -> str:
    if isinstance(value, Mapping):
        return f"{value['median']:.4g} (median over documents, {value['min']:.4g} to {value['max']:.4g})"
    return f"{value:.4g}"


def _fires_on_most(name: str, fired: int, layout: Layout, off: str) -> list[str]:
    """The warning about a rule that fires on most of the dataset."""
    total = int(layout.lengths @ layout.counts)
    if fired <= MOST * total:
        return []
    return [
        f"{name}: fires on {fired / total:.0%} of all completion tokens. Noise is seldom the larger part: the "
        "reference may not know this kind of text (other language or domain), or the threshold does not suit it. Look "
        f"at `xtf show`; choose another threshold, a `max_fraction` or another `reference.model`, or {off}"
    ]
