"""Documents that begin alike: with their beginning read once they have the scores of plain documents."""

from __future__ import annotations

import inspect
import re
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM

from tests import eager, tiny
from tests.scoring.test_engine import by_document
from xtf_plugin.data.documents import Branches, beside, collect, from_blocks
from xtf_plugin.errors import XTFError
from xtf_plugin.scoring import branches, engine
from xtf_plugin.scoring.batching import ScoringStats
from xtf_plugin.scoring.branches import agrees, can_branch, plan_branches, plan_rows, score_branches, share_out_rows
from xtf_plugin.scoring.reference import Reference
from xtf_plugin.store.records import Records


def made_of(ids, masks, branches):
    """The distinct ones of some documents."""
    lengths = np.asarray([len(mask) for mask in masks])
    return from_blocks([(np.concatenate(ids), np.concatenate(masks), lengths)], branches)


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
    return made_of(ids, masks, Branches(np.asarray(group_of), np.asarray(lengths)))


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


@pytest.mark.parametrize("budget", [300, 100_000])
@pytest.mark.parametrize("family", ["gemma3", "gemma2", "mistral", "qwen2"])
def test_a_sliding_window_is_counted_in_tokens_of_the_document(family, budget):
    """Not in places of the row, where other documents stand between a document's beginning and its rest."""
    model, documents = tiny.model(family), alike()
    assert model.config.sliding_window < documents.lengths.max()
    found, stats, reference = scored(documents, model, batch_tokens=budget)
    assert reference.branches is True and stats.tokens < documents.lengths.sum()
    check(documents, found, model)


@pytest.mark.parametrize(
    ("family", "attention", "instead"),
    [
        ("llama", "eager", "eager"),
        ("llama", "sdpa", "sdpa"),
        ("llama", "flash_attention_2", "sdpa"),
        ("llama", "flex_attention", "sdpa"),
        ("gemma2", "flash_attention_2", "eager"),  # its scores are capped, which SDPA cannot do
        ("qwen2", "flash_attention_2", "eager"),  # here of a class that says it has no SDPA
    ],
)
def test_attention_that_takes_no_such_masks_is_replaced_for_the_pass(family, attention, instead):
    model, documents, used, found = tiny.model(family), alike(), set(), {}
    model.config._attn_implementation = attention
    model.model.register_forward_pre_hook(lambda module, _: used.add(module.config._attn_implementation))
    model._supports_sdpa = family != "qwen2"
    reference = Reference(model, "tiny")
    with reference.scoring(record=False, masked=True):
        for records in score_branches(documents, np.arange(len(documents)), reference, 100_000, ScoringStats()):
            found |= by_document(records)
    assert used == {instead} and model.config._attn_implementation == attention
    model.config._attn_implementation = "eager"
    check(documents, found, model)


def test_all_that_shares_beginnings_is_read_with_such_attention(monkeypatch):
    """The documents that are tried, and the pass itself."""
    inside, seen = [], []
    scoring, states = Reference.scoring, branches._states

    @contextmanager
    def watched(self, record, *, masked=False):
        inside.append(masked)
        with scoring(self, record, masked=masked):
            yield
        inside.pop()

    monkeypatch.setattr(Reference, "scoring", watched)
    monkeypatch.setattr(branches, "_states", lambda *given, **named: seen.append(inside[-1]) or states(*given, **named))
    scored(alike(), tiny.model())
    assert len(seen) >= 4 and all(seen)


def test_attention_is_not_replaced_elsewhere():
    model = tiny.model()
    model.config._attn_implementation = "flash_attention_2"
    with Reference(model, "tiny").scoring(record=False):
        assert model.config._attn_implementation == "flash_attention_2"


def conversations():
    """Documents of several turns, and splices of each after each of its prompts; one turn of one document has none."""
    rng, rows = np.random.default_rng(5), []
    for turns in (1, 2, 3, 1):
        ids, labels = [], []
        for _ in range(turns):
            prompt, answer = (rng.integers(4, 400, rng.integers(2, 12)).tolist() for _ in range(2))
            ids += prompt + answer
            labels += [-100] * len(prompt) + answer
        rows.append({"input_ids": ids, "labels": labels})
    documents = collect(rows)
    ids, masks, groups, lengths = [], [], [], []
    for index in range(len(documents) - 1):
        own, mask = documents.document(index)
        for turn in np.flatnonzero(np.diff(mask.astype(int)) == 1) + 1:
            ids.append(np.concatenate([own[:turn], rng.integers(4, 400, 3)]).astype(np.int32))
            masks.append(np.arange(turn + 3) >= turn)
            groups.append(index)
            lengths.append(turn)
    return documents, made_of(ids, masks, Branches(np.asarray(groups), np.asarray(lengths)))


