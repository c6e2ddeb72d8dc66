"""The three pictures of docs/evidence.md, from the laboratory's results.

python -m tests.benchmarks.proof --data FOLDER --minutes 0 --pictures docs/images
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402  # after the backend is chosen
from matplotlib.axes import Axes  # noqa: E402

Results = Sequence[dict[str, Any]]
COLORS = {"default": "#1b7f5c", "paper": "#c2542d", "official": "#7a6bb0", "P < 0.1": "#b08900"}
MARKERS = ("o", "s", "^")
WIDEST = 0.03  # nats: arms beyond are cut there, and their value is written
SCORES = {  # heads for people, best known names
    "default": "default: relevance and novelty",
    "task_relevance": "explained (task relevance)",
    "influence_of_all": "influence of every sentence",
    "mean_log_probability": "mean log-probability",
    "typicality": "typicality",
    "attention_received": "attention received (paper)",
    "embedding_similarity": "embedding similarity (paper)",
}


def draw(found: Results, trained: Results, folder: Path) -> None:
    """Write the pictures of what was measured into a folder."""
    planted = [one for one in found if one["rate"] == 0.25 and one["shape"] == "spans" and one["phrases"] == "known"]
    planted = [one for one in planted if one["precision"] == "bf16"]
    noisy = [one for one in trained if one["rate"] > 0 and "in_format" not in one]  # one task: losses of others differ
    settings = {"svg.hashsalt": "xtf", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    with pyplot.rc_context(settings):
        for name, size, chosen, paint in (
            ("evidence-rules", (6.4, 4.2), planted, rules),
            ("evidence-scores", (6.8, 3.6), planted, scores),
            ("evidence-training", (7.6, 3.4), noisy, training),
        ):
            if chosen:
                figure = pyplot.figure(figsize=size, layout="constrained")
                paint(figure, chosen)
                figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
                pyplot.close(figure)


def rules(figure: Any, results: Results) -> None:
    """Noise found against good text lost, by rule, model and text."""
    axes: Axes = figure.add_subplot()
    models = list(dict.fromkeys(one["model"] for one in results))
    for name, color in COLORS.items():
        for model, marker in zip(models, MARKERS, strict=False):
            own = [one["rules"][name] for one in results if one["model"] == model and name in one["rules"]]
            lost, kept = [100 * one["good"] for one in own], [100 * one["found"] for one in own]
            label = f"{name}, {model}" if name == "default" else (name if model == models[0] else None)
            axes.scatter(lost, kept, c=color, marker=marker, s=34, label=label, alpha=0.85, clip_on=False)
    axes.plot([0, 60], [0, 60], color="#999999", linewidth=0.8, linestyle="--")
    axes.text(52, 54, "chance", color="#777777", rotation=34, ha="center", va="center")
    axes.set(xlim=(0, 60), ylim=(0, 100), xlabel="good tokens lost, %", ylabel="noise tokens found, %")
    axes.legend(frameon=False, loc="upper right", bbox_to_anchor=(1.0, 0.86))


def scores(figure: Any, results: Results) -> None:
    """AUC of each score over sentences: a dot for each model and text."""
    axes: Axes = figure.add_subplot()
    models = list(dict.fromkeys(one["model"] for one in results))
    for place, name in enumerate(reversed(SCORES)):
        for index, model in enumerate(models):
            own = [one["auc"].get(name, {}).get("all") for one in results if one["model"] == model]
            own = [value for value in own if value is not None]
            label = model if name == "task_relevance" else None
            color, height = COLORS["default"] if name == "default" else "#4a6fa5", place + 0.16 * (index - 1)
            marker = MARKERS[index % len(MARKERS)]
            axes.scatter(own, [height] * len(own), c=color, marker=marker, s=22, alpha=0.85, label=label)
    axes.axvline(0.5, color="#999999", linewidth=0.8, linestyle="--")
    axes.set_yticks(range(len(SCORES)), list(reversed(SCORES.values())))
    axes.set(xlim=(0.2, 1.01), xlabel="AUC: noise scores lower than good text (0.5: chance)")
    axes.legend(frameon=False, loc="upper left")


def training(figure: Any, results: Results) -> None:
    """Held-out loss against plain SFT, samples with noise, and loss of planted phrases, by arm; a dot for each seed."""
    plain = {one["seed"]: one for one in results if one["arm"] == "plain"}
    arms = [*[arm for arm in dict.fromkeys(one["arm"] for one in results) if arm != "plain"][::-1], "plain"]
    panels = figure.subplots(1, 3, sharey=True)
    for place, arm in enumerate(arms):
        own = [one for one in results if one["arm"] == arm and one["seed"] in plain]
        change = [one["loss"] - plain[one["seed"]]["loss"] for one in own]
        emitted, phrases = [100 * one["emitted"] for one in own], [one["loss_noise"] for one in own]
        for axes, values in zip(panels, (change, emitted, phrases), strict=True):
            color, mean = COLORS.get(arm, "#4a6fa5"), sum(values) / len(values)
            axes.barh(place, mean, color=color, alpha=0.35, height=0.6)
            axes.scatter(values, [place] * len(values), c=color, s=12)
            if axes is panels[0] and mean > WIDEST:
                axes.text(WIDEST, place, f"{mean:+.2f} ", ha="right", va="center")
    panels[0].set_yticks(range(len(arms)), [*arms[:-1], "plain SFT"])
    panels[0].set_xlim(-WIDEST, WIDEST)
    panels[0].axvline(0.0, color="#333333", linewidth=0.8)
    for axes, label in zip(
        panels, ("held-out loss, change (nats)", "samples with noise, %", "loss of noise"), strict=True
    ):
        axes.set_xlabel(label)
