"""Documents that begin alike: with their beginning read once they have the scores of plain documents."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM

from tests import eager, tiny
from tests.scoring.test_engine import by_document
from xtf_plugin.data.documents import Branches, from_arrays
from xtf_plugin.errors import XTFError
from xtf_plugin.scoring import branches, engine
from xtf_plugin.scoring.branches import agrees, can_branch, plan_branches, score_branches
from xtf_plugin.scoring.reference import Reference
from xtf_plugin.store.records import Records


def alike(groups=6, each=4, seed=0, longest=30):
    """Groups of documents with ragged beginnings; some share all of their group's, and labels have gaps."""
    rng = np.random.default_rng(seed)
    ids, masks, group_of, lengths = [], [], [], []
    for group in range(groups):
        beginning = rng.integers(4, 400, rng.integers(1, longest))
        for _ in range(each if group else 1):
            shared = rng.choice([len(beginning), rng.integers(1, len(beginning) + 1)])
            own = rng.integers(4, 400, rng.integers(1, longest))
            marked = rng.random(len(own)) < 0.8
            marked[0] = rng.random() < 0.7
            marked[-1] = True
            ids.append(np.concatenate([beginning[:shared], own]).astype(np.int32))
            masks.append(np.concatenate([np.zeros(shared, dtype=bool), marked]))
            group_of.append(group - 1)  # -1, a group like any other, is that of a template
            lengths.append(shared)
    return from_arrays(ids, masks, Branches(np.asarray(group_of), np.asarray(lengths)))


def scored(documents, model, **options):
    """Records of each document by the engine, the statistics and the reference."""
    found, reference = {}, Reference(model, "tiny")

    def sink(records):
        found.update(by_document(records))

    wanted = np.arange(len(documents))
    stats = engine.score(documents, wanted, reference, (), sink, progress=False, **options)
    return found, stats, reference


def check(documents, found, model):
    """Each document's records against the model's own forward over it alone."""
    assert len(found) == len(documents)
    for index in range(len(documents)):
        ids, completion = documents.document(index)
        logprobs, _ = eager.scores(model, ids.astype(np.int64), ())
        entropy, deviation = eager.expectations(model, ids.astype(np.int64))
        ours = found[documents.keys[index].tobytes()]
        for got, expected in ((ours.logprobs, logprobs), (ours.entropy, entropy), (ours.deviation, deviation)):
            np.testing.assert_allclose(got, expected[completion].numpy(), atol=2e-5, rtol=0)


@pytest.mark.parametrize("budget", [1, 200, 100_000])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gpt_neox", "granite", "cohere", "phi3"])
def test_equals_plain_documents(family, budget):
    """One document, a few groups, and all of them in a batch."""
    model, documents = tiny.model(family, **({"sliding_window": 64} if family == "qwen2" else {})), alike()
    found, stats, reference = scored(documents, model, batch_tokens=budget)
    assert reference.branches is True and can_branch(reference, documents)
    check(documents, found, model)
    assert (stats.batches == 1) == (budget > 1_000) and (stats.batches == len(documents)) == (budget == 1)


def test_a_common_beginning_is_read_once():
    documents, model = alike(groups=3, each=8), tiny.model()
    _, stats, _ = scored(documents, model, batch_tokens=100_000)
    groups, lengths = documents.branches.groups, documents.branches.lengths
    once = sum(int(lengths[groups == group].max()) for group in set(groups.tolist()))
    assert stats.tokens == once + int((documents.lengths - lengths).sum()) < documents.lengths.sum()
    _, plain, _ = scored(replace(documents, branches=None), model, batch_tokens=100_000)
    assert plain.tokens == documents.lengths.sum()


@pytest.mark.parametrize("family", ["gemma3", "gemma2", "mistral", "qwen2"])
def test_documents_longer_than_a_sliding_window_are_read_plainly(family, monkeypatch):
    """A shared beginning has gaps, and windows are counted in places of the cache."""
    model, documents = tiny.model(family), alike()
    assert model.config.sliding_window < documents.lengths.max()
    monkeypatch.setattr(engine, "score_branches", lambda *_, **__: 1 / 0)
    found, stats, reference = scored(documents, model, batch_tokens=300)
    assert not can_branch(reference, documents) and reference.branches is None
    check(documents, found, model)
    assert stats.tokens == documents.lengths.sum()


