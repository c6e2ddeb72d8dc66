"""The rules of the three attributes, Eq. (5) to (7) and their variants, and of selectors, made ready for a dataset.

Low scores are dropped, except by `unknown_below`, which drops high novelty. An undefined score (NaN) fires no rule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .config import KnowledgeNoveltyConfig, ReasoningDrop, ReasoningImportanceConfig, TaskRelevanceConfig
from .otsu import UndefinedSplit, multi_otsu
from .scorers import SelectorConfig, SelectorDrop
from .segments import (
    Bools,
    Doubles,
    Floats,
    Layout,
    Scale,
    dataset_quantiles,
    document_quantiles,
    identity,
    lowest,
    ordered,
    unordered,
)

Test = Callable[[Floats, Layout], tuple[Bools, Doubles | None]]
_TINY = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class Rule:
    """One rule, ready for any chunk of documents.

    Args:
        name: as in the block, "fence: 1.0".
        test: (scores, layout) -> the tokens it fires on, and each document's own threshold where it has one.
        drops: what it drops, in units of the attribute's score: `below` and `above` are exclusive, `up_to` inclusive;
            None: no such bound, or one per document.
    """

    name: str
    test: Test
    drops: Mapping[str, float | None]


@dataclass(frozen=True)
class Rules:
    """The rules of one attribute; in which order `max_fraction` lets tokens through; and what else to report."""

    rules: Sequence[Rule]
    rank: Callable[[Floats], Floats] = lambda scores: scores
    facts: Mapping[str, Any] = field(default_factory=dict)
    warnings: Sequence[str] = ()


AttributeConfig = ReasoningImportanceConfig | KnowledgeNoveltyConfig | TaskRelevanceConfig | SelectorConfig


def prepare(scores: Floats, layout: Layout, config: AttributeConfig) -> Rules:
    """The rules of one attribute or selector with their dataset-level thresholds worked out.

    Args:
        scores: (M,) as the rule sees them, after the window: attention received, knowledge novelty, task relevance, or
            what a selector's scorer gave; NaN: undefined.
        layout: of the documents' completion tokens.
        config: the attribute's or selector's part of the block.
    """
    if isinstance(config, KnowledgeNoveltyConfig):
        return _novelty_rules(scores, layout, config)
    if isinstance(config, TaskRelevanceConfig):
        return _relevance_rules(scores, layout, config)
    if isinstance(config, SelectorConfig):
        facts: dict[str, Any] = {"scorer": config.scorer, "scope": config.scope}
        return _low_rules(scores, layout, config.drop, config.scope, "linear", facts)
    facts = {"scope": config.scope, "scale": config.scale}
    return _low_rules(scores, layout, config.drop, config.scope, config.scale, facts)


def _under(limit: float, scale: Scale = identity) -> Test:
    return lambda scores, layout: (scale(scores.astype(np.float64)) < limit, None)


def _single(threshold: float) -> float:
    """The threshold as a float32 score would hold it: a probability on it is neither above nor below."""
    return float(np.float32(threshold))


def _over(limit: float) -> Test:
    return lambda scores, layout: (scores.astype(np.float64) > limit, None)


def _log(values: Doubles) -> Doubles:
    return np.log(np.maximum(values, _TINY))  # 0 is far below every other score, not infinitely so


def _low_rules(
    scores: Floats,
    layout: Layout,
    drop: ReasoningDrop | SelectorDrop,
    scope: str,
    scale_name: str,
    facts: Mapping[str, Any],
) -> Rules:
    """Eq. (5), `S < Q1 - k * (Q3 - Q1)`, over a document or the dataset; or the lowest share; or an absolute bound."""
    own = scope == "document"
    if drop.below is not None:
        return Rules([Rule(f"below: {drop.below}", _under(drop.below), {"below": drop.below})], facts=facts)
    if drop.quantile is not None:
        name = f"quantile: {drop.quantile}"
        if own:
            return Rules([Rule(name, _lowest_share(drop.quantile), {"up_to": None})], facts=facts)
        limit = float(dataset_quantiles(scores, layout, [drop.quantile])[0])
        return Rules([Rule(name, _under(limit), {"below": limit})], facts=facts)
    assert drop.fence is not None
    name = f"fence: {drop.fence}"
    scale, unscale = (_log, np.exp) if scale_name == "log" else (identity, identity)
    if own:
        return Rules([Rule(name, _document_fence(drop.fence, scale, unscale), {"below": None})], facts=facts)
    q1, q3 = dataset_quantiles(scores, layout, [0.25, 0.75], scale)
    fence = q1 - drop.fence * (q3 - q1)
    return Rules([Rule(name, _under(float(fence), scale), {"below": float(unscale(fence))})], facts=facts)


def _document_fence(k: float, scale: Scale, unscale: Scale) -> Test:
    def test(scores: Floats, layout: Layout) -> tuple[Bools, Doubles]:
        q1, q3 = document_quantiles(scores, layout, [0.25, 0.75], scale)
        fence = q1 - k * (q3 - q1)
        return scale(scores.astype(np.float64)) < layout.spread(fence), unscale(fence)

    return test


def _lowest_share(share: float) -> Test:
    def test(scores: Floats, layout: Layout) -> tuple[Bools, Doubles]:
        number = np.floor(share * layout.count(~np.isnan(scores))).astype(np.int64)
        fires, keys = lowest(ordered(scores), layout, number)
        return fires, unordered(keys)

    return test


def _novelty_rules(novelty: Floats, layout: Layout, config: KnowledgeNoveltyConfig) -> Rules:
    """Eq. (6), `P > known_above`; its opposite, `P < unknown_below`; or the dataset's lowest share of novelty."""
    drop, rules = config.drop, []
    if drop.quantile is not None:
        limit = float(dataset_quantiles(novelty, layout, [drop.quantile])[0])
        rules.append(Rule(f"quantile: {drop.quantile}", _under(limit), {"below": limit}))
    known, unknown = drop.known_above, drop.unknown_below
    if known is not None:
        rules.append(Rule(f"known_above: {known}", _under(_single(1 - known)), {"below": 1 - known}))
    if unknown is not None:
        rules.append(Rule(f"unknown_below: {unknown}", _over(_single(1 - unknown)), {"above": 1 - unknown}))

    def rank(scores: Floats) -> Floats:
        if unknown is None:
            return scores
        if known is None:
            return -scores
        # what is left of the way from each threshold to certainty: 1 - (P - a) / (1 - a) and 1 - (b - P) / b
        left_known = scores.astype(np.float64) / max(1 - known, _TINY)
        return np.minimum(left_known, (1 - scores.astype(np.float64)) / max(unknown, _TINY)).astype(np.float32)

    return Rules(rules, rank)


