"""Arms against plain SFT on the same seeds, with p values that know how many comparisons a table makes.

Tables and pictures both draw from here, so they cannot disagree.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .models import LIMIT
from .runs import Job
from .stats import holm, mean_interval, paired
from .worlds import GOOD_KINDS

Results = Mapping[str, dict[str, Any]]
METRICS = ("accuracy", "sampled")
LABELS = {
    "plain": "plain SFT",
    "plain_kept_tokens": "plain SFT, as many trained tokens",
    "plain_wall_clock": "plain SFT, as much wall-clock",
    "random_tokens": "random control, tokens",
    "random_spans": "random control, spans",
    "oracle": "oracle: exactly the planted noise",
}


def label(arm: str) -> str:
    """An arm's name for readers."""
    return LABELS.get(arm, arm)


@dataclass(frozen=True)
class Difference:
    """Percentage points above plain SFT: mean, half width of the 95 % interval, and Holm's p within the table."""

    mean: float
    half: float
    p: float


@dataclass(frozen=True)
class Outcome:
    """One arm: its results by seed, and per metric its difference from plain SFT, if there is something to compare."""

    arm: str
    by_seed: Mapping[int, dict[str, Any]]
    differences: Mapping[str, Difference]

    def interval(self, metric: str) -> tuple[float, float]:
        """Mean and half width of the 95 % interval, in per cent."""
        return mean_interval([100 * one[metric] for one in self.by_seed.values()])

    def mean(self, name: str) -> float:
        """Mean of a number over the seeds."""
        return float(np.mean([one[name] for one in self.by_seed.values()]))

    def dropped(self, wanted: Callable[[str], bool]) -> float:
        """Mean share dropped over the token kinds that are wanted; NaN if there are none."""
        values = [v for one in self.by_seed.values() for kind, v in one["dropped_by_kind"].items() if wanted(kind)]
        return float(np.mean(values)) if values else float("nan")


@dataclass(frozen=True)
class Comparison:
    """The arms of one table; `seeds` are those of every row, None if each row has its own."""

    outcomes: Sequence[Outcome]
    seeds: tuple[int, ...] | None

    @property
    def tests(self) -> int:
        """How many comparisons were tested, for which the p values are corrected."""
        return sum(d.p == d.p for one in self.outcomes for d in one.differences.values())


def _by_arm(jobs: Sequence[Job], results: Results) -> dict[str, dict[int, dict[str, Any]]]:
    """What is there of some jobs, by arm and seed."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for job in jobs:
        if job.key in results:
            found.setdefault(job.arm, {})[job.seed] = results[job.key]
    return found


def compare(jobs: Sequence[Job], results: Results) -> Comparison:
    """What is there of some jobs that differ in arm and seed alone.

    All arms are cut to the seeds that every one of them has, unless those are fewer than two.
    """
    by_arm = _by_arm(jobs, results)
    common = set.intersection(*(set(found) for found in by_arm.values())) if by_arm else set()
    if len(common) >= 2:
        by_arm = {arm: {seed: found[seed] for seed in sorted(common)} for arm, found in by_arm.items()}
    plain = by_arm.get("plain", {})
    comparable = [arm for arm, found in by_arm.items() if arm != "plain" and found.keys() & plain.keys()]
    pairs = [(arm, metric) for arm in comparable for metric in METRICS]
    tested = {(arm, metric): _paired(by_arm[arm], plain, metric) for arm, metric in pairs}
    adjusted = dict(zip(pairs, holm([tested[pair][2] for pair in pairs]), strict=True))
    outcomes = []
    for arm, found in by_arm.items():
        own = {m: Difference(*tested[arm, m][:2], adjusted[arm, m]) for m in METRICS if (arm, m) in tested}
        outcomes.append(Outcome(arm, found, own))
    return Comparison(outcomes, tuple(sorted(common)) if len(common) >= 2 else None)


def _paired(
    found: Mapping[int, dict[str, Any]], plain: Mapping[int, dict[str, Any]], metric: str
) -> tuple[float, float, float]:
    seeds = sorted(found.keys() & plain.keys())
    return paired([100 * found[seed][metric] for seed in seeds], [100 * plain[seed][metric] for seed in seeds])


HEAD = ("arm", "seeds", "kept", "noise dropped", "good lost", "greedy, %", "vs plain", "sampled, %", "vs plain")


def cells(one: Outcome) -> list[str]:
    """A row of an accuracy table, under HEAD."""
    name = label(one.arm)
    spans = one.dropped(lambda kind: kind.endswith("/span"))
    singles = one.dropped(lambda kind: kind.endswith("/single"))
    lost = one.dropped(lambda kind: kind in GOOD_KINDS and kind != "eos")
    row = [
        f"**{name}**" if one.arm == "default" else name,
        str(len(one.by_seed)),
        f"{one.mean('kept'):.0%}",
        "–" if spans != spans else f"{spans:.0%} / {singles:.0%}",
        f"{lost:.0%}",
    ]
    for metric in METRICS:
        mean, half = one.interval(metric)
        difference = one.differences.get(metric)
        row.append(f"{mean:.1f} ± {half:.1f}" if half == half else f"{mean:.1f}")
        row.append("" if difference is None else f"{difference.mean:+.1f} (p {_p(difference.p)})")
    return row


def _p(p: float) -> str:
    return "–" if p != p else "< 0.001" if p < 0.001 else f"{p:.3f}"


def caption(found: Comparison) -> str:
    """Which seeds the rows have, and what p is."""
    if found.seeds is not None:
        where = f"Every row has the seeds {_list(found.seeds)}"
    else:
        arms: dict[tuple[int, ...], list[str]] = {}
        for one in found.outcomes:
            arms.setdefault(tuple(sorted(one.by_seed)), []).append(label(one.arm))
        own = "; ".join(f"{_list(seeds)} in {' / '.join(names)}" for seeds, names in arms.items())
        where = f"Not two seeds are there for every arm, so each row has its own: {own}"
    return where + (f". p is Holm's, for this table's {found.tests} tests against plain SFT." if found.tests else ".")


def _list(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))


def cut_off(found: Comparison) -> str:
    """The highest share of greedy completions that ended at the limit, and whose it is."""
    worst = max(found.outcomes, key=lambda one: one.mean("truncated"))
    share = worst.mean("truncated")
    if not share:
        return f"No greedy completion reached the limit of {LIMIT} tokens."
    return f"Greedy completions cut at {LIMIT} tokens: at most {share:.1%}, of {label(worst.arm)}."


RIVALS = ("default, first look", "random_tokens", "random_spans", "DFT loss", "drop unknown", "oracle")


def against(jobs: Sequence[Job], results: Results) -> list[list[str]]:
    """Rows of the default's paired differences from its rivals, on the seeds that both have: greedy, then sampled."""
    by_arm = _by_arm(jobs, results)
    rows = []
    for rival in RIVALS:
        if len(by_arm.get(rival, {}).keys() & by_arm.get("default", {}).keys()) > 1:
            cells = []
            for metric in METRICS:
                mean, half, p = _paired(by_arm["default"], by_arm[rival], metric)
                cells.append(f"{mean:+.1f} ± {half:.1f} (p {_p(p)})")
            rows.append([label(rival), *cells])
    return rows