@pytest.mark.parametrize("budget", [1, 60, 100_000])
@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen2"])
def test_a_document_is_read_with_what_begins_like_it(family, budget):
    """It is all beginning: its own completions are predicted by the states of the beginning, in every turn."""
    documents, others = conversations()
    both, model = beside(documents, others), tiny.model(family)
    found, stats, reference = scored(both, model, batch_tokens=budget)
    assert reference.branches is True
    check(both, found, model)
    if budget == 100_000:
        assert stats.tokens == documents.lengths.sum() + 3 * len(others)
    assert both.row_documents.tolist() == (len(documents) + others.row_documents).tolist()


def test_a_first_token_is_predicted_by_nothing():
    documents, others = collect([{"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8]}]), alike(groups=1)
    others = replace(others, branches=Branches(others.branches.groups, others.branches.lengths))
    found, _, _ = scored(beside(documents, others), tiny.model())
    check(beside(documents, others), found, tiny.model())
    assert np.isnan(found[documents.keys[0].tobytes()].logprobs).tolist() == [True, False, False, False]


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


def test_documents_longer_than_a_chunk_of_attention_are_not_tried():
    documents, model = alike(), tiny.model()
    model.config.attention_chunk_size = int(documents.lengths.max())
    assert can_branch(Reference(model, "tiny"), documents)
    model.config.attention_chunk_size -= 1
    assert not can_branch(Reference(model, "tiny"), documents)


def test_rotary_embeddings_that_depend_on_the_batch_are_not_shared():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    assert not can_branch(Reference(tiny.model(rope_parameters=rope), "tiny"), alike())


@pytest.mark.parametrize("error", [None, TypeError("no cache"), RuntimeError("no cache")])
def test_a_decoder_that_disagrees_or_fails_is_found_out_once(error, monkeypatch):
    """With wrong positions the sharing gives other numbers; that is seen before any score is used, and said."""
    documents, model, tries = alike(), tiny.model(), []
    decoder = model.model.forward

    def wrong(*, use_cache, input_ids, past_key_values=None, cache=None, **given):
        if not use_cache:
            return decoder(use_cache=use_cache, input_ids=input_ids, **given)
        tries.append(1)
        if error is not None:
            raise error
        given = {**given, "position_ids": 0 * given["position_ids"]} if given else given
        return decoder(use_cache=use_cache, input_ids=input_ids, **{NAME_OF_CACHE: past_key_values or cache}, **given)

    monkeypatch.setattr(model.model, "forward", wrong)
    found, _, reference = scored(documents, model, batch_tokens=300)
    first = len(tries)
    engine.score(documents, np.arange(3), reference, (), lambda _: None, progress=False)
    assert reference.branches is False and len(tries) == first > 0
    monkeypatch.undo()
    check(documents, found, model)
    (warning,) = reference.take_warnings()
    why = (
        "other log-probabilities, by" if error is None else f"tiny fails .* [(]{type(error).__name__}: no cache[)]: so"
    )
    shared = int((documents.lengths - documents.branches.lengths).sum())
    for group in set(documents.branches.groups.tolist()):
        shared += int(documents.branches.lengths[documents.branches.groups == group].max())
    assert re.search(why, warning) and f"{documents.lengths.sum() / shared:.1f} times the tokens" in warning
    assert reference.take_warnings() == []


NAME_OF_CACHE = "cache" if "cache" in inspect.signature(tiny.model().model.forward).parameters else "past_key_values"


@pytest.mark.parametrize("where", ["_read", "_alone"])
def test_errors_of_our_own_are_not_taken_for_the_decoders(where, monkeypatch):
    def broken(*_, **__):
        raise IndexError("ours")

    monkeypatch.setattr(branches, where, broken)
    with pytest.raises(IndexError, match="ours"):
        scored(alike(), tiny.model())


def test_a_decoder_that_fails_later_is_named():
    """After it agreed on a few documents."""
    documents, model = alike(), tiny.model()
    _, _, reference = scored(documents, model)

    def broken(*_, **__):
        raise ValueError("planted")

    model.model.forward = broken
    with pytest.raises(XTFError, match="tiny fails .*ValueError: planted"), reference.scoring(record=False):
        list(score_branches(documents, np.arange(3), reference, 100_000, ScoringStats()))


def test_too_little_memory_for_the_check_is_no_error(monkeypatch):
    """Without keys and values that are kept, there may be enough."""

    def full(*_):
        raise torch.OutOfMemoryError("planted")

    monkeypatch.setattr(branches, "_read", full)
    documents, model = alike(), tiny.model()
    found, _, reference = scored(documents, model)
    check(documents, found, model)
    (warning,) = reference.take_warnings()
    assert "out of memory" in warning and "planted" in warning and "times the tokens" in warning


def test_agreement_is_measured_on_the_longest_documents(monkeypatch):
    documents, reference, seen = alike(), Reference(tiny.model(), "tiny"), []
    few = branches.score_branches
    monkeypatch.setattr(branches, "score_branches", lambda *given: seen.append(given[1]) or few(*given))
    assert agrees(documents, np.arange(len(documents)), reference)
    assert sorted(documents.lengths[seen[0]]) == sorted(documents.lengths)[-branches.CHECKED :]
    assert agrees(documents, np.arange(len(documents)), reference) and len(seen) == 1


def test_agreement_is_not_measured_on_documents_that_are_all_beginning(monkeypatch):
    """A forward over them is an ordinary one."""
    documents, others = conversations()
    both, reference, seen = beside(documents, others), Reference(tiny.model(), "tiny"), []
    few = branches.score_branches
    monkeypatch.setattr(branches, "score_branches", lambda *given: seen.append(given[1]) or few(*given))
    assert agrees(both, np.arange(len(documents)), reference) and reference.branches is None and not seen
    assert agrees(both, np.arange(len(both)), reference) and reference.branches is True
    assert (seen[0] >= len(documents)).all()


def tokens_of(documents, rows):
    """Tokens of the beginning and of the rest of each row."""
    rest = documents.lengths - documents.branches.lengths
    return [(int(documents.branches.lengths[row[0]]), int(rest[row].sum())) for row in rows]


@pytest.mark.parametrize("budget", [1, 150, 600, 100_000])
def test_batches_hold_what_the_budget_allows_and_every_document_once(budget):
    documents = alike(groups=20, each=7, seed=3)
    wanted = np.setdiff1d(np.arange(len(documents)), [2, 9, 10, 40])
    groups, lengths = documents.branches.groups, documents.branches.lengths
    plans = plan_branches(documents, wanted, budget)
    assert sorted(np.concatenate([row for batch in plans for row in batch])) == wanted.tolist()
    for batch in plans:
        begins, rests = zip(*tokens_of(documents, batch), strict=True)
        padded = len(batch) * (max(begins) + max(rests))
        assert padded <= budget or len(batch) == 1
        for row in batch:
            assert len(set(groups[row].tolist())) == 1 and lengths[row].max() == lengths[row[0]]
    if budget == 100_000:
        assert sum(map(len, plans)) == len(set(groups[wanted].tolist())), "each beginning is read once"
    assert plan_branches(documents, wanted[:0], budget) == [] == plan_rows(documents, wanted[:0], budget)


def ends(beginning, number, size):
    """Documents of `size` tokens each after one beginning."""
    first = np.arange(4, 4 + beginning)
    ids = [np.append(first, np.full(size, token)).astype(np.int32) for token in range(4, 4 + number)]
    masks = [np.arange(beginning + size) >= beginning] * number
    return made_of(ids, masks, Branches(np.zeros(number, dtype=np.int64), np.full(number, beginning)))


@pytest.mark.parametrize(
    ("beginning", "number", "size", "budget", "rows"),
    [
        (20, 100, 16, 100_000, [400] * 4),  # 512 tokens at most, and rows of like lengths
        (1_000, 100, 16, 100_000, [800, 800]),  # as many as the beginning has
        (9_000, 100, 100, 100_000, [3_400, 3_400, 3_200]),  # 4,096 at most
        (300, 100, 16, 600, [272] * 5 + [240]),  # what the budget leaves
        (3_000, 10, 600, 4_096, [1_800, 1_800, 1_800, 600]),  # half of the budget after a long beginning
        (30, 3, 700, 100_000, [700] * 3),  # a document is not cut
    ],
)
def test_rows_are_neither_long_nor_do_they_read_beginnings_often(beginning, number, size, budget, rows):
    documents = ends(beginning, number, size)
    found = [rest for _, rest in tokens_of(documents, plan_rows(documents, np.arange(number), budget))]
    assert found == rows


def test_behind_a_very_long_beginning_masks_stay_small():
    """A mask has an entry for each token of a rest and each that it may see."""
    documents = ends(200_000, 40, 100)
    rows = tokens_of(documents, plan_rows(documents, np.arange(40), 1 << 20))
    assert len(rows) > 1 and all(rest * (beginning + rest) <= branches.MASKED for beginning, rest in rows)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_documents_of_a_row_are_scored_by_one_rank(size):
    documents = alike(groups=20, each=7, seed=3)
    wanted = np.setdiff1d(np.arange(len(documents)), [2, 9, 10, 40])
    ranks = share_out_rows(documents, wanted, size, 4_096)
    own = documents.branches.groups[wanted]
    assert all(len(set(ranks[own == group].tolist())) == 1 for group in own) and len(set(ranks.tolist())) == size
    read = [
        sum(map(sum, tokens_of(documents, plan_rows(documents, wanted[ranks == rank], 4_096)))) for rank in range(size)
    ]
    assert max(read) - min(read) < 300


@pytest.fixture
def little_memory(monkeypatch):
    """Batches of more than two documents do not fit."""
    scores, sizes = branches._scores, []

    def limited(documents, batch, reference):
        sizes.append(sum(map(len, batch)))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("planted")
        return scores(documents, batch, reference)

    monkeypatch.setattr(branches, "CHECKED", 2)
    monkeypatch.setattr(branches, "_scores", limited)
    return sizes


def test_out_of_memory_halves_the_batches(little_memory, caplog):
    documents, model = alike(), tiny.model()
    found, stats, _ = scored(documents, model, batch_tokens=100_000)
    assert max(little_memory) == len(documents) and stats.batches > len(documents) // 2
    assert stats.halvings == sum(size > 2 for size in little_memory) > 0 and "out of memory with" in caplog.text
    check(documents, found, model)


def test_a_decoder_that_is_out_of_memory_reads_less(monkeypatch):
    documents, model = alike(), tiny.model()
    _, _, reference = scored(documents, model)
    found, failures = {}, iter([torch.OutOfMemoryError("planted")])
    decoder = model.model.forward

    def once(*given, **named):
        for error in failures:
            raise error
        return decoder(*given, **named)

    stats = ScoringStats()
    with monkeypatch.context() as patch, reference.scoring(record=False, masked=True):
        patch.setattr(model.model, "forward", once)
        for records in score_branches(documents, np.arange(len(documents)), reference, 100_000, stats):
            found |= by_document(records)
    assert stats.halvings == 1
    check(documents, found, model)


def test_larger_batches_are_split_before_they_fail(monkeypatch):
    """Whoever has seen once how much fits does not try as much again."""
    documents, model, tried = alike(groups=12), tiny.model(), []
    scores = branches._scores

    def limited(documents, batch, reference):
        begins, rests = zip(*tokens_of(documents, batch), strict=True)
        tried.append(len(batch) * (max(begins) + max(rests)))
        if tried[-1] > 200:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return scores(documents, batch, reference)

    monkeypatch.setattr(branches, "CHECKED", 2)
    monkeypatch.setattr(branches, "_scores", limited)
    found, stats, _ = scored(documents, model, batch_tokens=400)
    assert stats.halvings == sum(size > 200 for size in tried) == 1
    check(documents, found, model)


def test_a_document_that_does_not_fit_is_refused(monkeypatch):
    documents, reference = alike(), Reference(tiny.model(), "tiny")

    def full(*_):
        raise torch.OutOfMemoryError("planted")

    monkeypatch.setattr(branches, "_scores", full)
    with pytest.raises(XTFError, match="planted"):
        list(score_branches(documents, np.arange(3), reference, 100_000, ScoringStats()))


def test_other_errors_are_passed_on(monkeypatch):
    def broken(*_):
        raise RuntimeError("device-side assert")

    monkeypatch.setattr(branches, "_scores", broken)
    with pytest.raises(RuntimeError, match="device-side assert"):
        list(score_branches(alike(), np.arange(3), Reference(tiny.model(), "tiny"), 100_000, ScoringStats()))


def test_a_run_that_resumes_has_the_bits_of_one_that_was_not_killed():
    documents, reference = alike(groups=9), Reference(tiny.model(), "tiny")
    everything, budget = np.arange(len(documents)), 250
    plans = [np.concatenate(batch) for batch in plan_branches(documents, everything, budget)]
    assert len(plans) > 3
    done = np.concatenate([plans[0], plans[2][:1]])  # a complete batch and part of another
    wanted = np.setdiff1d(everything, done)

    def run(chosen):
        found = {}
        engine.score(
            *(documents, chosen, reference, (), lambda records: found.update(by_document(records))),
            **{"progress": False, "batch_tokens": budget},
        )
        return found

    whole, rest = run(everything), run(wanted)
    assert rest.keys() == {documents.keys[index].tobytes() for index in wanted}
    same = [key for key in rest if np.array_equal(rest[key].logprobs, whole[key].logprobs, equal_nan=True)]
    kept = np.concatenate(plans[1:2] + plans[3:])
    assert {documents.keys[index].tobytes() for index in kept} <= set(same)


def test_scores_are_the_same_whatever_is_read_beside_them():
    """Up to rounding: neither padding nor other documents of a row are attended to."""
    documents, model = alike(groups=8), tiny.model()
    found, _, _ = scored(documents, model, batch_tokens=100_000)
    alone, _, _ = scored(documents, model, batch_tokens=1)
    for key, records in found.items():
        assert isinstance(records, Records)
        np.testing.assert_allclose(records.logprobs, alone[key].logprobs, atol=1e-5)
