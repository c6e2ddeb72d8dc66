"""Excerpts of documents: a sentence behind another past than the one it stands behind.

What follows noise looks like noise itself, because the reference has just read noise. To ask what it says without, a
document is made of what is left before the sentence, and of the sentence. It is scored and stored by content as any
other, so every model that can score can do this, and a second run finds the answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .documents import IGNORE_INDEX, DocumentSet, collect
from .ragged import stretches

if TYPE_CHECKING:
    from ..scorers.base import Predictions

Bools = NDArray[np.bool_]
Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Excerpted:
    """What a reference predicts at the completion tokens of some segments, (M,) each; NaN at all others."""

    logprobs: Floats
    entropy: Floats
    deviation: Floats


def excerpts(documents: DocumentSet, hidden: Bools, starts: Ints, wanted: Ints, breaks: Bools) -> DocumentSet:
    """One document for each wanted segment: all before it in its document that is not hidden, then the segment.

    Equals, per segment, `[t for t in before if not hidden(t)] + segment`, of which the segment alone carries labels. A
    hidden token that ends a line stays where something before it in the line does: the segment would else be glued to
    what is left of a line that it does not belong to, and look odd for that.

    Args:
        documents: N documents with M completion tokens.
        hidden: (M,) completion tokens to leave out; what is no completion always stays.
        breaks: (M,) completion tokens that end a line.
        starts: (S,) first completion token of each segment, ascending from 0; no segment spans two documents or turns.
        wanted: (W,) indices into `starts`.

    Returns:
        the distinct documents; `row_documents` (W,) tells which belongs to which segment.
    """
    flat = np.flatnonzero(documents.completion)
    visible = np.ones(len(documents.input_ids), dtype=bool)
    visible[flat[hidden & ~_needed_breaks(documents, hidden, breaks)]] = False
    ends = np.append(starts[1:], len(flat))
    first, behind = flat[starts[wanted]], flat[ends[wanted] - 1] + 1
    begins = documents.offsets[np.searchsorted(documents.offsets, first, side="right") - 1]

    def rows() -> Iterator[dict[str, Any]]:
        for begin, a, b in zip(begins, first, behind, strict=True):
            past = documents.input_ids[begin:a][visible[begin:a]]
            own = documents.input_ids[a:b]
            labels = np.concatenate([np.full(len(past), IGNORE_INDEX), own])
            yield {"input_ids": np.concatenate([past, own]), "labels": labels}

    return collect(rows())


def _needed_breaks(documents: DocumentSet, hidden: Bools, breaks: Bools) -> Bools:
    """Hidden line ends of lines of which something before them is visible, (M,)."""
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
) -> Excerpted:
    """What a reference predicts in the wanted segments when it has not read the hidden tokens before them.

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
    return Excerpted(**columns)
