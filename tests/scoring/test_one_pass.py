"""The dataset's documents in one pass with splices that begin like them: the same scores, and prompts are read once."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests import real, tiny
from tests.made_scores import DEFAULT, KN, TR, read_prompts
from tests.test_plan import Provider, rows
from xtf_plugin.config.block import XTFConfig
from xtf_plugin.data.documents import collect
from xtf_plugin.errors import XTFError
from xtf_plugin.files import digest
from xtf_plugin.plan import make_plan
from xtf_plugin.scorers.explained import common_template
from xtf_plugin.scoring import branches, cached_scores
from xtf_plugin.scoring.batching import ScoringStats
from xtf_plugin.store.store import ScoreStore


def planned(folder, block=DEFAULT, data=None, model=None, provider=None):
    provider = provider or Provider(model)
    config = XTFConfig.parse({**block, "cache_dir": str(folder)})
    documents = collect(rows() if data is None else data)
    return make_plan(config, documents, provider, tiny.tokenizer(), progress=False), provider, documents


@pytest.fixture(autouse=True)
def prompts_are_read(monkeypatch):
    read_prompts(monkeypatch)


@pytest.fixture
def two_passes(monkeypatch):
    """A function after which documents and splices are read in passes of their own."""
    return lambda: monkeypatch.setattr(cached_scores, "AGAIN", np.inf)


def demo(number=24, longest=300):
    """Rows of the demo's data."""
    fast, made = tiny.tokenizer(), []
    for line in real.PAIRS.read_text(encoding="utf-8").splitlines()[:number]:
        pair = json.loads(line)
        prompt = fast(pair["prompt"])["input_ids"]
        ids = prompt + fast(pair["completion"])["input_ids"][:longest] + [fast.eos_token_id]
        made.append({"input_ids": ids, "labels": [-100] * len(prompt) + ids[len(prompt) :]})
    return made


def turns():
    """Rows of two turns."""
    fast, made = tiny.tokenizer(), []
    for row in tiny.conversations(8):
        given = fast.apply_chat_template(row["messages"], return_dict=True, return_assistant_tokens_mask=True)
        labels = np.where(given["assistant_masks"], given["input_ids"], -100).tolist()
        made.append({"input_ids": list(given["input_ids"]), "labels": labels})
    return made


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen2"])
@pytest.mark.parametrize("data", [rows, turns, demo])
def test_scores_and_masks_are_those_of_two_passes(family, data, tmp_path, two_passes):
    one, provider, _ = planned(tmp_path / "one", data=data(), model=tiny.model(family, max_position_embeddings=1024))
    two_passes()
    two, other, _ = planned(tmp_path / "two", data=data(), model=tiny.model(family, max_position_embeddings=1024))
    assert provider.reference.branches is other.reference.branches is True
    np.testing.assert_allclose(one.scores.logprobs, two.scores.logprobs, atol=2e-5)
    np.testing.assert_allclose(one.scores.values[TR], two.scores.values[TR], atol=2e-5)
    assert np.array_equal(one.selection.keep, two.selection.keep) and not one.selection.keep.all()
    assert (
        one.stats.tokens == two.stats.tokens and one.scorers["excerpts"]["tokens"] < two.scorers["excerpts"]["tokens"]
    )


def test_prompts_are_read_once(tmp_path):
    """What goes through the decoder is the dataset and, of each sentence, its first tokens twice."""
    provider, read = Provider(), []
    provider.reference.branches = True  # so that no documents are tried
    provider.reference.decoder.register_forward_pre_hook(
        lambda _, given, named: read.append(named["input_ids"].numel() if named["use_cache"] else 0), with_kwargs=True
    )
    block = {"preset": "none", TR: {"scorer": "explained", "drop": {"below": -1e9}}, "batch_tokens": 100_000}
    block["protect"] = {"formats": None, "special_tokens": False}
    made, _, documents = planned(tmp_path, block, provider=provider)
    excerpts, own = made.scorers["excerpts"], documents.input_ids[documents.completion]
    units = np.split(own, made.text.segments["sentence"][1:])
    firsts = set(made.scores.offsets[:-1].tolist())
    behind = [unit for at, unit in zip(made.text.segments["sentence"], units, strict=True) if at not in firsts]
    behind_tokens = sum(min(len(unit), 16) for unit in behind)
    alone_tokens = sum(map(len, {tuple(unit[:16]) for unit in units}))
    template = common_template(documents, tiny.tokenizer())
    assert made.stats.tokens == documents.lengths.sum() and made.stats.documents == len(documents)
    assert excerpts["tokens"] == behind_tokens + alone_tokens + len(template) and 0 < len(behind) < len(units)
    assert sum(read) == made.stats.padded_tokens + excerpts["padded_tokens"]


