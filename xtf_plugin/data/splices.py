"""Splices: part of a document after the beginning of the same document, with what stands between left out.

Most questions about a sentence are of this form: how probable is it right after the prompt, without the prompt, or
how probable is the text after it if it is left out? A splice is a document, so it is scored and stored like any other.
Splices of one document share their beginning, which a reference needs to read only once (`scoring.branches`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from .distinct import Distinct
from .documents import Branches, DocumentSet, from_blocks
from .predictions import PREDICTED, Predictions
from .ragged import CHUNK_TOKENS, Bools, Doubles, Floats, Ints, gathered, offsets_of, runs, stretches

Block = tuple[NDArray[np.int32], Bools, Ints]
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

    def sums(self, values: Callable[[slice, Ints, Ints], Floats]) -> Doubles:
        """Sums over the tokens of each splice, (W,) float64; an undefined value counts as 0.

        Args:
            values: of some tokens in a row: a slice of all tokens that are scored, the place of each in its splice, and
                its index among the completion tokens.
        """
        sums = np.zeros(len(self.keep))
        for part in runs(self.offsets, CHUNK_TOKENS):
            bounds = self.offsets[part.start : part.stop + 1]
            lengths = np.diff(bounds)
            place, at = stretches(np.zeros_like(lengths), lengths), stretches(self.begin[part], lengths)
            known = np.nan_to_num(values(slice(int(bounds[0]), int(bounds[-1])), place, at).astype(np.float64))
            sums[part] = np.add.reduceat(known, bounds[:-1] - bounds[0])
        return sums

    def parts(self, source: DocumentSet, size: int) -> list[Splices]:
        """Splices in a row with at most `size` tokens together; a longer one is alone."""
        first, stop = self._rest(source)
        past = self._past(source)
        where = runs(offsets_of(past + stop - first), size)
        return [Splices(self.keep[at], self.begin[at], self.end[at], self.template) for at in where]

    def documents(self, source: DocumentSet) -> DocumentSet:
        """The distinct splices as documents; `row_documents` (W,) has each splice's.

        Their group is the index of the source's document that they begin like; -1: they begin with the template.
        """
        first, _ = self._rest(source)
        kept, own = self.keep >= 0, np.searchsorted(source.offsets, first, side="right") - 1
        return from_blocks(self._blocks(source), Branches(np.where(kept, own, -1), self._past(source)))

    def distinct(self, source: DocumentSet) -> Distinct:
        """The keys of `documents`, without laying all of them out."""
        found = Distinct(tokens=False)
        for block in self._blocks(source):
            found.extend(*block)
        return found.finish()

    def _blocks(self, source: DocumentSet) -> Iterator[Block]:
        """Token ids, label masks and lengths of the splices, many at a time."""
        ids = np.concatenate([source.input_ids, self.template])
        completion = np.concatenate([source.completion, np.zeros(len(self.template), dtype=bool)])
        first, stop = self._rest(source)
        own = np.searchsorted(source.offsets, first, side="right") - 1
        begins = np.where(self.keep >= 0, source.offsets[own], len(source.input_ids))  # of the template, at the end
        begins, sizes = np.stack([begins, first], 1), np.stack([self._past(source), stop - first], 1)
        for part in runs(offsets_of(sizes.sum(1)), CHUNK_TOKENS):
            where = stretches(begins[part].reshape(-1), sizes[part].reshape(-1))
            asked = np.repeat(np.tile([False, True], len(sizes[part])), sizes[part].reshape(-1))
            yield ids[where], completion[where] & asked, sizes[part].sum(1)

    def _past(self, source: DocumentSet) -> Ints:
        """Tokens that each splice reads at its beginning, (W,)."""
        past: Ints = np.where(self.keep >= 0, source.completion_positions[self.keep], len(self.template))
        return past

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
        predicted = predict(made)
        found = spread(
            {name: getattr(predicted, name) for name in columns}, made.completion_offsets, made.row_documents
        )
        for name, values in columns.items():
            values.append(getattr(found, name))
    return Predictions(**{name: np.concatenate(values) for name, values in columns.items()})


def spread(columns: dict[str, Floats], offsets: Ints, which: Ints) -> Predictions:
    """What is predicted in some documents, (M,), for splices that equal them, (sum of their lengths,).

    Args:
        columns: predictions of documents, whose tokens end at `offsets`, (N + 1,); taken out as they are used, since
            each is as large as a dataset.
        which: (W,) the document that each splice is.
    """
    lengths, found = np.diff(offsets), {}
    for name in PREDICTED:
        found[name] = gathered(columns.pop(name), offsets[which], lengths[which])
    return Predictions(**found)
