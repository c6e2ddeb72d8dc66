"""What a wrong `xtf:` block raises: one `XTFUserError` that names key, value, legal values and the next step."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.made_scores import ALL_OFF as OFF
from xtf_plugin.config.block import AtLeast, XTFConfig
from xtf_plugin.errors import XTFUserError

JARGON = re.compile(
    r"Input should|dictionary|type=|pydantic|Value error|literal\[|function-|Config\b|Drop\b|<(on|off|text|other)>\."
)


def refusal(value) -> str:
    with pytest.raises(XTFUserError) as caught:
        XTFConfig.parse(value)
    message = str(caught.value)
    assert not JARGON.search(message), message
    return message


def novelty(**drop):
    return {"preset": "none", "knowledge_novelty": {"drop": drop}}


def importance(**keys):
    return {"preset": "none", "reasoning_importance": keys}


def relevance(**keys):
    return {"preset": "none", "task_relevance": keys}


CASES = {
    "wrong key": ({"min_kpet": 1}, ["xtf.min_kpet", "1", "min_kept", "dry_run"]),
    "wrong nested key": (
        importance(drop={"quantle": 0.05}),
        ["xtf.reasoning_importance.drop.quantle", "0.05", "quantile"],
    ),
    "key of another part": ({"domain": ["x"]}, ["xtf.domain", "xtf.task_relevance"]),
    "rule of another scorer": (
        relevance(drop={"known_above": 0.9}),
        ["xtf.task_relevance.drop.known_above", "cluster"],
    ),
    "rule beside its drop": (
        {"task_relevance": {"of_median": 0.3}},
        ["xtf.task_relevance.of_median: unknown key", "It belongs under xtf.task_relevance.drop."],
    ),
    "rule of no score": ({"of_median": 0.1}, ["`task_relevance: {drop: {of_median: ...}}`"]),
    "number for a rule": ({"task_relevance": {"drop": 0.3}}, ["Did you mean drop: {of_median: 0.3}?"]),
    "a number that no rule takes": ({"task_relevance": {"drop": 10**400}}, ["xtf.task_relevance.drop"]),
    "a pattern as it is to be pasted": (
        {"protect": r"#### \d"},
        [r"Did you mean protect: {patterns: ['#### \d']}?"],
    ),
    "a threshold as it is written": ({"task_relevance": {"drop": 0.9999999}}, ["{of_median: 0.9999999}?"]),
    "name that --reason takes for a slot": (
        {"selectors": {"tr": {"scorer": "novelty", "drop": {"quantile": 0.1}}}},
        ["is taken: reasons"],
    ),
    "list for protect": ({"protect": ["Answer: .*"]}, ["Did you mean protect: {patterns: ['Answer: .*']}?"]),
    "short name of a slot": ({"RI": False}, ["xtf.RI: unknown key", "RI stands for reasoning_importance."]),
    "scorer of a slot": ({"explaned": {}}, ["explained is a scorer: write `task_relevance: {...}`."]),
    "scorer as a key": (
        {"typicality": {}},
        ["write `selectors: {a_name: {scorer: typicality, drop: ...}}`."],
    ),
    "dashes": ({"min-kept": 1}, ["xtf.min-kept", "Did you mean min_kept?"]),
    "key that is no text": ({3: 1}, ["xtf.3", "preset"]),
    "key named self": ({"self": 1}, ["xtf.self"]),
    "key like a marker": ({"<on>": 1}, ["xtf.<on>: unknown key", "preset"]),
    "unknown preset": ({"preset": "papr"}, ["xtf.preset: 'papr'", "paper?", "default | none | paper | official"]),
    "preset of a wrong type": ({"preset": ["paper"]}, ["xtf.preset", "default | none | paper | official"]),
    "null preset": ({"preset": None}, ["xtf.preset: null", "default | none | paper | official"]),
    "two rules": (novelty(known_above=0.9, quantile=0.1), ["xtf.knowledge_novelty.drop", "exactly one", "{quantile:"]),
    "no rule": (importance(drop={}), ["xtf.reasoning_importance.drop: {}", "exactly one", "{fence: number >= 0}"]),
    "null rule": (importance(drop={"fence": None}), ["xtf.reasoning_importance.drop", "no rule"]),
    "of without cluster": (relevance(drop={"of": 4}), ["xtf.task_relevance.drop", "{cluster:"]),
    "of with another rule": (relevance(drop={"quantile": 0.1, "of": 4}), ["of and quantile", "exactly one"]),
    "rule as text": (importance(drop="fence"), ["xtf.reasoning_importance.drop: 'fence'", "{fence: number >= 0}"]),
    "rule as number": (importance(drop=0.05), ["xtf.reasoning_importance.drop: 0.05", "{fence: number >= 0}"]),
    "fence below 0": (importance(drop={"fence": -1}), ["fence: -1", ">= 0"]),
    "quantile 0": (importance(drop={"quantile": 0}), ["quantile: 0", "> 0 and < 1"]),
    "quantile 1": (novelty(quantile=1), ["quantile: 1", "> 0 and < 1"]),
    "percent": (novelty(known_above=95), ["known_above: 95", ">= 0 and <= 1"]),
    "nan": (novelty(known_above=math.nan), ["known_above: nan", "finite"]),
    "infinity": (importance(drop={"below": math.inf}), ["below: inf", "finite"]),
    "number beyond floats": (importance(drop={"below": 10**400}), ["below: 1000", "finite"]),
    "number as text": (novelty(known_above="0.9"), ["known_above: '0.9'", "quotes"]),
    "boolean as number": (novelty(known_above=True), ["known_above: true", "not a number"]),
    "boolean as whole number": ({"min_kept": True}, ["xtf.min_kept: true", "whole number >= 0"]),
    "float as whole number": ({"min_kept": 1.5}, ["xtf.min_kept: 1.5", "whole number >= 0"]),
    "null as number": ({"min_kept": None}, ["xtf.min_kept: null", "whole number >= 0"]),
    "negative floor": ({"min_kept": -1}, ["xtf.min_kept: -1", ">= 0"]),
    "text as boolean": ({"dry_run": "yes"}, ["xtf.dry_run: 'yes'", "true | false"]),
    "number as boolean": ({"protect": {"special_tokens": 1}}, ["xtf.protect.special_tokens: 1", "true | false"]),
    "even window": (importance(window=4), ["xtf.reasoning_importance.window: 4", "odd"]),
    "unknown window": (importance(window="sentense"), ["window: 'sentense'", "not a whole number", "odd whole number"]),
    "sentence window of 0.1.0": (
        importance(window="sentence"),
        ["window: 'sentence' is a unit", "`unit: sentence`"],
    ),
    "line window of 0.1.0": (importance(window="line"), ["window: 'line' is a unit", "`unit: line`"]),
    "window and unit": (importance(window=3, unit="line"), ["window: 3 has no effect beside `unit: line`"]),
    "unknown unit": (importance(unit="sentense"), ["unit: 'sentense'", "mean sentence?", "token | sentence | line"]),
    "unknown scorer of a slot": (
        importance(scorer="novlty"),
        ["reasoning_importance.scorer: 'novlty'", "mean novelty?"],
    ),
    "scorer without a rule": (
        {"knowledge_novelty": {"scorer": "typicality"}},
        ["xtf.knowledge_novelty.drop: missing", "{below: number}"],
    ),
    "key of the slot's usual scorer": (
        importance(scorer="typicality", drop={"below": -6}, layers="all"),
        ["xtf.reasoning_importance.layers: unknown key"],
    ),
    "window 0": (importance(window=0), ["window: 0", "odd whole number >= 1"]),
    "max_fraction 0": (importance(max_fraction=0), ["max_fraction: 0", "> 0 and <= 1"]),
    "max_fraction above 1": (relevance(max_fraction=1.1), ["max_fraction: 1.1", "> 0 and <= 1"]),
    "class beyond the split": (relevance(drop={"cluster": 6}), ["cluster: 6", "5 classes"]),
    "one class": (relevance(drop={"cluster": 1, "of": 1}), ["of: 1", ">= 2 and <= 8"]),
    "nine classes": (relevance(drop={"cluster": 1, "of": 9}), ["of: 9", ">= 2 and <= 8"]),
    "class 0": (relevance(drop={"cluster": 0}), ["cluster: 0", ">= 1"]),
    "novelty rules that meet": (
        novelty(known_above=0.5, unknown_below=0.5),
        ["unknown_below: 0.5", "known_above (0.5)"],
    ),
    "unknown layer": (importance(layers="frist"), ["layers: 'frist'", "first?", "middle | last | all"]),
    "no layer": (importance(layers=[]), ["layers: []", "not empty"]),
    "layer twice": (importance(layers=[1, 1]), ["layers: [1, 1]", "twice"]),
    "layer that is no number": (importance(layers=[0, "last"]), ["layers[1]: 'last'", "whole number"]),
    "layer without a list": (importance(layers=3), ["layers: 3", "not a list"]),
    "text for a mapping": ({"protect": "all"}, ["xtf.protect: 'all'", "special_tokens, patterns"]),
    "list for a mapping": (importance() | {"reference": ["m"]}, ["xtf.reference: ['m']", "model, revision"]),
    "list for an attribute": ({"task_relevance": [1]}, ["xtf.task_relevance: [1]", "true | false"]),
    "null for an attribute": ({"task_relevance": None}, ["xtf.task_relevance: null", "true | false"]),
    "true for a part that is no attribute": ({"protect": True}, ["xtf.protect: true", "mapping"]),
    "bad regex": ({"force_drop": ["ok", "("]}, ["xtf.force_drop[1]: '('", "regular expression"]),
    "impossible regex": (
        {"protect": {"patterns": ["a{9999999999}"]}},
        ["xtf.protect.patterns[0]", "regular expression"],
    ),
    "empty regex": ({"force_drop": [""]}, ["xtf.force_drop[0]: ''", "regular expression"]),
    "regex without a list": ({"force_drop": "x"}, ["xtf.force_drop: 'x'", "[...]"]),
    "missing word file": (
        relevance(domain="no/such.txt"),
        ["xtf.task_relevance.domain: 'no/such.txt'", "not a file", "[word]"],
    ),
    "no words": (relevance(domain=[]), ["xtf.task_relevance.domain: []", "not empty"]),
    "blank word": (relevance(domain=["a", " "]), ["domain", "empty word"]),
    "word that YAML took for a boolean": (relevance(domain=["a", False]), ["domain[1]: false", "text"]),
    "NUL in a path": ({"cache_dir": "a\0b"}, ["xtf.cache_dir: 'a\\x00b'", "NUL"]),
    "unknown combination": ({"combine": "unoin"}, ["xtf.combine: 'unoin'", "union?", "{at_least: whole number >= 1}"]),
    "at least nothing": ({"combine": {"at_least": 0}}, ["xtf.combine.at_least: 0", ">= 1"]),
    "at least without a number": ({"combine": {}}, ["xtf.combine.at_least: missing", ">= 1"]),
    "more than there are": (
        {"preset": "paper", "combine": {"at_least": 3}, "task_relevance": False},
        ["xtf.combine.at_least: 3", "more than there are scores (2)"],
    ),
    "batch of nothing": ({"batch_tokens": 0}, ["xtf.batch_tokens: 0", "auto | whole number >= 1"]),
    "unknown control": ({"control": "inverted"}, ["xtf.control: 'inverted'", "random | null"]),
    "unknown type": ({"reference": {"model": "m", "dtype": "bf16"}}, ["xtf.reference.dtype: 'bf16'", "bfloat16"]),
    "all off": ({**OFF, "selectors": False}, ["nothing could be dropped", "xtf: false"]),
    "control of nothing": ({"preset": "none", "control": "random"}, ["xtf.control: 'random'", "to match"]),
    "log scale without a fence": (
        importance(scale="log"),
        ["scale: 'log'", "{quantile: 0.05}", "no effect", "{fence: k}"],
    ),
    "scope of a constant": (
        importance(scope="dataset", drop={"below": 0.1}),
        ["scope: 'dataset'", "no effect", "{below: 0.1}"],
    ),
    "revision of the trained model": (
        {"reference": {"revision": "v1"}},
        ["xtf.reference.revision: 'v1'", "reference.model"],
    ),
    "type of the trained model": ({"reference": {"dtype": "float32"}}, ["xtf.reference.dtype", "reference.model"]),
    "code of the trained model": (
        {"reference": {"trust_remote_code": True}},
        ["trust_remote_code: true", "reference.model"],
    ),
    "number": (3, ["xtf: 3", "mapping", "true", "false"]),
    "list": ([], ["xtf: []", "mapping"]),
    "name of a preset": ("paper", ["{preset: paper}"]),
    "text in text": ('"{}"', ["xtf: '{}'", "mapping"]),
    "empty text": (" ", ["empty", "true", "false"]),
    "comment only": ("# true", ["empty"]),
    "broken text": ("{min_kept: 1", ["neither JSON nor YAML"]),
    "endless nesting": ("[" * 5_000, ["neither JSON nor YAML"]),
    "impossible date": ("2020-99-99", ["neither JSON nor YAML"]),
    "empty number": ("!!int ''", ["neither JSON nor YAML"]),
}


@pytest.mark.parametrize("name", CASES)
def test_a_wrong_block_is_named(name):
    block, expected = CASES[name]
    message = refusal(block)
    assert "\n" not in message or len(message.splitlines()) > 3
    for text in expected:
        assert text in message, f"{text!r} not in: {message}"
    assert len(message) < 1000
    if isinstance(block, dict) and all(isinstance(key, str) for key in block):
        with pytest.raises(XTFUserError) as direct:
            XTFConfig(**block)
        assert str(direct.value) == message


def test_every_problem_has_its_line():
    message = refusal(
        {
            "preset": "official",
            "min_kept": -1,
            "reasoning_importance": {"window": 2, "drop": {"fence": "x"}},
            "reference": {"quantization": "none", "dtype": "float16"},
            "tsk_relevance": False,
        }
    )
    lines = message.splitlines()
    assert "6 problems" in lines[0] and "docs/config.md" in lines[-1]
    keys = [line.split(":")[0].strip() for line in lines[1:-1]]
    assert sorted(keys) == [
        "xtf.min_kept",
        "xtf.reasoning_importance.drop.fence",
        "xtf.reasoning_importance.window",
        "xtf.reference.dtype",
        "xtf.reference.quantization",
        "xtf.tsk_relevance",
    ]


def test_an_error_shows_no_traceback_of_another_library():
    with pytest.raises(XTFUserError) as caught:
        XTFConfig(min_kept=-1)
    assert caught.value.__cause__ is None and caught.value.__suppress_context__


def test_keys_that_act_are_not_refused():
    XTFConfig(reasoning_importance={"drop": {"fence": 1}, "scale": "log", "scope": "dataset"})
    XTFConfig(reasoning_importance={"drop": {"quantile": 0.1}, "scope": "dataset"})
    XTFConfig(reference={"model": "m", "revision": "r", "quantization": "none", "dtype": "float32"})
    XTFConfig(**OFF, force_drop=["x"], control="random")


def test_word_files_are_read_before_any_model(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("# only a comment\n \n", encoding="utf-8")
    assert path.name in refusal(relevance(domain=str(path))) and "no word" in refusal(relevance(domain=str(path)))
    path.write_bytes(b"caf\xe9")
    assert "not UTF-8" in refusal(relevance(domain=str(path)))
    assert "not a file" in refusal(relevance(domain=str(tmp_path)))
    path.write_text("café\n", encoding="utf-8")
    assert XTFConfig.parse(relevance(domain=str(path))).task_relevance.domain == str(path)


def test_an_array_is_refused_as_a_list_is():
    with pytest.raises(XTFUserError, match=r"xtf.reasoning_importance.scorer: \[1, 2\]"):
        XTFConfig.parse({"preset": "default", "reasoning_importance": {"scorer": np.array([1, 2])}})


def test_blocks_that_hold_themselves_are_refused():
    for text in ("&a {task_relevance: *a}", "&a {task_relevance: {drop: *a}}", "&a {force_drop: [*a]}"):
        refusal(text)


KEYS = list(XTFConfig().to_dict())
KEYS += ["layers", "drop", "window", "domain", "scale", "fence", "quantile", "below", "known_above", "cluster", "of"]
KEYS += ["patterns", "model", "at_least", "max_fraction", "<on>", "self"]
VALUES = [
    "default",
    "paper",
    "all",
    "dataset",
    "auto",
    "union",
    "random",
    "nf4",
    "~",
    "~nobody",
    "(",
    "1e9999",
    "\ud800",
]
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(VALUES)
    | st.binary(max_size=2)
    | st.sampled_from([AtLeast(at_least=1), object(), 1j])
)
keys = st.sampled_from(KEYS) | st.text(max_size=3) | st.integers() | st.none() | st.tuples(st.booleans())
junk = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4), max_leaves=12
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(junk | st.dictionaries(st.sampled_from(KEYS), junk, max_size=4))
def test_junk_is_refused_and_nothing_else(value):
    try:
        config = XTFConfig.parse(value)
    except XTFUserError as error:
        assert str(error) and "Input should" not in str(error)
    else:
        assert config is None or XTFConfig.parse(config.to_dict()) == config


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=30) | st.text(alphabet="{}[]:,-!&*'\"% \n01ae", max_size=20) | junk.map(repr))
def test_junk_text_is_refused_and_nothing_else(text):
    try:
        config = XTFConfig.parse(text)
    except XTFUserError:
        return
    assert config is None or isinstance(config, XTFConfig)


@pytest.mark.parametrize(("value", "said"), [("x", "but text."), ("0.2", "but text; remove the quotes.")])
def test_text_in_place_of_a_number(value, said):
    with pytest.raises(XTFUserError) as refused:
        XTFConfig(task_relevance={"drop": {"of_median": value}})
    assert f"'{value}' is not a number, {said} Legal: " in str(refused.value)


@pytest.mark.parametrize("part", [{"protect": "("}, {"protect": ["a", "["]}, {"protect": ""}, {"protect": "a\nb"}])
def test_no_hint_is_refused_itself(part):
    with pytest.raises(XTFUserError) as refused:
        XTFConfig.parse(part)
    assert "Did you mean" not in str(refused.value)


@pytest.mark.parametrize("number", [5, -1, float("nan")])
def test_no_number_is_suggested_that_its_rule_refuses(number):
    with pytest.raises(XTFUserError) as refused:
        XTFConfig.parse({"task_relevance": {"drop": number}})
    assert "Did you mean" not in str(refused.value)
