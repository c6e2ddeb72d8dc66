"""A plan in numbers: the content of summary.json, metrics for the trackers, lines for the terminal.

Counts are occurrences in the dataset.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from .. import __version__
from ..config.block import XTFConfig
from ..data.ragged import Floats, Ints, Layout, dataset_quantiles
from ..environment import installed_version
from ..errors import harmless
from ..selection.select import DECISIONS, Selection, rule_bits
from ..selection.text_rules import special_ids
from . import whatif
from .by_value import by_value
from .familiarity import familiarity
from .score_table import ScoreTable, plain
from .terminal import by_table, measure, on_one_line, text_of, totals_table
from .whatif import WhatIf

if TYPE_CHECKING:
    from ..plan import Plan

logger = logging.getLogger(__name__)

BINS = 40
FORMATS = 5  # lines in the terminal
PATTERNS = 12  # of the block whose matches are printed
NAMED = 3  # kept texts that recur, in the terminal
_ENDS = 0.002  # share of the scores beyond each end of a histogram
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
        "distributions": {n: histogram(values, table.layout, table.weights) for n, values in table.scores.items()},
        "combinations": Verdicts(table.config, table, table.weights).combinations(),
        "endings": endings(table, plan, special_ids(tokenizer)),
    }
    return replace(table, about=summary(plan, tokenizer, found)), moved


def summary(plan: Plan, tokenizer: Any, found: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Everything in summary.json, as plain JSON values; docs/output-files.md describes the keys.

    `found` are statistics of the score table; None leaves their keys out.
    """
    special = np.isin(plan.scores.token_ids, special_ids(tokenizer))
    stats, keep, weights = plan.stats, plan.selection.keep, plan.weights
    layout = Layout(plan.scores.offsets, plan.scores.counts)
    known = familiarity(plan)
    facts = {
        "format": 3,
        "config": plan.config.to_dict(),
        **({"recipe": plan.recipe} if plan.recipe else {}),
        "reference": plan.reference,
        "versions": versions(),
        "thresholds": plan.selection.thresholds,
        "totals": totals(plan),
        **({"by": by_value(plan.groups, layout, plan.selection.keep)} if plan.groups else {}),
        "familiarity": known,
        "formats": [{"text": text, "share": round(part, 4)} for text, part in _formats(plan).items()],
        "patterns": [asdict(each) for each in plan.text.matches],
        "recurring": [{**asdict(each), "text": on_one_line(each.text)} for each in plan.recurring],
        **(found or {}),
        "special_tokens": {
            "labelled": int(weights[special].sum()),
            "dropped": int(weights[special & ~keep].sum()),
        },
        "scoring": {
            "scored_documents": stats.documents,
            "stored_documents": stats.stored_documents,
            "seconds": round(stats.seconds, 3),
            "tokens_per_second": round(share(stats.tokens, stats.seconds), 1),
            "padding_fraction": round(1 - stats.tokens / stats.padded_tokens, 4) if stats.padded_tokens else 0.0,
            "batches": stats.batches,
            "out_of_memory_halvings": stats.halvings,
        },
        "scorers": plan.scorers,
        **({"streaming": plan.streaming} if plan.streaming else {}),
        "loss_is_comparable_with_plain_sft": False,
        "warnings": [*plan.warnings, *([known["advice"]] if known.get("level") == "weak" else [])],
    }
    return dict(plain(facts))


def show(plan: Plan, written: list[Path]) -> None:
    """Print the plan to the terminal (standard error): shares, scorers, cost, warnings, and the files written."""
    stats, lines = plan.stats, []
    if plan.streaming:
        which = "the whole stream" if plan.streaming["whole_stream"] else "not the whole stream"
        sample = f"calibration sample: the first {plan.streaming['documents']:,} documents of the stream, {which}"
        lines.append(f"{sample}; all figures are of this sample")
    known = familiarity(plan)
    if advice := known.get("advice"):
        logger.info("xtf: %s", advice)
    console = Console(stderr=True, soft_wrap=True)
    console.print(totals_table(totals(plan)))
    layout = Layout(plan.scores.offsets, plan.scores.counts)
    for column, values in by_value(plan.groups, layout, plan.selection.keep).items():
        console.print(by_table(column, values))
    print_lines(
        [
            *lines,
            f"reference {plan.reference.get('name')} ({plan.reference.get('source')})",
            f"scored {stats.documents:,} documents in {stats.seconds:.1f} s "
            f"({share(stats.tokens, stats.seconds):,.0f} tokens/s), {stats.stored_documents:,} were in the score cache",
            *_scorer_lines(plan),
            *_text_lines(plan),
            *([("warning: " if known["level"] == "weak" else "") + advice] if advice else []),
            "the training loss is taken over kept tokens only and is not comparable with plain SFT's.",
            *(f"warning: {warning}" for warning in plan.warnings),
            *(f"wrote {path}" for path in written),
        ]
    )


