"""Scores of a dataset that are stored as a whole: found at once by the same start, and by no other one."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest

from tests import tiny
from tests.made_scores import KN, RI, TR
from tests.test_plan import Provider, rows
from xtf_plugin.config.block import XTFConfig
from xtf_plugin.data.documents import collect
from xtf_plugin.plan import make_plan
from xtf_plugin.scorers import ScoringContext, explained, registry
from xtf_plugin.scoring import dataset_scores

EVERY_UNIT = {"reasoning_importance": {"among": None}}


@pytest.fixture
def plan(tmp_path, monkeypatch):
    """A plan of any dataset, as if it were large; to random weights prompts say too little, and no unit is doubtful."""
    monkeypatch.setattr(dataset_scores, "LARGE", 1)
    monkeypatch.setattr(explained, "LEAST", -np.inf)

    def make(block=None, data=None, tokenizer=None):
        config = XTFConfig.parse({"cache_dir": str(tmp_path), **EVERY_UNIT, **(block or {})})
        made, provider = collect(rows() if data is None else data), Provider()
        made = make_plan(config, made, provider, tokenizer or tiny.tokenizer(), progress=False)
        made.__dict__["opened"] = provider.opened
        return made

    return make


def tables(folder):
    return sorted(folder.rglob("scores-*.parquet"))


def broken(*_, **__):
    raise AssertionError("this start must not ask for sentences")


def test_the_same_start_asks_for_no_sentence(plan, tmp_path, monkeypatch):
    first = plan()
    assert len(tables(tmp_path)) == 4
    for used in ("data.splices.Splices.distinct", "scorers.new_text._scores", "store.store.ScoreStore.lookup"):
        monkeypatch.setattr(f"xtf_plugin.{used}", broken)
    second = plan()
    assert second.opened == 0 and second.stats.stored_documents == first.stats.documents
    for name in (TR, KN, RI):
        assert np.isfinite(first.scores.values[name]).any()
        np.testing.assert_array_equal(second.scores.values[name], first.scores.values[name])
    np.testing.assert_array_equal(second.scores.logprobs, first.scores.logprobs)
    assert len(tables(tmp_path)) == 4


def other_spelling():
    """The tiny tokenizer with full stop and @ exchanged, so that sentences end elsewhere."""
    tokenizer = copy.deepcopy(tiny.tokenizer())
    state = tokenizer.backend_tokenizer.to_str()
    assert state.count('".":') == state.count('"@":') == 1
    state = state.replace('".":', "full stop").replace('"@":', '".":').replace("full stop", '"@":')
    tokenizer._tokenizer = type(tokenizer.backend_tokenizer).from_str(state)
    return tokenizer


def changed(data):
    """The first row with another token in its completion."""
    first = copy.deepcopy(data[0])
    at = len(first["input_ids"]) - 3
    first["input_ids"][at] = first["labels"][at] = first["input_ids"][at] ^ 1
    return [first, *data[1:]]


RI_OFF = {"reasoning_importance": False}
STARTS = {
    "order": {"data": rows()[::-1]},
    "counts": {"data": rows() + rows()[:3]},
    "a token": {"data": changed(rows())},
    "a label": {"data": [{**rows()[0], "labels": [-100, *rows()[0]["input_ids"][1:]]}, *rows()[1:]]},
    "protected": {"block": {"protect": {"patterns": ["[A-Z]"]}}},
    "forced": {"block": {"force_drop": ["[A-Z]"]}},
    "threshold": {"block": {"task_relevance": {"drop": {"of_median": 0.9}}}},
    "option of another": {"block": {"task_relevance": {"drop": {"below": 0.05}}}},
    "option": {"block": {"task_relevance": {"first": 3}, "knowledge_novelty": {"shortest": 2}}},
    "unit": {"block": {"task_relevance": {"unit": "line"}, "knowledge_novelty": {"unit": "line"}, **RI_OFF}},
    "spelling": {"tokenizer": other_spelling},
}


@pytest.mark.parametrize("what", list(STARTS))
def test_another_start_computes_its_own(plan, what, tmp_path, monkeypatch):
    """A table that was stored for other input would go unnoticed, so the scores are those without any table."""
    given = {name: value() if callable(value) else value for name, value in STARTS[what].items()}
    plan()
    found = plan(**given)
    assert len(tables(tmp_path)) > 4
    monkeypatch.setattr(dataset_scores, "LARGE", 10**6)
    alone = plan(**given)
    for name in found.scores.values:
        np.testing.assert_array_equal(found.scores.values[name], alone.scores.values[name])


def test_a_score_that_reads_others_depends_on_them_and_their_options():
    made = collect(rows())
    config = XTFConfig.parse({"selectors": {"own": {"scorer": "log_probability", "drop": {"below": -9}}}})
    other = XTFConfig.parse({"selectors": {"own": {"scorer": "log_probability", "drop": {"below": -8}}}})
    noise = np.random.default_rng(0).random((2, len(made.completion_ids)), dtype=np.float32)

    def key(name, parts, values):
        context = ScoringContext(made, tiny.tokenizer(), SimpleNamespace(segments=lambda unit: np.asarray([0])))
        context.parts, context.scores = parts.scores, {"own": values}
        part = config.scores[name]
        return dataset_scores.input_key(context, registry.find(part.scorer), part)

    for name, reads in ((RI, True), (TR, False)):
        assert key(name, config, noise[0]) == key(name, config, noise[0])
        assert (key(name, config, noise[0]) != key(name, config, noise[1])) is reads
        assert (key(name, config, noise[0]) != key(name, other, noise[0])) is reads


def test_another_version_computes_its_own(plan, tmp_path, monkeypatch):
    plan()
    monkeypatch.setattr(dataset_scores, "__version__", "99")
    plan()
    assert len(tables(tmp_path)) == 7


def test_a_damaged_table_is_computed_again(plan, tmp_path, caplog):
    first = plan()
    for path in tables(tmp_path):
        path.write_bytes(path.read_bytes()[:-9] + b"123456789")
    second = plan()
    assert "it is computed again" in caplog.text
    for name in (TR, KN):
        np.testing.assert_array_equal(second.scores.values[name], first.scores.values[name])


def test_scores_with_a_warning_are_not_stored(plan, tmp_path, monkeypatch):
    monkeypatch.setattr(explained, "LEAST", np.inf)
    for _ in range(2):
        assert any("say too little" in warning for warning in plan().warnings)
    assert len(tables(tmp_path)) == 3


def test_another_reference_of_a_score_has_no_table(plan):
    """Its fingerprint is no part of the key."""
    source, context = SimpleNamespace(whole=True), SimpleNamespace(token_ids=[1])
    for reference, stored in ((None, True), ({"model": "some/model"}, False)):
        part = explained.ExplainedConfig.model_validate({"scorer": "explained", "reference": reference})
        assert dataset_scores.is_stored(source, context, explained.explained, part) is stored


def test_small_datasets_have_no_tables(plan, tmp_path, monkeypatch):
    monkeypatch.setattr(dataset_scores, "LARGE", 10**6)
    plan()
    assert not tables(tmp_path)
