"""Collects the distinct ones of many documents in order of first appearance, thousands at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import XTFUserError
from .keys import KEY_BYTES, distinct, document_keys
from .ragged import Bools, Ints, Layout, gathered, offsets_of, stretches

BLOCK = 8192  # documents that are looked at together
TOKEN_IDS = 1 << 22  # more than any vocabulary has: tables by token id stay small, whatever the data hold


@dataclass(frozen=True)
class _Block:
    """Documents that are distinct among themselves, and which of them each added document is."""

    keys: NDArray[np.uint8]
    lengths: Ints
    trained: Ints
    input_ids: NDArray[np.int32]
    completion: Bools
    which: Ints


class Distinct:
    """Documents are added; their distinct ones are the attributes after `finish`.

    Args:
        tokens: whether token ids and label masks are kept; else they stay empty.

    Attributes:
        added: number of documents that were added.
        predicts: whether a completion token is predicted: one that is not the first of its document.
        keys: (N, 16) uint8. lengths, trained: (N,) tokens and completion tokens of each. input_ids, completion: flat.
        which: (added,) the distinct document that each added one is.
    """

    def __init__(self, *, tokens: bool = True) -> None:
        self.added, self.predicts, self._tokens = 0, False, tokens
        self._kept = 0  # documents in the blocks
        self._blocks: list[_Block] = []
        self._latest: list[tuple[NDArray[Any], Bools]] = []

    def add(self, tokens: NDArray[Any], completion: Bools) -> None:
        """Add one document: its token ids and its label mask, (T,) each."""
        self._latest.append((tokens, completion))
        if len(self._latest) == BLOCK:
            self._join()

    def extend(self, input_ids: NDArray[Any], completion: Bools, lengths: Ints) -> None:
        """Add documents of these lengths (n,), whose token ids and label masks follow each other.

        Raises:
            XTFUserError: a token id is negative, or `TOKEN_IDS` or more.
        """
        self._join()
        offsets, ids = offsets_of(lengths), _to_int32(input_ids)
        firsts = int(completion[offsets[:-1][lengths > 0]].sum())
        self.predicts = self.predicts or int(completion.sum()) > firsts
        keys, trained = document_keys(ids, completion, offsets), Layout(offsets, lengths).count(completion)
        places, which = distinct(keys)
        if not self._tokens:
            ids, completion = ids[:0].copy(), completion[:0].copy()
        elif len(places) < len(keys):
            inside = stretches(offsets[places], lengths[places])
            ids, completion = ids[inside], completion[inside]
        self.added += len(which)
        self._blocks.append(_Block(keys[places], lengths[places], trained[places], ids, completion, which + self._kept))
        self._kept += len(places)

    def _join(self) -> None:
        if self._latest:
            ids, masks = zip(*self._latest, strict=True)
            self._latest = []
            lengths = np.asarray([len(mask) for mask in masks], dtype=np.int64)
            self.extend(np.concatenate(ids), np.concatenate(masks), lengths)

    def finish(self) -> Distinct:
        """Put the blocks together; to be called once, after all documents were added."""
        self._join()
        blocks, self._blocks = self._blocks, []
        nothing = np.zeros(0, dtype=np.int64)
        keys = np.concatenate([np.zeros((0, KEY_BYTES), np.uint8), *(block.keys for block in blocks)])
        lengths = np.concatenate([nothing, *(block.lengths for block in blocks)])
        trained = np.concatenate([nothing, *(block.trained for block in blocks)])
        places, again = distinct(keys)
        self.keys, self.lengths, self.trained = keys[places], lengths[places], trained[places]
        self.which = again[np.concatenate([nothing, *(block.which for block in blocks)])]
        self.completion = np.concatenate([np.zeros(0, bool), *(block.completion for block in blocks)])
        self.input_ids = np.concatenate([np.zeros(0, np.int32), *(block.input_ids for block in blocks)])
        del blocks
        if self._tokens and len(places) < len(keys):
            starts = offsets_of(lengths)[places]
            self.input_ids = gathered(self.input_ids, starts, self.lengths)
            self.completion = gathered(self.completion, starts, self.lengths)
        return self


def _to_int32(tokens: NDArray[Any]) -> NDArray[np.int32]:
    if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < TOKEN_IDS:
        bad = tokens[(tokens < 0) | (tokens >= TOKEN_IDS)][0]
        raise XTFUserError(f"a training row holds the token id {int(bad)}, which no tokenizer gives; tokenise again.")
    return tokens.astype(np.int32, copy=False)
