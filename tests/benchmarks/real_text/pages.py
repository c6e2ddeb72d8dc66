"""The benchmark's tables and examples as Markdown, from what the stages stored."""

from __future__ import annotations

import math
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks.proof import tables
from tests.benchmarks.proof.stats import mean_interval
from tests.benchmarks.proof.tables import environment, table

from .examples import escaped
from .planted import ARMS as ARMS_PLANTED
from .planted import GOOD, KINDS
from .records import PARTS
from .runs import ARMS, BASE, METRICS

BEGIN, END = "<!-- real text -->", "<!-- /real text -->"
Audit = Mapping[str, Mapping[str, Mapping[str, Any]]]


def caption() -> str:
    """Hardware, versions and commit, and whether the commit is all there is to know about the code."""
    changed = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True, check=False).stdout
    return environment() + (" The working tree had uncommitted changes." if changed.strip() else "")


def percent(share: float, digits: int = 1) -> str:
    """A share, or a dash for what does not exist; what is not nothing does not look like nothing."""
    least = 0.5 * 10**-digits
    if 0 < 100 * share < least:
        return f"< {least:.{digits + 1}f}%"
    return "–" if share != share else f"{share:.{digits}%}"


def base_table(base: Mapping[str, Any], parts: Mapping[str, Mapping[str, Sequence[Any]]]) -> str:
    """How the data were split and how well the base model predicts what it has not read."""
    rows = [
        [name, *(f"{len(by_part[part]):,}" for part in PARTS), *(f"{loss:.2f}" for loss in base["held_out"][name])]
        for name, by_part in parts.items()
    ]
    head = ["data set", *PARTS, "held-out loss, whole text", "held-out loss, completion"]
    text = (
        f"The base model: a Llama with {base['parameters']:,} parameters and a vocabulary of {base['vocabulary']:,}, "
        f"trained from scratch on the pretrain parts ({base['documents']:,} documents, {base['tokens']:,} tokens). It "
        "is tiny: it has learned the form of the texts, hardly any arithmetic, no medicine and no programming. "
        "Losses in nats a token."
    )
    return f"### Data and base model\n\n{text}\n\n{table(head, rows)}\n"


def dropped_table(audit: Audit) -> str:
    """How much each block drops, in all and by rule."""
    rows = []
    for dataset, blocks in audit.items():
        for block, one in blocks.items():
            rules = ", ".join(f"{rule} {percent(share)}" for rule, share in one["by_rule"].items())
            number = round(one["dropped"] * one["tokens"])
            cells = [f"{one['tokens']:,}", f"{number:,}", percent(one["dropped"]), percent(one["rows_touched"])]
            rows.append([dataset, block, *cells, rules])
    head = ["data set", "block", "completion tokens", "dropped", "share", "rows with a drop", "dropped by rule"]
    return f"### What is dropped from the train parts\n\n{table(head, rows)}\n"


def kinds_table(audit: Audit, blocks: Sequence[str]) -> str:
    """Which kinds of tokens are dropped: share of the kind, and the kind's share of all drops."""
    rows = []
    for dataset, found in audit.items():
        shown = [block for block in blocks if block in found]
        for kind, facts in found[shown[0]]["kinds"].items():
            cells = [found[block]["kinds"][kind] for block in shown]
            shares = [f"{percent(one['dropped'])} / {percent(one['of_dropped'], 0)}" for one in cells]
            rows.append([dataset, kind, percent(facts["tokens"]), *shares])
    note = "Share of the kind that is dropped / the kind's share of all that is dropped."
    return f"### Kinds of dropped tokens\n\n{note}\n\n{table(['data set', 'kind', 'of all tokens', *blocks], rows)}\n"


def overlap_table(audit: Audit) -> str:
    """How far the paper's three attributes agree."""
    rows = []
    for dataset, blocks in audit.items():
        for block, one in blocks.items():
            if "overlap" in one:
                pairs = [
                    f"{percent(p['shared'])} / {percent(p['of_smaller'])}" for p in one["overlap"]["pairs"].values()
                ]
                names = list(one["overlap"]["pairs"])
                exactly = [percent(share) for share in one["overlap"]["exactly"].values()]
                rows.append([dataset, block, percent(one["overlap"]["union"]), *exactly, *pairs])
    short = [name.replace("reasoning_importance", "RI").replace("knowledge_novelty", "KN") for name in names]
    head = ["data set", "block", "union", "by one alone", "by two", "by all three"]
    head += [name.replace("task_relevance", "TR") for name in short]
    note = (
        "Of the tokens that any of the three attributes drops, the share that one, two or three drop. Pairs: common "
        "tokens of both together / of the smaller set. The paper's figure: at most 58.3 % for any two."
    )
    return f"### Overlap of the paper's attributes\n\n{note}\n\n{table(head, rows)}\n"


def top_table(audit: Audit) -> str:
    """The texts that each rule drops most often."""
    rows = []
    for dataset, blocks in audit.items():
        for block, one in blocks.items():
            for rule, found in one["top"].items() if not block.endswith("alone") else ():
                texts = [f"“{escaped(text)}” {number} ({percent(share, 0)})" for text, number, share in found]
                rows.append([dataset, block, rule, ", ".join(texts) or "–"])
    note = "Text, how often it is dropped, and which share of its occurrences that is."
    return f"### Tokens dropped most often\n\n{note}\n\n{table(['data set', 'block', 'rule', 'tokens'], rows)}\n"


