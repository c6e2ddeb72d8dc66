"""Rows are cut into documents that are found by content: shuffled, packed, or among other rows."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import torch

from xtf_plugin.data.documents import collect, split_row
from xtf_plugin.data.keys import document_key
from xtf_plugin.errors import XTFUserError


def row(ids, prompt):
    labels = [-100] * prompt + list(ids[prompt:])
    return {"input_ids": list(ids), "labels": labels}


A, B, C = row([5, 6, 7, 8], 2), row([9, 10, 11], 1), row([5, 6, 7, 8], 1)


def packed(*rows):
    return {
        "input_ids": sum((r["input_ids"] for r in rows), []),
        "labels": sum((r["labels"] for r in rows), []),
        "seq_lengths": [len(r["input_ids"]) for r in rows],
    }


def test_key_is_pinned():
    """A change of the hash loses every stored score; it must be a decision, not an accident."""
    key = document_key(np.array([1, 2, 3]), np.array([False, True, True]))
    assert key.hex() == "e47092934aa408e395d94bbacdfa662d"


def test_key_depends_on_ids_order_and_label_mask():
    ids, mask = np.array([1, 2, 3]), np.array([False, True, True])
    variants = [(ids, mask), (ids[::-1], mask), (ids, ~mask), (ids[:2], mask[:2])]
    assert len({document_key(*variant) for variant in variants}) == 4


def test_packing_shuffling_and_position_ids_give_the_same_documents():
    plain = {k.tobytes() for k in collect([A, B, C]).keys}
    assert {k.tobytes() for k in collect([packed(C, B, A)]).keys} == plain
    restarts = {**packed(C, B, A), "position_ids": [0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3]}
    del restarts["seq_lengths"]
    assert {k.tobytes() for k in collect([restarts]).keys} == plain


def test_duplicates_are_counted_and_rows_remember_their_documents():
    documents = collect([A, packed(B, A), A])
    assert len(documents) == 2
    assert documents.counts.tolist() == [3, 1]
    assert documents.row_offsets.tolist() == [0, 1, 3, 4]
    assert documents.row_documents.tolist() == [0, 1, 0, 0]


def test_completion_views():
    documents = collect([A, B])
    assert documents.lengths.tolist() == [4, 3]
    assert documents.completion_offsets.tolist() == [0, 2, 4]
    assert documents.completion_positions.tolist() == [2, 3, 1, 2]


def test_row_without_boundaries_is_one_document():
    assert len(split_row({**packed(A, B), "seq_lengths": None})) == 1


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"input_ids": [1, 2]}, "no `labels`"),
        ({"input_ids": [1, 2], "labels": [1]}, "2 input_ids but 1 labels"),
        ({"labels": [1]}, "has no input_ids, only labels"),
        ({"input_ids": np.array([1, 2**64 - 1], np.uint64), "labels": [1, 2]}, "beyond 64 bits"),
        ({**packed(A, B), "seq_lengths": [2**62] * 3 + [2**62 + 7]}, f"add up to {2**64 + 7}"),
        ({"input_ids": [1, 2.5], "labels": [1, 2]}, "not a flat list of whole numbers"),
        ({"input_ids": [1, 2], "labels": [1, 2], "position_ids": [0]}, "2 tokens but 1 position_ids"),
        ({**packed(A, B), "seq_lengths": [4, 4]}, "add up to 8"),
        ({**packed(A, B), "seq_lengths": [7, 0]}, "add up to 7"),
        ({"input_ids": [1, -2], "labels": [1, 2]}, "token id -2"),
        ({"input_ids": [1, 2**40], "labels": [1, 2]}, "token id 1099511627776"),
    ],
)
def test_inconsistent_rows_are_refused(bad, message):
    with pytest.raises(XTFUserError, match=message):
        collect([bad])


def test_nothing_to_train_on_is_refused():
    with pytest.raises(XTFUserError, match="none of the 3 training rows has a completion token that is predicted"):
        collect([row([1, 2], 2), {"input_ids": [], "labels": []}, row([7], 0)])


def test_empty_rows_beside_good_ones_are_harmless():
    documents = collect([{"input_ids": [], "labels": []}, A])
    assert documents.lengths.tolist() == [0, 4]


@pytest.mark.parametrize("made", [list, tuple, np.array, torch.tensor, pa.array, lambda v: np.array(v, dtype=object)])
def test_columns_of_every_kind_are_read(made):
    row = {"input_ids": made([5, 6, 7]), "labels": made([-100, 6, 7]), "attention_mask": made([True, True, True])}
    ((where, ids, completion),) = split_row(row)
    assert (where, ids.tolist(), completion.tolist()) == (slice(0, 3), [5, 6, 7], [False, True, True])


def test_lengths_are_computed_once():
    """Plans of a pass ask for them row by row: for a million documents that would be hours."""
    documents = collect([{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}])
    assert documents.lengths is documents.lengths
    assert documents.lengths.tolist() == [3]
