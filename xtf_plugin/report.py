"""What a plan amounts to: summary.json, the score table, metrics for the trackers, and a few lines for the terminal."""

from __future__ import annotations

import json
import logging
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from . import __version__, selection, spans, view
from .files import write_whole
from .pipeline import Plan, special_ids
from .table import ScoreTableWriter

logger = logging.getLogger(__name__)

TABLE_LIMIT = 20_000_000  # completion tokens up to which a training run writes the score table by itself
CHUNK_TOKENS = 500_000
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


def summary(plan: Plan, tokenizer: Any) -> dict[str, Any]:
    """Everything in summary.json: config, reference, versions, thresholds, totals, cost, warnings. Keys are stable."""
    special = np.isin(plan.scores.token_ids, special_ids(tokenizer))
    return {
        "format": 1,
        "config": plan.config.to_dict(),
        "reference": plan.reference,
        "versions": versions(),
        "thresholds": plan.selection.thresholds,
        "totals": totals(plan),
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


def write(plan: Plan, tokenizer: Any, folder: Path) -> list[Path]:
    """Write summary.json, and the score table unless the dataset is very large, below `folder`; return what was
    written.

    A folder that cannot be written is told, not fatal: the masks do not depend on it.
    """
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / "summary.json"
        write_whole(target, (json.dumps(summary(plan, tokenizer), indent=2) + "\n").encode())
        written.append(target)
        if len(plan.scores.token_ids) <= TABLE_LIMIT:
            written.append(write_table(plan, tokenizer, folder / "scores.parquet"))
        else:
            logger.warning("xtf: %d tokens: no score table; `xtf score` writes it", len(plan.scores.token_ids))
    except OSError as error:
        logger.warning("xtf: %s cannot be written (%s); training goes on without a report", folder, error)
    return written


def write_table(plan: Plan, tokenizer: Any, path: Path) -> Path:
    """Write the score table (one row per completion token, in dataset order) and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scores, documents = plan.scores, plan.documents
    distinct = np.unique(scores.token_ids)
    texts = np.asarray(spans.token_texts(tokenizer, distinct.tolist()), dtype=object)
    bits, values = selection.rule_bits(plan.config), range(np.iinfo(plan.selection.reasons.dtype).max + 1)
    names = np.asarray([selection.reason_text(reason, bits) for reason in values], dtype=object)
    keys = np.asarray([key.tobytes().hex() for key in documents.keys], dtype=object)
    novelty = None if scores.logprobs is None else -np.expm1(scores.logprobs)
    metadata = {
        "config": plan.config.to_dict(),
        "thresholds": plan.selection.thresholds,
        "reference": plan.reference,
        "versions": versions(),
        **({"selectors": plan.selectors} if plan.selectors else {}),
        **({"streaming": plan.streaming} if plan.streaming else {}),
    }
    columns = {
        "reasoning_importance": scores.reasoning_importance,
        "knowledge_novelty": novelty if plan.config.knowledge_novelty else None,
        "task_relevance": scores.task_relevance,
    }
    with ScoreTableWriter(path, metadata, list(scores.selectors)) as writer:
        for row, index, where in _occurrences(plan):
            writer.write(
                row=row,
                document=keys[index],
                position=scores.positions[where],
                token_id=scores.token_ids[where],
                token=texts[np.searchsorted(distinct, scores.token_ids[where])],
                kept=plan.selection.keep[where],
                reason=names[plan.selection.reasons[where]],
                selectors={name: _or_nan(values, where) for name, values in scores.selectors.items()},
                **{name: _or_nan(values, where) for name, values in columns.items()},
            )
    return path


def _or_nan(values: NDArray[np.float32] | None, where: NDArray[np.int64]) -> NDArray[np.float32]:
    return np.full(len(where), np.nan, dtype=np.float32) if values is None else values[where]


def _occurrences(plan: Plan) -> Any:
    """Yield (row, document, flat index) arrays of every completion token in dataset order, some rows at a time."""
    documents, offsets = plan.documents, plan.scores.offsets
    rows = np.repeat(np.arange(len(documents.row_offsets) - 1), np.diff(documents.row_offsets))
    sizes = np.diff(offsets)[documents.row_documents]
    ends = np.cumsum(sizes)
    low = 0
    while low < len(rows):
        base = ends[low] - sizes[low]
        high = max(low + 1, int(np.searchsorted(ends, base + CHUNK_TOKENS, side="right")))
        part = documents.row_documents[low:high]
        repeat = sizes[low:high]
        starts = np.repeat(offsets[:-1][part] - (ends[low:high] - repeat - base), repeat)
        yield np.repeat(rows[low:high], repeat), np.repeat(part, repeat), starts + np.arange(repeat.sum())
        low = high


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
