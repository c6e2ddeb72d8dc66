"""The collator: plans become -100 labels, nothing else changes, and nothing unplanned passes."""

from __future__ import annotations

import pickle

import numpy as np
import pyarrow as pa
import pytest
import torch
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from xtf_plugin.data.documents import collect
from xtf_plugin.errors import XTFError
from xtf_plugin.selection.masks import MaskTable
from xtf_plugin.training.collator import XTFDataCollator

A = {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}
B = {"input_ids": [9, 10, 11], "labels": [-100, 10, 11]}
# language modelling: the first label is there but never predicted
TEXT = {"input_ids": [20, 21, 22], "labels": [20, 21, 22]}


def masks(rows, keep, best=None):
    documents = collect(rows)
    flags = np.concatenate([np.asarray(k, dtype=bool) for k in keep])
    best = np.zeros(len(documents), dtype=np.int64) if best is None else np.asarray(best)
    return MaskTable.build(documents.keys, documents.completion_offsets, flags, best)


def collate(rows, table, **options):
    return XTFDataCollator(DataCollatorForLanguageModeling(pad_token_id=0, **options), table)(rows)


def test_only_planned_labels_change():
    table = masks([A, B], [[False, True], [True, True]])
    stock = DataCollatorForLanguageModeling(pad_token_id=0)([A, B])
    ours = collate([A, B], table)
    assert ours["labels"].tolist() == [[-100, -100, -100, 8], [-100, 10, 11, -100]]
    assert ours.keys() == stock.keys()
    for name in stock.keys() - {"labels"}:
        assert torch.equal(ours[name], stock[name])
    assert A["labels"] == [-100, -100, 7, 8], "the dataset's own row must not change"


def test_packed_rows_are_masked_per_document():
    table = masks([A, B], [[False, True], [True, False]])
    packed = {"input_ids": B["input_ids"] + A["input_ids"], "labels": B["labels"] + A["labels"], "seq_lengths": [3, 4]}
    batch = collate([packed], table, padding_free=True)
    assert batch["labels"].tolist() == [[-100, 10, -100, -100, -100, -100, 8]]


@pytest.mark.parametrize("made", [lambda v: pa.chunked_array([v]), lambda v: np.array(v, dtype=object)])
def test_labels_that_numpy_does_not_share_are_masked(made):
    given = {**A, "labels": made(A["labels"])}
    collator = XTFDataCollator(
        lambda rows: {"labels": torch.tensor([int(v) for v in rows[0]["labels"]])}, masks([A], [[False, True]])
    )
    assert collator([given])["labels"].tolist() == [-100, -100, -100, 8]
    assert np.asarray(given["labels"]).tolist() == A["labels"], "the dataset's own row must not change"


@pytest.mark.parametrize("kind", [np.uint8, np.int8, np.uint64])
def test_labels_of_a_type_without_room_for_the_mark(kind):
    row = {"input_ids": np.array([5, 6, 7], kind), "labels": np.array([5, 6, 7], kind)}
    batch = XTFDataCollator(
        lambda rows: {"labels": torch.tensor(np.asarray(rows[0]["labels"], np.int64))},
        masks([row], [[True, False, True]]),
    )([row])
    assert batch["labels"].tolist() == [5, -100, 7]


def test_multipack_nesting_is_handed_on():
    seen = []

    def inner(features):
        seen.append(features)
        return {"labels": torch.tensor([label for group in features for row in group for label in row["labels"]])}

    XTFDataCollator(inner, masks([A, B], [[False, True], [True, True]]))([[A, B], [A]])
    assert [[row["labels"] for row in group] for group in seen[0]] == [
        [[-100, -100, -100, 8], [-100, 10, 11]],
        [[-100, -100, -100, 8]],
    ]


def test_a_batch_without_any_label_has_one_restored_and_counted():
    table = masks([A, B], [[False, False], [False, False]], best=[1, 0])
    collator = XTFDataCollator(DataCollatorForLanguageModeling(pad_token_id=0), table)
    assert collator([A, B])["labels"].tolist() == [[-100, -100, -100, 8], [-100, -100, -100, -100]]
    assert collator.counters.sum(0).tolist() == [1, 1]


def test_a_first_label_does_not_count_as_one_that_trains():
    table = masks([TEXT], [[True, False, False]], best=[2])
    assert collate([TEXT], table)["labels"].tolist() == [[20, -100, 22]]


def test_padding_free_may_blank_first_labels():
    table = masks([TEXT], [[True, True, False]])
    assert collate([TEXT], table, padding_free=True)["labels"].tolist() == [[-100, 21, -100]]


def test_unplanned_rows_stop_the_run():
    with pytest.raises(XTFError, match="was not scored"):
        collate([B], masks([A], [[True, True]]))


def test_other_labels_for_the_same_tokens_are_another_document():
    with pytest.raises(XTFError, match="was not scored"):
        collate([{**A, "labels": [-100, 6, 7, 8]}], masks([A], [[True, True]]))


def test_a_collator_that_rebuilds_labels_is_refused():
    def rebuilding(features):
        ids = torch.tensor([row["input_ids"] for row in features])
        return {"input_ids": ids, "labels": ids.clone()}

    with pytest.raises(XTFError, match="builds labels of its own"):
        XTFDataCollator(rebuilding, masks([A], [[False, True]]))([A])


def test_a_collator_that_loses_labels_is_refused():
    def losing(features):
        batch = DataCollatorForLanguageModeling(pad_token_id=0)(features)
        batch["labels"][:, -1] = -100
        return batch

    with pytest.raises(XTFError, match="builds labels of its own"):
        XTFDataCollator(losing, masks([A], [[True, True]]))([A])


def test_lookup_compares_the_complete_key():
    keys = np.zeros((2, 16), dtype=np.uint8)
    keys[1, 15] = 2
    table = MaskTable.build(keys, np.asarray([0, 1, 2]), np.asarray([True, False]), np.zeros(2, dtype=np.int64))
    assert table.lookup(bytes(15) + b"\x02") is not None
    assert table.lookup(bytes(15) + b"\x01") is None, "its first half is that of a planned document"


def test_without_masks_it_refuses():
    with pytest.raises(XTFError, match="no masks"):
        XTFDataCollator(DataCollatorForLanguageModeling(pad_token_id=0))([A])


def test_pickling_keeps_the_plan_and_is_compact():
    rows = [{"input_ids": list(range(i, i + 100)), "labels": list(range(i, i + 100))} for i in range(200)]
    table = masks(rows, [np.arange(100) % 3 > 0] * 200)
    copy = pickle.loads(pickle.dumps(XTFDataCollator(DataCollatorForLanguageModeling(pad_token_id=0), table)))
    assert torch.equal(copy(rows[:4])["labels"], collate(rows[:4], table)["labels"])
    assert sum(array.nbytes for array in (table.keys, table.offsets, table.bits, table.best)) < 200 * (100 / 8 + 40)


def test_lookup_of_many_documents():
    rng = np.random.default_rng(0)
    rows = [{"input_ids": list(ids), "labels": list(ids)} for ids in rng.integers(0, 50, (300, 12))]
    documents = collect(rows)
    keep = rng.random(12 * len(documents)) < 0.5
    best = np.zeros(len(documents), dtype=np.int64)
    table = MaskTable.build(documents.keys, documents.completion_offsets, keep, best)
    for index, key in enumerate(documents.keys):
        assert np.array_equal(table.lookup(key.tobytes())[0], keep[index * 12 : index * 12 + 12])
    assert table.lookup(bytes(16)) is None
