"""The laboratory's texts, noise and statistics: what is called noise is noise, and what is called good is the text."""

from __future__ import annotations

import json
import math
import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests import real
from tests.benchmarks import stats
from tests.benchmarks.proof import detect, noise, pictures, tables, texts
from tests.benchmarks.proof.__main__ import record
from tests.benchmarks.proof.detect import RULES, Setting, dropped, tokenized
from tests.benchmarks.proof.texts import GOOD, Example
from xtf_plugin.scoring.batching import ScoringStats


def clean(number: int = 40) -> list[Example]:
    """The demo's pairs, which are part of the project."""
    return texts.chat(texts.ROOT)[:number]


class TestNoise:
    @pytest.mark.parametrize("phrases", ["known", "new"])
    def test_what_is_not_noise_is_the_completion(self, phrases):
        rng, kinds = random.Random(1), set()
        for example in clean():
            made = noise.plant(example, clean(), 0.25, rng, phrases=phrases)
            kept = "".join(text for text, kind in made.pieces if kind == GOOD)
            assert kept.split() == example.completion.split()
            kinds |= {kind for _, kind in made.pieces}
        assert kinds == {GOOD, *noise.SPANS}

    @pytest.mark.parametrize("rate", [0.1, 0.25, 0.4])
    def test_the_rate_is_met(self, rate):
        rng = random.Random(2)
        made = [noise.plant(example, clean(), rate, rng) for _ in range(8) for example in clean()]
        sizes = {good: sum(len(t) for e in made for t, k in e.pieces if (k == GOOD) is good) for good in (True, False)}
        assert abs(sizes[False] / sum(sizes.values()) - rate) < 0.05

    def test_no_noise_at_rate_zero(self):
        assert all(noise.plant(one, clean(), 0.0, random.Random(3)).completion == one.completion for one in clean())

    def test_the_two_lists_of_phrases_share_nothing(self):
        known = {text for pool in noise._known().values() for text in pool}
        assert not known & {text for pool in noise.NEW.values() for text in pool} and len(known) > 40

    def test_single_tokens_are_spoilt_where_it_says_so(self):
        rng, example = (
            random.Random(4),
            Example("p", (("The 3 buses carry 120 passengers between Granada and home.", GOOD),)),
        )
        made = [noise.spoil(example, 0.5, rng) for _ in range(40)]
        words = example.completion.split()
        for one in made:
            for before, (after, kind) in zip(words, one.pieces, strict=True):
                assert (after.strip() != before) is (kind != GOOD)
        assert {kind for one in made for _, kind in one.pieces} == {GOOD, *noise.TOKENS}


@real.needs(real.SMOLLM2)
def test_every_token_has_the_kind_of_its_text():
    tokenizer = real.tokenizer(real.SMOLLM2)
    made = [noise.plant(example, clean(), 0.25, random.Random(5)) for example in clean(12)]
    documents, kinds = tokenized(made, tokenizer)
    ids = documents.input_ids[documents.completion]
    for index, example in enumerate(made):
        own = slice(*documents.completion_offsets[index : index + 2])
        text = tokenizer.decode(ids[own][kinds[own] != GOOD])
        planted = "".join(piece for piece, kind in example.pieces if kind != GOOD)
        assert abs(len(text.split()) - len(planted.split())) <= 2 * sum(kind != GOOD for _, kind in example.pieces)


def test_shares_are_by_kind():
    kinds = np.asarray([GOOD, GOOD, "typo", "digression"], dtype=object)
    found = dropped(np.asarray([True, False, True, False]), kinds)
    assert found == {GOOD: 0.5, "typo": 1.0, "digression": 0.0, "found": 0.5}


def test_the_cost_counts_all_tokens_that_were_read():
    """One pass may read documents and splices together, so the seconds of a plain pass are measured apart."""
    excerpts = {"tokens": 60, "seconds": 1.5}
    made = SimpleNamespace(stats=ScoringStats(tokens=90, seconds=2.5), scorers={"excerpts": excerpts})
    documents = SimpleNamespace(lengths=np.asarray([40, 60]))
    assert detect._cost(made, documents, 2.0) == {"tokens": 1.5, "seconds": 2.0}


@real.needs(real.SMOLLM2)
def test_running_text_is_measured_and_tabled(tmp_path):
    made = detect.measure_form(detect.Form("chat", 4), tmp_path, tmp_path)
    assert 0 < made["rules"]["running_text"]["good"] < 1  # lists and tables of clean answers
    cells = [cell.strip() for cell in tables.everything([{**made, "made": "here"}]).splitlines()[-1].split("|")[1:-1]]
    assert cells == ["chat", "0%", "–", f"{made['rules']['running_text']['good']:.1%}", "–", "–"]
    assert "running text, chat" in tables.line(made)


