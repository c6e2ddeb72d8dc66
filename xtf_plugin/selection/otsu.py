"""Multi-Otsu: the thresholds of Eq. (7).

Image libraries search a histogram of 256 bins. Scores are not evenly spread, so bins would decide the class of a token;
here the split is exact over up to 65,536 distinct values, and over as many bins where there are more.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..data.ragged import chunks

MAX_DISTINCT = 1 << 16
_SLICE = 1 << 20

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class UndefinedSplit(ValueError):
    """There are fewer distinct values than classes."""


def multi_otsu(values: ArrayLike, weights: ArrayLike | None = None, classes: int = 5) -> Floats:
    """Split values into classes so that the variance between the classes is greatest (Multi-Otsu, as in Eq. (7)).

    Equals: try every way to cut the sorted distinct values into `classes` non-empty runs, and keep the one with the
    smallest weighted sum of squared distances to the class means. Done by dynamic programming in O(classes * n log n)
    for n distinct values. More than 65,536 distinct values are first put into 65,536 equal bins between the smallest
    and the largest, each represented by its largest value. Among equally good splits the lowest last threshold wins,
    then the lowest one before it.

    Args:
        values: (M,) finite numbers.
        weights: (M,) positive numbers, how often each value occurs; None: once each.
        classes: number of classes, at least 2.

    Returns:
        (classes - 1,) ascending float64 thresholds `t`, each the largest value of its class; the class of a value, from
        0, is `np.searchsorted(t, value)`.

    Raises:
        UndefinedSplit: fewer distinct values (or non-empty bins) than classes.
        ValueError: fewer than 2 classes, or values that are not finite.
    """
    if classes < 2:
        raise ValueError(f"a split needs at least 2 classes, not {classes}")
    flat = np.asarray(values).ravel()
    points, mass = _tally(flat, None if weights is None else np.asarray(weights).ravel())
    if not np.isfinite(points).all():
        raise ValueError("a split needs finite values; leave NaN and infinity out")
    if len(points) < classes:
        raise UndefinedSplit(f"{len(points)} distinct values cannot be split into {classes} classes")
    return points[_cuts(points, mass, classes) - 1]


def _tally(values: NDArray[np.generic], weights: NDArray[np.generic] | None) -> tuple[Floats, Floats]:
    """Distinct values, ascending, and the weight of each; slice by slice, to bound memory."""
    points: Floats = np.zeros(0)
    mass: Floats = np.zeros(0)
    for piece in chunks(len(values), _SLICE):
        part = values[piece]
        if weights is not None:  # most documents occur once, and counting takes a fifth of the time of adding up
            more = weights[piece] != 1
            points, mass = _added(points, mass, part[more], weights[piece][more])
            part = part[~more]
        points, mass = _added(points, mass, *np.unique(part, return_counts=True))
        if len(points) > MAX_DISTINCT:
            return _histogram(values, weights)
    return points, mass


def _added(points: Floats, mass: Floats, values: NDArray[Any], weights: NDArray[Any]) -> tuple[Floats, Floats]:
    """Distinct points with their weights, and some more values with theirs."""
    if not len(values):
        return points, mass
    points, merged = np.unique(np.concatenate([points, values.astype(np.float64)]), return_inverse=True)
    return points, np.bincount(merged.ravel(), weights=np.concatenate([mass, weights])).astype(np.float64)


def _histogram(values: NDArray[np.generic], weights: NDArray[np.generic] | None) -> tuple[Floats, Floats]:
    """The largest value of each non-empty bin, and the bin's weight."""
    low, high = float(values.min()), float(values.max())
    if not np.isfinite(high - low):
        raise ValueError("a split needs finite values; leave NaN and infinity out")
    top, mass = np.full(MAX_DISTINCT, -np.inf), np.zeros(MAX_DISTINCT)
    for piece in chunks(len(values), _SLICE):
        part = values[piece].astype(np.float64)
        where = np.minimum((part - low) / (high - low) * MAX_DISTINCT, MAX_DISTINCT - 1).astype(np.int64)
        count = None if weights is None else weights[piece]
        mass += np.bincount(where, weights=count, minlength=MAX_DISTINCT)
        np.maximum.at(top, where, part)
    return top[mass > 0], mass[mass > 0]


def _cuts(points: Floats, mass: Floats, classes: int) -> Ints:
    """How many of the points lie in the first 1, 2, … classes - 1 classes of the best split.

    The within-class sum of squares is a constant minus `sum over classes of S**2 / W`, with `W` a class's weight and
    `S` its weighted sum, so the latter is maximised. `best[j]` is its greatest value over splits of the first `j`
    points.
    """
    n = len(points)
    centred = points - np.average(points, weights=mass)  # S**2 / W of large values would cancel in the differences
    W = np.concatenate([[0.0], np.cumsum(mass)])
    S = np.concatenate([[0.0], np.cumsum(mass * centred)])
    best = np.full(n + 1, -np.inf)
    best[1:] = S[1:] ** 2 / W[1:]
    choices = []
    for c in range(2, classes):
        best, choice = _layer(best, S, W, c, n - (classes - c))
        choices.append(choice)
    last = np.arange(classes - 1, n)
    cut = int(last[np.argmax(best[last] + (S[n] - S[last]) ** 2 / (W[n] - W[last]))])
    cuts = [cut]
    for choice in reversed(choices):
        cut = int(choice[cut])
        cuts.append(cut)
    return np.asarray(cuts[::-1], dtype=np.int64)


def _layer(previous: Floats, S: Floats, W: Floats, low: int, high: int) -> tuple[Floats, Ints]:
    """One more class: for every `j` in low..high, the best `previous[i] + gain of the class i..j-1`, and its `i`.

    The best `i` never decreases as `j` grows, so those of every other `j` bound the search for the ones between: each
    round of halving checks O(n) pairs.
    """
    size = high - low + 1
    found = np.full(size + 2, low - 1, dtype=np.int64)  # the best i of j = low - 1 + m is at m, between two sentinels
    found[-1] = high - 1
    best = np.full(len(previous), -np.inf)
    step = 1 << size.bit_length()
    while step:
        m = np.arange(step, size + 1, 2 * step)
        if len(m):
            j = m + low - 1
            first = found[m - step]
            last = np.minimum(found[np.minimum(m + step, size + 1)], j - 1)
            count = last - first + 1
            starts = np.cumsum(count) - count
            i = np.arange(int(count.sum())) + np.repeat(first - starts, count)
            end = np.repeat(j, count)
            value = previous[i] + (S[end] - S[i]) ** 2 / (W[end] - W[i])
            best[j] = np.maximum.reduceat(value, starts)
            winners = np.flatnonzero(value == np.repeat(best[j], count))
            found[m] = i[winners[np.searchsorted(winners, starts)]]
        step //= 2
    choice = np.zeros(len(previous), dtype=np.int64)
    choice[low : high + 1] = found[1:-1]
    return best, choice
