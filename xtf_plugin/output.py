"""Writes what a run leaves in `<output_dir>/xtf`: summary.json, report.html, and the score table."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import page, payload
from .selection import select as selection
from .data import token_text as spans
from .files import write_whole
from .plan import Plan
from .report import summary, versions
from .table import ScoreTableWriter, plain

logger = logging.getLogger(__name__)

TABLE_LIMIT = 20_000_000  # completion tokens up to which a training run writes score table and report by itself
CHUNK_TOKENS = 500_000
PAGE, TABLE = "report.html", "scores.parquet"


def write(plan: Plan, tokenizer: Any, folder: Path, *, whole: bool = False) -> list[Path]:
    """Write summary.json, and report and score table unless the dataset is very large (or the `whole` is asked for),
    below `folder`; return what was written.

    A folder that cannot be written is told, not fatal: the masks do not depend on it.
    """
    written: list[Path] = []
    large = len(plan.scores.token_ids) > TABLE_LIMIT and not whole
    data = None if large else _page_data_or_none(plan, tokenizer)
    facts = plain(summary(plan, tokenizer)) if data is None else data["summary"]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "summary.json", (json.dumps(facts, indent=2) + "\n").encode())
        written.append(folder / "summary.json")
        if data is None:
            (folder / PAGE).unlink(missing_ok=True)  # an earlier run's would pass for this one's
        else:
            written.append(write_page(data, folder / PAGE))
        if large:
            (folder / TABLE).unlink(missing_ok=True)
            number = len(plan.scores.token_ids)
            logger.warning("xtf: %d tokens: no report and no score table; `xtf score` writes them", number)
        else:
            written.append(write_table(plan, tokenizer, folder / TABLE, data))
    except OSError as error:
        logger.warning("xtf: %s cannot be written (%s); training goes on without a report", folder, error)
    return written


def write_again(plan: Plan, tokenizer: Any, written: list[Path], path: Path) -> Path:
    """Put the score table at another path too: a copy of the one that was `written`, if one was. Raises OSError."""
    table = next((made for made in written if made.name == TABLE), None)
    if table is None:
        return write_table(plan, tokenizer, path, _page_data_or_none(plan, tokenizer))
    write_whole(path, table.read_bytes())
    return path


def _page_data_or_none(plan: Plan, tokenizer: Any) -> dict[str, Any] | None:
    """`page_data`, or None if that fails: a report explains a run, and must not end one whose masks are right."""
    try:
        return page_data(plan, tokenizer)
    except Exception:
        logger.warning("xtf: report.html could not be made; training goes on without it", exc_info=True)
        return None


def page_data(plan: Plan, tokenizer: Any) -> dict[str, Any]:
    """All that report.html shows; its `summary` is that of summary.json."""
    counted = payload.explained(plan, tokenizer)
    built = payload.build(plan, tokenizer, summary(plan, tokenizer, counted["facts"]), counted)
    return dict(plain(built))  # a number that JSON lacks becomes null


def write_page(data: Mapping[str, Any], path: Path) -> Path:
    """Write report.html and return its path."""
    write_whole(path, page.render(data, page.title(path)).encode())
    return path


def write_table(plan: Plan, tokenizer: Any, path: Path, data: Mapping[str, Any] | None = None) -> Path:
    """Write the score table (one row per completion token, in dataset order) and return its path.

    `data` is what its report shows, kept in the file so that `xtf report` can make the page again.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scores, documents = plan.scores, plan.documents
    distinct = np.unique(scores.token_ids)
    pieces = spans.token_bytes(tokenizer, distinct.tolist())
    texts = np.asarray([piece.decode(errors="replace") for piece in pieces], dtype=object)
    bits, values = selection.rule_bits(plan.config), range(np.iinfo(plan.selection.reasons.dtype).max + 1)
    names = np.asarray([selection.reason_text(reason, bits) for reason in values], dtype=object)
    keys = np.asarray([key.tobytes().hex() for key in documents.keys], dtype=object)
    novelty = None if scores.logprobs is None else -np.expm1(scores.logprobs)
    metadata = {
        "config": plan.config.to_dict(),
        "thresholds": plan.selection.thresholds,
        "reference": plan.reference,
        "versions": versions(),
        "bytes": {str(i): p.hex() for i, p in zip(distinct.tolist(), pieces, strict=True) if not spans.is_text(p)},
        **({"selectors": plan.selectors} if plan.selectors else {}),
        **({"streaming": plan.streaming} if plan.streaming else {}),
    }
    columns = {
        "reasoning_importance": scores.reasoning_importance,
        "knowledge_novelty": novelty if plan.config.knowledge_novelty else None,
        "task_relevance": scores.task_relevance,
    }
    with ScoreTableWriter(path, metadata, list(scores.selectors), data) as writer:
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
