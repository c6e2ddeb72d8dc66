"""The report's sliders count what a run with their thresholds would select: every stop, many settings, many blocks."""

from __future__ import annotations

import random

import numpy as np
import pytest

from tests.test_selection import random_scores
from xtf_plugin import whatif
from xtf_plugin.config.block import XTFConfig
from xtf_plugin.selection.select import FLOOR
from xtf_plugin.selection.select import select
from xtf_plugin.sliders import thinned

LENGTHS = [1, 2, 3, 5, 8, 40, 1, 17, 0, 33, 9, 4]
COUNTS = [1, 3, 1, 2, 1, 1, 5, 1, 2, 1, 1, 4]
BLOCKS = {
    "absolute": {
        "reasoning_importance": {"drop": {"below": 0.5}},
        "knowledge_novelty": {"drop": {"known_above": 0.95}},
        "task_relevance": {"drop": {"below": 0.5}},
    },
    "shares": {
        "reasoning_importance": {"drop": {"quantile": 0.2}, "scope": "dataset"},
        "knowledge_novelty": {"drop": {"quantile": 0.1}, "window": 3},
        "task_relevance": {"drop": {"quantile": 0.3}, "max_fraction": 0.25},
    },
    "of documents": {"reasoning_importance": {"drop": {"quantile": 0.2}, "max_fraction": 0.1}, "min_kept": 3},
    "fences": {"reasoning_importance": {"drop": {"fence": 0.8}}, "min_kept": 2},
    "fence of the dataset": {"reasoning_importance": {"drop": {"fence": 0.5}, "scope": "dataset", "scale": "log"}},
    "both schools": {"knowledge_novelty": {"drop": {"known_above": 0.9, "unknown_below": 0.05}}, "min_kept": 1},
    "capped schools": {"knowledge_novelty": {"drop": {"known_above": 0.9, "unknown_below": 0.05}, "max_fraction": 0.2}},
    "classes": {"task_relevance": {"drop": {"cluster": 2, "of": 4}}, "min_kept": 2},
    "a majority": {"combine": "majority", "min_kept": 4},
    "all of them": {"combine": "intersection"},
    "at least two": {"combine": {"at_least": 2}, "min_kept": 2},
}


def config(block):
    off = {"reasoning_importance": False, "knowledge_novelty": False, "task_relevance": False}
    own = block.keys() & off.keys()
    return XTFConfig.parse({"preset": "paper", "min_kept": 0, **({} if not own else off), **block})


def moved(block: XTFConfig, table, at) -> XTFConfig | None:
    """The block with the sliders at `at`; None if it is none that a run would take."""
    settings = block.to_dict()
    for slider, place in zip(table.sliders, at, strict=True):
        stop = slider.stops[place]
        if not slider.key:
            continue
        settings[slider.voter]["drop"][slider.key] = stop
    for voter in block.voters:
        if all(value is None for key, value in settings[voter]["drop"].items() if key != "of"):
            settings[voter] = False
    try:
        return XTFConfig.parse(settings)
    except ValueError:
        return None


def at_the_start(table) -> list[int]:
    return [slider.at for slider in table.sliders]


def flags(scores, seed):
    rng = np.random.default_rng(seed)
    size = len(scores.token_ids)
    return rng.random(size) < 0.05, rng.random(size) < 0.04


def selected(scores, block, protected, forced):
    result = select(scores, block, protected, forced)
    weights = np.repeat(scores.counts, np.diff(scores.offsets))
    return {
        "tokens": int(weights.sum()),
        "dropped": int(weights[~result.keep].sum()),
        "rescued": int(weights[(result.reasons & FLOOR) > 0].sum()),
        "fired": result.fired,
    }


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("seed", [0, 1])
def test_every_stop_counts_what_a_run_would_select(name, seed):
    block = config(BLOCKS[name])
    scores = random_scores(LENGTHS, seed, COUNTS)
    protected, forced = flags(scores, seed)
    table = whatif.build(scores, block, protected, forced)
    assert table.complete
    start = at_the_start(table)
    assert whatif.count(table, start, block) == selected(scores, block, protected, forced)
    rng, checked, different = random.Random(seed), 0, set()
    settings = [
        start[:i] + [s] + start[i + 1 :] for i, slider in enumerate(table.sliders) for s in range(len(slider.stops))
    ]
    settings += [[rng.randrange(len(slider.stops)) for slider in table.sliders] for _ in range(40)]
    for at in settings:
        other = moved(block, table, at)
        if other is not None:
            counted = whatif.count(table, at, block)
            counted["fired"] = {voter: counted["fired"][voter] for voter in other.voters}
            assert counted == selected(scores, other, protected, forced), at
            checked += 1
            different.add(counted["dropped"])
    assert (checked > 10 and len(different) >= 3) or name == "capped schools"


