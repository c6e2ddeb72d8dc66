"""The report's sliders fire where a run with their thresholds would: every stop, many settings, many blocks."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from tests.selection.test_select import random_scores
from xtf_plugin.config.block import XTFConfig
from xtf_plugin.data.ragged import Layout
from xtf_plugin.report import whatif
from xtf_plugin.selection.select import rule_bits, select

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
    "of documents": {"reasoning_importance": {"drop": {"quantile": 0.2}, "max_fraction": 0.1}},
    "fences": {"reasoning_importance": {"drop": {"fence": 0.8}}},
    "fence of the dataset": {"reasoning_importance": {"drop": {"fence": 0.5}, "scope": "dataset", "scale": "log"}},
    "both schools": {"knowledge_novelty": {"drop": {"known_above": 0.9, "unknown_below": 0.05}}},
    "capped schools": {"knowledge_novelty": {"drop": {"known_above": 0.9, "unknown_below": 0.05}, "max_fraction": 0.2}},
    "classes": {"task_relevance": {"drop": {"cluster": 2, "of": 4}}},
    "shares of the median": {"reasoning_importance": {"drop": {"of_median": 0.5}}},
}


def config(block):
    off = {"reasoning_importance": False, "knowledge_novelty": False, "task_relevance": False}
    return XTFConfig.parse({"preset": "paper", **off, **block})


def table(name, seed=0, block=None):
    """What sliders need of a score table, the scores it comes from, and the block."""
    block, scores = block or config(BLOCKS[name]), random_scores(LENGTHS, seed, COUNTS)
    rng, layout = np.random.default_rng(seed), Layout(scores.offsets, scores.counts)
    marks = {"protected": rng.random(len(scores.token_ids)) < 0.05, "forced": rng.random(len(scores.token_ids)) < 0.04}
    made = {"config": block, "scores": select(scores, block).seen, "layout": layout}
    return SimpleNamespace(**made, weights=layout.spread(scores.counts), **marks), scores


def moved(block: XTFConfig, sliders, at) -> XTFConfig | None:
    """The block with the sliders at `at`; None if it is none that a run would take."""
    settings = block.to_dict()
    for slider, place in zip(sliders, at, strict=True):
        if slider.key:
            settings[slider.score]["drop"][slider.key] = slider.stops[place]
    for score in block.scores:
        if all(value is None for key, value in settings[score]["drop"].items() if key != "of"):
            settings[score] = False
    try:
        return XTFConfig.parse(settings)
    except ValueError:
        return None


def settings(sliders):
    """Each slider at each of its stops, the others where they were."""
    start = [slider.at for slider in sliders]
    return [start[:i] + [s] + start[i + 1 :] for i, slider in enumerate(sliders) for s in range(len(slider.stops))]


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("seed", [0, 1])
def test_every_stop_fires_where_a_run_with_it_would(name, seed):
    given, scores = table(name, seed)
    found = whatif.build(given)
    checked, different = 0, set()
    for at in settings(found.sliders):
        other = moved(given.config, found.sliders, at)
        if other is None:
            continue
        reasons = select(scores, other).reasons
        for score, bit in rule_bits(other).items():
            mine = [(slider, place) for slider, place in zip(found.sliders, at, strict=True) if slider.score == score]
            fires = np.logical_or.reduce([slider.patterns[slider.codes, place] for slider, place in mine])
            np.testing.assert_array_equal(fires, (reasons & bit) > 0, err_msg=f"{score} {at}")
            different.add((score, int(fires.sum())))
        checked += 1
    assert (checked > 3 and len(different) >= 3) or name == "capped schools"


@pytest.mark.parametrize("name", BLOCKS)
def test_cells_hold_every_token_once(name):
    given, _ = table(name)
    found = whatif.build(given)
    assert found.weights.sum() == given.weights.sum()
    for index, slider in enumerate(found.sliders):
        for code in range(len(slider.patterns)):
            for flags in range(4):
                here = (slider.codes == code) & (given.protected + 2 * given.forced == flags)
                cells = (found.cells[:, index] == code) & (found.flags == flags)
                assert found.weights[cells].sum() == given.weights[here].sum()


@pytest.mark.parametrize("name", BLOCKS)
def test_every_stop_has_the_thresholds_of_a_run_with_it(name):
    """In units of the score; the median where every document has its own."""
    given, scores = table(name, 5)
    sliders, checked = whatif.build(given).sliders, 0
    for at in settings(sliders):
        other = moved(given.config, sliders, at)
        for score in () if other is None else other.scores:
            drops = select(scores, other).thresholds[score]["drops"].values()
            own = any(isinstance(value, dict) for value in drops)
            expected = [value["median"] if own else value for value in drops if value is not None]
            here = [(slider, stop) for slider, stop in zip(sliders, at, strict=True) if slider.score == score]
            limits = [limit for slider, stop in here for limit in slider.limits[stop]]
            assert sorted(limits) == pytest.approx(sorted(expected), rel=1e-4)
            assert own == here[0][0].per_document or not limits
            checked += len(limits)
    assert checked > 5 or name == "capped schools"


@pytest.mark.parametrize("seed", [2, 3])
def test_thinned_sliders_fire_the_same(seed):
    made = whatif.build(table("absolute", seed)[0]).sliders
    fewer = [whatif.thinned(slider) for slider in made]
    assert all(len(a.stops) < len(b.stops) for a, b in zip(fewer, made, strict=True))
    for slider, other in zip(made, fewer, strict=True):
        assert other.stops[other.at] == slider.stops[slider.at] and other.stops[0] == slider.stops[0]
        for place, stop in enumerate(other.stops):
            before = slider.patterns[slider.codes, slider.stops.index(stop)]
            assert (other.patterns[other.codes, place] == before).all()
            assert other.limits[place] == slider.limits[slider.stops.index(stop)]


def test_a_large_table_is_thinned(monkeypatch):
    given, _ = table("absolute", 3)
    full = whatif.build(given)
    monkeypatch.setattr(whatif, "MAX_CELLS", 20)
    found = whatif.build(given)
    assert found.weights.sum() == full.weights.sum()
    assert sum(len(slider.stops) for slider in found.sliders) < 30 < sum(len(slider.stops) for slider in full.sliders)


def test_rules_beyond_the_fourth_slider_are_fixed():
    scorer = {"scorer": "typicality", "drop": {"below": -1}}
    block = XTFConfig.parse({"preset": "none", "selectors": {f"s{i}": scorer for i in range(6)}})
    scores, rng = random_scores(LENGTHS, 4, COUNTS), np.random.default_rng(4)
    values = {f"s{i}": rng.normal(size=len(scores.token_ids)).astype(np.float32) for i in range(6)}
    result = select(replace(scores, values=values), block)
    sliders = whatif.make_sliders(block, result.seen, Layout(scores.offsets, scores.counts))
    assert [slider.key for slider in sliders] == ["below"] * 4 + [""] * 2
    for slider, bit in zip(sliders, rule_bits(block).values(), strict=True):
        np.testing.assert_array_equal(slider.patterns[slider.codes, slider.at], (result.reasons & bit) > 0)


def test_with_a_random_control_nothing_moves():
    given, _ = table("", block=XTFConfig.parse({"preset": "paper", "control": "random"}))
    assert all(slider.key == "" and "control" in slider.note for slider in whatif.build(given).sliders)