def examples_list(audit: Audit) -> str:
    """Completions with what is dropped from them struck through."""
    parts = ["### Examples\n\nDropped tokens are ~~struck through~~; ⏎ is a line break, ␣ and · are spaces.\n"]
    for dataset, blocks in audit.items():
        for block, one in blocks.items():
            for example in one["examples"]:
                rules = ", ".join(f"{rule} {number}" for rule, number in example["rules"].items())
                head = f"**{dataset}, `{block}`**, row {example['row']}, {example['tokens']} tokens; {rules}"
                parts.append(f"{head}\n\n> “{example['text']}”\n")
    return "\n".join(parts)


def runs_table(dataset: str, results: Mapping[str, Mapping[str, Any]]) -> str:
    """Held-out losses of every arm, and the paired difference from plain SFT on the seeds that both have."""
    return _arms_table(f"Fine-tuned on {dataset}: held-out loss with plain labels", results, (BASE, *ARMS))


def _arms_table(title: str, results: Mapping[str, Mapping[str, Any]], arms: Sequence[str]) -> str:
    by_arm: dict[str, dict[str, Mapping[str, Any]]] = {}
    for key, one in results.items():
        arm, _, seed = key.rpartition("/")
        by_arm.setdefault(arm, {})[seed] = one
    metrics = [*METRICS, *(["accuracy"] if "accuracy" in next(iter(results.values())) else [])]
    rows = []
    for arm in arms:
        found = by_arm.get(arm, {})
        if found:
            kept = percent(sum(one.get("kept", float("nan")) for one in found.values()) / len(found))
            cells = [cell for metric in metrics for cell in _cells(found, by_arm.get("plain", {}), metric)]
            rows.append([arm, str(len(found)) if arm != BASE else "–", kept, *cells])
    names = {"all": "all tokens", "numbers": "number tokens", "answer": "final answer", "accuracy": "decision right, %"}
    head = ["arm", "seeds", "kept", *(cell for metric in metrics for cell in (names[metric], "vs plain"))]
    one = next(iter(results.values()))
    note = "An arm that drops nothing from a seed's rows is plain SFT to the last bit and is not run again."
    note += f" The commonest decision alone is right in {percent(one['commonest'])}." if "commonest" in one else ""
    return f"### {title}\n\n{table(head, rows)}\n{note}\n"


def _cells(
    found: Mapping[str, Mapping[str, Any]], plain: Mapping[str, Mapping[str, Any]], metric: str
) -> tuple[str, str]:
    """A metric with its 95 % interval, and the mean of the paired differences from plain SFT with its interval."""
    scale, digits = (100, 1) if metric == "accuracy" else (1, 3)
    mean, half = mean_interval([scale * one[metric] for one in found.values()])
    own = f"{mean:.{digits}f}" + (f" ± {half:.{digits}f}" if half == half else "")
    common = sorted(found.keys() & plain.keys())
    if found is plain or len(common) < 2:
        return own, ""
    difference, half = mean_interval([scale * (found[seed][metric] - plain[seed][metric]) for seed in common])
    return own, f"{difference:+.{digits}f} ± {half:.{digits}f}"


def everything(parts: Any, base: Mapping[str, Any], audit: Audit, results: Mapping[str, Mapping[str, Any]]) -> str:
    """The whole page."""
    blocks = list(next(iter(audit.values())))
    found = [f"{caption()}\n", base_table(base, parts), dropped_table(audit), kinds_table(audit, blocks)]
    found += [overlap_table(audit), top_table(audit)]
    found += [runs_table(name, own) for name, own in results.items() if own]
    return "\n".join(found)


def planted_tables(noisy: Mapping[str, Any]) -> str:
    """What is found of foreign lines in real solutions, and what training on them costs."""
    one = noisy["detection"]
    where = f"GSM8K, {one['tokens']:,} completion tokens, {percent(one['noise'])} of them in foreign lines"
    rows = [[name, *(f"{aucs[kind]:.2f}" for kind in ("all", *KINDS))] for name, aucs in one["auc"].items()]
    aucs = table(["score", "all", *KINDS], rows)
    columns = ("all", *KINDS, GOOD, "precision")
    rows = [
        [name if name == "paper" else f"out_of_place below {name}", *(percent(o.get(c, math.nan)) for c in columns)]
        for name, o in one["rules"].items()
    ]
    rules = table(["rule", "foreign lines", *KINDS, "good lost", "precision"], rows)
    head = "### Foreign lines planted into real solutions"
    parts = [f"{head}\n\n{where}. AUC of scores, then what rules drop.\n\n{aucs}\n{rules}"]
    if noisy["runs"]:
        title = "Fine-tuned on solutions with foreign lines: loss on clean held-out ones"
        parts.append(_arms_table(title, noisy["runs"], ARMS_PLANTED))
    return "\n".join(parts)


def write_into(page: Path, text: str) -> None:
    """Put the text between the marks of a page; ValueError if it has none."""
    tables.write_into(page, text, BEGIN, END)
