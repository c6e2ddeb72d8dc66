"""The laboratory: what it calls noise is noise, what it calls good is the plain solution, its statistics are right."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from tests.benchmarks.proof import arms, data, noise, stats, worlds
from tests.benchmarks.proof.detect import outcome
from tests.benchmarks.proof.models import answers


@pytest.fixture(scope="module")
def encoder():
    return data.Encoder(data.train_tokenizer())


@pytest.mark.parametrize("world", worlds.WORLDS)
class TestWorlds:
    def test_solutions_are_true_and_end_with_the_answer(self, world):
        rng = random.Random(0)
        for _ in range(200):
            problem = worlds.WORLDS[world](rng)
            text = "".join(word for pieces in problem.lines for word, _ in pieces)
            for left, right in (part.split("=")[:2] for part in text.split("\n") if part.count("=") == 1):
                terms = left.split()[-3:]
                assert eval(" ".join(terms)) == int(right.split()[0].rstrip(".")), text  # noqa: S307
            assert text.endswith("Answer: " + problem.answer)

    def test_what_is_not_noise_is_the_solution(self, world, encoder):
        """Without its planted tokens a noisy row is the clean row, but for the words that noise has replaced."""
        clean = data.make_rows(world, 40, 0.0, 3, encoder)
        noisy = data.make_rows(world, 40, 0.3, 3, encoder, kinds=("filler", "off_topic", "junk", "copied"))
        for one, other in zip(clean, noisy, strict=True):
            assert one.prompt == other.prompt and one.answer == other.answer
            kept = [t for t, kind in zip(other.completion, other.kinds, strict=True) if not noise.is_noise(kind)]
            assert kept == one.completion

    @pytest.mark.parametrize("rate", [0.1, 0.25, 0.4])
    def test_the_rate_is_met(self, world, rate, encoder):
        rng, marked, total = random.Random(1), 0, 0
        for _ in range(400):
            bad, every = noise.count(noise.plant(worlds.WORLDS[world](rng), rate, rng))
            marked, total = marked + bad, total + every
        assert abs(marked / total - rate) < 0.03

    def test_every_kind_form_and_shape_occurs(self, world, encoder):
        kinds = set(data.flat_kinds(data.make_rows(world, 400, 0.4, 5, encoder)).tolist())
        wanted = {f"{k}/{f}/{s}" for k in noise.KINDS for f in noise.FORMS for s in ("span", "single")}
        assert wanted <= kinds and set(worlds.GOOD_KINDS) <= kinds

    def test_held_out_problems_are_none_of_the_rows(self, world, encoder):
        rows = data.make_rows(world, 300, 0.0, 0, encoder)
        problems = data.make_problems(world, 100, 0, rows, encoder)
        prompts = {tuple(row.prompt) for row in rows}
        assert len(problems) == 100 and not any(tuple(encoder.prompt(p)) in prompts for p in problems)

    def test_same_seed_same_rows(self, world, encoder):
        assert data.make_rows(world, 20, 0.25, 1, encoder) == data.make_rows(world, 20, 0.25, 1, encoder)
        assert data.make_rows(world, 20, 0.25, 1, encoder) != data.make_rows(world, 20, 0.25, 2, encoder)


def test_answers_are_read_behind_the_first_mark(encoder):
    texts = ["First 2.\nAnswer: 14", "Answer: 3\nAnswer: 4", "no answer"]
    assert answers([encoder.text(text) for text in texts], encoder.tokenizer) == ["14", "3", ""]


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


class TestArms:
    def test_random_spans_keep_number_and_lengths_in_every_document(self, encoder):
        rows = data.make_rows("sums", 30, 0.3, 0, encoder)
        keep = arms.oracle(rows)
        drawn = arms.random_spans(keep, rows, 0)
        assert not np.array_equal(keep, drawn)
        at = 0
        for row in rows:
            part = slice(at, at + len(row.completion))
            assert (~drawn[part]).sum() == (~keep[part]).sum()
            at += len(row.completion)

    def test_every_block_is_legal(self):
        from xtf_plugin import XTFConfig

        for arm in arms.ARMS.values():
            if arm.block is not None:
                XTFConfig.parse(arms.with_reference(arm, "some/model").block if arm.reference else arm.block)

    def test_outcome_counts(self):
        kinds = np.asarray(["step", "answer", "junk/varying/span", "wrong/varying/single", "step"])
        found = outcome(
            np.asarray([True, False, True, False, False]), np.asarray([False, False, True, True, False]), kinds
        )
        assert (found["spans"], found["singles"], found["precision"]) == (1.0, 0.0, 0.5)
        assert found["good_lost"] == 1 / 3 and found["lost"]["step"] == 0.5
