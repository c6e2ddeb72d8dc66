"""Multi-Otsu against brute force over all partitions, and against scikit-image where its histogram loses nothing."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.filters import threshold_multiotsu

from xtf_plugin.selection import otsu
from xtf_plugin.selection.otsu import UndefinedSplit, multi_otsu


def within(values: np.ndarray, weights: np.ndarray, thresholds: np.ndarray) -> float:
    """Weighted sum of squared distances to the class means."""
    label = np.searchsorted(thresholds, values)
    total = 0.0
    for c in np.unique(label):
        v, w = values[label == c], weights[label == c]
        total += float((w * (v - np.average(v, weights=w)) ** 2).sum())
    return total


def brute_force(values: np.ndarray, weights: np.ndarray, classes: int) -> float:
    points = np.unique(values)
    cuts = combinations(range(len(points) - 1), classes - 1)
    return min(within(values, weights, points[list(cut)]) for cut in cuts)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(-40, 40), st.integers(1, 9)), min_size=2, max_size=14),
    st.integers(2, 5),
    st.floats(0.01, 100),
    st.floats(-1e4, 1e4),
)
def test_no_partition_of_the_distinct_values_is_better(pairs, classes, scale, shift):
    values = np.array([v for v, _ in pairs]) * scale + shift
    weights = np.array([w for _, w in pairs], dtype=float)
    distinct = len(np.unique(values))
    if distinct < classes:
        with pytest.raises(UndefinedSplit, match=f"{distinct} distinct values .* {classes} classes"):
            multi_otsu(values, weights, classes)
        return
    thresholds = multi_otsu(values, weights, classes)
    assert len(np.unique(np.searchsorted(thresholds, values))) == classes, "a class is empty"
    assert set(thresholds) <= set(values), "a threshold is the largest value of its class"
    best = brute_force(values, weights, classes)
    assert within(values, weights, thresholds) <= best * (1 + 1e-7) + 1e-7 * scale**2


@pytest.mark.parametrize(("classes", "seed"), [(2, 0), (2, 1), (3, 0), (3, 1), (4, 0), (4, 1), (4, 2), (5, 0)])
def test_equals_skimage_on_integers_that_fill_256_bins(classes, seed):
    rng = np.random.default_rng(seed)
    centres = rng.choice(256, 6, replace=False)
    values = np.clip(rng.normal(rng.choice(centres, 4000), 8).round(), 0, 255).astype(np.uint8)
    values[:2] = 0, 255  # one bin for each integer
    np.testing.assert_array_equal(multi_otsu(values, classes=classes), threshold_multiotsu(values, classes=classes))


def test_hand_made_classes():
    values = [1, 2, 10, 11, 12, 50]
    np.testing.assert_array_equal(multi_otsu(values, classes=3), [2, 12])
    np.testing.assert_array_equal(np.searchsorted(multi_otsu(values, classes=3), values), [0, 0, 1, 1, 1, 2])
    assert multi_otsu(values, classes=3).dtype == np.float64


def test_weights_are_repetitions_and_decide():
    values, weights = np.array([0.0, 1.0, 2.0, 3.1]), np.array([1, 50, 1, 50])
    expected = multi_otsu(np.repeat(values, weights), classes=2)
    np.testing.assert_array_equal(multi_otsu(values, weights, 2), expected)
    assert multi_otsu([0, 1, 2], [9, 1, 1], 2) == [0]
    assert multi_otsu([0, 1, 2], [1, 1, 9], 2) == [1]


def test_order_of_the_values_does_not_matter():
    rng = np.random.default_rng(3)
    values, weights = rng.normal(size=500), rng.integers(1, 5, 500)
    order = rng.permutation(500)
    np.testing.assert_array_equal(multi_otsu(values, weights), multi_otsu(values[order], weights[order]))


def test_a_tie_goes_to_the_lowest_threshold():
    np.testing.assert_array_equal(multi_otsu([-1.0, 0.0, 1.0], classes=2), [-1.0])
    np.testing.assert_array_equal(multi_otsu([-3.0, -1.0, 1.0, 3.0], classes=3), [-3.0, -1.0])


def test_as_many_values_as_classes():
    np.testing.assert_array_equal(multi_otsu([4.0, 1.0, 3.0], classes=3), [1.0, 3.0])


def test_large_offsets_do_not_drown_the_differences():
    values = np.array([0.0, 1, 10, 11, 30, 31])
    np.testing.assert_array_equal(multi_otsu(values + 1e8, classes=3), [1e8 + 1, 1e8 + 11])


@pytest.mark.parametrize("weighted", [False, True])
def test_slices_change_nothing(monkeypatch, weighted):
    rng = np.random.default_rng(4)
    values = rng.integers(0, 60, 999).astype(np.float32) / 7
    weights = rng.integers(1, 4, 999) if weighted else None
    expected = multi_otsu(values, weights)
    monkeypatch.setattr(otsu, "_SLICE", 10)
    np.testing.assert_array_equal(multi_otsu(values, weights), expected)


@pytest.mark.parametrize("weighted", [False, True])
def test_very_many_distinct_values_are_binned_within_one_bin(weighted):
    rng = np.random.default_rng(5)
    values = np.concatenate([rng.normal(c, 0.02, 30_000) for c in (0.1, 0.3, 0.5, 0.7, 0.9)])
    weights = rng.integers(1, 3, len(values)) if weighted else None
    thresholds = multi_otsu(values, weights)
    assert len(np.unique(values)) > otsu.MAX_DISTINCT
    assert set(thresholds) <= set(values)
    np.testing.assert_allclose(thresholds, [0.2, 0.4, 0.6, 0.8], atol=0.06)
    np.testing.assert_array_equal(np.bincount(np.searchsorted(thresholds, values)), [30_000] * 5)


def test_the_order_of_very_many_values_does_not_matter():
    rng = np.random.default_rng(6)
    values, weights = rng.random(300_000), rng.integers(1, 3, 300_000)
    order = rng.permutation(len(values))
    np.testing.assert_array_equal(multi_otsu(values, weights), multi_otsu(values[order], weights[order]))


def test_what_cannot_be_split():
    with pytest.raises(UndefinedSplit):
        multi_otsu([], classes=2)
    with pytest.raises(UndefinedSplit):
        multi_otsu([2.0] * 9, classes=2)
    with pytest.raises(ValueError, match="2 classes"):
        multi_otsu([1.0, 2.0], classes=1)
    with pytest.raises(ValueError, match="finite"):
        multi_otsu([1.0, 2.0, np.nan], classes=2)