def test_pages_are_halved(tmp_path):
    (tmp_path / "noise").mkdir()
    rows = [{"title": str(at), "lines": ["one", "two"], "article": [True, False]} for at in range(5)]
    (tmp_path / "noise/web_pages.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    halves = [[one.prompt for one in texts.sample(name, tmp_path, 9, 0)[0]] for name in texts.HALVES]
    assert [sorted(half) for half in halves] == [[f"Title: {at}\n\n" for at in part] for part in ((0, 2, 4), (1, 3))]


def test_settings_have_keys_of_their_own():
    one = Setting("m", "chat", 0.25, 3)
    assert (
        one.key != Setting("m", "chat", 0.25, 3, phrases="new").key and " " not in Setting("m", "web pages", 0, 3).key
    )
    assert tables.everything([]) == "not measured yet\n"


class TestStats:
    def test_auc_is_the_share_of_ordered_pairs(self):
        rng = np.random.default_rng(0)
        scores, marks = rng.integers(0, 6, 60).astype(float), rng.random(60) < 0.4
        pairs = [(a < b) + 0.5 * (a == b) for a in scores[marks] for b in scores[~marks]]
        assert math.isclose(stats.auc(scores, marks), np.mean(pairs))
        assert stats.auc([1.0, np.nan], [False, True]) == 0.0  # undefined is never dropped

    @pytest.mark.parametrize(("df", "value"), [(1, 12.706), (4, 2.776), (9, 2.262), (30, 2.042)])
    def test_students_t_equals_the_textbooks(self, df, value):
        assert abs(stats.t_quantile(df) - value) < 2e-3
        assert abs(stats.t_tail(value, df) - 0.05) < 1e-4

    def test_paired_test_uses_the_pairs(self):
        one, other = [0.5, 0.6, 0.7, 0.8], [0.4, 0.51, 0.6, 0.69]
        mean, half, p = stats.paired(one, other)
        assert math.isclose(mean, 0.1) and half < 0.02 and p < 0.01
        assert stats.paired(one, other[::-1])[2] > 0.1


def trained(arm: str, seed: int, change: float) -> dict[str, Any]:
    losses = [0.9 + change + 0.01 * ((seed + place) % 5) for place in range(20)]
    more = {"loss": sum(losses) / 20, "loss_digits": 0.4, "loss_answers": 0.01, "loss_noise": 2.0, "emitted": 0.1}
    return {
        "arm": arm,
        "seed": seed,
        "rate": 0.25,
        "losses": losses,
        "dropped_noise": 0.9,
        "dropped_good": 0.01,
        **more,
    }


def test_training_arms_are_held_against_plain_the_oracle_and_the_random_control():
    changes = {"plain": 0.0, "oracle": -0.02, "default": -0.015, "random": 0.001}
    found = tables.training_table([trained(arm, seed, by) for arm, by in changes.items() for seed in range(3)])
    rows = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")] for line in found.splitlines()[2:]}
    assert rows["default"][3].startswith("0.9050 (-0.0150") and rows["default"][4] == "75%"
    assert rows["plain"][4] == "–" and rows["random"][5] == "–"
    assert rows["random"][4] == "-5%" and rows["oracle"][4] == "100%"


def test_a_record_has_no_text_of_public_files():
    line = record({"auc": {"all": 0.123456789}, "longest": [{"text": "of somebody else"}]})
    assert json.loads(line) == {"auc": {"all": 0.12346}}


def test_pictures_are_drawn_from_results(tmp_path, monkeypatch):
    shares = {"good": 0.01, "found": 0.9}
    found = {"rate": 0.25, "shape": "spans", "phrases": "known", "precision": "bf16", "model": "m"}
    found |= {"rules": {name: shares for name in RULES}, "auc": {"task_relevance": {"all": 0.9}}}
    runs = [trained("plain", 0, 0), trained("default", 0, -0.1), trained("default", 1, 0)]
    drawn = []

    def training(figure, results):
        drawn.append(results)
        pictures_training(figure, results)

    pictures_training = pictures.training
    monkeypatch.setattr(pictures, "training", training)
    pictures.draw([found], [*runs, {**trained("plain", 0, 9), "in_format": 0.5}], tmp_path)
    assert drawn == [runs], "losses of another task are not comparable"
    names = ("evidence-rules", "evidence-scores", "evidence-training")
    texts = [(tmp_path / f"{name}.svg").read_text() for name in names]
    assert len(texts) == 3 and all(text.lstrip().startswith("<?xml") for text in texts)