@pytest.mark.parametrize("family", ["gemma3", "gemma2", "mistral", "qwen2"])
def test_documents_within_a_sliding_window_share_their_beginning(family):
    model, documents = tiny.model(family, sliding_window=64), alike()
    found, _, reference = scored(documents, model, batch_tokens=300)
    assert reference.branches is True
    check(documents, found, model)


@pytest.mark.parametrize("named", [True, False])
def test_a_state_that_is_no_attention_is_read_plainly(named, monkeypatch):
    """Mamba has no keys and values. If its config did not say so, the few documents that are tried first would."""
    if not named:
        monkeypatch.setattr(branches, "ATTENTION", branches.ATTENTION | {"linear_attention"})
    fast = tiny.tokenizer()
    config = MambaConfig(vocab_size=len(fast), hidden_size=32, num_hidden_layers=2, state_size=4, pad_token_id=1)
    torch.manual_seed(0)
    model, documents = MambaForCausalLM(config).eval(), alike()
    found, stats, reference = scored(documents, model, batch_tokens=300)
    assert reference.branches is (None if named else False) and stats.tokens == documents.lengths.sum()
    for index in range(len(documents)):
        ids, completion = documents.document(index)
        given = torch.as_tensor(ids.astype(np.int64))
        with torch.no_grad():
            rates = model(input_ids=given[None], use_cache=False).logits[0, :-1].log_softmax(-1)
        expected = np.append(np.nan, rates.gather(-1, given[1:, None])[:, 0].numpy())[completion]
        np.testing.assert_allclose(found[documents.keys[index].tobytes()].logprobs, expected, atol=2e-5)


def test_layers_of_another_kind_are_not_tried():
    documents = alike()
    model = tiny.model()
    model.config.layer_types = ["full_attention", "linear_attention"]
    assert not can_branch(Reference(model, "tiny"), documents)
    model.config.layer_types = ["full_attention", "full_attention"]
    assert can_branch(Reference(model, "tiny"), documents)


@pytest.mark.parametrize(
    ("why", "changes"),
    [
        ("none are known", {"branches": None}),
        ("one document shares nothing", {"lengths": 0}),
    ],
)
def test_documents_without_common_beginnings_are_read_plainly(why, changes):
    documents = alike()
    if "lengths" in changes:
        lengths = documents.branches.lengths.copy()
        lengths[3] = 0
        changes = {"branches": Branches(documents.branches.groups, lengths)}
    assert not can_branch(Reference(tiny.model(), "tiny"), replace(documents, **changes)), why


def test_rotary_embeddings_that_depend_on_the_batch_are_not_shared():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    assert not can_branch(Reference(tiny.model(rope_parameters=rope), "tiny"), alike())


@pytest.mark.parametrize("error", [None, TypeError("no cache"), RuntimeError("no cache")])
def test_a_decoder_that_disagrees_or_fails_is_found_out_once(error, monkeypatch, caplog):
    """With wrong positions the sharing gives other numbers; that is seen before any score is used."""
    documents, model, tries = alike(), tiny.model(), []
    states = branches._states

    def wrong(reference, ids, cache, **given):
        tries.append(1)
        if error is not None:
            raise error
        given = {**given, "position_ids": 0 * given["position_ids"]} if given else given
        return states(reference, ids, cache, **given)

    monkeypatch.setattr(branches, "_states", wrong)
    with caplog.at_level(logging.INFO):
        found, _, reference = scored(documents, model, batch_tokens=300)
        first = len(tries)
        engine.score(documents, np.arange(3), reference, (), lambda _: None, progress=False)
    assert reference.branches is False and len(tries) == first > 0
    assert "reads shared beginnings again for every document" in caplog.text
    check(documents, found, model)


def test_agreement_is_measured_on_the_longest_documents(monkeypatch):
    documents, reference, seen = alike(), Reference(tiny.model(), "tiny"), []
    few = branches.score_branches
    monkeypatch.setattr(branches, "score_branches", lambda *given: seen.append(given[1]) or few(*given))
    assert agrees(documents, np.arange(len(documents)), reference)
    assert sorted(documents.lengths[seen[0]]) == sorted(documents.lengths)[-branches.CHECKED :]
    assert agrees(documents, np.arange(len(documents)), reference) and len(seen) == 1


