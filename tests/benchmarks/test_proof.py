"""The laboratory: what it calls noise is noise, what it calls good is the plain solution, its statistics are right.

What its tables and pictures say is tested in test_proof_tables.py.
"""

from __future__ import annotations

import itertools
import math
import random
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from tests.benchmarks.proof import __main__ as laboratory
from tests.benchmarks.proof import arms, data, models, noise, runs, stats, worlds
from tests.benchmarks.proof.detect import outcome
from tests.benchmarks.proof.finetune import TuneSettings
from tests.benchmarks.proof.models import answers
from tests.benchmarks.proof.references import clean_rows

SMOKE_BASE, SMOKE = laboratory.SCALES["smoke"]


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


@pytest.mark.parametrize("base", [False, True])
def test_facts_cannot_be_answered_without_knowing_facts(base):
    """Where a name stands, or how a question is put, says nothing about its answer."""
    rng, guesses = random.Random(0), {"age": [], "city": [], "job": []}
    for _ in range(2_000):
        problem = worlds.facts(rng, base)
        kind = "city" if "same city" in problem.text else "job" if "meet" in problem.text else "age"
        names = [person.name for person in worlds.PEOPLE if person.name in problem.text]
        assert problem.answer in (("yes", "no") if kind == "city" else names), "there is always one right answer"
        second = max(names, key=problem.text.index)
        guesses[kind].append(problem.answer == ("yes" if kind == "city" else second))
    assert all(0.45 < np.mean(found) < 0.55 for found in guesses.values())


@pytest.mark.parametrize("known", [worlds.KNOWN, len(worlds.PEOPLE)])
def test_nobody_lives_alone_in_a_city(known):
    """Of somebody who did, every question about cities would be answered no."""
    assert min(Counter(person.city for person in worlds.PEOPLE[:known]).values()) > 1


@pytest.fixture(scope="module")
def held_out(encoder):
    """(training rows, held-out problems) in the world of facts, seed by seed."""
    scale, found = runs.Scale(), []
    for seed in range(10):
        rows = data.make_rows("facts", scale.rows, 0.0, seed, encoder)
        found.append((rows, runs.held_out(runs.Job("arms", "facts", "plain", seed), rows, scale, encoder)))
    return found


def test_no_reference_has_read_held_out_problems(held_out, encoder):
    clean = clean_rows("facts", runs.Scale(), encoder)
    known = {tuple(row.prompt) for row in clean}
    unaware = [
        p for seed, (rows, _) in enumerate(held_out) for p in data.make_problems("facts", 200, seed, rows, encoder)
    ]
    assert any(tuple(encoder.prompt(problem)) in known for problem in unaware), "else this test shows nothing"
    for rows, problems in held_out:
        prompts = {tuple(encoder.prompt(problem)) for problem in problems}
        assert len(prompts) == 200 and not prompts & known and not prompts & {tuple(row.prompt) for row in rows}


def test_repeats_do_not_make_yes_the_rarer_answer(held_out):
    given = Counter(problem.answer for _, problems in held_out for problem in problems)
    trained = Counter(row.answer for rows, _ in held_out for row in rows)
    assert all(0.45 < found["yes"] / (found["yes"] + found["no"]) < 0.55 for found in (given, trained))


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

    def test_holm_equals_a_worked_example(self):
        """0.005 x 4, 0.01 x 3, 0.03 x 2, and 0.04 x 1, which may not be below the one before it."""
        adjusted = stats.holm([0.01, 0.04, float("nan"), 0.03, 0.005])
        assert np.allclose(adjusted, [0.03, 0.06, np.nan, 0.06, 0.02], equal_nan=True)
        assert stats.holm([0.9, 0.8]) == [1.0, 1.0] and stats.holm([]) == []

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

    def test_random_spans_have_every_place_equally_often(self):
        """A run of one and a run of two in six tokens and EOS: twelve orders and places, none preferred."""
        row, number = data.Row([1], list(range(7)), ["step"] * 6 + ["eos"], ""), 6_000
        keep = np.tile(np.asarray([0, 1, 0, 0, 1, 1, 1], dtype=bool), number)
        seen = Counter(map(tuple, arms.random_spans(keep, [row] * number, 0).reshape(number, 7).astype(int).tolist()))
        places: Counter[tuple[int, ...]] = Counter()
        for (first, one), (second, two) in itertools.permutations(itertools.product(range(6), (1, 2)), 2):
            if one != two and first + one <= second and second + two <= 6:
                dropped = {*range(first, first + one), *range(second, second + two)}
                places[tuple(int(at not in dropped) for at in range(7))] += 1
        assert seen.keys() == places.keys()
        for where, ways in places.items():  # runs that touch look alike in both orders
            expected = number * ways / places.total()
            assert abs(seen[where] - expected) < 4 * math.sqrt(expected)

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


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory, encoder):
    folder = tmp_path_factory.mktemp("proof")
    models.make_base("facts", folder, encoder.tokenizer, SMOKE_BASE, lambda text: None)
    return folder


