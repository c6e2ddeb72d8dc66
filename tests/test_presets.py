"""What a block changes of its preset: attributes that come on, selectors that change or go."""

from __future__ import annotations

import pytest

from xtf_plugin.config.block import PRESETS, XTFConfig
from xtf_plugin.errors import XTFUserError


def test_an_attribute_that_the_preset_has_off_comes_on_with_its_own_defaults():
    on = XTFConfig.parse({"reasoning_importance": True, "knowledge_novelty": {"window": 5}})
    assert on.attributes == ("reasoning_importance", "knowledge_novelty") and len(on.selectors) == len(
        PRESETS["default"]["selectors"]
    )
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
