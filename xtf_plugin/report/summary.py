"""A plan in numbers: the content of summary.json, metrics for the trackers, lines for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from .. import __version__
from ..data.ragged import Layout
from ..environment import installed_version
from ..plan import Plan
from ..selection.text_rules import special_ids
from . import statistics, terminal, whatif
from .score_table import ScoreTable, plain
from .statistics import Verdicts, share
from .whatif import WhatIf

_PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "datasets")


def versions() -> dict[str, str | None]:
    """Installed versions of this package and of those that scores and masks depend on; None: not installed."""
    return {"xtf-plugin": __version__, **{name: installed_version(name) for name in _PACKAGES}}


def metrics(plan: Plan) -> dict[str, float]:
    """`xtf/kept_fraction` and `xtf/dropped_by/<score>`: shares of the dataset's completion tokens, 0 to 1.

    A token that the rules of two scores fire on counts for both, if it is dropped.
    """
    facts = totals(plan)
    dropped = {f"xtf/dropped_by/{name}": counts["dropped_fraction"] for name, counts in facts["scores"].items()}
    return {"xtf/kept_fraction": facts["kept_fraction"], **dropped}


def totals(plan: Plan) -> dict[str, Any]:
    """Counts of rows, documents and completion tokens of the dataset; see `Verdicts.totals`."""
    layout = Layout(plan.scores.offsets, plan.scores.counts)
    emptied = (layout.lengths > 0) & (layout.count(plan.selection.keep) == 0)
    return {
        "rows": len(plan.documents.row_offsets) - 1,
        "documents": int(plan.documents.counts.sum()),
        "distinct_documents": len(plan.documents),
        "fully_dropped_documents": int(plan.documents.counts[emptied].sum()),
        **Verdicts(plan.config, plan.selection, plan.weights).totals(),
    }


def described(plan: Plan, tokenizer: Any) -> tuple[ScoreTable, WhatIf]:
    """The score table of a run, with all of summary.json, and the sliders of its report."""
    table = ScoreTable.of_plan(plan, tokenizer)
    moved = whatif.build(table)
    found = {
        "distributions": statistics.distributions(table),
        "combinations": Verdicts(plan.config, plan.selection, plan.weights).combinations(),
        "tokens": statistics.token_tables(table, moved.sliders),
        "endings": statistics.endings(table, plan.documents, special_ids(tokenizer)),
    }
    return replace(table, about=summary(plan, tokenizer, found)), moved


def summary(plan: Plan, tokenizer: Any, found: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Everything in summary.json, as plain JSON values; docs/report.md describes the keys.

    Args:
        plan: of the run.
        tokenizer: the training tokenizer.
        found: statistics of the score table; None leaves their keys out.
    """
    special = np.isin(plan.scores.token_ids, special_ids(tokenizer))
    stats, keep, weights = plan.stats, plan.selection.keep, plan.weights
    facts = {
        "format": 1,
        "config": plan.config.to_dict(),
        "reference": plan.reference,
        "versions": versions(),
        "thresholds": plan.selection.thresholds,
        "totals": totals(plan),
        **(found or {}),
        "special_tokens": {
            "labelled": int(weights[special].sum()),
            "dropped": int(weights[special & ~keep].sum()),
        },
        "scoring": {
            "scored_documents": stats.documents,
            "stored_documents": plan.reused,
            "seconds": round(stats.seconds, 3),
            "tokens_per_second": round(share(stats.tokens, stats.seconds), 1),
            "padding_fraction": round(1 - stats.tokens / stats.padded_tokens, 4) if stats.padded_tokens else 0.0,
            "batches": stats.batches,
            "out_of_memory_halvings": stats.halvings,
        },
        "scorers": plan.scorers,
        **({"streaming": plan.streaming} if plan.streaming else {}),
        "loss_is_comparable_with_plain_sft": False,
        "warnings": plan.warnings,
    }
    return dict(plain(facts))


def show(plan: Plan, written: list[Path]) -> None:
    """Print the plan to the terminal (standard error): shares, scorers, cost, warnings, and the files written."""
    stats = plan.stats
    Console(stderr=True, soft_wrap=True).print(terminal.totals_table(totals(plan)))
    print_lines(
        [
            *_streaming_line(plan),
            f"reference {plan.reference.get('name')} ({plan.reference.get('source')})",
            f"scored {stats.documents:,} documents in {stats.seconds:.1f} s "
            f"({share(stats.tokens, stats.seconds):,.0f} tokens/s), {plan.reused:,} came from the store",
            *_scorer_lines(plan),
            "the training loss is taken over kept tokens only and is not comparable with plain SFT's.",
            *(f"warning: {warning}" for warning in plan.warnings),
            *(f"wrote {path}" for path in written),
        ]
    )


def _streaming_line(plan: Plan) -> list[str]:
    if not plan.streaming:
        return []
    number, complete = plan.streaming["documents"], plan.streaming["whole_stream"]
    which = "the whole stream" if complete else "not the whole stream"
    return [f"calibration sample: the first {number:,} documents of the stream, {which}; all figures are of this sample"]


def _scorer_lines(plan: Plan) -> list[str]:
    """A line for each score, each further reference, and rescoring."""
    lines = [
        f"{name}: {scorer['scorer']} version {scorer['version']} ({scorer['package']})"
        for name, scorer in plan.scorers["scores"].items()
    ]
    cost = "in {seconds:.1f} s, {stored_documents:,} came from the store"
    line = "reference {name} ({source}): scored {documents:,} documents " + cost
    lines += [line.format(**reference) for reference in plan.scorers["references"]]
    if "excerpts" in plan.scorers:
        line = "rescoring: scored {documents:,} excerpts of {tokens:,} tokens " + cost
        lines.append(line.format(**plan.scorers["excerpts"]))
    return lines


def print_lines(lines: list[str]) -> None:
    """Print lines to the terminal (standard error)."""
    console = Console(stderr=True, soft_wrap=True)
    for line in lines:
        console.print(f"xtf: {line}", markup=False, highlight=False)