def _relevance_rules(scores: Floats, layout: Layout, config: TaskRelevanceConfig) -> Rules:
    """Eq. (7), one class of a Multi-Otsu split over all occurrences; or the dataset's lowest share; or a bound."""
    drop = config.drop
    if drop.below is not None:
        return Rules([Rule(f"below: {drop.below}", _under(drop.below), {"below": drop.below})])
    if drop.quantile is not None:
        limit = float(dataset_quantiles(scores, layout, [drop.quantile])[0])
        return Rules([Rule(f"quantile: {drop.quantile}", _under(limit), {"below": limit})])
    assert drop.cluster is not None
    name = f"cluster: {drop.cluster}, of: {drop.of}"
    undefined = np.isnan(scores)
    known = ~undefined if undefined.any() else slice(None)  # a view, not a copy of the dataset
    weights = None if (layout.counts == 1).all() else layout.spread(layout.counts.astype(np.float32))[known]
    try:
        cuts = multi_otsu(scores[known], weights, drop.of)
    except UndefinedSplit as error:
        told = f"the rule {{{name}}} is undefined and drops nothing: {error}. Use fewer classes, or {{quantile: q}}"
        return Rules([], facts={"undefined": str(error)}, warnings=[told])
    low = float(cuts[drop.cluster - 2]) if drop.cluster > 1 else None
    high = float(cuts[drop.cluster - 1]) if drop.cluster < drop.of else None
    facts = {"classes": {"thresholds": cuts.tolist(), "sizes": _class_sizes(scores, layout, cuts)}}
    return Rules([Rule(name, _within(low, high), {"above": low, "up_to": high})], facts=facts)


def _within(low: float | None, high: float | None) -> Test:
    def test(scores: Floats, layout: Layout) -> tuple[Bools, None]:
        exact = scores.astype(np.float64)
        return (exact > (-np.inf if low is None else low)) & (exact <= (np.inf if high is None else high)), None

    return test


def _class_sizes(scores: Floats, layout: Layout, cuts: Doubles) -> list[int]:
    """Occurrences in the dataset of each class's tokens."""
    edges = [None, *cuts.tolist(), None]
    tests = [_within(low, high) for low, high in zip(edges[:-1], edges[1:], strict=True)]
    sizes = np.zeros(len(tests), dtype=np.int64)
    for tokens, _, part in layout.chunks():
        sizes += [int(part.count(test(scores[tokens], part)[0]) @ part.counts) for test in tests]
    return [int(size) for size in sizes]
