"""The report's sliders fire where a run with their thresholds would: every place, many settings, many blocks."""

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
    made = {"config": block, "scores": select(scores, block).seen, "layout": layout, "offsets": scores.offsets}
    tokens = {"pieces": {0: b"a"}, "token_ids": np.zeros_like(scores.token_ids), "positions": scores.positions}
    tokens["opens"] = np.isin(np.arange(len(scores.token_ids)), scores.offsets)
    return SimpleNamespace(**made, **tokens, weights=layout.spread(scores.counts), **marks), scores


def value_at(slider, place):
    """The value of a slider's key at a place; of a line one that is a threshold just there."""
    if place < 0:
        return None
    if slider.kind != "line":
        return slider.places[place]
    return (slider.places[place] - slider.line[0]) / slider.line[1]


def moved(block: XTFConfig, sliders, at) -> XTFConfig | None:
    """The block with the sliders at `at`; None if it is none that a run would take."""
    settings = block.to_dict()
    for slider, place in zip(sliders, at, strict=True):
        if slider.key:
            settings[slider.score]["drop"][slider.key] = value_at(slider, place)
    for score in block.scores:
        if all(value is None for key, value in settings[score]["drop"].items() if key != "of"):
            settings[score] = False
    try:
        return XTFConfig.parse(settings)
    except ValueError:
        return None


def reached(slider, config):
    """The place of the value that a block has: rounding may have moved it beside the one it was made from."""
    part = config.scores.get(slider.score)
    value = None if part is None else getattr(part.drop, slider.key)
    if value is None or slider.kind != "line":
        return -1 if value is None else slider.places.index(value)
    sign = -1 if slider.key == "unknown_below" else 1
    return int(np.searchsorted(sign * np.asarray(slider.places), sign * slider.threshold(value)))


