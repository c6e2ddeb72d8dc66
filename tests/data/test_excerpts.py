"""Excerpts: a segment after the rest of its document, and its predictions at their places."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from xtf_plugin.data import excerpts
from xtf_plugin.data.documents import collect


def test_an_excerpt_is_the_visible_context_and_the_segment():
    documents = collect(
        [
            {"input_ids": [1, 2, 3, 4, 5, 6], "labels": [-100, 2, 3, -100, 5, 6]},
            {"input_ids": [7, 8, 9], "labels": [-100, -100, -100]},
            {"input_ids": [1, 9, 8, 7], "labels": [1, 9, 8, 7]},
        ]
    )
    starts, hidden = np.asarray([0, 2, 4, 6]), np.asarray([True, False, False, True] + [True, False, True, False])
    made = excerpts.excerpts(documents, hidden, starts, np.asarray([1, 3]), np.zeros(8, dtype=bool))
    found = [(ids.tolist(), labels.tolist()) for ids, labels in map(made.document, made.row_documents)]
    assert found == [([1, 3, 4, 5, 6], [False] * 3 + [True] * 2), ([9, 8, 7], [False, True, True])]


def test_values_come_back_to_their_places():
    documents = collect([{"input_ids": list(range(10, 18)), "labels": list(range(10, 18))}] * 2)
    starts, hidden = np.asarray([0, 3, 5]), np.zeros(8, dtype=bool)

    def predict(made):
        values = made.input_ids[made.completion].astype(np.float32)
        return SimpleNamespace(logprobs=values, entropy=values + 100, deviation=values + 200)

    found = excerpts.predictions_without(documents, hidden, starts, np.asarray([2, 0]), hidden, predict)
    expected = np.asarray([10, 11, 12, np.nan, np.nan, 15, 16, 17], dtype=np.float32)
    np.testing.assert_array_equal(found.logprobs, expected)
    np.testing.assert_array_equal(found.deviation, expected + 200)


def test_no_wanted_segment_needs_no_reference():
    documents = collect([{"input_ids": [1, 2], "labels": [1, 2]}])
    none = np.zeros(0, dtype=np.int64)
    hidden = np.zeros(2, dtype=bool)
    found = excerpts.predictions_without(documents, hidden, np.asarray([0]), none, hidden, lambda _: 1 / 0)
    assert np.isnan(found.logprobs).all()


def test_the_break_of_a_line_of_which_something_is_left_stays():
    """Else the segment would be glued to a line that it does not belong to."""
    ids = list(range(1, 10))
    documents = collect([{"input_ids": ids, "labels": [-100, *ids[1:]]}])  # 2 3 4n | 5 6n | 7 8 9
    breaks = np.isin(ids[1:], [4, 6])
    starts, wanted = np.asarray([0, 1, 3, 5]), np.asarray([3])
    for hidden, past in [([3, 4], [1, 2, 4, 5, 6]), ([2, 3, 4], [1, 5, 6]), ([3, 4, 5, 6], [1, 2, 4])]:
        made = excerpts.excerpts(documents, np.isin(ids[1:], hidden), starts, wanted, breaks)
        assert made.document(0)[0].tolist() == [*past, 7, 8, 9]
