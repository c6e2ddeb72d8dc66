"""From fired rules to keep flags and reasons: combine, force, protection, control, floor; independence of order."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from tests.made_scores import ALL_OFF, ALL_ON, KN, RI, TR, scores_of, taken, with_scores
from xtf_plugin.config.block import XTFConfig
from xtf_plugin.data import ragged
from xtf_plugin.errors import XTFError
from xtf_plugin.selection.select import BITS, CONTROL, FLOOR, FORCED, PROTECTED, reason_text, select

NAN = float("nan")
REASONING, NOVELTY, RELEVANCE = (BITS[name] for name in (RI, KN, TR))
RULES = {RI: {"drop": {"below": 0.5}}, KN: {"drop": {"known_above": 0.95}}, TR: {"drop": {"below": 0.5}}}
VOTES = {0: 0, REASONING: 1, NOVELTY: 1, RELEVANCE: 1, REASONING | NOVELTY: 2, REASONING | NOVELTY | RELEVANCE: 3}


def config(**block):
    return XTFConfig.parse({"preset": "paper", **RULES, **block})


def from_bits(*bits, first=1):
    """One document whose tokens fire the rules named by their bits; log-probabilities fall with the index."""
    array = np.asarray(bits)
    novelty = np.where(array & NOVELTY, -0.001, -1.0 - np.arange(len(array)) / 10)
    return scores_of(
        [len(array)],
        first,
        keys=np.arange(16, dtype=np.uint8)[None],
        reasoning_importance=np.where(array & REASONING, 0.1, 1.0),
        logprobs=novelty,
        task_relevance=np.where(array & RELEVANCE, 0.1, 0.9),
    )


def random_scores(lengths, seed=0, counts=None):
    rng = np.random.default_rng(seed)
    size = int(np.sum(lengths))
    relevance = rng.random(50).astype(np.float32)
    token_ids = rng.integers(0, 50, size).astype(np.int32)
    first = np.repeat(rng.integers(0, 3, len(lengths)), lengths)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    logprobs = -rng.exponential(size=size).astype(np.float32)
    logprobs[rng.random(size) < 0.05] = NAN
    return scores_of(
        lengths,
        keys=rng.integers(0, 256, (len(lengths), 16)).astype(np.uint8),
        counts=None if counts is None else np.asarray(counts, dtype=np.int64),
        token_ids=token_ids,
        positions=(np.arange(size) - np.repeat(starts[:-1], lengths) + first).astype(np.int32),
        reasoning_importance=rng.lognormal(size=size),
        logprobs=logprobs,
        task_relevance=relevance[token_ids],
    )


@pytest.mark.parametrize(
    ("combine", "needed"),
    [("union", 1), ("intersection", 3), ("majority", 2), ({"at_least": 1}, 1), ({"at_least": 2}, 2)],
)
def test_combine_counts_the_scores_whose_rules_fired(combine, needed):
    bits = list(VOTES)
    chosen = select(from_bits(*bits), config(combine=combine, min_kept=0))
    assert chosen.keep.tolist() == [VOTES[b] < needed for b in bits]
    assert chosen.reasons.tolist() == bits, "a rule that fired is named even where the token is kept"
    assert chosen.fired == {"reasoning_importance": 3, "knowledge_novelty": 3, "task_relevance": 2}


def test_combine_knows_only_scores_that_are_on():
    block = {"task_relevance": False, "combine": "intersection", "min_kept": 0}
    chosen = select(from_bits(0, REASONING, REASONING | NOVELTY, REASONING | RELEVANCE), config(**block))
    assert chosen.keep.tolist() == [True, True, False, True]
    assert "task_relevance" not in chosen.thresholds
    majority = select(from_bits(0, REASONING, REASONING | NOVELTY), config(**{**block, "combine": "majority"}))
    assert majority.keep.tolist() == [True, True, False], "more than half of two is two"


def test_force_and_protection():
    scores = from_bits(0, REASONING, 0, REASONING, 0)
    protected = np.asarray([False, False, True, True, True])
    forced = np.asarray([True, True, True, False, False])
    chosen = select(scores, config(min_kept=0), protected, forced)
    assert chosen.keep.tolist() == [False, False, True, True, True]
    assert chosen.reasons.tolist() == [FORCED, REASONING, PROTECTED, REASONING | PROTECTED, 0]


@pytest.mark.parametrize("name", [RI, KN, TR, "first"])
def test_floor_keeps_what_the_first_score_rates_highest(name):
    """Whatever the score is called: a slot with a scorer that finds noise must not rescue the worst noise."""
    part = {"scorer": "typicality", "drop": {"below": 9}}
    scores = with_scores(from_bits(*[0] * 5), **{name: [2, 7, NAN, 5, 7], "second": [1, 0, 9, 0, 0]})
    scores = replace(scores, logprobs=np.float32([-1, -3, -1, -2, -2]))
    block = {name: part} if name in ALL_ON else {"selectors": {name: part, "second": part}}
    for min_kept, kept in [(1, []), (2, [4]), (3, [1, 4]), (4, [1, 3, 4]), (5, [0, 1, 3, 4]), (9, [0, 1, 3, 4])]:
        chosen = select(scores, XTFConfig.parse({"preset": "none", **block, "min_kept": min_kept}))
        assert np.flatnonzero(chosen.reasons & FLOOR).tolist() == kept and chosen.best.tolist() == [4]
        assert np.flatnonzero(chosen.keep).tolist() == sorted([2, *kept]), "an undefined score drops nothing"


def test_the_floor_ranks_by_selectors_before_slots():
    scores = with_scores(from_bits(*[REASONING] * 3), low=[1, 3, 2])
    block = config(selectors={"low": {"scorer": "log_probability", "drop": {"below": 9}}}, min_kept=1)
    assert select(scores, block).keep.tolist() == [False, True, False]


def test_floor_counts_trainable_tokens_only():
    scores = from_bits(0, REASONING, REASONING, first=0)
    chosen = select(scores, config(min_kept=1))
    assert chosen.keep.tolist() == [True, True, False], "the kept token at position 0 is never trained on"
    protected = select(scores, config(min_kept=1), np.asarray([False, False, True]))
    assert protected.keep.tolist() == [True, False, True], "a protected token fills the floor"


def test_floor_and_best_without_logprobs():
    scores = with_scores(from_bits(*[REASONING] * 4), logprobs=None, task_relevance=[0.9, 0.8, NAN, 0.9])
    scores.positions[0] = 0
    relevance = {"drop": {"below": 1.0}}
    block = config(reasoning_importance=False, knowledge_novelty=False, task_relevance=relevance, min_kept=1)
    assert select(scores, block).best.tolist() == [3]
    block = config(knowledge_novelty=False, task_relevance=False, min_kept=2)  # all of one reasoning importance
    chosen = select(with_scores(scores, task_relevance=None), block)
    assert np.flatnonzero(chosen.keep).tolist() == [1, 2] and chosen.best.tolist() == [1]


@pytest.mark.parametrize("name", [RI, KN, TR])
def test_best_is_the_trainable_token_that_the_first_score_rates_highest(name):
    scores = random_scores([5, 0, 1, 9, 12], seed=3)
    scores.positions[5] = 0  # the only token of document 2
    chosen = select(scores, config(**{**ALL_OFF, name: True}))
    expected = []
    for low, high in zip(scores.offsets[:-1], scores.offsets[1:], strict=True):
        rank = [(-chosen.seen[name][i], -scores.logprobs[i], i - low) for i in range(low, high) if scores.positions[i]]
        rank = [(s, math.inf if math.isnan(p) else p, i) for s, p, i in rank if not math.isnan(s)]
        expected.append(min(rank)[2] if rank else -1)
    assert chosen.best.tolist() == expected
    assert -1 in expected


@pytest.mark.parametrize("seed", [0, 1])
def test_control_drops_as_many_as_the_rules_would(seed):
    scores = random_scores([40, 0, 25, 60, 3], seed=seed)
    protected = np.random.default_rng(seed).random(len(scores.token_ids)) < 0.2
    plain = select(scores, config(min_kept=1), protected)
    control = select(scores, config(min_kept=1, control="random", seed=5), protected)
    layout = ragged.Layout(scores.offsets, scores.counts)
    np.testing.assert_array_equal(layout.count(control.keep), layout.count(plain.keep))
    assert (control.keep != plain.keep).any()
    assert control.keep[protected].all()
    decided = (control.reasons & CONTROL) > 0
    np.testing.assert_array_equal(decided, ~control.keep | (~plain.keep & control.keep))
    assert control.fired == plain.fired
    other = select(scores, config(min_kept=1, control="random", seed=6), protected)
    assert (other.keep != control.keep).any()


def test_control_is_uniform_and_independent_of_the_scores():
    documents, length = 4000, 10
    scores = random_scores([length] * documents)
    scores = replace(scores, positions=scores.positions + 1)  # every token trains
    scores.values[RI][:] = np.tile(np.where(np.arange(length) < 3, 0.1, 1.0), documents)
    chosen = select(scores, config(knowledge_novelty=False, task_relevance=False, control="random"))
    dropped = ~chosen.keep.reshape(documents, length)
    assert (dropped.sum(1) == 3).all()
    rate = dropped.mean(0)
    assert np.abs(rate - 0.3).max() < 5 * math.sqrt(0.3 * 0.7 / documents)
    together = (dropped[:, 0] & dropped[:, 1]).mean()
    assert abs(together - 0.3 * 2 / 9) < 5 * math.sqrt(0.0667 / documents), "pairs are as likely as any other"


def test_control_still_respects_the_floor():
    scores = from_bits(REASONING, REASONING, 0, first=0)
    seen = set()
    for seed in range(20):
        chosen = select(scores, config(control="random", min_kept=1, seed=seed))
        assert chosen.keep[1:].any(), "something trainable is left"
        seen.update(chosen.reasons.tolist())
    assert not any(bits & FLOOR for bits in seen), "the draw already leaves what the floor asks for"
    assert any(bits & CONTROL for bits in seen)


def test_control_plans_with_the_floor_in_mind():
    scores = from_bits(*[REASONING] * 4)
    chosen = select(scores, config(control="random", min_kept=3))
    assert chosen.keep.sum() == 3 and not (chosen.reasons & FLOOR).any()
    forced = select(from_bits(0), config(control="random", min_kept=1), None, np.asarray([True]))
    assert forced.keep.all() and forced.reasons.tolist() == [0], "the floor would have kept it anyway"


def test_control_depends_on_the_whole_key():
    one = replace(random_scores([60] * 3), keys=np.zeros((3, 16), dtype=np.uint8))
    one.keys[1, 0], one.keys[2, 15] = 1, 1
    one.values[RI][:] = np.tile([0.1] * 20 + [1.0] * 40, 3)
    keep = select(one, config(knowledge_novelty=False, task_relevance=False, control="random")).keep.reshape(3, 60)
    assert (keep[0] != keep[1]).any() and (keep[0] != keep[2]).any() and (keep[1] != keep[2]).any()


BLOCKS = [
    {},
    {"preset": "none", "task_relevance": {"drop": {"cluster": 2, "of": 4}, "window": 3}, "combine": "majority"},
    {"reasoning_importance": {"drop": {"quantile": 0.3}, "window": 5, "max_fraction": 0.2}, "min_kept": 12},
    {"knowledge_novelty": {"drop": {"quantile": 0.2}, "window": 7}, "control": "random", "min_kept": 3},
    {"reasoning_importance": {"drop": {"fence": 0.2}, "scope": "dataset", "scale": "log"}},
]


@pytest.mark.parametrize("block", BLOCKS)
def test_the_order_of_documents_does_not_matter(block):
    scores = random_scores([20, 0, 31, 7, 1, 50], counts=[1, 2, 1, 3, 1, 1])
    order = np.asarray([4, 2, 0, 5, 1, 3])
    moved, flat = taken(scores, order)
    plain, permuted = select(scores, config(**block)), select(moved, config(**block))
    np.testing.assert_array_equal(permuted.keep, plain.keep[flat])
    np.testing.assert_array_equal(permuted.reasons, plain.reasons[flat])
    np.testing.assert_array_equal(permuted.best, plain.best[order])
    assert (permuted.thresholds, permuted.fired) == (plain.thresholds, plain.fired)
    assert sorted(permuted.warnings) == sorted(plain.warnings)


@pytest.mark.parametrize("block", BLOCKS)
def test_two_copies_equal_a_count_of_two(block):
    scores = random_scores([20, 33, 7])
    copied, flat = taken(scores, np.asarray([0, 1, 1, 2]))
    counted = select(replace(scores, counts=np.asarray([1, 2, 1])), config(**block))
    twice = select(copied, config(**block))
    np.testing.assert_array_equal(twice.keep, counted.keep[flat])
    np.testing.assert_array_equal(twice.reasons, counted.reasons[flat])
    assert twice.fired == counted.fired


@pytest.mark.parametrize("block", BLOCKS)
def test_chunks_do_not_matter(monkeypatch, block):
    scores = random_scores([20, 0, 31, 7, 1, 50, 0])
    rng = np.random.default_rng(1)
    protected, forced = rng.random((2, len(scores.token_ids))) < 0.1
    whole = select(scores, config(**block), protected, forced)
    monkeypatch.setattr(ragged, "CHUNK_TOKENS", 8)
    cut = select(scores, config(**block), protected, forced)
    np.testing.assert_array_equal(cut.keep, whole.keep)
    np.testing.assert_array_equal(cut.reasons, whole.reasons)
    np.testing.assert_array_equal(cut.best, whole.best)
    assert (cut.thresholds, cut.fired, cut.warnings) == (whole.thresholds, whole.fired, whole.warnings)
    json.dumps(cut.thresholds, allow_nan=False)


def test_a_document_alone_gets_the_same_document_level_mask():
    scores = random_scores([20, 31, 7])
    block = config(**{"reasoning_importance": {"drop": {"quantile": 0.2}}, "control": "random"})
    whole = select(scores, block)
    alone, flat = taken(scores, np.asarray([1]))
    np.testing.assert_array_equal(select(alone, block).keep, whole.keep[flat])


def test_everything_dropped_and_nothing_given():
    chosen = select(from_bits(REASONING, REASONING), config(min_kept=0))
    assert not chosen.keep.any() and any("every one of the 2 trainable" in w for w in chosen.warnings)
    empty = select(random_scores([0, 0]), config())
    assert empty.best.tolist() == [-1, -1] and len(empty.keep) == 0


def test_what_does_not_fit_together_is_refused():
    scores = from_bits(0, 0)
    with pytest.raises(XTFError, match="knowledge_novelty is on, but the documents have no scores for it"):
        select(with_scores(scores, knowledge_novelty=None), config())
    for wrong in (with_scores(scores, task_relevance=[0.5]), replace(scores, logprobs=np.zeros(3, np.float32))):
        with pytest.raises(XTFError, match=r"(task_relevance|logprobs) has the shape \((1|3),\)"):
            select(wrong, config())
    with pytest.raises(XTFError, match="protected"):
        select(scores, config(), np.asarray([True]))
    with pytest.raises(XTFError, match="2 offsets"):
        select(replace(scores, counts=np.asarray([1, 1])), config())


def test_reason_text():
    assert reason_text(0) == ""
    assert reason_text(REASONING | NOVELTY | RELEVANCE) == "reasoning_importance,knowledge_novelty,task_relevance"
    assert [reason_text(b) for b in (PROTECTED, FLOOR, FORCED, CONTROL)] == ["protected", "floor", "forced", "control"]
    assert [REASONING, NOVELTY, RELEVANCE, PROTECTED, FLOOR, FORCED, CONTROL] == [1, 2, 4, 8, 16, 32, 64]


def test_a_selection_keeps_what_the_rules_saw():
    scores = random_scores([20, 31, 7])
    starts = np.asarray([0, 8, 20, 33, 51])
    block = {"preset": "none", RI: {"unit": "line"}, KN: {"window": 3}, TR: True}
    chosen = select(scores, config(**block), segments={"line": starts})
    layout = ragged.Layout(scores.offsets, scores.counts)
    expected = {
        RI: ragged.segment_means(scores.values[RI], layout, starts),
        KN: -np.expm1(ragged.windowed(scores.logprobs, layout, 3)),
        TR: scores.values[TR],
    }
    assert list(chosen.seen) == list(ALL_ON)
    for name, seen in expected.items():
        np.testing.assert_array_equal(chosen.seen[name], seen)
        assert chosen.seen[name].dtype == np.float32
