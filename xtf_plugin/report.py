"""What a plan amounts to, in numbers: the facts of summary.json, metrics for the trackers, lines for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from . import __version__, view
from .selection import select as selection
from .selection.text_rules import special_ids
from .plan import Plan

_PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "datasets")


def versions() -> dict[str, str | None]:
    """Installed versions of this package and of those whose behaviour decides scores and masks."""
    found: dict[str, str | None] = {"xtf-plugin": __version__}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _share(part: float, whole: float) -> float:
    return float(part) / float(whole) if whole else 0.0


def _count(plan: Plan, flags: NDArray[np.bool_]) -> int:
    """Occurrences in the dataset of the completion tokens that `flags` (M,) marks."""
    return int(plan.weights[flags].sum())


def metrics(plan: Plan) -> dict[str, float]:
    """`xtf/kept_fraction`, `xtf/dropped_by/<attribute or selector>`: shares of the dataset's completion tokens, 0 to 1.

    A token that two rules fire on counts for both; a rule that fired on a kept token counts for neither.
    """
    facts = totals(plan)
    result = {"xtf/kept_fraction": facts["kept_fraction"]}
    for name, attribute in facts["attributes"].items():
        result[f"xtf/dropped_by/{name}"] = attribute["dropped_fraction"]
    return result


def totals(plan: Plan) -> dict[str, Any]:
    """Counts over the dataset's completion tokens: kept, dropped, by attribute or selector, by decision, overlaps."""
    reasons, keep = plan.selection.reasons, plan.selection.keep
    tokens, dropped = int(plan.weights.sum()), _count(plan, ~keep)
    attributes, bits = {}, selection.rule_bits(plan.config)
    for name, bit in bits.items():
        fired = (reasons & bit) > 0
        count = _count(plan, fired & ~keep)
        others = (reasons & (sum(bits.values()) - bit)) > 0
        attributes[name] = {
            "fired": _count(plan, fired),
            "dropped": count,
            "dropped_alone": _count(plan, fired & ~keep & ~others),
            "fired_fraction": _share(_count(plan, fired), tokens),
            "dropped_fraction": _share(count, tokens),
        }
    overlaps = {}
    for index, first in enumerate(bits):
        for second in list(bits)[index + 1 :]:
            a, b = (reasons & bits[first]) > 0, (reasons & bits[second]) > 0
            overlaps[f"{first} & {second}"] = _share(_count(plan, a & b), min(_count(plan, a), _count(plan, b)))
    per_document = np.add.reduceat(np.append(keep, False), plan.scores.offsets[:-1]) if len(keep) else np.zeros(0)
    sizes = np.diff(plan.scores.offsets)
    emptied = (sizes > 0) & (np.where(sizes > 0, per_document, 0) == 0)
    return {
        "rows": len(plan.documents.row_offsets) - 1,
        "documents": int(plan.documents.counts.sum()),
        "distinct_documents": len(plan.documents),
        "fully_dropped_documents": int(plan.documents.counts[emptied].sum()),
        "completion_tokens": tokens,
        "kept_tokens": tokens - dropped,
        "dropped_tokens": dropped,
        "kept_fraction": _share(tokens - dropped, tokens),
        "attributes": attributes,
        "decided_by": {name: _count(plan, (reasons & bit) > 0) for name, bit in selection.DECISIONS.items()},
        "overlap_of_the_smaller_set": overlaps,
    }