def test_scores_are_stored_under_the_documents_keys(tmp_path):
    first, _, _ = planned(tmp_path)
    novelty = {"preset": "none", KN: {"drop": {"quantile": 0.1}}}
    second, provider, documents = planned(tmp_path, novelty)
    assert provider.opened == 0 and second.stats.stored_documents == len(documents)
    assert np.array_equal(first.scores.logprobs, second.scores.logprobs, equal_nan=True)


def test_only_missing_documents_are_scored(tmp_path):
    planned(tmp_path, data=rows(8))
    made, _, documents = planned(tmp_path, data=rows(8) + rows(5, seed=8))
    assert (made.stats.documents, made.stats.stored_documents) == (5, 8)
    assert made.stats.tokens == documents.lengths[8:].sum()
    again, provider, _ = planned(tmp_path, data=rows(8) + rows(5, seed=8))
    assert provider.opened == 0 and (again.stats.documents, again.scorers["excerpts"]["documents"]) == (0, 0)
    assert np.array_equal(made.selection.keep, again.selection.keep)


def test_a_run_that_was_killed_in_the_pass_resumes_with_the_same_bits(tmp_path, monkeypatch):
    block = {**DEFAULT, "batch_tokens": 300}
    whole, _, _ = planned(tmp_path / "whole", block, data=rows(20))
    add, calls = ScoreStore.add, []

    def killed(self, records):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        add(self, records)

    monkeypatch.setattr(ScoreStore, "add", killed)
    with pytest.raises(KeyboardInterrupt):
        planned(tmp_path / "killed", block, data=rows(20))
    monkeypatch.setattr(ScoreStore, "add", add)
    resumed, _, _ = planned(tmp_path / "killed", block, data=rows(20))
    assert 0 < resumed.stats.stored_documents < 20
    assert np.array_equal(whole.scores.logprobs, resumed.scores.logprobs, equal_nan=True)
    for name, values in whole.scores.values.items():
        assert np.array_equal(values, resumed.scores.values[name], equal_nan=True), name


def test_a_reference_that_cannot_share_reads_plainly_and_the_run_says_what_it_costs(tmp_path, monkeypatch):
    shared, _, _ = planned(tmp_path / "shared")

    def broken(*_):
        raise XTFError("no cache.")

    monkeypatch.setattr(branches, "_read", broken)
    plain, provider, _ = planned(tmp_path / "plain")
    assert provider.reference.branches is False
    np.testing.assert_allclose(plain.scores.logprobs, shared.scores.logprobs, atol=2e-5)
    assert np.array_equal(plain.selection.keep, shared.selection.keep)
    (warning,) = [text for text in plain.warnings if text.startswith("no cache: so what")]
    assert "times the tokens" in warning and not any("times the tokens" in text for text in shared.warnings)


def start(row, tokens):
    """A row with no more than so many tokens of its prompt."""
    first = row["labels"].count(-100) - tokens
    return {name: values[first:] for name, values in row.items()}


@pytest.mark.parametrize(
    ("data", "selectors", "first"),
    [
        (rows(6), {}, "both"),
        ([start(row, 2) for row in rows(6)], {}, "splices"),  # prompts are too few tokens to be worth it
        (rows(6), {"received": {"scorer": "attention_received", "drop": {"below": 0.0}}}, "dataset"),  # recorded first
    ],
)
def test_one_pass_serves_both_where_that_saves_tokens(data, selectors, first, tmp_path, monkeypatch):
    seen, score = [], cached_scores.score

    def spied(documents, *given, **named):
        seen.append({key.tobytes() for key in documents.keys})
        return score(documents, *given, **named)

    monkeypatch.setattr(cached_scores, "score", spied)
    _, _, documents = planned(tmp_path, {**DEFAULT, "selectors": selectors}, data=data)
    own = {key.tobytes() for key in documents.keys}
    found = "dataset" if seen[0] == own else "both" if seen[0] > own else "splices"
    assert found == first and (seen[0] & own == set() or first != "splices")


def test_the_statistics_of_a_pass_are_divided_by_tokens():
    whole = ScoringStats(10, 100, 120, 3, 1, 2.0, 4)
    part = whole.part(4, 25, 3)
    assert part == ScoringStats(4, 25, 30, 3, 1, 0.5, 3) and whole == ScoringStats(6, 75, 90, 0, 0, 1.5, 1)
    whole = ScoringStats(3, 30, 40, 2, 1, 1.0, 5)
    assert whole.part(0, 0, 5) == ScoringStats(stored_documents=5) and whole == ScoringStats(3, 30, 40, 2, 1, 1.0, 0)


def test_scores_made_with_other_settings_are_reported(tmp_path, caplog):
    for dtype in ("float32", "bfloat16"):
        assert "this run scores anew" not in caplog.text
        provider = Provider()
        provider.fingerprint = lambda dtype=dtype: digest({"dtype": dtype})
        provider.description = lambda dtype=dtype: {"name": "tiny", "dtype": dtype}
        planned(tmp_path, provider=provider)
    assert caplog.text.count("this run scores anew") == 1
