"""Three pictures of what was measured, as SVG files beside docs/evidence.md: tables show digits, these show shapes.

Equal results give equal files: no dates, and element names from a fixed salt. Colours are Okabe and Ito's, which all
common kinds of colour blindness tell apart, and markers differ too. Matplotlib is imported when something is drawn.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from . import plan
from .comparison import METRICS, Comparison, Results, compare, label
from .runs import Scale, done

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREEDY_AND_SAMPLED = dict(zip(METRICS, ("greedy", "sampled at temperature 1"), strict=True))
_SWEEP = re.compile(r"(.+?),? below (-?\d+(?:\.\d+)?)")


def write(results_folder: Path, target: Path, scale: Scale) -> list[Path]:
    """Draw every picture whose numbers are there; return the files."""
    target.mkdir(parents=True, exist_ok=True)
    found = done(results_folder)
    files = []
    if (results_folder / "detection.json").exists():
        settings = json.loads((results_folder / "detection.json").read_text())
        files += sensitivity(settings, target / "sensitivity.svg")
    files += differences(compare(plan.jobs(["arms"], scale.seeds), found), target / "differences.svg")
    files += by_rate(rate_comparisons(found, scale.seeds), target / "rates.svg")
    return files


def _style() -> AbstractContextManager[None]:
    """The look of all pictures, and the salt that makes them reproducible; other code's settings are left alone."""
    import matplotlib

    options: dict[Any, Any] = {"svg.hashsalt": "xtf", "font.size": 9, "grid.alpha": 0.3}
    return matplotlib.rc_context({**options, "axes.grid": True, "axes.axisbelow": True})


def sweeps(rules: Mapping[str, Mapping[str, Any]]) -> dict[str, list[tuple[float, Mapping[str, Any]]]]:
    """Rules called "<family> below <number>", by family, from the lowest threshold to the highest."""
    found: dict[str, list[tuple[float, Mapping[str, Any]]]] = {}
    for name, one in rules.items():
        if match := _SWEEP.fullmatch(name):
            found.setdefault(match[1], []).append((float(match[2]), one))
    return {family: sorted(points, key=lambda point: point[0]) for family, points in found.items()}


def sensitivity(settings: Iterable[Mapping[str, Any]], path: Path) -> list[Path]:
    """How much of the planted spans each family of rules finds for the good tokens it costs, along its thresholds."""
    from matplotlib.figure import Figure

    own = [s for s in settings if s["world"] == s["base"] and not s["quantization"] and s["rate"] == plan.MAIN_RATE]
    families = list(dict.fromkeys(family for setting in own for family in sweeps(setting["rules"])))
    if not families:
        return []
    with _style():
        figure = Figure(figsize=(3.4 * len(own), 3.9))
        axes = figure.subplots(1, len(own), sharex=True, sharey=True, squeeze=False)
        for axis, setting in zip(axes[0], own, strict=True):
            for family, points in sweeps(setting["rules"]).items():
                _sweep(axis, family, points, families.index(family))
            default = setting["rules"]["default"]
            x, y = 100 * default["good_lost"], 100 * default["spans"]
            axis.plot(x, y, "*", color="black", markersize=14, fillstyle="none", label="default", zorder=5)
            axis.set(title=f"world {setting['world']}", xlabel="good tokens lost, %", ylim=(0, 108))
        _, widest = axes[0][0].get_xlim()
        axes[0][0].set_xlim(-0.05 * widest, 1.08 * widest)  # room for the thresholds at the ends
        axes[0][0].set_ylabel("tokens of planted spans found, %")
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="lower center", ncols=4, frameon=False)
        figure.tight_layout(rect=(0, 0.06 + 0.055 * (len(labels) > 4), 1, 1))
        return _save(figure, path)


