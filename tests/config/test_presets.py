"""What a block changes of its preset: slots that come on or get another scorer, selectors that change or go."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.config.test_config import holds
from xtf_plugin.config.block import XTFConfig
from xtf_plugin.config.scores import PRESETS, SLOTS
from xtf_plugin.errors import XTFUserError
from xtf_plugin.scorers import registry


def test_a_slot_that_the_preset_has_off_comes_on_with_the_papers_scorer_and_its_defaults():
    on = XTFConfig.parse({"preset": "none", "reasoning_importance": True, "knowledge_novelty": {"window": 5}})
    assert list(on.scores) == ["reasoning_importance", "knowledge_novelty"]
    assert (on.reasoning_importance.scorer, on.reasoning_importance.drop.quantile) == ("attention_received", 0.05)
    assert (on.knowledge_novelty.drop.known_above, on.knowledge_novelty.window) == (0.95, 5)


def test_the_default_asks_sentences_for_all_three_attributes():
    default = XTFConfig()
    assert {name: (part.scorer, part.unit, str(part.drop)) for name, part in default.scores.items()} == {
        "reasoning_importance": ("influence", "sentence", "{below: 0.0}"),
        "knowledge_novelty": ("new_text", "sentence", "{below: 0.1}"),
        "task_relevance": ("explained", "sentence", "{of_median: 0.2}"),
    }
    assert default.selectors == {} and default.protect.formats == 0.2
    assert XTFConfig.parse({name: True for name in default.scores}) == default
    none = XTFConfig.parse({"preset": "none", "task_relevance": {"scorer": "explained"}})
    assert none.task_relevance == default.task_relevance and list(none.scores) == ["task_relevance"]


def test_a_slot_without_scorer_changes_the_presets_score():
    changed = XTFConfig.parse({"task_relevance": {"first": 5}, "knowledge_novelty": {"unit": "line"}})
    assert (changed.task_relevance.scorer, changed.task_relevance.first) == ("explained", 5)
    assert changed.task_relevance.drop == XTFConfig().task_relevance.drop
    assert (changed.knowledge_novelty.scorer, changed.knowledge_novelty.unit) == ("new_text", "line")
    assert changed.reasoning_importance == XTFConfig().reasoning_importance


@pytest.mark.parametrize("preset", ["paper", "official"])
def test_the_papers_presets_protect_no_format(preset):
    assert XTFConfig(preset=preset).protect.formats is None
    assert XTFConfig(preset=preset, protect={"formats": 0.5}).protect.formats == 0.5


LEAN = {"scorer": "influence"}
FREE = "or null, which scores all units, or switch {} off"
OF_UNITS = "knowledge_novelty, task_relevance"


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        (
            {"task_relevance": False},
            "reasoning_importance.among: 'task_relevance' is off; write `task_relevance: {scorer: explained}` "
            f"(legal: knowledge_novelty; {FREE.format('reasoning_importance')})",
        ),
        (
            {"preset": "none", "knowledge_novelty": {**LEAN, "unit": "line"}},
            "is off; write `task_relevance: {scorer: explained, unit: line}` (legal: none;",
        ),
        (
            {"preset": "none", "selectors": {"lean": {**LEAN, "among": "knowledge_novelty"}}},
            "selectors.lean.among: 'knowledge_novelty' is off; write `knowledge_novelty: {scorer: new_text}` "
            f"(legal: none; {FREE.format('lean')})",
        ),
        (
            {"selectors": {"lean": {**LEAN, "among": "lean"}}},
            f"selectors.lean.among: 'lean' is not another score of this block that is on (legal: {OF_UNITS};",
        ),
        (
            {"reasoning_importance": {"among": "task_relevence"}},
            f"is not another score of this block that is on (legal: {OF_UNITS};",
        ),
        (
            {"reasoning_importance": {**LEAN, "among": "reasoning_importance"}, "task_relevance": False},
            "is not another score of this block that is on (legal: knowledge_novelty;",
        ),
        (
            {"reasoning_importance": {"unit": "line"}, "knowledge_novelty": {"unit": "line"}},
            "reasoning_importance.among: 'task_relevance' has `unit: sentence`; write `unit: line` there too "
            "(legal: knowledge_novelty;",
        ),
        (
            {"preset": "none", "reasoning_importance": LEAN, "task_relevance": True},
            "'task_relevance' has the scorer embedding_similarity, which scores tokens, not complete units "
            "(legal: none;",
        ),
        (
            {"task_relevance": {"scorer": "typicality", "unit": "sentence", "drop": {"below": -4}}},
            "'task_relevance' has the scorer typicality, which scores tokens, not complete units "
            "(legal: knowledge_novelty;",
        ),
        (
            {"selectors": {"lean": {**LEAN, "among": "reasoning_importance"}}},
            f"'reasoning_importance' has the scorer influence, which reads other scores itself (legal: {OF_UNITS};",
        ),
    ],
    ids=str,
)
def test_influence_asks_among_the_units_of_another_score(block, expected):
    """A score with other units, or without a number of its own for a unit, would be read at the wrong places."""
    with pytest.raises(XTFUserError) as refusal:
        XTFConfig.parse(block)
    assert expected in str(refusal.value)


@pytest.mark.parametrize(
    "block",
    [
        {"task_relevance": False, "reasoning_importance": {"among": None}},
        {"task_relevance": False, "reasoning_importance": {"among": "knowledge_novelty"}},
        {"task_relevance": {"unit": "line"}, "reasoning_importance": {"unit": "line"}},
        {"preset": "none", "task_relevance": {"scorer": "explained"}, "selectors": {"lean": LEAN}},
        {
            "reasoning_importance": {"among": "odd"},
            "selectors": {"odd": {"scorer": "explained", "drop": {"below": 0}}},
        },
    ],
    ids=str,
)
def test_influence_takes_any_other_score_of_its_units(block):
    assert XTFConfig.parse(XTFConfig.parse(block).to_dict()) == XTFConfig.parse(block)


def test_a_score_that_maps_its_averages_is_not_asked_in(monkeypatch):
    """The rule would see other numbers than `context.scores` holds."""
    mapped = replace(registry.BUILTIN["new_text"], seen=lambda values: values)
    monkeypatch.setitem(registry.BUILTIN, "new_text", mapped)
    with pytest.raises(
        XTFUserError, match=r"new_text, which scores tokens, not complete units \(legal: task_relevance"
    ):
        XTFConfig.parse({"reasoning_importance": {"among": "knowledge_novelty"}})


ODD = {"scorer": "typicality", "unit": "line", "drop": {"below": -4}}


@pytest.fixture
def with_selector(monkeypatch):
    """No preset has a selector today, but one may."""
    monkeypatch.setitem(PRESETS, "default", {**PRESETS["default"], "selectors": {"odd": ODD}})


def test_selectors_of_the_preset_are_changed_replaced_and_taken_out(with_selector):
    other = {"scorer": "log_probability", "drop": {"quantile": 0.1}}
    changed = XTFConfig.parse({"selectors": {"odd": {"drop": {"below": -3}}}})
    assert list(changed.selectors) == ["odd"] and changed.selectors["odd"].drop.below == -3
    assert changed.selectors["odd"].unit == XTFConfig().selectors["odd"].unit == "line"
    less = XTFConfig.parse({"selectors": {"odd": False, "more": other}})
    assert list(less.selectors) == ["more"] and XTFConfig.parse(less.to_dict()) == less
    replaced = XTFConfig.parse({"selectors": {"odd": other, "more": other}})
    assert list(replaced.selectors) == ["odd", "more"] and replaced.selectors["odd"].scorer == "log_probability"
    none = XTFConfig.parse({"selectors": False, "force_drop": ["x"]})
    assert not none.selectors and XTFConfig.parse(none.to_dict()) == none
    with pytest.raises(XTFUserError, match="selectors.od: false takes a .*, but that has odd; remove the key"):
        XTFConfig.parse({"selectors": {"od": False}})


def test_a_selector_that_the_preset_does_not_have_cannot_be_taken_out():
    for preset in PRESETS:
        with pytest.raises(XTFUserError, match="selectors.out_of_place: false .*but that has no selector"):
            XTFConfig.parse({"preset": preset, "selectors": {"out_of_place": False}})
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
IMPORTANCE = {"layers": "all", "drop": {"fence": 1.0}, "scale": "linear", "scope": "document"}
NOVELTY = {"drop": {"known_above": 0.95}, "window": 1, "max_fraction": None}
RELEVANCE = {"domain": "dataset", "embedding": "input", "drop": {"cluster": 2, "of": 5}}
LOW = {"low": {"scorer": "log_probability", "drop": {"below": -1.0}, "scope": "dataset"}}
# Blocks that released versions took, and what is written for them today; None: the same block.
OLD = {
    "0.1.0, every key": (
        {
            "reasoning_importance": IMPORTANCE,
            "knowledge_novelty": NOVELTY,
            "task_relevance": RELEVANCE,
            "selectors": LOW,
        },
        {
            "reasoning_importance": {"scorer": "attention_received", **IMPORTANCE},
            "knowledge_novelty": {"scorer": "novelty", **NOVELTY},
            "task_relevance": {"scorer": "embedding_similarity", **RELEVANCE},
            "selectors": LOW,
        },
    ),
    "0.1.0, one unit of the old default": (
        {"reasoning_importance": {"unit": "token"}},
        {"reasoning_importance": {"scorer": "attention_received", "unit": "token"}},
    ),
    "0.1.0, a window": (
        {"task_relevance": {"window": 3, "drop": {"quantile": 0.2}}},
        {
            "task_relevance": {"scorer": "embedding_similarity", "window": 3, "drop": {"quantile": 0.2}},
            "reasoning_importance": False,  # the default's asks among units of task_relevance
        },
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
    "a scorer that is gone": (
        {"selectors": {"begin": {"scorer": "opening", "drop": {"below": -4}, "context": "kept"}}},
        {"selectors": {"begin": {"scorer": "explained", "drop": {"of_median": 0.2}}}},
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
    with pytest.raises(
        XTFUserError, match=r"write `unit: (sentence|line)`|name a `reference`|add `scorer: \w+`|Write `explained`"
    ):
        XTFConfig.parse(old)
    XTFConfig.parse(new)


@pytest.mark.parametrize(
    ("slot", "scorer", "part", "key"),
    [
        ("reasoning_importance", "attention_received", {"layers": "all"}, "layers"),
        ("reasoning_importance", "attention_received", {"scorer": "influence", "layers": [0]}, "layers"),
        ("reasoning_importance", "attention_received", {"layers": "frist", "horizon": 3}, "layers"),
        ("reasoning_importance", "attention_received", {"unit": "token"}, "unit"),
        ("reasoning_importance", "attention_received", {"window": 3}, "window"),
        ("reasoning_importance", "attention_received", {"scope": "document"}, "scope"),
        ("knowledge_novelty", "novelty", {"drop": {"known_above": 0.95}}, "drop.known_above"),
        ("knowledge_novelty", "novelty", {"drop": {"unknown_below": 95}}, "drop.unknown_below"),
        ("knowledge_novelty", "novelty", {"drop": {"known_above": 0.95}, "windwo": 1}, "drop.known_above"),
        ("knowledge_novelty", "novelty", {"unit": "token"}, "unit"),
        ("knowledge_novelty", "novelty", {"window": 5, "max_fraction": 0.05}, "window"),
        ("task_relevance", "embedding_similarity", {"domain": "dataset"}, "domain"),
        ("task_relevance", "embedding_similarity", {"domain": ["x"]}, "domain"),
        ("task_relevance", "embedding_similarity", {"unit": "token"}, "unit"),
        ("task_relevance", "embedding_similarity", {"window": 3, "drop": {"quantile": 0.2}}, "window"),
        ("task_relevance", "embedding_similarity", {"embedding": "output", "drop": {"cluster": 1}}, "embedding"),
    ],
    ids=str,
)
def test_a_key_of_the_papers_scorer_under_the_default_is_refused_with_its_name(slot, scorer, part, key):
    """Recipes for the presets of the paper, or written when a slot's only scorer was the paper's."""
    with pytest.raises(XTFUserError) as refusal:
        XTFConfig.parse({slot: part})
    lines = [line.strip() for line in str(refusal.value).splitlines()]
    (line,) = (line for line in lines if line.startswith(f"xtf.{slot}.{key}: "))
    assert f"The paper's scorer takes it: add `scorer: {scorer}`." in line
    assert str(refusal.value).count("add `scorer:") == 1, "only what that scorer would not refuse, too"


@pytest.mark.parametrize("slot", SLOTS)
def test_every_key_that_the_papers_scorer_has_alone_is_refused_with_its_name(slot):
    """Keys of either scorer, and rules of either, from the models: one that comes is held to it, too."""
    papers, own = (registry.BUILTIN[name].Config for name in (SLOTS[slot], PRESETS["default"][slot]["scorer"]))
    of_papers = registry.BUILTIN[SLOTS[slot]].Config(scorer=SLOTS[slot]).model_dump()
    alone = [{key: of_papers[key]} for key in papers.model_fields.keys() - own.model_fields.keys()]
    rules = (part.model_fields["drop"].annotation.model_fields.keys() for part in (papers, own))
    alone += [{"drop": {key: 0.5}} for key in set.difference(*map(set, rules))]
    assert alone
    for part in alone:
        with pytest.raises(XTFUserError, match=f"The paper's scorer takes it: add `scorer: {SLOTS[slot]}`"):
            XTFConfig.parse({slot: part})
        others = dict.fromkeys(SLOTS, False)
        assert XTFConfig.parse({**others, slot: {**part, "scorer": SLOTS[slot]}}).scores[slot].scorer == SLOTS[slot]


@pytest.mark.parametrize(
    "block",
    [
        {"reasoning_importance": {"layer": "all"}},
        {"reasoning_importance": {"unit": "sentense"}},
        {"reasoning_importance": {"window": 3, "unit": "line"}},
        {"reasoning_importance": {"scale": "log"}},
        {"reasoning_importance": {"among": 3}},
        {"reasoning_importance": {"reference": {"modle": "x"}}},
        {"task_relevance": {"first": 0}},
        {"knowledge_novelty": {"scope": "document"}},
        {"knowledge_novelty": {"layers": "all"}},
        {"reasoning_importance": {"scorer": "typicality", "drop": {"below": -6}, "layers": "all"}},
        {"preset": "paper", "knowledge_novelty": {"shortest": 3}},
        {"preset": "none", "reasoning_importance": {"horizon": 3}},
    ],
    ids=str,
)
def test_the_papers_scorer_is_named_only_where_it_helps(block):
    with pytest.raises(XTFUserError) as refusal:
        XTFConfig.parse(block)
    assert "add `scorer:" not in str(refusal.value)


def test_selectors_keep_the_order_of_the_block_and_those_of_the_preset_come_last(with_selector):
    """`min_kept` and the bits of reasons depend on it."""
    other = {"scorer": "log_probability", "drop": {"quantile": 0.1}}
    more = XTFConfig.parse({"selectors": {"b": other, "a": other}})
    assert list(more.selectors) == ["b", "a", "odd"]
    assert list(XTFConfig.parse(more.to_dict()).scores) == list(more.scores)
