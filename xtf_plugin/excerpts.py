"""Excerpts of documents: a sentence behind another past than the one it stands behind.

What follows noise looks like noise itself, because the reference has just read noise. To ask what it says without, a
document is made of what is left before the sentence, and of the sentence. It is scored and stored by content as any
other, so every model that can score can do this, and a second run finds the answers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .documents import IGNORE_INDEX, DocumentSet, collect

if TYPE_CHECKING:
    from .scorers.base import Predictions

Bools = NDArray[np.bool_]
Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Excerpted:
    """What a reference predicts at the completion tokens of some segments, (M,) each; NaN at all others."""

    logprobs: Floats
    entropy: Floats
    deviation: Floats


def excerpts(documents: DocumentSet, hidden: Bools, starts: Ints, wanted: Ints) -> DocumentSet:
    """One document for each wanted segment: all before it in its document that is not hidden, then the segment.

    Equals, per segment, `[t for t in before if not hidden(t)] + segment`, of which the segment alone carries labels.

    Args:
        documents: N documents with M completion tokens.
        hidden: (M,) completion tokens to leave out; what is no completion always stays.
        starts: (S,) first completion token of each segment, ascending from 0; no segment spans two documents or turns.
        wanted: (W,) indices into `starts`.

    Returns:
        the distinct documents; `row_documents` (W,) tells which belongs to which segment.
    """
    flat = np.flatnonzero(documents.completion)
    visible = np.ones(len(documents.input_ids), dtype=bool)
    visible[flat[hidden]] = False
    ends = np.append(starts[1:], len(flat))
    first, behind = flat[starts[wanted]], flat[ends[wanted] - 1] + 1
    begins = documents.offsets[np.searchsorted(documents.offsets, first, side="right") - 1]
    rows = []
    for begin, a, b in zip(begins, first, behind, strict=True):
        past = documents.input_ids[begin:a][visible[begin:a]]
        own = documents.input_ids[a:b]
        labels = np.concatenate([np.full(len(past), IGNORE_INDEX), own])
        rows.append({"input_ids": np.concatenate([past, own]), "labels": labels})
    return collect(rows)


def predictions_without(
    documents: DocumentSet,
    hidden: Bools,
    starts: Ints,
    wanted: Ints,
    predict: Callable[[DocumentSet], Predictions],
) -> Excerpted:
    """What a reference predicts in the wanted segments when it has not read the hidden tokens before them.

    Args:
        documents, hidden, starts, wanted: as in `excerpts`.
        predict: predictions at the completion tokens of any documents.
    """
    total = int(documents.completion.sum())
    columns = {name: np.full(total, np.nan, dtype=np.float32) for name in ("logprobs", "entropy", "deviation")}
    if len(wanted):
        made = excerpts(documents, hidden, starts, wanted)
        found, offsets = predict(made), made.completion_offsets
        lengths = np.append(starts[1:], total)[wanted] - starts[wanted]
        into = _stretches(starts[wanted], lengths)
        out_of = _stretches(offsets[made.row_documents], lengths)
        for name, values in columns.items():
            values[into] = getattr(found, name)[out_of]
    return Excerpted(**columns)


def _stretches(begins: Ints, lengths: Ints) -> Ints:
    """Indices begin, begin + 1, ... of every stretch, one after the other."""
    before = np.cumsum(lengths) - lengths
    return np.repeat(begins - before, lengths) + np.arange(int(lengths.sum()))