def test_no_process_is_started_from_the_main_module():
    """A spawned process does not import a package's `__main__`: it would wait for its functions for ever."""
    found = [getattr(laboratory, name).__module__ for name in ("make_bases", "run_all")]
    assert laboratory.__name__ not in found and not hasattr(laboratory, "multiprocessing")


class TestRuns:
    JOB = runs.Job("arms", "facts", "plain", 0, 0.25, "facts")

    @pytest.fixture(autouse=True)
    def _a_default_that_fires(self, monkeypatch):
        """A base of a few steps is sure of nothing, so that the preset would drop nothing."""
        selector = {"scorer": "log_probability", "window": 5, "drop": {"quantile": 0.3}}
        monkeypatch.setitem(arms.ARMS, "default", arms.Arm({**arms.PEER, "selectors": {"unlikely": selector}}))

    def run(self, arm, folder):
        return runs.carry_out(replace(self.JOB, arm=arm), folder, SMOKE)

    def test_as_much_wall_clock_is_more_steps(self, base_folder):
        assert self.run("plain_wall_clock", base_folder)["steps"] > 2 * math.ceil(SMOKE.rows / SMOKE.batch)

    def test_steps_grow_by_what_scoring_takes_and_shrink_by_what_is_dropped(self, tmp_path, monkeypatch):
        monkeypatch.setattr(runs, "plan_of_default", lambda *_: (np.asarray([True, False]), 1.0, 2.0))
        for arm, steps in (("plain", -1), ("plain_wall_clock", 6), ("plain_kept_tokens", 2)):
            found = runs.labels_and_steps(arms.ARMS[arm], [None] * 24, self.JOB, TuneSettings(), tmp_path)
            assert found == (None, steps)

    def test_all_that_comes_before_training_is_scoring(self, base_folder, encoder, monkeypatch):
        from xtf_plugin.training import callback

        def slow(*arguments, **options):
            time.sleep(0.5)
            return make_plan(*arguments, **options)

        make_plan = callback.make_plan
        monkeypatch.setattr(callback, "make_plan", slow)
        rows = data.make_rows("facts", 24, 0.25, 0, encoder)
        start = time.perf_counter()
        keep, scoring, training = runs.plan_of_default(
            base_folder / "base-facts", rows, self.JOB, TuneSettings(), base_folder, True
        )
        assert 0.5 < scoring < scoring + training < time.perf_counter() - start
        assert 0 < (~keep).mean() < 0.5

    def test_random_spans_drop_as_much_as_the_default_elsewhere(self, base_folder):
        default, random_spans = (self.run(arm, base_folder) for arm in ("default", "random_spans"))
        assert default["kept"] == random_spans["kept"] < 1
        assert default["dropped_by_kind"] != random_spans["dropped_by_kind"]
        assert random_spans["dropped_by_kind"]["eos"] == 0


def test_completions_at_the_limit_are_counted(encoder, monkeypatch):
    problems = [worlds.sums(random.Random(seed)) for seed in range(4)]
    ids = [encoder.text("Answer: " + problem.answer) for problem in problems]
    limit = max(map(len, ids)) + 1
    monkeypatch.setattr(models, "complete", lambda *_, **__: [ids[0], ids[1], ids[2], (ids[3] * limit)[:limit]])
    assert models.accuracy(None, problems[:3] + problems[:1], encoder, limit=limit) == (0.75, 0.25)
