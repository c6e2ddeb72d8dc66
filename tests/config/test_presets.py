"""What a block changes of its preset: slots that come on or get another scorer, selectors that change or go."""

from __future__ import annotations

import pytest

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
        {"selectors": {"t": {"scorer": "token_cleaning", "drop": {"quantile": 0.4}, "mode": "self_evolving"}}},
        {"selectors": {"t": {"scorer": "token_cleaning", "drop": {"quantile": 0.4}, "reference": {"model": "m"}}}},
    ),
}


@pytest.mark.parametrize("name", OLD)
def test_an_old_spelling_loads_or_is_refused_with_what_to_write(name):
    old, new = OLD[name]
    if new is None:
        config = XTFConfig.parse(old)
        assert XTFConfig.parse(config.to_dict()) == config
        return
    with pytest.raises(XTFUserError, match=r"write `unit: (sentence|line)`|name a `reference`"):
        XTFConfig.parse(old)
    XTFConfig.parse(new)
