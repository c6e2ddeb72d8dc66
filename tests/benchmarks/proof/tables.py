"""The tables of docs/evidence.md, printed from what was measured; a table whose numbers are missing is left out."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from . import plan
from .candidates import DEFAULT
from .comparison import HEAD, Results, against, caption, cells, compare, cut_off
from .folders import head
from .noise import FORMS, KINDS
from .runs import Job, Scale, done
from .worlds import GOOD_KINDS

BEGIN, END = "<!-- tables -->", "<!-- /tables -->"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first are right-aligned."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def environment(commit: str | None = None) -> str:
    """Hardware, versions and commit (None: the one that is checked out), as the tables' caption."""
    names = ("torch", "transformers", "trl", "peft", "bitsandbytes")
    packages = ", ".join(f"{name} {version(name)}" for name in names)
    models = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.split(":", 1)[1].strip() for line in models if line.startswith("model name")), platform.machine())
    return f"{cpu}, one thread a process; Python {platform.python_version()}, {packages}; commit {commit or head()}."


def accuracy_table(title: str, jobs: Sequence[Job], results: Results) -> str:
    """Greedy and sampled accuracy of arms on the same seeds, with intervals and paired tests against plain SFT."""
    found = compare(jobs, results)
    if not found.outcomes:
        return ""
    rows = [cells(one) for one in found.outcomes]
    return f"### {title}\n\n{caption(found)}\n\n{table(HEAD, rows)}\n{cut_off(found)}\n"


def auc_table(setting: dict[str, Any]) -> str:
    """AUC of every score, by noise kind, spans and single tokens."""
    columns = [f"{kind}/all/{shape}" for shape in ("span", "single") for kind in ("all", *KINDS)]
    head = ["score", *(("spans" if c.startswith("all") else c.split("/")[0]) for c in columns[:7])]
    head += [("single tokens" if c.startswith("all") else c.split("/")[0]) for c in columns[7:]]
    rows = [[name, *(_auc(aucs[column]) for column in columns)] for name, aucs in setting["auc"].items()]
    return f"### AUC: {_where(setting)}\n\n{table(head, rows)}\n"


def _auc(value: float) -> str:
    return f"{value:.2f}".lstrip("0") if value < 0.995 else "1.00"


def _where(setting: dict[str, Any]) -> str:
    reference = f", {setting['quantization']} reference" if setting["quantization"] else ""
    return (
        f"world {setting['world']}, base model {setting['base']}{reference}, noise rate {setting['rate']:.0%} "
        f"({setting['tokens']:,} completion tokens, {setting['noise']:.1%} noise)"
    )


def conditions_table(settings: Sequence[dict[str, Any]]) -> str:
    """The main scores over all settings: what a base model that knows less, or a 4-bit reference, changes."""
    names = [
        "attention received, all",
        "relevance to the dataset",
        "log-probability, 1",
        "log-probability, 9",
        "log-probability, line",
        "typicality, 1",
        "typicality, line",
        "opening, sentence, clip 8",
        "opening, line, clip 8",
        DEFAULT,
    ]
    head = ["world", "base", "reference", "rate", *names]
    rows = []
    for setting in settings:
        if "auc" in setting:
            aucs = [setting["auc"][name] for name in names]
            cells = [f"{_auc(one['all/all/span'])} / {_auc(one['all/all/single'])}" for one in aucs]
            where = [setting["world"], setting["base"], setting["quantization"] or "fp32", f"{setting['rate']:.0%}"]
            rows.append([*where, *cells])
    return f"### AUC of spans / single tokens in every setting\n\n{table(head, rows)}\n"


def rules_table(setting: dict[str, Any]) -> str:
    """What each rule drops."""
    head = [
        "rule",
        "dropped",
        "precision",
        "spans",
        "single tokens",
        "good lost",
        *(f"{k} lost" for k in GOOD_KINDS[:4]),
    ]
    rows = []
    for name, one in setting["rules"].items():
        shares = [one[key] for key in ("dropped", "precision", "spans", "singles", "good_lost")]
        shares += [one["lost"][kind] for kind in GOOD_KINDS[:4]]
        rows.append([name, *("–" if share != share else f"{share:.1%}" for share in shares)])
    return f"### Rules: {_where(setting)}\n\n{table(head, rows)}\n"


def default_table(settings: Sequence[dict[str, Any]]) -> str:
    """What the default drops in every setting; at rate 0, what filtering clean data costs."""
    head = ["world", "base", "reference", "rate", "dropped", "precision", "spans", "single tokens", "good lost"]
    head += [f"{kind} lost" for kind in GOOD_KINDS[:4]]
    rows = []
    for setting in settings:
        one = setting["rules"]["default"]
        shares = [one[key] for key in ("dropped", "precision", "spans", "singles", "good_lost")]
        shares += [one["lost"][kind] for kind in GOOD_KINDS[:4]]
        where = [setting["world"], setting["base"], setting["quantization"] or "fp32", f"{setting['rate']:.0%}"]
        rows.append([*where, *("–" if share != share else f"{share:.1%}" for share in shares)])
    return f"### The default's rules in every setting\n\n{table(head, rows)}\n"


