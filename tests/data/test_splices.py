"""Splices against a loop that builds each of them by hand: their tokens, their groups and where their values go."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from xtf_plugin.data.documents import collect
from xtf_plugin.data.ragged import offsets_of
from xtf_plugin.data.splices import Splices, predictions_of

TEMPLATE = np.asarray([90, 91], dtype=np.int32)


def documents_of(rng, n=7):
    """Documents with several turns, one without a prompt, one without a completion, one that occurs twice."""
    rows = []
    for index in range(n):
        ids, labels = [], []
        for _ in range(index % 3 + 1):
            prompt, answer = rng.integers(1, 50, rng.integers(index > 0, 5)), rng.integers(1, 50, rng.integers(3, 9))
            ids += [*prompt.tolist(), *answer.tolist()]
            labels += [-100] * len(prompt) + answer.tolist()
        rows.append({"input_ids": ids, "labels": labels})
    rows[3]["labels"] = [-100] * len(rows[3]["input_ids"])
    return collect([*rows, rows[4]])


def splices_of(rng, documents, number):
    """Some splices of some documents, some with the template for a beginning, one of them twice."""
    keep, begin, end = [], [], []
    filled = np.flatnonzero(np.diff(documents.completion_offsets) >= 3)
    for _ in range(number):
        index = rng.choice(filled)
        low, high = documents.completion_offsets[index : index + 2]
        first, second, third = np.sort(rng.choice(np.arange(low, high + 1), 3, replace=False))
        keep.append(rng.choice([-1, first, first, second]))
        begin.append(second)
        end.append(third)
    bounds = (np.asarray([*given, given[0]], dtype=np.int64) for given in (keep, begin, end))
    return Splices(*bounds, TEMPLATE)


def by_hand(documents, splices):
    """Token ids of each splice, the places in it that are scored, and the length of its beginning."""
    places = [(index, at) for index in range(len(documents)) for at in np.flatnonzero(documents.document(index)[1])]
    for keep, begin, end in zip(splices.keep, splices.begin, splices.end, strict=True):
        index, first = places[begin]
        if 0 <= keep < begin:
            first = places[begin - 1][1] + 1
        stop = places[end - 1][1] + 1
        ids, completion = documents.document(index)
        past = TEMPLATE.tolist() if keep < 0 else ids[: places[keep][1]].tolist()
        scored = [len(past) + at - first for at in range(first, stop) if completion[at]]
        yield past + ids[first:stop].tolist(), scored, len(past)


def read_so_far(ids):
    """A number for each place of a document that depends on all that is read up to it."""
    found, state = [], 1
    for token in ids:
        state = (state * 31 + int(token)) % 100_003
        found.append(state)
    return found


def predict(made):
    """A reference that predicts `read_so_far`."""
    numbers = [np.asarray(read_so_far(ids))[mask] for ids, mask in map(made.document, range(len(made)))]
    values = np.concatenate(numbers).astype(np.float32)
    return SimpleNamespace(logprobs=values, entropy=values + 1, deviation=values + 2)


@pytest.mark.parametrize("seed", range(4))
def test_splices_are_those_of_a_loop(seed):
    rng = np.random.default_rng(seed)
    documents = documents_of(rng)
    splices = splices_of(rng, documents, 40)
    made = splices.documents(documents)
    assert len(made) < len(splices.keep) == len(made.row_documents) == 41, "equal splices are one document"
    for place, (ids, scored, past) in zip(made.row_documents, by_hand(documents, splices), strict=True):
        found, mask = made.document(place)
        assert found.tolist() == ids and np.flatnonzero(mask).tolist() == scored
        assert made.branches.lengths[place] == past


@pytest.mark.parametrize("seed", range(4))
def test_documents_of_a_group_begin_alike(seed):
    rng = np.random.default_rng(seed)
    documents = documents_of(rng)
    made = splices_of(rng, documents, 60).documents(documents)
    groups, lengths = made.branches.groups, made.branches.lengths
    assert len(set(groups.tolist())) > 3 and (np.bincount(groups + 1) > 1).any()
    for one in range(len(made)):
        for other in np.flatnonzero(groups == groups[one]):
            common = min(lengths[one], lengths[other])
            assert np.array_equal(made.document(one)[0][:common], made.document(other)[0][:common])


def sums(splices, values):
    """The sum of flat values over each splice."""
    return splices.sums(lambda tokens, place, at: values[tokens])


@pytest.mark.parametrize("seed", range(4))
def test_predictions_come_splice_after_splice(seed):
    rng = np.random.default_rng(seed)
    documents = documents_of(rng)
    splices = splices_of(rng, documents, 40)
    found = predictions_of(documents, splices, predict)
    expected = [[read_so_far(ids)[at] for at in scored] for ids, scored, _ in by_hand(documents, splices)]
    flat = np.asarray([value for values in expected for value in values], dtype=np.float32)
    np.testing.assert_array_equal(found.logprobs, flat)
    np.testing.assert_array_equal(found.entropy, flat + 1)
    np.testing.assert_array_equal(found.deviation, flat + 2)
    assert splices.offsets.tolist() == offsets_of(np.asarray([len(values) for values in expected])).tolist()
    np.testing.assert_array_equal(sums(splices, found.logprobs), [sum(values) for values in expected])
    at = [place for begin, end in zip(splices.begin, splices.end, strict=True) for place in range(begin, end)]
    np.testing.assert_array_equal(
        splices.sums(lambda tokens, place, here: here - place), splices.begin * (splices.end - splices.begin)
    )
    assert splices.sums(lambda tokens, place, here: (here == np.asarray(at)[tokens]).astype(np.float32)).sum() == len(
        at
    )


@pytest.mark.parametrize("size", [1, 30, 100])
def test_many_splices_are_laid_out_a_part_at_a_time(size, monkeypatch):
    rng = np.random.default_rng(0)
    documents = documents_of(rng)
    splices = splices_of(rng, documents, 40)
    whole, tokens = predictions_of(documents, splices, predict), []

    def counted(made):
        tokens.append(len(made.input_ids))
        return predict(made)

    monkeypatch.setattr("xtf_plugin.data.splices.TOGETHER", size)
    parts = predictions_of(documents, splices, counted)
    np.testing.assert_array_equal(parts.logprobs, whole.logprobs)
    longest = max(len(ids) for ids, _, _ in by_hand(documents, splices))
    assert len(tokens) > 2 and max(tokens) <= max(size, longest)


def test_sums_leave_out_what_is_undefined_and_are_exact_in_float64():
    starts, ends = np.asarray([0, 3]), np.asarray([3, 5])
    splices = Splices(starts, starts, ends, TEMPLATE)
    values = np.asarray([1e8, 1, np.nan, -2, 3], dtype=np.float32)
    assert sums(splices, values).tolist() == [100_000_001.0, 1.0]


def test_the_first_token_of_a_document_begins_after_nothing():
    """With `keep` at the very first token, the beginning is empty, and nothing predicts the splice's first token."""
    documents = collect([{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}])
    one = np.zeros(1, dtype=np.int64)
    made = Splices(one, one + 1, one + 3, TEMPLATE).documents(documents)
    assert made.document(0)[0].tolist() == [6, 7] and made.branches.lengths.tolist() == [0]


def test_no_splice_needs_no_reference():
    documents = collect([{"input_ids": [1, 2], "labels": [1, 2]}])
    none = np.zeros(0, dtype=np.int64)
    found = predictions_of(documents, Splices(none, none, none, TEMPLATE), lambda _: 1 / 0)
    assert len(found.logprobs) == 0 and found.logprobs.dtype == np.float32
    assert len(sums(Splices(none, none, none, TEMPLATE), found.logprobs)) == 0