@pytest.mark.parametrize("name", BLOCKS)
def test_every_stop_tells_the_thresholds_of_a_run_with_it(name):
    """In units of the histograms: novelty as probability; where documents have thresholds of their own, the median."""
    block, scores = config(BLOCKS[name]), random_scores(LENGTHS, 5, COUNTS)
    nothing = np.zeros(len(scores.token_ids), dtype=bool)
    table, checked = whatif.build(scores, block, nothing, None), 0
    for index, slider in enumerate(table.sliders):
        for place in range(len(slider.stops)):
            at = [*at_the_start(table)[:index], place, *at_the_start(table)[index + 1 :]]
            other = moved(block, table, at)
            if other is None or slider.voter not in other.voters:
                continue
            drops = select(scores, other, nothing).thresholds[slider.voter]["drops"].values()
            own = any(isinstance(value, dict) for value in drops)
            came_to = [value["median"] if own else value for value in drops if value is not None]
            shown = [1 - value if slider.voter == "knowledge_novelty" else value for value in came_to]
            here = zip(table.sliders, at, strict=True)
            told = [limit for each, stop in here if each.voter == slider.voter for limit in each.limits[stop]]
            assert sorted(told) == pytest.approx(sorted(shown), rel=1e-4)
            assert own == slider.own or not told
            checked += len(told)
    assert checked > 5 or name == "capped schools"


@pytest.mark.parametrize("name", ["absolute", "a majority"])
def test_thinned_sliders_count_the_same(name):
    block, scores = config(BLOCKS[name]), random_scores(LENGTHS, 2, COUNTS)
    protected, forced = flags(scores, 2)
    made = whatif.build(scores, block, protected, forced)
    fewer = [thinned(slider) for slider in made.sliders]
    assert all(len(a.stops) < len(b.stops) for a, b in zip(fewer, made.sliders, strict=True))
    for slider, other in zip(made.sliders, fewer, strict=True):
        assert other.stops[other.at] == slider.stops[slider.at] and other.stops[0] == slider.stops[0]
        for place, stop in enumerate(other.stops):
            before = slider.patterns[slider.codes, slider.stops.index(stop)]
            assert (other.patterns[other.codes, place] == before).all()
            assert other.limits[place] == slider.limits[slider.stops.index(stop)]


def test_a_large_table_is_thinned(monkeypatch):
    block, scores = config(BLOCKS["absolute"]), random_scores(LENGTHS, 3, COUNTS)
    protected, forced = flags(scores, 3)
    monkeypatch.setattr(whatif, "MAX_CELLS", 20)
    table = whatif.build(scores, block, protected, forced)
    assert whatif.count(table, at_the_start(table), block) == selected(scores, block, protected, forced)
    assert sum(len(slider.stops) for slider in table.sliders) < 30


@pytest.mark.parametrize("limit", ["MAX_FLOORED", "MAX_LASTING", "MAX_PATTERNS"])
def test_too_many_documents_for_the_floor_are_told(monkeypatch, limit):
    block, scores = config({**BLOCKS["absolute"], "min_kept": 1}), random_scores(LENGTHS, 3, COUNTS)
    monkeypatch.setattr(whatif, limit, 2)
    nothing = np.zeros(len(scores.token_ids), dtype=bool)
    table = whatif.build(scores, block, nothing, None)
    assert not table.complete and table.floored == []


def test_further_rules_stay_as_they_are():
    scorer = {"scorer": "typicality", "drop": {"below": -1}}
    settings = {"preset": "none", "selectors": {f"s{i}": scorer for i in range(6)}}
    block, scores = XTFConfig.parse(settings), random_scores(LENGTHS, 4, COUNTS)
    rng = np.random.default_rng(4)
    values = {f"s{i}": rng.normal(size=len(scores.token_ids)).astype(np.float32) for i in range(6)}
    from dataclasses import replace

    scores = replace(scores, selectors=values)
    nothing = np.zeros(len(scores.token_ids), dtype=bool)
    table = whatif.build(scores, block, nothing, None)
    assert [slider.key for slider in table.sliders] == ["below"] * 4 + [""] * 2
    assert whatif.count(table, at_the_start(table), block) == selected(scores, block, nothing, None)
