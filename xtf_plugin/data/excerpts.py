"""Excerpts: a sentence or line after a shortened context.

Text that follows noise has a low probability because the reference has just read noise. To measure it without, an
excerpt is made: what is left of the document before the segment, and the segment. Excerpts are documents, so they are
scored and stored like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from .documents import IGNORE_INDEX, DocumentSet, collect
from .predictions import Predictions
from .ragged import Bools, Ints, stretches


def excerpts(documents: DocumentSet, hidden: Bools, starts: Ints, wanted: Ints, breaks: Bools) -> DocumentSet:
    """One document per wanted segment: the tokens before it in its document that are not hidden, then the segment.

    Equals, per segment, `[t for t in before if not hidden(t)] + segment`, with labels on the segment alone. A hidden
    token that ends a line is kept if an earlier token of the line is visible; otherwise the segment would be joined to
    the rest of a line that it does not belong to.

    Args:
        documents: N documents with M completion tokens.
        hidden: (M,) completion tokens to leave out; prompts are never left out.
        starts: (S,) first completion token of each segment, ascending from 0; no segment spans two documents or turns.
        wanted: (W,) indices into `starts`.
        breaks: (M,) completion tokens that end a line.

    Returns:
        the distinct documents; `row_documents` (W,) has the document of each segment.
    """
    flat = np.flatnonzero(documents.completion)
    visible = np.ones(len(documents.input_ids), dtype=bool)
    visible[flat[hidden & ~_needed_breaks(documents, hidden, breaks)]] = False
    ends = np.append(starts[1:], len(flat))
    first, stop = flat[starts[wanted]], flat[ends[wanted] - 1] + 1
    begins = documents.offsets[np.searchsorted(documents.offsets, first, side="right") - 1]

    def rows() -> Iterator[dict[str, Any]]:
        for begin, a, b in zip(begins, first, stop, strict=True):
            past = documents.input_ids[begin:a][visible[begin:a]]
            own = documents.input_ids[a:b]
            labels = np.concatenate([np.full(len(past), IGNORE_INDEX), own])
            yield {"input_ids": np.concatenate([past, own]), "labels": labels}

    return collect(rows())


def _needed_breaks(documents: DocumentSet, hidden: Bools, breaks: Bools) -> Bools:
    """Hidden ends of lines that have a visible token, (M,)."""
    if not (hidden & breaks).any():
        return np.zeros(len(hidden), dtype=bool)
    begins = np.zeros(len(hidden) + 1, dtype=bool)
    begins[documents.completion_offsets] = True
    begins[1:] |= breaks
    lines = np.flatnonzero(begins[:-1])
    some = np.add.reduceat((~hidden).astype(np.int64), lines) > 0
    needed: Bools = hidden & breaks & np.repeat(some, np.diff(lines, append=len(hidden)))
    return needed


def predictions_without(
    documents: DocumentSet,
    hidden: Bools,
    starts: Ints,
    wanted: Ints,
    breaks: Bools,
    predict: Callable[[DocumentSet], Predictions],
) -> Predictions:
    """What a reference predicts in the wanted segments if the hidden tokens before them are left out; NaN elsewhere.

    Args:
        documents, hidden, starts, wanted, breaks: as in `excerpts`.
        predict: predictions at the completion tokens of any documents.
    """
    total = int(documents.completion.sum())
    columns = {name: np.full(total, np.nan, dtype=np.float32) for name in ("logprobs", "entropy", "deviation")}
    if len(wanted):
        made = excerpts(documents, hidden, starts, wanted, breaks)
        found, offsets = predict(made), made.completion_offsets
        lengths = np.append(starts[1:], total)[wanted] - starts[wanted]
        into = stretches(starts[wanted], lengths)
        out_of = stretches(offsets[made.row_documents], lengths)
        for name, values in columns.items():
            values[into] = getattr(found, name)[out_of]
    return Predictions(**columns)
