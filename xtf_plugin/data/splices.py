"""Splices: part of a document after the beginning of the same document, with what stands between left out.

Most questions about a sentence are of this form: how probable is it right after the prompt, without the prompt, or
how probable is the text after it if it is left out? A splice is a document, so it is scored and stored like any other.
Splices of one document share their beginning, which a reference needs to read only once (`scoring.branches`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from .documents import Branches, DocumentSet, from_arrays
from .predictions import PREDICTED, Predictions
from .ragged import Bools, Doubles, Floats, Ints, offsets_of, runs, stretches

TOGETHER = 1 << 27  # tokens that are laid out at a time, at most ten bytes each


@dataclass(frozen=True)
class Splices:
    """W splices of the completion of a set of documents.

    Splice `w` reads its document without the completion tokens from `keep[w]` up to `begin[w]` and what stands between
    them, up to and with completion token `end[w] - 1`. It is scored at the completion tokens from `begin[w]` on. With
    `keep[w] = -1` it reads `template` and then the document from completion token `begin[w]` on.

    Args:
        keep, begin, end: (W,) int64 indices of completion tokens of one document each, `keep <= begin < end`.
        template: (K,) token ids.
    """

    keep: Ints
    begin: Ints
    end: Ints
    template: NDArray[np.int32]

    @cached_property
    def offsets(self) -> Ints:
        """(W + 1,) bounds of the splices among all tokens that are scored."""
        return offsets_of(self.end - self.begin)

    def per_splice(self, values: Floats) -> Doubles:
        """Sums of per-token values (sum of lengths,) over each splice, (W,) float64; an undefined value counts as 0."""
        known = np.concatenate([np.nan_to_num(values.astype(np.float64)), [0.0]])
        sums = np.add.reduceat(known, self.offsets[:-1]) if len(self.keep) else np.zeros(0)
        return np.where(self.end > self.begin, sums, 0.0)

    def parts(self, source: DocumentSet, size: int) -> list[Splices]:
        """Splices in a row with at most `size` tokens together; a longer one is alone."""
        first, stop = self._rest(source)
        past = np.where(self.keep >= 0, source.completion_positions[self.keep], len(self.template))
        where = runs(offsets_of(past + stop - first), size)
        return [Splices(self.keep[at], self.begin[at], self.end[at], self.template) for at in where]

    def documents(self, source: DocumentSet) -> DocumentSet:
        """The distinct splices as documents; `row_documents` (W,) has each splice's.

        Their group is the index of the source's document that they begin like; -1: they begin with the template.
        """
        flat, (first, stop) = source.completion_flat, self._rest(source)
        own = np.searchsorted(source.offsets, first, side="right") - 1
        cut = np.where(self.keep >= 0, flat[np.maximum(self.keep, 0)], 0)
        ids: list[NDArray[np.int32]] = []
        masks: list[Bools] = []
        for place in range(len(first)):
            kept = self.keep[place] >= 0
            past = source.input_ids[source.offsets[own[place]] : cut[place]] if kept else self.template
            here = slice(first[place], stop[place])
            ids.append(np.concatenate([past, source.input_ids[here]]))
            masks.append(np.concatenate([np.zeros(len(past), dtype=bool), source.completion[here]]))
        lengths = np.asarray([len(tokens) for tokens in ids], dtype=np.int64) - (stop - first)
        return from_arrays(ids, masks, Branches(np.where(self.keep >= 0, own, -1), lengths))

    def _rest(self, source: DocumentSet) -> tuple[Ints, Ints]:
        """Where what each splice reads after its beginning starts and ends in `input_ids`, (W,) each."""
        flat = source.completion_flat
        # a prompt after what is left out, between two turns, is read
        first = np.where((self.keep >= 0) & (self.keep < self.begin), flat[self.begin - 1] + 1, flat[self.begin])
        return first, flat[self.end - 1] + 1


def predictions_of(
    documents: DocumentSet, splices: Splices, predict: Callable[[DocumentSet], Predictions]
) -> Predictions:
    """What a reference predicts in some splices, (sum of their lengths,) each.

    Args:
        documents, splices: see `Splices`.
        predict: predictions at the completion tokens of any documents; called several times if there are many.
    """
    columns = {name: [np.zeros(0, dtype=np.float32)] for name in PREDICTED}
    for part in splices.parts(documents, TOGETHER):  # each repeats its prompt: together they can be many datasets
        made = part.documents(documents)
        found = predict(made)
        at = stretches(made.completion_offsets[made.row_documents], np.diff(part.offsets))
        for name, values in columns.items():
            values.append(getattr(found, name)[at])
    return Predictions(**{name: np.concatenate(values) for name, values in columns.items()})
