"""The tables of docs/evidence.md, from the laboratory's results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks.stats import paired
from tests.benchmarks.tables import table, write_into

from .noise import SPANS

Results = Sequence[dict[str, Any]]


def line(one: dict[str, Any]) -> str:
    """One result in a line, for the log."""
    if one["shape"] == "form":
        return f"running text, {one['text']}: found / good lost {_both(one['rules']['running_text'])}"
    rule = one["rules"]["default"]
    return (
        f"{one['model']} {one['text']} {one['rate']:.0%} {one['phrases']} {one['shape']}: found {rule['found']:.1%}, "
        f"good lost {rule['good']:.2%}, AUC {one['auc']['default']['all']:.3f}, tokens x {one['cost']['tokens']:.2f}, "
        f"seconds x {one['cost']['seconds']:.2f}"
    )


def train_line(one: dict[str, Any]) -> str:
    """One training run in a line, for the log."""
    return (
        f"{one['arm']} seed {one['seed']} {one['rate']:.0%}: loss {one['loss']:.4f}, digits {one['loss_digits']:.4f}, "
        f"emitted {one['emitted']:.1%}, good lost {one['dropped_good']:.1%}, noise dropped {one['dropped_noise']:.1%}, "
        f"{one['seconds']:.0f} s"
    )


MEASURES = {  # names of results, heads and digits
    "loss_digits": ("on digits", 3),
    "loss_answers": ("on answers", 4),
    "loss_noise": ("on planted phrases", 2),
}


def training_table(results: Results) -> str:
    """What each arm does, over its seeds: losses, samples with noise, and what it left out.

    The change is against plain SFT, with a 95 % interval over seeds; p is of a paired test against the random control
    (plain SFT where there is none), over the held-out completions of all seeds.
    """
    arms = {arm: {one["seed"]: one for one in results if one["arm"] == arm} for arm in _names(results, "arm")}
    plain, control = arms.get("plain", {}), arms.get("random") or arms.get("plain", {})
    oracle = arms.get("oracle", {})
    match = any("exact_match" in one for one in results)
    rows = []
    for arm, own in arms.items():
        compared = own is not plain and bool(own.keys() & plain.keys())
        mean, half, _ = paired(*_pairs(own, plain, "loss")) if compared else (0.0, 0.0, 0.0)
        interval = "" if half != half else f" ± {half:.4f}"  # a single seed has none
        each, others = _pairs(own, control, "losses")
        p = paired(sum(each, []), sum(others, []))[2] if own is not control and each else float("nan")
        rows.append(
            [
                arm,
                str(len(own)),
                f"{_mean(own, 'loss'):.4f}" + (f" ({mean:+.4f}{interval})" if compared else ""),
                _kept(own, oracle, plain) if compared else "–",
                "–" if p != p else f"{p:.1g}",
                *(f"{_mean(own, name):.{digits}f}" for name, (_, digits) in MEASURES.items()),
                _share(_mean(own, "emitted")),
                *([_share(_mean(own, "exact_match"))] if match else []),
                *(_share(_mean(own, name)) for name in ("dropped_noise", "dropped_good")),
            ]
        )
    head = ["arm", "seeds", "held-out loss", "of the oracle's gain", "p", *(name for name, _ in MEASURES.values())]
    more = ["samples with noise", *["right answers"] * match, "noise dropped", "good dropped"]
    return table([*head, *more], rows)


def formats_table(results: Results) -> str:
    """How often a model that was trained on a format answers in it, over the seeds of each arm."""
    measures = ("in_format", "in_format_greedy", "emitted", "dropped_noise", "dropped_good")
    rows = []
    for text in _names(results, "text"):
        for arm in _names(results, "arm"):
            own = {one["seed"]: one for one in results if (one["text"], one["arm"]) == (text, arm)}
            if own:
                shares = (_share(_mean(own, name)) for name in measures)
                rows.append([text, arm, str(len(own)), f"{_mean(own, 'loss'):.4f}", *shares])
    head = ["format", "arm", "seeds", "held-out loss", "in the format, sampled", "greedy"]
    return table([*head, "samples with noise", "noise dropped", "good dropped"], rows)


def _names(results: Results, key: str) -> list[str]:
    return list(dict.fromkeys(one[key] for one in results))


def _pairs(own: dict[int, Any], other: dict[int, Any], name: str) -> tuple[list[Any], list[Any]]:
    """A measure of the seeds that two arms share."""
    shared = [seed for seed in own if seed in other]
    return [own[seed][name] for seed in shared], [other[seed][name] for seed in shared]


def _mean(own: dict[int, Any], name: str) -> float:
    return sum(one[name] for one in own.values()) / len(own)


def _kept(own: dict[int, Any], oracle: dict[int, Any], plain: dict[int, Any]) -> str:
    """An arm's gain as a share of the oracle's, on the seeds that both have."""
    shared = own.keys() & oracle.keys()
    gain, best = (_gain({seed: arm[seed] for seed in shared}, plain) for arm in (own, oracle))
    if not best > 0:
        return "–"
    return _share(gain / best, 0) if gain > -best else "a loss"


def _gain(own: dict[int, Any], plain: dict[int, Any]) -> float:
    """By how much the loss is lower than that of plain SFT, on the seeds that both have."""
    one, other = _pairs(own, plain, "loss")
    return (sum(other) - sum(one)) / len(one) if one else 0.0


def _share(value: float | None, digits: int = 1) -> str:
    return "–" if value is None or value != value else f"{value:.{digits}%}"


def _both(rule: dict[str, float]) -> str:
    return f"{_share(rule.get('found'))} / {_share(rule.get('good'))}" if rule else "–"


def _auc(value: float | None) -> str:
    return "–" if value is None or value != value else f"{value:.3f}"


def _where(one: dict[str, Any]) -> list[str]:
    more = [
        part
        for part in (one["precision"] * (one["precision"] != "bf16"), "new phrases" * (one["phrases"] == "new"))
        if part
    ]
    return [" ".join([one["model"], *more]), one["text"], _share(one["rate"], 0)]


def found_table(results: Results) -> str:
    """What the default finds of planted spans, by kind, and what it loses."""
    rows = [
        [
            *_where(one),
            _share(one["rules"]["default"]["found"]),
            _share(one["rules"]["default"]["good"], 2),
            _auc(one["auc"]["default"]["all"]),
            *(_share(one["rules"]["default"].get(kind), 0) for kind in SPANS),
            f"{one['cost']['tokens']:.2f} / {one['cost']['seconds']:.2f}",
        ]
        for one in results
    ]
    head = ["model", "text", "noise", "found", "good lost", "AUC", *SPANS, "cost, tokens / seconds"]
    return table(head, rows)


def scores_table(results: Results) -> str:
    """AUC of each score over all kinds."""
    names = list(dict.fromkeys(name for one in results for name in one["auc"]))
    rows = [[*_where(one), *(_auc(one["auc"].get(name, {}).get("all")) for name in names)] for one in results]
    return table(["model", "text", "noise", *names], rows)


def rules_table(results: Results) -> str:
    """Found and lost of the other rules."""
    names = list(dict.fromkeys(name for one in results for name in one["rules"]))
    rows = [
        [
            *_where(one),
            *(_both(one["rules"].get(name, {})) for name in names),
        ]
        for one in results
    ]
    return table(["model", "text", "noise", *(f"{name}: found / good lost" for name in names)], rows)


def forms_of_lines_table(results: Results) -> str:
    """What `running_text` finds and loses, and its AUC."""
    rows = [
        [
            one["text"],
            _share(one["noise"], 0),
            *(_share(one["rules"]["running_text"].get(part)) for part in ("found", "good")),
            *(_auc(one["auc"][part]) for part in ("lines", "tokens")),
        ]
        for one in results
    ]
    return table(["text", "noise", "found", "good lost", "AUC over lines", "AUC over tokens"], rows)


def _made(results: Results) -> str:
    return "\n".join(dict.fromkeys(f"{one['made']}." for one in results)) + "\n"


def _titled(*tables: tuple[str, Results, tuple[Callable[[Results], str], ...]]) -> list[str]:
    """A title and its tables, for all that was measured."""
    return [
        part
        for title, chosen, made in tables
        if chosen
        for part in (f"### {title}\n", *(make(chosen) for make in made))
    ]


def _planted(results: Results) -> Results:
    return [one for one in results if one["rate"] > 0 and one["shape"] == "spans"]


def _clean(results: Results) -> Results:
    return [one for one in results if one["rate"] == 0 and one["noise"] == 0 and one["shape"] != "form"]


def everything(results: Results, trained: Results = ()) -> str:
    """The tables that answer whether it helps, as Markdown."""
    if not results and not trained:
        return "not measured yet\n"
    by_form = [one for one in results if one["shape"] == "form"]
    labelled = [one for one in results if one["rate"] == 0 and one["noise"] > 0 and one["shape"] != "form"]
    parts = [_made([*results, *trained])]
    parts += _titled(
        ("Planted spans: the default", _planted(results), (found_table,)),
        ("Clean text: the default", _clean(results), (found_table,)),
        ("Real noise", labelled, (scores_table, rules_table)),
        ("Lines without running text: `running_text`, which asks no model", by_form, (forms_of_lines_table,)),
    )
    problems = [one for one in trained if "in_format" not in one]
    for rate in dict.fromkeys(one["rate"] for one in problems):
        chosen = [one for one in problems if one["rate"] == rate]
        parts += [f"### Training on rows with {rate:.0%} noise\n", training_table(chosen)]
    if formats := [one for one in trained if "in_format" in one]:
        parts += ["### Training on answers in a format, with 25% noise\n", formats_table(formats)]
    return "\n".join(parts)


def further(results: Results) -> str:
    """The tables of single scores, of other rules and of single tokens, as Markdown."""
    tokens = [one for one in results if one["shape"] == "tokens"]
    return "\n".join(
        [
            _made([one for one in results if one["shape"] != "form"]),
            *_titled(
                ("Planted spans: AUC of each score, by sentence", _planted(results), (scores_table,)),
                ("Planted spans: other rules", _planted(results), (rules_table,)),
                ("Clean text: what every rule drops", _clean(results), (rules_table,)),
                ("Single tokens", tokens, (scores_table, rules_table)),
            ),
        ]
    )


def write(page: Path, text: str) -> None:
    """Put the tables into a page."""
    write_into(page, text)