def settings(sliders):
    """Each slider at some of its places and off, the others where they were."""
    start = [slider.at for slider in sliders]
    steps = [range(-1, len(slider.places), max(1, len(slider.places) // 12)) for slider in sliders]
    return [start[:i] + [place] + start[i + 1 :] for i, places in enumerate(steps) for place in places]


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("seed", [0, 1])
def test_every_place_fires_where_a_run_with_it_would(name, seed):
    given, scores = table(name, seed)
    found = whatif.build(given)
    checked, different = 0, set()
    for at in settings(found.sliders):
        other = moved(given.config, found.sliders, at)
        if other is None:
            continue
        reasons = select(scores, other).reasons
        for score, bit in rule_bits(other).items():
            mine = [slider for slider in found.sliders if slider.score == score]
            fires = np.logical_or.reduce([slider.fires(reached(slider, other) if slider.key else 0) for slider in mine])
            np.testing.assert_array_equal(fires, (reasons & bit) > 0, err_msg=f"{score} {at}")
            different.add((score, int(fires.sum())))
        checked += 1
    assert (checked > 3 and len(different) >= 3) or name == "capped schools"


@pytest.mark.parametrize("name", BLOCKS)
def test_the_run_is_at_its_own_place(name):
    given, scores = table(name, 3)
    reasons = select(scores, given.config).reasons
    for score, bit in rule_bits(given.config).items():
        mine = [slider.fires(slider.at) for slider in whatif.build(given).sliders if slider.score == score]
        np.testing.assert_array_equal(np.logical_or.reduce(mine), (reasons & bit) > 0)


def test_places_of_many_scores_are_not_dense_and_hold_the_runs_own_value():
    rng = np.random.default_rng(0)
    values = {"mine": rng.normal(size=5_000).astype(np.float32)}
    block = XTFConfig.parse(
        {"preset": "none", "selectors": {"mine": {"scorer": "typicality", "drop": {"below": -1.23}}}}
    )
    (slider,) = whatif.make_sliders(block, values, Layout(np.asarray([0, 5_000]), np.asarray([1])))
    assert not slider.dense and slider.places[slider.at] == -1.23 and len(slider.places) <= whatif.NEVER
    np.testing.assert_array_equal(slider.fires(slider.at), values["mine"].astype(np.float64) < -1.23)
    shares = np.diff([slider.fires(place).mean() for place in range(len(slider.places))])
    assert shares.max() < 0.02 and slider.fires(len(slider.places) - 1).mean() > 0.45
    (dense,) = whatif.make_sliders(block, {"mine": values["mine"][:50]}, Layout(np.asarray([0, 50]), np.asarray([1])))
    assert dense.dense and len(dense.places) == 50


def test_undefined_scores_never_fire():
    values = {"mine": np.asarray([np.nan, 1.0, 2.0], dtype=np.float32)}
    block = XTFConfig.parse({"preset": "none", "selectors": {"mine": {"scorer": "typicality", "drop": {"below": 9}}}})
    (slider,) = whatif.make_sliders(block, values, Layout(np.asarray([0, 3]), np.asarray([1])))
    assert slider.fires(slider.at).tolist() == [False, True, True]
    (empty,) = whatif.make_sliders(
        block, {"mine": np.full(3, np.nan, np.float32)}, Layout(np.asarray([0, 3]), np.asarray([1]))
    )
    assert not empty.fires(empty.at).any()


@pytest.mark.parametrize("name", BLOCKS)
def test_cells_hold_every_token_once(name):
    given, _ = table(name)
    found = whatif.build(given)
    assert found.weights.sum() == given.weights.sum()
    for index, slider in enumerate(found.sliders):
        for code in np.unique(slider.codes).tolist():
            for flags in range(4):
                here = (slider.codes == code) & (given.protected + 2 * given.forced == flags)
                cells = (found.cells[:, index] == code) & (found.flags == flags)
                assert found.weights[cells].sum() == given.weights[here].sum()


@pytest.mark.parametrize("name", BLOCKS)
def test_every_place_has_the_thresholds_of_a_run_with_it(name):
    """In units of the score; the median where every document has its own."""
    given, scores = table(name, 5)
    sliders, checked = whatif.build(given).sliders, 0
    for at in settings(sliders):
        other = moved(given.config, sliders, at)
        for score in () if other is None else other.scores:
            drops = select(scores, other).thresholds[score]["drops"].values()
            own = any(isinstance(value, dict) for value in drops)
            expected = [value["median"] if own else value for value in drops if value is not None]
            mine = [slider for slider in sliders if slider.score == score]
            limits = [limit for slider in mine for limit in limits_of(slider, other)]
            assert sorted(limits) == pytest.approx(sorted(expected), rel=1e-4)
            assert own == mine[0].per_document or not limits
            checked += len(limits)
    assert checked > 3 or name == "capped schools"


def limits_of(slider, config):
    value = getattr(config.scores[slider.score].drop, slider.key) if slider.key else None
    if slider.kind == "line":
        return [] if value is None else [slider.threshold(value)]
    return slider.limits[reached(slider, config) if slider.key else 0]


@pytest.mark.parametrize("name", ["absolute", "of documents"])
def test_thinned_sliders_fire_the_same(name):
    made = whatif.build(table(name, 2)[0]).sliders
    for slider in made:
        other = whatif.thinned(slider)
        assert len(other.places) < len(slider.places) and not other.dense
        assert (other.fires(other.at) == slider.fires(slider.at)).all()
        for place, value in enumerate(other.places):
            assert (other.fires(place) == slider.fires(list(slider.places).index(value))).all()


def test_a_large_table_is_thinned(monkeypatch):
    given, _ = table("absolute", 3)
    full = whatif.build(given)
    monkeypatch.setattr(whatif, "MAX_CELLS", 20)
    found = whatif.build(given)
    assert found.weights.sum() == full.weights.sum()
    assert sum(len(slider.places) for slider in found.sliders) < 40 < sum(len(slider.places) for slider in full.sliders)


@pytest.mark.parametrize("min_kept", [0, 1, 3, 10**18])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_slack_covers_what_min_kept_brings_back(min_kept, seed):
    given, scores = table("absolute", seed, config({**BLOCKS["absolute"], "min_kept": min_kept}))
    found = whatif.build(given)
    for at in settings(found.sliders):
        block = moved(given.config, found.sliders, at)
        if block is None:
            continue
        exact = select(scores, block, given.protected, given.forced)
        without = select(scores, block.model_copy(update={"min_kept": 0}), given.protected, given.forced)
        brought = int(given.weights[exact.keep & ~without.keep].sum())
        assert brought <= found.slack and (min_kept or not found.slack)


def test_characters_whose_tokens_differ_are_loose():
    given, _ = table("absolute", 0)
    given.pieces = {0: b"a", 1: b"\xe6\xbc", 2: b"\xa2"}
    given.token_ids = np.zeros(len(given.weights), dtype=np.int32)
    given.token_ids[12:14] = 1, 2
    given.token_ids[11] = 2  # begins a document, so it is inside nothing
    found = whatif.build(given)
    assert found.weights[(found.flags & whatif.LOOSE) > 0].sum() == 2 * given.weights[12]


def test_rules_whose_scores_would_change_say_so():
    parts = {"task_relevance": True, "reasoning_importance": True, "knowledge_novelty": True}
    block = XTFConfig.parse({"preset": "default", **parts})
    values = {name: np.linspace(0, 1, 5, dtype=np.float32) for name in block.scores}
    sliders = whatif.make_sliders(block, values, Layout(np.asarray([0, 5]), np.asarray([1])))
    assert [slider.score for slider in sliders if slider.rescored] == ["task_relevance"]
    other = {"scorer": "new_text", "drop": {"below": 0.5}}
    block = XTFConfig.parse(
        {"preset": "none", "reasoning_importance": {"scorer": "influence"}, "task_relevance": other}
    )
    values = {name: values["task_relevance"] for name in block.scores}
    sliders = whatif.make_sliders(block, values, Layout(np.asarray([0, 5]), np.asarray([1])))
    assert [slider.score for slider in sliders if slider.rescored] == ["task_relevance"], "influence asks about it"


def test_rules_beyond_the_fourth_slider_are_fixed():
    scorer = {"scorer": "typicality", "drop": {"below": -1}}
    block = XTFConfig.parse({"preset": "none", "selectors": {f"s{i}": scorer for i in range(6)}})
    scores, rng = random_scores(LENGTHS, 4, COUNTS), np.random.default_rng(4)
    values = {f"s{i}": rng.normal(size=len(scores.token_ids)).astype(np.float32) for i in range(6)}
    result = select(replace(scores, values=values), block)
    sliders = whatif.make_sliders(block, result.seen, Layout(scores.offsets, scores.counts))
    assert [slider.key for slider in sliders] == ["below"] * 4 + [""] * 2
    for slider, bit in zip(sliders, rule_bits(block).values(), strict=True):
        np.testing.assert_array_equal(slider.fires(slider.at), (result.reasons & bit) > 0)


def test_with_a_random_control_nothing_moves():
    given, _ = table("", block=XTFConfig.parse({"preset": "paper", "control": "random"}))
    assert all(slider.key == "" and "control" in slider.note for slider in whatif.build(given).sliders)