def _scorer_lines(plan: Plan) -> list[str]:
    """A line for each score, each further reference, and parts of documents."""
    lines = [
        f"{name}: {measure(scorer['scorer'])} ({scorer['scorer']} version {scorer['version']}, {scorer['package']})"
        for name, scorer in plan.scorers["scores"].items()
    ]
    cost = "in {seconds:.1f} s, {stored_documents:,} were in the score cache"
    line = "reference {name} ({source}): scored {documents:,} documents " + cost
    lines += [line.format(**reference) for reference in plan.scorers["references"]]
    if "excerpts" in plan.scorers:
        line = "sentences: scored {documents:,} parts of documents, {tokens:,} tokens, " + cost
        lines.append(line.format(**plan.scorers["excerpts"]))
    return lines


def _formats(plan: Plan) -> dict[str, float]:
    """Openings that are protected as format, as they are shown, and the share of documents that have them."""
    shown: dict[str, float] = {}
    for text, part in plan.text.formats.items():  # some differ in white space or in how they are cut into tokens
        shown.setdefault(on_one_line(text), part)
    return shown


def _text_lines(plan: Plan) -> list[str]:
    """Lines about openings that are kept as format, the block's patterns, and texts that recur."""
    formats = list(_formats(plan).items())
    line = 'kept as format: "{}" opens a line or sentence in {:.0%} of documents'
    lines = [line.format(text, part) for text, part in formats[:FORMATS]]
    if len(formats) > FORMATS:
        lines.append(f"kept as format: {len(formats) - FORMATS} more openings, see the report")
    lines += [
        f"{each.key} {harmless(repr(each.pattern))}: {each.tokens:,} tokens in {each.documents:,} of the documents, at "
        f"most {each.most:,} in one"
        for each in plan.text.matches[:PATTERNS]
        if each.tokens
    ]
    dropped = sum(each.dropped for each in plan.recurring)
    if plan.recurring:
        kept = len(plan.recurring) - dropped
        lines.append(f"texts that recur: {dropped} dropped, {kept} kept; the report lists them")
    said = [each for each in plan.recurring if not each.dropped and not each.why][:NAMED]
    line = '"{}" is kept in {:,} of the {:,} documents that have it. If it is noise, add to the block: {}'
    lines += [
        line.format(on_one_line(each.text), each.documents - each.dropped_in, each.documents, harmless(each.setting))
        for each in said
    ]
    return lines


def print_lines(lines: list[str]) -> None:
    """Print lines to the terminal (standard error)."""
    console = Console(stderr=True, soft_wrap=True)
    for line in lines:
        console.print(f"xtf: {line}", markup=False, highlight=False)


def share(part: float, total: float) -> float:
    """`part / total`; 0 if the total is 0."""
    return float(part) / float(total) if total else 0.0