def summary(plan: Plan, tokenizer: Any, told: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Everything in summary.json, see docs/report.md. Keys are stable.

    Args:
        plan: of the run.
        tokenizer: the training tokenizer.
        told: the `facts` of `payload.explained`; without them those keys are left out.
    """
    special = np.isin(plan.scores.token_ids, special_ids(tokenizer))
    return {
        "format": 1,
        "config": plan.config.to_dict(),
        "reference": plan.reference,
        "versions": versions(),
        "thresholds": plan.selection.thresholds,
        "totals": totals(plan),
        **(told or {}),
        "special_tokens": {
            "labelled": _count(plan, special),
            "dropped": _count(plan, special & ~plan.selection.keep),
        },
        "scoring": {
            "scored_documents": plan.stats.documents,
            "stored_documents": plan.reused,
            "seconds": round(plan.stats.seconds, 3),
            "tokens_per_second": round(_share(plan.stats.tokens, plan.stats.seconds), 1),
            "padding_fraction": round(1 - _share(plan.stats.tokens, plan.stats.padded_tokens), 4)
            if plan.stats.padded_tokens
            else 0.0,
            "batches": plan.stats.batches,
            "out_of_memory_halvings": plan.stats.halvings,
        },
        **({"selectors": plan.selectors} if plan.selectors else {}),
        **({"streaming": plan.streaming} if plan.streaming else {}),
        "loss_is_comparable_with_plain_sft": False,
        "warnings": plan.warnings,
    }


def _selector_lines(plan: Plan) -> list[str]:
    """A line for each selector, and one for each pass of a reference that only selectors asked for."""
    if not plan.selectors:
        return []
    scorers = (f"selector {n}: {s['scorer']} version {s['version']} ({s['package']})" for n, s in _scorers(plan))
    passes = (
        f"reference {p['name']} ({p['source']}): scored {p['documents']:,} documents in {p['seconds']:.1f} s, "
        f"{p['stored_documents']:,} came from the store"
        for p in plan.selectors["references"]
    )
    looks = plan.selectors.get("excerpts")
    if looks is None:
        return [*scorers, *passes]
    told = (
        f"second looks: scored {looks['documents']:,} excerpts of {looks['tokens']:,} tokens in "
        f"{looks['seconds']:.1f} s, {looks['stored_documents']:,} came from the store"
    )
    return [*scorers, *passes, told]


def _scorers(plan: Plan) -> list[tuple[str, dict[str, Any]]]:
    return list(plan.selectors["scorers"].items())


def show(plan: Plan, written: list[Path]) -> None:
    """Print the plan to the terminal (standard error): shares, the rules' warnings, where the files are."""
    facts, stats = totals(plan), plan.stats
    attributes = facts["attributes"].items()
    counts = view.Summary(
        documents=facts["documents"],
        tokens=facts["completion_tokens"],
        kept=facts["kept_tokens"],
        fired={name: attribute["fired"] for name, attribute in attributes},
        dropped={name: attribute["dropped"] for name, attribute in attributes},
        alone={name: attribute["dropped_alone"] for name, attribute in attributes},
        decided={name: count for name, count in facts["decided_by"].items() if count},
    )
    lines = [
        *_streaming_line(plan),
        f"reference {plan.reference.get('name')} ({plan.reference.get('source')})",
        f"scored {stats.documents:,} documents in {stats.seconds:.1f} s ({_share(stats.tokens, stats.seconds):,.0f} "
        f"tokens/s), {plan.reused:,} came from the store",
        *_selector_lines(plan),
        "the training loss is taken over kept tokens only and is not comparable with plain SFT's.",
        *(f"warning: {warning}" for warning in plan.warnings),
        *(f"wrote {path}" for path in written),
    ]
    Console(stderr=True, soft_wrap=True).print(view.summary_table(counts))
    tell(lines)


def _streaming_line(plan: Plan) -> list[str]:
    if not plan.streaming:
        return []
    number, whole = plan.streaming["documents"], plan.streaming["whole_stream"]
    which = "all there are" if whole else "not the whole stream"
    return [f"calibration sample: the first {number:,} documents of the stream, {which}; all figures here are of it"]


def tell(lines: list[str]) -> None:
    """Print lines to the terminal (standard error)."""
    console = Console(stderr=True, soft_wrap=True)
    for line in lines:
        console.print(f"xtf: {line}", markup=False, highlight=False)
