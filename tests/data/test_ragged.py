"""Arithmetic on ragged arrays where it takes a shortcut."""

from __future__ import annotations

import numpy as np
import pytest

from xtf_plugin.data import ragged
from xtf_plugin.data.ragged import Layout, gathered, offsets_of, segment_means, stretches

STARTS = np.asarray([0, 3, 4, 9])
NAN = float("nan")


@pytest.mark.parametrize("chunk", [1, 2, 5, 1 << 17])
@pytest.mark.parametrize("values", [[0.1, -2.0, NAN, 7.0], [0.1, 0.1, 0.1, 0.1]])
def test_one_value_in_each_segment_is_its_mean(monkeypatch, chunk, values):
    monkeypatch.setattr(ragged, "CHUNK_TOKENS", chunk)
    scores = np.repeat(np.asarray(values, dtype=np.float32), [3, 1, 5, 3])
    assert segment_means(scores, Layout(np.asarray([0, 9, 12]), np.ones(2, dtype=np.int64)), STARTS) is scores


@pytest.mark.parametrize("chunk", [1, 2, 5, 1 << 17])
@pytest.mark.parametrize("place", range(12))
@pytest.mark.parametrize("other", [0.5, NAN])
def test_any_other_value_in_a_segment_changes_the_mean(monkeypatch, chunk, place, other):
    monkeypatch.setattr(ragged, "CHUNK_TOKENS", chunk)
    scores = np.repeat(np.asarray([1, 2, 3, 4], dtype=np.float32), [3, 1, 5, 3])
    scores[place] = other
    expected = np.empty_like(scores)
    for low, high in zip(STARTS, [*STARTS[1:], 12], strict=True):
        expected[low:high] = np.nanmean(scores[low:high]) if np.isfinite(scores[low:high]).any() else NAN
    expected[np.isnan(scores)] = NAN
    found = segment_means(scores, Layout(np.asarray([0, 9, 12]), np.ones(2, dtype=np.int64)), STARTS)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("chunk", [1, 7, 1 << 17])
def test_gathered_spans_are_those_of_their_indices(monkeypatch, chunk):
    monkeypatch.setattr(ragged, "CHUNK_TOKENS", chunk)
    rng = np.random.default_rng(0)
    values, lengths = rng.random(100, dtype=np.float32), rng.integers(0, 9, 30)
    starts = rng.integers(0, 100 - lengths)
    np.testing.assert_array_equal(gathered(values, starts, lengths), values[stretches(starts, lengths)])
    assert len(gathered(values, starts[:0], lengths[:0])) == 0 == offsets_of(lengths[:0])[-1]
