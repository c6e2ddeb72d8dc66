"""Keys made and compared as arrays are those of each document alone."""

from __future__ import annotations

import numpy as np
import pytest

from xtf_plugin.data import keys
from xtf_plugin.data.distinct import Distinct
from xtf_plugin.data.keys import distinct, document_key, document_keys
from xtf_plugin.data.ragged import offsets_of


def random_documents(rng, number, longest):
    lengths = rng.integers(0, longest, number)
    ids = [rng.integers(0, 1 << 22, length).astype(np.int32) for length in lengths]
    return ids, [rng.random(length) < 0.5 for length in lengths]


@pytest.mark.parametrize("longest", [2, 9, 65, 200])
def test_many_keys_are_those_of_each_document(monkeypatch, longest):
    """Documents without tokens, and masks of whole and broken words of 64 bits among them; in several chunks."""
    monkeypatch.setattr(keys, "CHUNK_TOKENS", 300)
    ids, masks = random_documents(np.random.default_rng(longest), 200, longest)
    offsets = offsets_of(np.asarray([len(mask) for mask in masks]))
    found = document_keys(np.concatenate(ids), np.concatenate(masks), offsets)
    assert [key.tobytes() for key in found] == [document_key(*each) for each in zip(ids, masks, strict=True)]


def test_no_documents_have_no_keys():
    nothing = np.zeros(0, dtype=np.int32)
    assert document_keys(nothing, nothing.astype(bool), np.zeros(1, dtype=np.int64)).shape == (0, 16)
    first, which = distinct(np.zeros((0, 16), dtype=np.uint8))
    assert len(first) == len(which) == 0


@pytest.mark.parametrize("alike", [0, 8, 15], ids=["apart", "equal first halves", "that differ in the last byte"])
def test_distinct_keys_in_order_of_first_appearance(alike):
    rng = np.random.default_rng(alike)
    given = rng.integers(0, 4, (300, 16), dtype=np.uint8)
    given[:, :alike] = 7
    given[:, alike + 1 :] = 0
    first, which = distinct(given)
    index: dict[bytes, int] = {}
    expected = [index.setdefault(key.tobytes(), len(index)) for key in given]
    assert which.tolist() == expected and len(first) == len(index) > 1
    assert [given[place].tobytes() for place in first] == list(index)


@pytest.mark.parametrize("tokens", [True, False])
def test_documents_that_come_again_in_a_block_and_in_a_later_one(tokens):
    rng, found = np.random.default_rng(0), Distinct(tokens=tokens)
    ids, masks = random_documents(rng, 12, 6)
    order = rng.integers(0, 12, (5, 9))
    for block in order:
        lengths = np.asarray([len(masks[at]) for at in block])
        found.extend(np.concatenate([ids[at] for at in block]), np.concatenate([masks[at] for at in block]), lengths)
    found.add(ids[0], masks[0])
    found.finish()
    given = [*order.reshape(-1).tolist(), 0]
    index: dict[bytes, int] = {}
    assert found.which.tolist() == [index.setdefault(document_key(ids[at], masks[at]), len(index)) for at in given]
    firsts = [given[found.which.tolist().index(which)] for which in range(len(index))]
    assert [key.tobytes() for key in found.keys] == list(index) and found.added == len(given)
    assert found.trained.tolist() == [int(masks[at].sum()) for at in firsts]
    assert found.lengths.tolist() == [len(masks[at]) for at in firsts]
    expected = np.concatenate([ids[at] for at in firsts]) if tokens else np.zeros(0)
    np.testing.assert_array_equal(found.input_ids, expected)
