"""The prompts of a dataset: what they have in common, and the text before each answer.

Without its prompt, nobody can judge what is dropped from an answer.
"""

from __future__ import annotations

import itertools
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .ragged import CHUNK_TOKENS, Bools, Ints, gathered, offsets_of
from .token_text import distinct_ids, token_bytes

if TYPE_CHECKING:
    from .documents import DocumentSet

TOKENS = 64  # before an answer, at most
CUT = "… "  # before a text whose beginning is left out


def contexts(documents: DocumentSet) -> tuple[Ints, Ints]:
    """First tokens, and those after the last, of all that stands in a document before each of its answers.

    Of answers with nothing before them there are none.
    """
    ends = documents.completion_flat[documents.completion_runs[:-1]].astype(np.int64)
    begins = documents.offsets[np.searchsorted(documents.offsets, ends, side="right") - 1]
    some = ends > begins
    return begins[some], ends[some]


def shared_ends(ids: NDArray[Any], begins: Ints, ends: Ints) -> tuple[int, int]:
    """How many tokens all of some spans of `ids`, (n,), begin with, and how many of the others they end with."""
    front = _alike(ids, begins, ends - begins, 1)
    return front, min(_alike(ids, ends - 1, ends - begins, -1), int((ends - begins).min()) - front)


def _alike(ids: NDArray[Any], starts: Ints, sizes: Ints, step: int) -> int:
    """How many tokens all spans of `ids` of these sizes, (n,), begin with, or with `step` -1 end with."""
    size, low = int(sizes.min()), 0
    while size and low < len(starts):
        places, some = step * np.arange(size), starts[low : low + max(1, CHUNK_TOKENS // size)]
        differs = np.flatnonzero((ids[some[:, None] + places] != ids[starts[0] + places]).any(axis=0))
        size, low = int(differs[0]) if len(differs) else size, low + len(some)
    return size


class Prompts:
    """The text before the runs of completion tokens (answers, turns) of some documents.

    Args:
        documents: of a dataset.
        tokenizer: of their token ids.
        special: ids of special tokens.
    """

    def __init__(self, documents: DocumentSet, tokenizer: Any, special: Ints) -> None:
        self.documents = documents
        self.tokenizer = tokenizer
        self.special = special

    def before(self, opens: Ints) -> list[str]:
        """The last `TOKENS` tokens before some runs, as text; from the end of the run before, or the document's begin.

        What all prompts begin or end with is left out (a system prompt, the marks of a chat template), from or up to a
        special token or a line break, so that no message is cut; unless that is all that there is. So is what all later
        turns begin with.

        Args:
            opens: (R,) the runs' first tokens, as places among all completion tokens.

        Returns:
            R texts without white space at their ends; empty where nothing is before a document's first run, "…" if
            nothing of its own is before a later one. A character that is cut in two is replaced by U+FFFD.
        """
        begins, ends, later = self._gaps(opens)
        front, front_later, back = self._frame
        begins = np.minimum(begins + np.where(later, front_later, front), ends)
        ends = np.maximum(ends - back, begins)
        cut = ends - begins > TOKENS
        begins = np.where(cut, ends - TOKENS, begins)
        texts = [text.strip() for text in self._decoded(begins, ends - begins)]
        short = (cut | (later & ~np.asarray(list(map(bool, texts)), dtype=bool))).tolist()
        return [(CUT + text).rstrip() if each else text for text, each in zip(texts, short, strict=True)]

    def _gaps(self, opens: Ints) -> tuple[Ints, Ints, Bools]:
        """First tokens and those after the last between some runs and what is before them, and which begin no document.

        Before a run is another run, or the begin of its document.
        """
        flat = self.documents.completion_flat
        ends = flat[opens].astype(np.int64)
        begins = self.documents.offsets[np.searchsorted(self.documents.offsets, ends, side="right") - 1]
        since = np.where(opens > 0, flat[np.maximum(opens, 1) - 1].astype(np.int64) + 1, 0)
        return np.maximum(begins, since), ends, since > begins

    def _decoded(self, begins: Ints, sizes: Ints) -> list[str]:
        """The text of spans of the documents' tokens."""
        data, at, lengths = self._spelt
        ids = gathered(self.documents.input_ids, begins, sizes)
        spelt = gathered(data, at[ids], lengths[ids]).tobytes()
        bounds = offsets_of(lengths[ids])[offsets_of(sizes)].tolist()
        return [spelt[low:high].decode(errors="replace") for low, high in itertools.pairwise(bounds)]

    @cached_property
    def _frame(self) -> tuple[int, int, int]:
        """How many tokens `before` leaves out: that all prompts begin with, all later turns, and that all end with."""
        (begins, ends), ids = contexts(self.documents), self.documents.input_ids
        if not len(begins):
            return 0, 0, 0
        back = _alike(ids, ends - 1, ends - begins, -1)
        if _alike(ids, begins, ends - begins, 1) == back == (ends - begins).max():  # all are the same
            return 0, 0, 0
        last = ids[ends[0] - back : ends[0]]
        tails = self._bounds(last, np.zeros(len(last), dtype=np.int64))
        back = back - int(tails[0]) if len(tails) else 0
        starts, stops, later = self._gaps(self.documents.completion_runs[:-1])
        later &= stops > starts
        return self._front(begins, ends, back), self._front(starts[later], stops[later], back), back

    def _front(self, begins: Ints, ends: Ints, back: int) -> int:
        """How many tokens all of some spans begin with, up to the last bound, without the last `back` of each."""
        if not len(begins):
            return 0
        alike = _alike(self.documents.input_ids, begins, ends - begins, 1)
        room = max(0, int((ends - begins).min()) - back)
        first = self.documents.input_ids[begins[0] : begins[0] + min(alike, room)]
        if alike >= room:  # a whole message is shared, and its line breaks are its own
            heads = np.flatnonzero(np.isin(first, self.special))
        else:
            heads = self._bounds(first, self._spelt[2][first] - 1)
        return int(heads[-1]) + 1 if len(heads) else 0

    def _bounds(self, tokens: NDArray[Any], at: Ints) -> Ints:
        """The places of special tokens, and of those whose byte `at` (of their first or last) is a line feed."""
        data, starts, sizes = self._spelt
        feeds = (sizes[tokens] > 0) & (data[np.minimum(starts[tokens] + at, len(data) - 1)] == ord("\n"))
        return np.flatnonzero(np.isin(tokens, self.special) | feeds)

    @cached_property
    def _spelt(self) -> tuple[NDArray[np.uint8], Ints, Ints]:
        """The bytes of all tokens that occur, one after the other; by token id, where they start and their number."""
        distinct = distinct_ids(self.documents.input_ids)
        pieces = token_bytes(self.tokenizer, distinct.tolist())
        starts, sizes = (np.zeros(int(distinct.max(initial=-1)) + 1, dtype=np.int64) for _ in range(2))
        sizes[distinct] = list(map(len, pieces))
        starts[distinct] = offsets_of(sizes[distinct])[:-1]
        return np.frombuffer(b"".join(pieces), dtype=np.uint8), starts, sizes