RECALLED = ("paper, Eq. (1)", "official", "KN, P < 0.05", "typicality below -10", "opening, both, below -4", "default")


def recall_table(settings: Sequence[dict[str, Any]]) -> str:
    """Which kinds of noise the main rules find."""
    head = ["world", "rule", *KINDS, *(f"{kind}, single" for kind in KINDS)]
    rows = []
    for setting in settings:
        for name in RECALLED:
            one = setting["rules"][name]
            shares = [one[form][kind] for form in ("found", "found_single") for kind in KINDS]
            rows.append([setting["world"], name, *("–" if share != share else f"{share:.0%}" for share in shares)])
    return f"### Recall by kind: spans, then single tokens\n\n{table(head, rows)}\n"


def forms_table(settings: Sequence[dict[str, Any]]) -> str:
    """The same noise said in ever new words, and in the same words again and again."""
    names = ("log-probability, 1", "log-probability, 9", "log-probability, line", "typicality, 1", DEFAULT)
    rows = []
    for setting in settings:
        for shape in ("span", "single"):
            for form in FORMS:
                cells = [_auc(setting["auc"][name][f"all/{form}/{shape}"]) for name in names]
                rows.append([setting["world"], "spans" if shape == "span" else "single tokens", form, *cells])
    return f"### AUC by form\n\n{table(['world', 'noise', 'form', *names], rows)}\n"


def costs_table(costs: Sequence[dict[str, Any]]) -> str:
    """The cost of rescoring relative to the pass."""
    head = ["world", "rate", "sentences looked at again", "their tokens / the pass's", "seconds of the plan, ratio"]
    rows = [
        [one["world"], f"{one['rate']:.0%}", str(one["sentences"]), f"{one['tokens']:.2f}", f"{one['seconds']:.2f}"]
        for one in costs
    ]
    return f"### Cost of rescoring\n\n{table(head, rows)}\n"


def rivals_table(scale: Scale, results: Results) -> str:
    """The default against its first look, controls, peers and the oracle, world by world."""
    rows = []
    for world in (plan.MAIN, *plan.OTHERS):
        jobs = [j for j in plan.jobs(["arms", "worlds"], scale.seeds) if j.world == world and j.rate == plan.MAIN_RATE]
        rows += [[world, *row] for row in against(jobs, results)]
    if not rows:
        return ""
    note = f"Paired over seeds at {plan.MAIN_RATE:.0%} noise; p is of each test alone."
    head = ["world", "the default minus", "greedy, points", "sampled, points"]
    return f"### The default against controls, peers and the oracle\n\n{note}\n\n{table(head, rows)}\n"


TITLES = {
    "arms": "Every arm, full fine-tuning",
    "rates": "Other noise rates, full fine-tuning",
    "worlds": "Other worlds, full fine-tuning",
    "repeating": "Noise of the repeating forms alone, full fine-tuning",
    "qlora": "QLoRA, 4-bit nf4",
    "bases": "A base model that knows both worlds",
}


def everything(folder: Path, groups: Sequence[str], scale: Scale, caption: str | None = None) -> str:
    """All tables, as Markdown."""
    made = folder / "scale.json"
    commit = json.loads(made.read_text()).get("commit") if made.exists() else None
    parts = [(caption or environment(commit)) + "\n"]
    if (folder / "detection.json").exists():
        settings = json.loads((folder / "detection.json").read_text())
        own = [s for s in settings if s["world"] == s["base"] and not s["quantization"] and s["rate"] == plan.MAIN_RATE]
        parts += ["## Finding noise\n", conditions_table(settings), default_table(settings)]
        parts += [forms_table(own), recall_table(own)]
        if (folder / "costs.json").exists():
            parts.append(costs_table(json.loads((folder / "costs.json").read_text())))
        parts += [f(setting) for f in (auc_table, rules_table) for setting in own]
    results = done(folder)
    parts += ["## Better models\n", rivals_table(scale, results)]
    for group in groups:
        jobs = plan.jobs([group], scale.seeds)
        for world, base, rate in dict.fromkeys((job.world, job.base, job.rate) for job in jobs):
            chosen = [job for job in jobs if (job.world, job.base, job.rate) == (world, base, rate)]
            title = f"{TITLES[group]}: world {world}, base model {base}, {rate:.0%} noise"
            parts.append(accuracy_table(title, chosen, results))
    return "\n".join(part for part in parts if part)


def write_into(page: Path, text: str, mark: str = BEGIN, end_mark: str = END) -> None:
    """Put text between the marks of a page; ValueError if it has none."""
    before, begin, rest = page.read_text(encoding="utf-8").partition(mark)
    _, end, after = rest.partition(end_mark)
    if not begin or not end:
        raise ValueError(f"{page} has no lines {mark} and {end_mark} to put the tables between")
    page.write_text(f"{before}{mark}\n\n{text.strip()}\n\n{end_mark}{after}", encoding="utf-8")
