"""What a block changes of its preset: slots that come on or get another scorer, selectors that change or go."""

from __future__ import annotations

import pytest

from tests.config.test_config import holds
from xtf_plugin.config.block import XTFConfig
from xtf_plugin.config.scores import PRESETS
from xtf_plugin.errors import XTFUserError


def test_an_attribute_that_the_preset_has_off_comes_on_with_its_own_defaults():
    on = XTFConfig.parse({"reasoning_importance": True, "knowledge_novelty": {"window": 5}})
    assert list(on.scores) == ["reasoning_importance", "knowledge_novelty", *PRESETS["default"]["selectors"]]
    assert on.reasoning_importance.drop.quantile == 0.05
    assert (on.knowledge_novelty.drop.known_above, on.knowledge_novelty.window) == (0.95, 5)


def test_selectors_of_the_preset_are_changed_replaced_and_taken_out():
    names = list(PRESETS["default"]["selectors"])
    other = {"scorer": "log_probability", "drop": {"quantile": 0.1}}
    changed = XTFConfig.parse({"selectors": {names[0]: {"drop": {"below": -3}}}})
    assert list(changed.selectors) == names and changed.selectors[names[0]].drop.below == -3
    assert changed.selectors[names[0]].unit == XTFConfig().selectors[names[0]].unit == "both"
    less = XTFConfig.parse({"selectors": {names[0]: False, "more": other}})
    assert list(less.selectors) == [*names[1:], "more"] and XTFConfig.parse(less.to_dict()) == less
    replaced = XTFConfig.parse({"selectors": {names[0]: other, "more": other}})
    assert list(replaced.selectors) == [*names, "more"] and replaced.selectors[names[0]].scorer == "log_probability"
    none = XTFConfig.parse({"selectors": False, "force_drop": ["x"]})
    assert not none.selectors and XTFConfig.parse(none.to_dict()) == none
    with pytest.raises(XTFUserError, match="selectors.out_of_plaice: false takes a .*, but that has out_of_place"):
        XTFConfig.parse({"selectors": {"out_of_plaice": False}})
    with pytest.raises(XTFUserError, match="but that has no selector"):
        XTFConfig.parse({"preset": "paper", "selectors": {"out_of_place": False}})
    with pytest.raises(XTFUserError, match="nothing could be dropped"):
        XTFConfig.parse({"preset": "none"})


def test_a_slot_with_another_scorer_takes_nothing_of_the_preset():
    other = {"scorer": "typicality", "drop": {"below": -6}}
    changed = XTFConfig.parse({"preset": "official", "knowledge_novelty": other})
    assert changed.knowledge_novelty.scorer == "typicality" and changed.knowledge_novelty.max_fraction is None
    assert changed.reasoning_importance == XTFConfig(preset="official").reasoning_importance
    same = XTFConfig.parse({"preset": "official", "knowledge_novelty": {"scorer": "novelty"}})
    assert same == XTFConfig(preset="official")
    assert XTFConfig.parse(changed.to_dict()) == changed


CLEAN = {"scorer": "token_cleaning", "drop": {"quantile": 0.4}}
# Blocks that released versions took, and what is written for them today; None: the same block.
OLD = {
    "0.1.0, every key": (
        {
            "reasoning_importance": {"layers": "all", "drop": {"fence": 1.0}, "scale": "linear", "scope": "document"},
            "knowledge_novelty": {"drop": {"known_above": 0.95}, "window": 1, "max_fraction": None},
            "task_relevance": {"domain": "dataset", "embedding": "input", "drop": {"cluster": 2, "of": 5}},
            "selectors": {"low": {"scorer": "log_probability", "drop": {"below": -1.0}, "scope": "dataset"}},
        },
        None,
    ),
    "0.1.0, every other key": (
        {
            "preset": "official",
            "reference": {"model": None, "revision": None, "quantization": "nf4", "dtype": "auto"},
            "reasoning_importance": {"drop": {"quantile": 0.1}, "window": 3, "max_fraction": 0.1},
            "knowledge_novelty": {"drop": {"known_above": 0.9, "unknown_below": 0.01}},
            "task_relevance": {"domain": ["x"], "embedding": "output", "drop": {"below": 0.1}, "window": 5},
            "selectors": {
                "odd": {"scorer": "typicality", "drop": {"below": -6}, "reference": None, "max_fraction": 0.5},
                "begin": {"scorer": "opening", "drop": {"fence": 1}, "unit": "line", "clip": 4, "context": "document"},
                "rho": {"scorer": "excess_loss", "drop": {"quantile": 0.4}, "reference": {"model": "m"}},
                "clean": {**CLEAN, "mode": "fixed", "reference": {"model": "m"}},
            },
            "combine": {"at_least": 2},
            "protect": {"special_tokens": True, "patterns": ["x"]},
            "force_drop": ["y"],
            **{"min_kept": 1, "control": "random", "seed": 1, "cache_dir": "c", "batch_tokens": 64},
            **{"calibration": 10, "report": False, "dry_run": True},
        },
        None,
    ),
    "0.1.0, switches": ({"preset": "paper", "task_relevance": False, "reasoning_importance": True}, None),
    "sentence of a slot": (
        {"knowledge_novelty": {"window": "sentence"}},
        {"knowledge_novelty": {"unit": "sentence"}},
    ),
    "line of a selector": (
        {"selectors": {"low": {"scorer": "log_probability", "drop": {"below": -1.0}, "window": "line"}}},
        {"selectors": {"low": {"scorer": "log_probability", "drop": {"below": -1.0}, "unit": "line"}}},
    ),
    "self-evolving": (
        {"selectors": {"t": {**CLEAN, "mode": "self_evolving"}}},
        {"selectors": {"t": {**CLEAN, "reference": {"model": "m"}}}},
    ),
}


@pytest.mark.parametrize("name", OLD)
def test_an_old_spelling_loads_or_is_refused_with_what_to_write(name):
    old, new = OLD[name]
    if new is None:
        config = XTFConfig.parse(old)
        assert holds(config.to_dict(), {key: value for key, value in old.items() if value is not True})
        assert XTFConfig.parse(config.to_dict()) == config
        return
    with pytest.raises(XTFUserError, match=r"write `unit: (sentence|line)`|name a `reference`"):
        XTFConfig.parse(old)
    XTFConfig.parse(new)


def test_selectors_keep_the_order_of_the_block_and_those_of_the_preset_come_last():
    """`min_kept` and the bits of reasons depend on it."""
    other = {"scorer": "log_probability", "drop": {"quantile": 0.1}}
    more = XTFConfig.parse({"selectors": {"b": other, "a": other}})
    assert list(more.selectors) == ["b", "a", "out_of_place"]
    assert list(XTFConfig.parse(more.to_dict()).scores) == list(more.scores)