def _sweep(axis: Any, family: str, points: Sequence[tuple[float, Mapping[str, Any]]], number: int) -> None:
    """One family's line, with the threshold written at both ends."""
    xs, ys = ([100 * one[key] for _, one in points] for key in ("good_lost", "spans"))
    colour = COLOURS[number % len(COLOURS)]
    axis.plot(xs, ys, color=colour, marker=MARKERS[number % len(MARKERS)], markersize=5, linewidth=1.2, label=family)
    for index in (0, -1):
        # above on the left or below on the right in turn: families that lie on each other write apart
        offset, side = ((6, -11), "left") if number % 2 else ((-6, 5), "right")
        place = {"xytext": offset, "textcoords": "offset points", "ha": side}
        text = f"{points[index][0]:g}".replace("-", "\N{MINUS SIGN}")
        axis.annotate(text, (xs[index], ys[index]), color=colour, fontsize=8, **place)


def differences(found: Comparison, path: Path) -> list[Path]:
    """Every arm's percentage points above plain SFT with 95 % intervals, greedy and sampled side by side."""
    from matplotlib.figure import Figure

    arms = [one for one in found.outcomes if one.differences]
    if not arms:
        return []
    with _style():
        figure = Figure(figsize=(9.5, 1.4 + 0.27 * len(arms)))
        axes = figure.subplots(1, 2, sharey=True)
        for axis, (metric, name), colour, marker in zip(
            axes, GREEDY_AND_SAMPLED.items(), COLOURS, MARKERS, strict=False
        ):
            means = [one.differences[metric].mean for one in arms]
            halves = [one.differences[metric].half for one in arms]
            halves = [half if half == half else 0.0 for half in halves]  # a single seed has no interval
            places = range(len(arms))
            axis.errorbar(means, places, xerr=halves, fmt=marker, color=colour, capsize=3, markersize=5, linewidth=1.3)
            axis.axvline(0, color="black", linewidth=1)
            axis.set(title=name, xlabel="percentage points above plain SFT")
        axes[0].set_yticks(range(len(arms)), [label(one.arm) for one in arms])
        axes[0].invert_yaxis()
        figure.tight_layout()
        return _save(figure, path)


def rate_comparisons(results: Results, seeds: int) -> dict[float, Comparison]:
    """The arms of the table of rates at every rate of the main world; the main rate is in the table of all arms."""
    rated = plan.jobs(["rates"], seeds)
    arms = {job.arm for job in rated}
    jobs = [*rated, *(job for job in plan.jobs(["arms"], seeds) if job.arm in arms)]
    rates = sorted({job.rate for job in jobs})
    return {rate: compare([job for job in jobs if job.rate == rate], results) for rate in rates}


def by_rate(found: Mapping[float, Comparison], path: Path) -> list[Path]:
    """Accuracy in the main world against the share of noise, a line an arm, with 95 % intervals."""
    from matplotlib.figure import Figure

    arms = list(dict.fromkeys(one.arm for comparison in found.values() for one in comparison.outcomes))
    if not arms:
        return []
    with _style():
        figure = Figure(figsize=(9.5, 4.2))
        axes = figure.subplots(1, 2, sharey=True)
        for axis, (metric, name) in zip(axes, GREEDY_AND_SAMPLED.items(), strict=True):
            for number, arm in enumerate(arms):
                points = [(r, o.interval(metric)) for r, c in found.items() for o in c.outcomes if o.arm == arm]
                shift = 0.6 * (number - (len(arms) - 1) / 2)  # intervals stand beside each other
                xs, ys = [100 * rate + shift for rate, _ in points], [mean for _, (mean, _) in points]
                halves = [half if half == half else 0.0 for _, (_, half) in points]
                look = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}
                axis.errorbar(xs, ys, yerr=halves, capsize=2, markersize=5, linewidth=1.2, label=label(arm), **look)
            axis.set(title=name, xlabel="noise among completion words, %", xticks=[100 * rate for rate in found])
        axes[0].set_ylabel(f"problems solved, world {plan.MAIN}, %")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="lower center", ncols=3, frameon=False)
        figure.tight_layout(rect=(0, 0.12, 1, 1))
        return _save(figure, path)


def _save(figure: Any, path: Path) -> list[Path]:
    figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
    return [path]