@pytest.mark.parametrize("budget", [1, 150, 600, 100_000])
def test_batches_hold_what_the_budget_allows_and_every_document_once(budget):
    documents = alike(groups=20, each=7, seed=3)
    wanted = np.setdiff1d(np.arange(len(documents)), [2, 9, 10, 40])
    groups, lengths = documents.branches.groups, documents.branches.lengths
    plans = list(plan_branches(documents, wanted, budget))
    assert sorted(np.concatenate([plan.documents for plan in plans])) == wanted.tolist()
    for plan in plans:
        rest = (documents.lengths - lengths)[plan.documents].max()
        padded = len(plan.bases) * lengths[plan.bases].max() + len(plan.documents) * rest
        assert padded <= budget or len(plan.documents) == 1
        assert len(set(groups[plan.bases].tolist())) == len(plan.bases), "each beginning is read once"
        for document, group in zip(plan.documents, plan.groups, strict=True):
            base = plan.bases[group]
            assert groups[base] == groups[document] and lengths[base] >= lengths[document]
    assert list(plan_branches(documents, wanted[:0], budget)) == []


def test_keys_and_values_are_held_for_a_limited_number_of_rows():
    """Many short ends of one long beginning: the cache is copied for each of them."""
    long = np.arange(4, 304).astype(np.int32)
    ids = [np.append(long, token).astype(np.int32) for token in range(4, 204)]
    masks = [np.arange(301) == 300] * 200
    documents = from_arrays(ids, masks, Branches(np.zeros(200, dtype=np.int64), np.full(200, 300)))
    plans = list(plan_branches(documents, np.arange(200), 1_000))
    assert max(len(plan.documents) for plan in plans) * 301 <= branches.CACHED * 1_000 and len(plans) > 1


@pytest.fixture
def little_memory(monkeypatch):
    """Batches of more than two documents do not fit."""
    scores, sizes = branches._scores, []

    def limited(documents, batch, reference):
        sizes.append(len(batch.documents))
        if len(batch.documents) > 2:
            raise torch.OutOfMemoryError("planted")
        return scores(documents, batch, reference)

    monkeypatch.setattr(branches, "CHECKED", 2)
    monkeypatch.setattr(branches, "_scores", limited)
    return sizes


def test_out_of_memory_halves_the_batches(little_memory):
    documents, model = alike(), tiny.model()
    found, stats, _ = scored(documents, model, batch_tokens=100_000)
    assert max(little_memory) == len(documents) and stats.batches > len(documents) // 2
    check(documents, found, model)


def test_a_document_that_does_not_fit_is_refused(monkeypatch):
    documents, reference = alike(), Reference(tiny.model(), "tiny")

    def full(*_):
        raise torch.OutOfMemoryError("planted")

    monkeypatch.setattr(branches, "_scores", full)
    with pytest.raises(XTFError, match="planted"):
        list(score_branches(documents, np.arange(3), reference, 100_000))


def test_other_errors_are_passed_on(monkeypatch):
    def broken(*_):
        raise RuntimeError("device-side assert")

    monkeypatch.setattr(branches, "_scores", broken)
    with pytest.raises(RuntimeError, match="device-side assert"):
        list(score_branches(alike(), np.arange(3), Reference(tiny.model(), "tiny"), 100_000))


def test_a_run_that_resumes_has_the_bits_of_one_that_was_not_killed():
    documents, reference = alike(groups=9), Reference(tiny.model(), "tiny")
    everything, budget = np.arange(len(documents)), 250
    plans = list(plan_branches(documents, everything, budget))
    assert len(plans) > 3
    done = np.concatenate([plans[0].documents, plans[2].documents[:1]])  # a complete batch and part of another
    wanted = np.setdiff1d(everything, done)

    def run(chosen, planned):
        with reference.scoring(record=False):
            given = score_branches(documents, chosen, reference, budget, planned=planned)
            return dict(each for records, _, _ in given for each in by_document(records))

    whole, rest = run(everything, everything), run(wanted, everything)
    assert rest.keys() == {documents.keys[index].tobytes() for index in wanted}
    same = [key for key in rest if np.array_equal(rest[key].logprobs, whole[key].logprobs, equal_nan=True)]
    kept = np.concatenate([plan.documents for plan in plans[1:2] + plans[3:]])
    assert {documents.keys[index].tobytes() for index in kept} <= set(same)


def test_scores_are_the_same_whatever_is_read_beside_them():
    """Up to rounding: padding on the left of an end and on the right of a beginning is not attended to."""
    documents, model = alike(groups=8), tiny.model()
    found, _, _ = scored(documents, model, batch_tokens=100_000)
    alone, _, _ = scored(documents, model, batch_tokens=1)
    for key, records in found.items():
        assert isinstance(records, Records)
        np.testing.assert_allclose(records.logprobs, alone[key].logprobs, atol=1e-5)
