"""A batch proves that masks are applied only if it would look otherwise without them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from xtf_plugin.data.documents import DocumentSet, collect
from xtf_plugin.errors import XTFError
from xtf_plugin.training import verification
from xtf_plugin.training.verification import LabelVerifier, PlannedDocuments, verify_batch

A = {"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 7, 8]}
B = {"input_ids": [9, 10, 11, 12], "labels": [-100, 10, 11, 12]}
TEXT = {"input_ids": [20, 21, 22, 23], "labels": [20, 21, 22, 23]}


def planned(rows, keep):
    return PlannedDocuments(collect(rows), np.asarray(keep, dtype=bool))


def batch(rows, **more):
    made = {name: torch.tensor([row[name] for row in rows]) for name in ("input_ids", "labels")}
    return {**made, "attention_mask": torch.ones_like(made["input_ids"]), **more}


def masked(row, *places):
    return {**row, "labels": [-100 if place in places else label for place, label in enumerate(row["labels"])]}


def test_dropped_labels_are_counted():
    plan = planned([A, B], [1, 0, 1, 0, 0, 1])
    assert verify_batch(plan, batch([masked(A, 2), masked(B, 1, 2)])) == 3


def test_an_unmasked_batch_that_lacks_exactly_one_drop_is_refused():
    with pytest.raises(XTFError, match="does not carry the planned labels"):
        verify_batch(planned([A, B], [1, 0, 1, 1, 1, 1]), batch([A, B]))
    with pytest.raises(XTFError, match="does not carry the planned labels"):
        verify_batch(planned([A], [1, 0, 1]), batch([A]))


def test_the_first_batch_is_checked():
    with pytest.raises(XTFError, match="does not carry the planned labels"):
        LabelVerifier(planned([A], [1, 0, 1])).check(batch([A]))


def test_a_batch_of_padding_alone_is_refused():
    with pytest.raises(XTFError, match="holds no planned document"):
        verify_batch(planned([A], [1, 0, 1]), batch([{**A, "labels": [-100] * 4}], attention_mask=torch.zeros(1, 4)))


def test_a_restored_label_is_allowed_and_proves_nothing():
    plan = planned([A, B], [0, 0, 0, 0, 0, 0])
    assert verify_batch(plan, batch([masked(A, 1, 3), masked(B, 1, 2, 3)])) == 3, "the other document's three"
    assert verify_batch(planned([masked(A, 1, 2)], [0]), batch([masked(A, 1, 2)])) == 0, "as it would be unmasked"


def test_a_restored_label_beside_others_is_refused():
    with pytest.raises(XTFError, match="does not carry the planned labels"):
        verify_batch(planned([A, B], [0, 0, 0, 0, 0, 1]), batch([masked(A, 1, 3), masked(B, 1, 2)]))


def test_a_first_token_trains_nothing_and_proves_nothing():
    plan = planned([TEXT], [0, 1, 1, 1])
    assert verify_batch(plan, batch([TEXT])) == 0
    assert verify_batch(plan, batch([masked(TEXT, 0)])) == 0


def test_tokens_that_are_planned_under_two_label_masks_prove_no_more_than_either():
    """One document, unmasked, looks like the other one with its drop."""
    rows = [A, masked(A, 3)]
    assert verify_batch(planned(rows, [1, 1, 0, 1, 1]), batch([masked(A, 3)])) == 0


@pytest.mark.parametrize("positions", [[2, 3, 4, 5], [2, 3, 0, 1]])
def test_a_row_whose_positions_do_not_begin_at_0_is_cut_as_while_planning(positions):
    row = {**A, "position_ids": positions}
    plan = planned([row], [1, 0, 1])
    given = batch([masked(A, 2)], position_ids=torch.tensor([positions]))
    assert verify_batch(plan, given) == (1 if 0 not in positions else 0), "a second document's first token is no proof"


class TestLabelVerifier:
    """Sixty-four batches and more with nothing to drop: then the first ones that have something."""

    ROWS = [{"input_ids": [index + 30, 6, 7, 8], "labels": [-100, 6, 7, 8]} for index in range(200)]

    def watched(self, first_drop, apply):
        keep = np.ones((200, 3), dtype=bool)
        keep[first_drop:, :2] = False
        verifier = LabelVerifier(planned(self.ROWS, keep.ravel()))
        for index, row in enumerate(self.ROWS):
            verifier.check(batch([masked(row, 1, 2) if apply and index >= first_drop else row]))
        return verifier

    @pytest.mark.parametrize("first_drop", [0, 63, 70, 190])
    def test_masks_that_are_not_applied_are_found_late_rather_than_never(self, first_drop):
        with pytest.raises(XTFError, match="does not carry the planned labels"):
            self.watched(first_drop, apply=False)

    @pytest.mark.parametrize(("first_drop", "proven"), [(0, True), (70, True), (193, False), (200, False)])
    def test_what_was_proven(self, first_drop, proven):
        verifier = self.watched(first_drop, apply=True)
        assert (verifier.batches, verifier.proven) == (200, proven)

    def test_no_batch_is_checked_after_the_proof(self, monkeypatch):
        checked = []
        monkeypatch.setattr(verification, "verify_batch", lambda *_: checked.append(1) or len(checked) // 3)
        self.watched(0, apply=True)
        assert len(checked) == 3


class TestLookUp:
    ROWS = [{"input_ids": [index + 30, 6, 7, 8], "labels": [-100, 6, 7, 8]} for index in range(3_000)]

    def test_only_documents_with_the_same_tokens_are_compared(self, monkeypatch):
        plan, compared = planned(self.ROWS, np.tile([True, True, False], 3_000)), []
        document = DocumentSet.document
        monkeypatch.setattr(
            DocumentSet, "document", lambda self, index: compared.append(index) or document(self, index)
        )
        assert verify_batch(plan, batch([masked(row, 3) for row in self.ROWS[40:48]])) == 8
        assert compared == list(range(40, 48))

    def test_two_documents_with_one_hash_are_distinguished(self, monkeypatch):
        monkeypatch.setattr(verification.xxhash, "xxh3_64_intdigest", lambda _: 5)
        plan = planned([A, B, TEXT], [1, 0, 1, 0, 0, 1, 1, 1, 1, 0])
        assert verify_batch(plan, batch([masked(A, 2), masked(B, 1, 2), masked(TEXT, 3)])) == 4
        with pytest.raises(XTFError, match="did not plan"):
            verify_batch(plan, batch([{**A, "input_ids": [5, 6, 7, 9]}]))

    def test_a_token_id_beyond_32_bits_is_another_token(self):
        with pytest.raises(XTFError, match="did not plan"):
            verify_batch(planned([A], [1, 0, 1]), batch([{**masked(A, 2), "input_ids": [5 + 2**32, 6, 7, 8]}]))

    def test_padding_without_an_attention_mask_is_removed(self):
        plan = planned([A, {"input_ids": [5, 6], "labels": [-100, 6]}], [1, 0, 1, 1])
        given = batch([{name: [*values, 0, 0] for name, values in masked(A, 2).items()}])
        given["labels"][:, 4:] = -100
        del given["attention_mask"]
        assert verify_batch(plan, given) == 1, "the longest document that the row begins with"
        ended = {"input_ids": [5, 6, 7, 0], "labels": [-100, 6, 7, 0]}  # its last token is also the padding
        batch_of_one = batch([{name: [*values, 0, 0] for name, values in masked(ended, 3).items()}])
        batch_of_one["labels"][:, 4:] = -100
        del batch_of_one["attention_mask"]
        assert verify_batch(planned([ended], [1, 1, 0]), batch_of_one) == 1
        given["labels"][:, 2] = 7
        with pytest.raises(XTFError, match="does not carry the planned labels"):
            verify_batch(plan, given)