class Verdicts:
    """Number of tokens by reason and keep flag; counts of fired rules and dropped tokens are sums over it.

    Args:
        selection: its `reasons` and `keep`, (M,), are read.
        weights: (M,) occurrences in the dataset.
    """

    def __init__(self, config: XTFConfig, selection: Selection | ScoreTable, weights: Ints) -> None:
        """Count each pair of reason and keep flag once."""
        self.bits = rule_bits(config)
        sums = np.bincount(selection.reasons.astype(np.int64) * 2 + selection.keep, weights)
        self.found = [(at >> 1, bool(at & 1), int(sums[at])) for at in np.flatnonzero(sums).tolist()]
        self.rules = sum(self.bits.values())

    def count(self, all_of: int = 0, none_of: int = 0, kept: bool | None = None) -> int:
        """Tokens whose reason has all bits of `all_of` and none of `none_of`; `kept` None: kept and dropped tokens."""
        return sum(
            tokens
            for reason, flag, tokens in self.found
            if reason & all_of == all_of and not reason & none_of and kept in (None, flag)
        )

    def totals(self) -> dict[str, Any]:
        """Completion tokens: kept, dropped, by score, by decision; overlaps of rules."""
        tokens, kept = self.count(), self.count(kept=True)
        fired = {name: self.count(bit) for name, bit in self.bits.items()}
        dropped = {name: self.count(bit, kept=False) for name, bit in self.bits.items()}
        return {
            "completion_tokens": tokens,
            "kept_tokens": kept,
            "dropped_tokens": tokens - kept,
            "kept_fraction": share(kept, tokens),
            "scores": {
                name: {
                    "fired": fired[name],
                    "dropped": dropped[name],
                    "dropped_alone": self.count(bit, self.rules - bit, kept=False),
                    "fired_fraction": share(fired[name], tokens),
                    "dropped_fraction": share(dropped[name], tokens),
                }
                for name, bit in self.bits.items()
            },
            "decided_by": {name: self.count(bit) for name, bit in DECISIONS.items()},
            "overlap_of_the_smaller_set": {
                f"{first} & {second}": share(self.count(a | b), min(fired[first], fired[second]))
                for (first, a), (second, b) in combinations(self.bits.items(), 2)
            },
        }

    def combinations(self) -> list[dict[str, Any]]:
        """Number of tokens that each set of rules fired on, largest first; tokens without a rule come last."""
        sums = Counter[int]()
        for reason, _, tokens in self.found:
            sums[reason & self.rules] += tokens
        named = [([name for name, bit in self.bits.items() if fired & bit], count) for fired, count in sums.items()]
        named.sort(key=lambda each: (not each[0], -each[1]))
        return [{"rules": rules, "tokens": count} for rules, count in named]


def histogram(values: Floats, layout: Layout, weights: Ints) -> dict[str, Any]:
    """A histogram of a score; the outermost bins include everything beyond them.

    Args:
        values: (M,) as its rule saw them.
        layout: of the documents; weights: (M,) occurrences.
    """
    low, middle, high = (float(v) for v in dataset_quantiles(values, layout, [_ENDS, 0.5, 1 - _ENDS]))
    undefined = int(weights[np.isnan(values)].sum())
    if not np.isfinite([low, high]).all():
        return {"edges": [], "tokens": [], "undefined": undefined, "median": None}
    if high <= low:
        high = low + max(abs(low), 1.0) * 1e-3
    known = ~np.isnan(values)
    inside = np.clip(values[known].astype(np.float64), low, high)
    counts, edges = np.histogram(inside, BINS, (low, high), weights=weights[known])
    return {
        "edges": [float(f"{edge:.5g}") for edge in edges],
        "tokens": [int(count) for count in counts],
        "undefined": undefined,
        "median": float(f"{middle:.5g}"),
    }


def endings(table: ScoreTable, plan: Plan, special: NDArray[np.int64]) -> dict[str, Any]:
    """Special tokens among the completions, kept and dropped, and documents whose completion has no end of turn.

    Such a document was cut off (`max_length`, `sequence_len`), its template writes no end of turn, or the end has no
    label. Trailing whitespace is ignored: many templates end a turn with a line break.
    """
    ids, weights, found = table.token_ids, table.weights, []
    for token in np.intersect1d(ids, special).tolist():
        marks = ids == token
        total, dropped = int(weights[marks].sum()), int(weights[marks & ~table.keep].sum())
        found.append({"token_id": token, "token": text_of(table.pieces[token]), "labelled": total, "dropped": dropped})
    turns = plan.text.turns
    without = 0 if turns is None else turns.unended(plan.documents.counts)
    return {
        "special_tokens": found,
        "documents_ending_without_one": without,
        "end_of_turn": [] if turns is None else [on_one_line(text) for text in turns.texts.ends],
    }
