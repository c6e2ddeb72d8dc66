"""The few statistics of the evidence: ROC-AUC with ties, confidence intervals of means, paired tests.

Written out because SciPy is not among the project's dependencies; tests hold them against textbook values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


def ranks(values: ArrayLike) -> Floats:
    """Ranks from 1, equal values share their mean rank; equals `scipy.stats.rankdata`."""
    array = np.asarray(values, dtype=np.float64)
    distinct, inverse, counts = np.unique(array, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    del distinct
    return (ends - (counts - 1) / 2)[inverse]


def auc(scores: ArrayLike, noise: ArrayLike) -> float:
    """P(a noise token scores lower than a good one), ties counted half; 0.5 = blind, NaN without either.

    Args:
        scores: (M,) low = to be dropped; NaN (undefined, never dropped) counts as the highest score.
        noise: (M,) bool.
    """
    array = np.asarray(scores, dtype=np.float64)
    array = np.where(np.isnan(array), np.inf, array)
    marks = np.asarray(noise, dtype=bool)
    bad, good = int(marks.sum()), int((~marks).sum())
    if not bad or not good:
        return float("nan")
    return float(1 - (ranks(array)[marks].sum() - bad * (bad + 1) / 2) / (bad * good))


def t_tail(t: float, df: int) -> float:
    """P(|T| > |t|) for Student's t, by numerical integration of its density."""
    if not math.isfinite(t):
        return 0.0
    log_c = math.lgamma((df + 1) / 2) - math.lgamma(df / 2) - 0.5 * math.log(df * math.pi)
    # with x = |t| + u / (1 - u) the tail becomes an integral over [0, 1)
    u = (np.arange(200_000) + 0.5) / 200_000
    x = abs(t) + u / (1 - u)
    density = np.exp(log_c - (df + 1) / 2 * np.log1p(x * x / df)) / (1 - u) ** 2
    return float(min(1.0, 2 * density.mean()))


@cache
def t_quantile(df: int, level: float = 0.95) -> float:
    """The two-sided critical value: P(|T| > value) = 1 - level."""
    low, high = 0.0, 1e3
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if t_tail(middle, df) > 1 - level else (low, middle)
    return (low + high) / 2


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half width of its 95 % confidence interval (Student's t); half width NaN for a single value."""
    array = np.asarray(values, dtype=np.float64)
    if len(array) < 2:
        return float(array.mean()), float("nan")
    return float(array.mean()), t_quantile(len(array) - 1) * float(array.std(ddof=1)) / math.sqrt(len(array))


def holm(values: Sequence[float]) -> list[float]:
    """p values adjusted by Holm's step-down method for being that many; NaN (no test) stays NaN and counts for none."""
    order = sorted((index for index, p in enumerate(values) if p == p), key=lambda index: values[index])
    adjusted, highest = [float("nan")] * len(values), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * values[index]))
        adjusted[index] = highest
    return adjusted


def paired(one: Sequence[float], other: Sequence[float]) -> tuple[float, float, float]:
    """Paired t-test of `one - other`: mean difference, half width of its 95 % interval, two-sided p."""
    difference = np.asarray(one, dtype=np.float64) - np.asarray(other, dtype=np.float64)
    mean, half = mean_interval(difference.tolist())
    deviation = float(difference.std(ddof=1)) if len(difference) > 1 else float("nan")
    if not deviation > 0:
        return mean, half, float("nan") if mean == 0 or len(difference) < 2 else 0.0
    t = mean / (deviation / math.sqrt(len(difference)))
    return mean, half, t_tail(t, len(difference) - 1)
