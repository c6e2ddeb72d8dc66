"""The text before each answer: without it, nobody can judge what is dropped from the answer."""

from __future__ import annotations

import itertools
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .ragged import Ints, offsets_of, stretches
from .token_text import distinct_ids, token_bytes

if TYPE_CHECKING:
    from .documents import DocumentSet

TOKENS = 64  # before an answer, at most


class Prompts:
    """The text before the runs of completion tokens (answers, turns) of some documents.

    Args:
        documents: of a dataset.
        tokenizer: of their token ids.
    """

    def __init__(self, documents: DocumentSet, tokenizer: Any) -> None:
        self.documents = documents
        self.tokenizer = tokenizer

    def before(self, opens: Ints) -> list[str]:
        """The last `TOKENS` tokens before some runs, as text; from the end of the run before, or the document's begin.

        Args:
            opens: (R,) the runs' first tokens, as places among all completion tokens.

        Returns:
            R texts; empty where nothing is before. A character that is cut in two is replaced by U+FFFD.
        """
        documents, flat = self.documents, self.documents.completion_flat
        ends = flat[opens].astype(np.int64)
        begins = documents.offsets[np.searchsorted(documents.offsets, ends, side="right") - 1]
        later = opens > 0
        begins[later] = np.maximum(begins[later], flat[opens[later] - 1].astype(np.int64) + 1)
        begins = np.maximum(begins, ends - TOKENS)
        data, starts, sizes = self._spelt
        ids = documents.input_ids[stretches(begins, ends - begins)]
        spelt = data[stretches(starts[ids], sizes[ids])].tobytes()
        bounds = offsets_of(sizes[ids])[offsets_of(ends - begins)].tolist()
        return [spelt[low:high].decode(errors="replace") for low, high in itertools.pairwise(bounds)]

    @cached_property
    def _spelt(self) -> tuple[NDArray[np.uint8], Ints, Ints]:
        """The bytes of all tokens that occur, one after the other; by token id, where they start and their number."""
        distinct = distinct_ids(self.documents.input_ids)
        pieces = token_bytes(self.tokenizer, distinct.tolist())
        starts, sizes = (np.zeros(int(distinct.max(initial=-1)) + 1, dtype=np.int64) for _ in range(2))
        sizes[distinct] = list(map(len, pieces))
        starts[distinct] = offsets_of(sizes[distinct])[:-1]
        return np.frombuffer(b"".join(pieces), dtype=np.uint8), starts, sizes
