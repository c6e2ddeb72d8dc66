"""How documents are split into scoring batches: within the budget, with as little padding as possible."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from xtf_plugin.scoring import engine
from xtf_plugin.scoring.batching import FORWARD_TOKENS, whole_batches_first


def test_batches_respect_the_budget_and_waste_little():
    lengths = np.random.default_rng(0).integers(50, 300, 5_000)
    plans = list(engine.plan_batches(lengths, 4_096))
    padded = [len(p) * lengths[p].max() for p in plans]
    assert max(padded) <= 4_096
    assert sorted(np.concatenate(plans)) == list(range(5_000))
    assert sum(padded) <= 1.03 * lengths.sum()


def padded_tokens(plans, lengths):
    return sum(len(plan) * int(lengths[plan].max()) for plan in plans)


@pytest.mark.parametrize("budget", [1, 700, 5_000])
def test_batches_are_the_cheapest_cut(budget):
    """Compared with every split of a few sorted documents."""
    lengths = np.asarray([900, 3, 640, 0, 610, 600, 90, 700, 3, 80])
    order = [0, 7, 2, 4, 5, 6, 9, 1, 8]  # longest first, ties by index, empty ones left out
    plans = list(engine.plan_batches(lengths, budget))
    assert np.concatenate(plans).tolist() == order
    costs = []
    for cuts in itertools.product((False, True), repeat=len(order) - 1):
        ends = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), len(order)]
        parts = [np.asarray(order[low:high]) for low, high in itertools.pairwise(ends)]
        if all(len(part) == 1 or padded_tokens([part], lengths) <= budget for part in parts):
            costs.append(padded_tokens(parts, lengths) + FORWARD_TOKENS * len(parts))
    assert padded_tokens(plans, lengths) + FORWARD_TOKENS * len(plans) == min(costs)


def test_few_documents_and_a_large_budget_waste_little_too():
    lengths = np.random.default_rng(0).normal(450, 110, 500).clip(140, 880).astype(np.int64)
    plans = list(engine.plan_batches(lengths, 16_384))
    assert padded_tokens(plans, lengths) <= 1.03 * lengths.sum()
    assert len(plans) <= 1.3 * lengths.sum() / 16_384
    assert list(engine.plan_batches(np.zeros(3, dtype=np.int64), 100)) == []


def test_packed_batches_hold_what_the_budget_allows():
    lengths = np.asarray([7, 30, 4, 0, 30, 100, 1])
    plans = list(engine.plan_batches(lengths, 64, packed=True))
    assert [plan.tolist() for plan in plans] == [[5], [1, 4], [0, 2, 6]]


def together(plans):
    return {frozenset(plan.tolist()) for plan in plans}


def planned(lengths, wanted, budget, packed=False):
    def plan(documents):
        split = engine.plan_batches(lengths[documents], budget, packed=packed)
        return [documents[batch] for batch in split]

    return whole_batches_first(plan, wanted, np.arange(len(lengths)))


@pytest.mark.parametrize("packed", [False, True])
def test_missing_documents_keep_the_batches_of_a_complete_pass(packed):
    lengths = np.random.default_rng(0).integers(0, 90, 300)
    plans = list(engine.plan_batches(lengths, 700, packed=packed))
    everything = np.flatnonzero(lengths)
    assert [p.tolist() for p in planned(lengths, everything, 700, packed)] == [p.tolist() for p in plans]
    done = plans[1:4] + plans[7:8]
    broken = plans[5][:2]  # part of a batch is done
    wanted = np.setdiff1d(everything, np.concatenate([*done, broken]))
    found = planned(lengths, wanted, 700, packed)
    assert np.sort(np.concatenate(found)).tolist() == wanted.tolist()
    assert together(plans) - together(done) - {frozenset(plans[5].tolist())} <= together(found)
    assert frozenset(plans[5][2:].tolist()) in together(found)


def test_a_few_documents_of_many_share_a_new_batch():
    lengths = np.full(1_000, 10)
    wanted = np.arange(0, 1_000, 50)
    (found,) = planned(lengths, wanted, 1_000)
    assert found.tolist() == wanted.tolist()
    assert planned(lengths, wanted[:0], 1_000) == []
