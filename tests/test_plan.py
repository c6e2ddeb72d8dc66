"""From documents to a plan: what is scored again and what is not, and what each part of the block does to the masks."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import pytest
import torch

from tests import tiny
from tests.made_scores import ALL_ON, KN, RI, TR
from xtf_plugin.config.block import XTFConfig
from xtf_plugin.data import sentences, token_text
from xtf_plugin.data.documents import collect
from xtf_plugin.files import digest
from xtf_plugin.plan import make_plan
from xtf_plugin.report import summary
from xtf_plugin.scoring.fingerprint import model_facts
from xtf_plugin.scoring.reference import Reference
from xtf_plugin.selection.text_rules import special_ids


class Provider:
    """A reference in memory that counts how often it is opened and how many documents pass through it."""

    def __init__(self, model=None) -> None:
        self.reference = Reference(model or tiny.model(), "tiny")
        self.opened = 0
        self.forwards = 0

    def fingerprint(self):
        return digest(model_facts(self.reference.model))

    def description(self):
        return {"name": "tiny"}

    def text_config(self):
        return self.reference.text_config

    @contextmanager
    def open(self):
        self.opened += 1
        forward = self.reference.decoder.register_forward_hook(lambda *_: setattr(self, "forwards", self.forwards + 1))
        yield self.reference
        forward.remove()


def rows(n=12, seed=0):
    fast, made = tiny.tokenizer(), []
    for pair in tiny.problems(n, seed):
        prompt = fast(pair["prompt"])["input_ids"]
        ids = prompt + fast(pair["completion"])["input_ids"] + [fast.eos_token_id]
        made.append({"input_ids": ids, "labels": [-100] * len(prompt) + ids[len(prompt) :]})
    return made


# The three slots, each with its scorer's defaults.
ATTRIBUTES_ON = {"preset": "none", **ALL_ON}


@pytest.fixture
def plan(tmp_path):
    def make(block=True, data=None, provider=None):
        provider = provider or Provider()
        block = {} if block is True else block
        config = XTFConfig.parse({**ATTRIBUTES_ON, "cache_dir": str(tmp_path), **block})
        made = make_plan(config, collect(data or rows()), provider, tiny.tokenizer(), progress=False)
        made.__dict__["provider"] = provider
        return made

    return make


@pytest.mark.parametrize(("formats", "units"), [(None, ["line"]), (0.5, ["line", "sentence"])])
def test_the_text_is_searched_once_for_a_plan_and_its_report(plan, monkeypatch, formats, units):
    searched, split = [], []
    find, starts = token_text.match_each, sentences.segment_starts
    monkeypatch.setattr(token_text, "match_each", lambda *given: searched.append(given[3]) or find(*given))
    monkeypatch.setattr(sentences, "segment_starts", lambda *given: split.append(given[0]) or starts(*given))
    protect = {"patterns": ["\\d+"], "formats": formats}
    block = {"protect": protect, "force_drop": ["happy"], "task_relevance": {"unit": "line"}}
    summary.described(plan(block), tiny.tokenizer())
    assert searched == [["\\d+"], ["happy"]] and split == units


class TestStore:
    def test_second_run_does_not_open_the_reference(self, plan):
        first, second = plan(), plan()
        assert first.provider.opened == 1 and second.provider.opened == 0
        assert second.stats.stored_documents == 12 and second.stats.documents == 0
        assert np.array_equal(first.selection.keep, second.selection.keep)

    def test_stored_sentences_are_not_laid_out_again(self, plan, monkeypatch):
        block = {"preset": "default"}
        first = plan(block)
        assert first.scorers["excerpts"]["documents"] > 12
        monkeypatch.setattr("xtf_plugin.data.splices.Splices.documents", lambda *_: 1 / 0)
        second = plan(block)
        assert second.scorers["excerpts"]["stored_documents"] == first.scorers["excerpts"]["documents"]
        for name, values in first.scores.values.items():
            np.testing.assert_array_equal(second.scores.values[name], values)

    @pytest.mark.parametrize(
        "block",
        [
            {"reasoning_importance": {"drop": {"quantile": 0.4}}},
            {"knowledge_novelty": {"drop": {"unknown_below": 0.5}}},
            {"task_relevance": {"drop": {"quantile": 0.3}}},
            {"reasoning_importance": False},
            {"control": "random"},
            {"combine": "majority"},
        ],
    )
    def test_other_thresholds_select_without_scoring(self, plan, block):
        before = plan()
        after = plan(block)
        assert after.provider.opened == 0
        assert not np.array_equal(before.selection.keep, after.selection.keep)

    def test_added_rows_are_the_only_ones_scored(self, plan):
        plan(data=rows(12))
        assert plan(data=rows(12) + rows(5, seed=8)).stats.documents == 5

    def test_other_weights_score_again(self, plan):
        plan()
        assert plan(provider=Provider(tiny.model(seed=1))).stats.documents == 12

    def test_other_layers_score_again_and_change_the_scores(self, plan):
        one, two = plan({"reasoning_importance": {"layers": [0]}}), plan({"reasoning_importance": {"layers": [1]}})
        assert two.stats.documents == 12
        assert not np.allclose(one.scores.values[RI], two.scores.values[RI], equal_nan=True)

    def test_one_opening_serves_all_layers_and_a_second_run_finds_them(self, plan):
        heads = {"scorer": "attention_received", "drop": {"quantile": 0.2}}
        block = {"selectors": {"low": {**heads, "layers": [0]}, "high": {**heads, "layers": [1]}}}
        first = plan(block)
        assert first.provider.opened == 1
        np.testing.assert_array_equal(first.scores.logprobs, first.scores.values[KN])
        assert plan(block).provider.opened == 0

    def test_relevance_alone_runs_no_decoder(self, plan):
        made = plan({"reasoning_importance": False, "knowledge_novelty": False})
        assert made.provider.forwards == 0 and made.stats.documents == 0

    def test_damaged_relevance_table_is_made_again(self, plan, tmp_path, caplog):
        before = plan()
        (table,) = tmp_path.rglob("relevance-*.parquet")
        table.write_bytes(table.read_bytes()[:-20])
        after = plan()
        assert after.provider.opened == 1 and "computed again" in caplog.text
        np.testing.assert_array_equal(before.scores.values[TR], after.scores.values[TR])

    def test_relevance_table_of_another_reference_is_not_trusted(self, plan, tmp_path, caplog):
        first = plan()
        (table,) = tmp_path.rglob("relevance-*.parquet")
        other = Provider(tiny.model(seed=1))
        foreign = tmp_path / "v2" / other.fingerprint() / table.name
        foreign.parent.mkdir()
        foreign.write_bytes(table.read_bytes())
        second = plan(provider=other)
        assert "does not match" in caplog.text
        assert not np.allclose(first.scores.values[TR], second.scores.values[TR])


class TestTextRules:
    def test_special_tokens_are_protected_unless_turned_off(self, plan):
        drop_all = {
            "knowledge_novelty": {"drop": {"unknown_below": 0.99}},
            "reasoning_importance": False,
            "task_relevance": False,
            "min_kept": 0,
            "protect": {"formats": None},
        }
        eos = tiny.tokenizer().eos_token_id
        on, off = plan(drop_all), plan({**drop_all, "protect": {"special_tokens": False, "formats": None}})
        assert on.selection.keep[on.scores.token_ids == eos].all()
        assert not off.selection.keep.any()

    def test_patterns_protect_and_force(self, plan):
        block = {"force_drop": [r"Sure, happy to help!"], "protect": {"patterns": [r"The answer is \d+\."]}}
        made = plan({**block, "knowledge_novelty": {"drop": {"unknown_below": 0.99}}})
        fast = tiny.tokenizer()
        start, stop = made.scores.offsets[0], made.scores.offsets[1]
        kept = made.scores.token_ids[start:stop][made.selection.keep[start:stop]]
        text = fast.decode(kept)
        assert "The answer is" in text and "happy" not in text

    def test_special_ids_cover_added_special_tokens(self):
        fast = tiny.tokenizer()
        assert set(special_ids(fast)) == {fast.convert_tokens_to_ids(t) for t in fast.all_special_tokens}

    def test_runs_break_at_turns_and_documents(self):
        documents = collect(
            [
                {"input_ids": [1, 2, 3, 4, 5], "labels": [1, 2, -100, 4, 5]},
                {"input_ids": [6, 7], "labels": [6, 7]},
                {"input_ids": [8], "labels": [-100]},
            ]
        )
        assert documents.completion_runs.tolist() == [0, 2, 4, 6]

    def test_patterns_that_match_nothing_give_a_warning(self, plan):
        warnings = plan({"force_drop": ["no such text"]}).warnings
        assert any("force_drop" in w and "matches nothing" in w for w in warnings)


class TestControl:
    def test_random_control_matches_the_rate_of_every_document(self, plan):
        rules, control = plan(), plan({"control": "random"})
        ends = rules.scores.offsets
        for a, b in zip(ends[:-1], ends[1:], strict=True):
            assert rules.selection.keep[a:b].sum() == control.selection.keep[a:b].sum()
        assert not np.array_equal(plan({"control": "random", "seed": 1}).selection.keep, control.selection.keep)


def test_text_without_prompt_control_draws_only_tokens_that_train(plan):
    """Language modelling: position 0 carries a label that nothing predicts; a draw spent on it would not match."""
    data = [{"input_ids": r["input_ids"], "labels": r["input_ids"]} for r in rows()]
    rules, control = plan(data=data), plan({"control": "random"}, data=data)
    trains = rules.scores.positions > 0
    assert (~rules.selection.keep & trains).sum() == (~control.selection.keep & trains).sum()


def test_presets_differ_as_documented(plan):
    kept = {name: plan({"preset": name}).selection.keep.mean() for name in ("default", "paper", "official")}
    assert len(set(kept.values())) == 3
    official = plan({"preset": "official"})
    per_document = np.diff(official.scores.offsets)
    dropped = np.add.reduceat(~official.selection.keep, official.scores.offsets[:-1])
    assert (dropped <= 3 * np.floor(0.05 * per_document)).all(), "each attribute is capped at 5 % of a document"


def test_the_eager_definition_of_relevance_by_hand(plan):
    """Cosine distance to the occurrence-weighted mean of all tokens, min-max over distinct completion tokens."""
    made = plan()
    embedding = made.provider.reference.model.get_input_embeddings().weight.detach()
    ids = torch.as_tensor(made.documents.input_ids.astype(np.int64))
    domain = embedding[ids].mean(0)
    distinct = torch.as_tensor(np.unique(made.scores.token_ids).astype(np.int64))
    distance = 1 - torch.nn.functional.cosine_similarity(embedding[distinct], domain[None])
    expected = 1 - (distance - distance.min()) / (distance.max() - distance.min())
    table = dict(zip(distinct.tolist(), expected.tolist(), strict=True))
    np.testing.assert_allclose(made.scores.values[TR], [table[t] for t in made.scores.token_ids], atol=1e-5)


def test_expert_words_and_output_embeddings_change_relevance(plan):
    settings = [
        {},
        {"domain": ["apples", "books"]},
        {"embedding": "output"},
        {"embedding": "output", "domain": ["apples", "books"]},
    ]
    scores = [plan({TR: s}).scores.values[TR] for s in settings]
    for index, one in enumerate(scores):
        assert np.nanmin(one) == 0 and np.nanmax(one) == 1
        assert not any(np.allclose(one, other, atol=1e-3) for other in scores[:index])


def test_a_run_works_with_an_unwritable_cache(tmp_path, caplog):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    config = XTFConfig.parse({"cache_dir": str(blocked / "below")})
    made = make_plan(config, collect(rows()), Provider(), tiny.tokenizer(), progress=False)
    assert made.stats.documents == 12 and "XTF_CACHE" in caplog.text


def test_scores_made_with_other_settings_are_reported_once(plan, caplog):
    """The warning says what differs; a run that finds its own scores gives none."""

    class Elsewhere(Provider):
        def __init__(self, device):
            super().__init__()
            self.device = device

        def fingerprint(self):
            return digest({"device": self.device})

        def description(self):
            return {"name": f"/models/{self.device}/tiny", "device": self.device, "autocast": "no"}

    block = {"reasoning_importance": False}
    plan(block, provider=Elsewhere("cuda"))
    assert "this run scores anew" not in caplog.text
    plan(block, provider=Elsewhere("cpu"))
    found = [record.message for record in caplog.records if "this run scores anew" in record.message]
    assert len(found) == 1
    assert "made with device cuda; this run has device cpu, autocast no" in found[0]
    caplog.clear()
    plan(block, provider=Elsewhere("cpu"))
    plan(block, provider=Elsewhere("cuda"))
    assert "this run scores anew" not in caplog.text
