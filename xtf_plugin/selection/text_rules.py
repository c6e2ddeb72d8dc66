"""What the text decides, whatever the scores: protected and force-dropped tokens, sentences and lines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..data import sentences, token_text
from ..data.documents import DocumentSet
from ..data.ragged import Bools, Ints

if TYPE_CHECKING:
    from ..config.block import XTFConfig


@dataclass(frozen=True)
class TextRules:
    """All that a block asks of the text of a set of documents.

    Args:
        protected: (M,) completion tokens that are never dropped; forced: (M,) those that go unless protected.
        segments: first tokens of the sentences and lines that some score asks for, by unit.
    """

    protected: Bools
    forced: Bools | None
    segments: Mapping[str, Ints]

    @classmethod
    def find(cls, config: XTFConfig, documents: DocumentSet, tokenizer: Any) -> TextRules:
        """Those of the documents."""
        protected, forced = marked_tokens(config, documents, tokenizer)
        return cls(protected, forced, text_segments(config, documents, tokenizer))


def marked_tokens(config: XTFConfig, documents: DocumentSet, tokenizer: Any) -> tuple[Bools, Bools | None]:
    """Protected and force-dropped completion tokens, (M,) each: special tokens and regex matches."""
    token_ids = documents.input_ids[documents.completion]
    protected = np.zeros(len(token_ids), dtype=bool)
    if config.protect.special_tokens:
        protected |= np.isin(token_ids, special_ids(tokenizer))
    runs = completion_runs(documents)
    if config.protect.patterns:
        protected |= token_text.match_spans(tokenizer, token_ids, runs, config.protect.patterns)
    forced = None
    if config.force_drop:
        forced = token_text.match_spans(tokenizer, token_ids, runs, config.force_drop)
    return protected, forced


def text_segments(config: XTFConfig, documents: DocumentSet, tokenizer: Any) -> dict[str, Ints]:
    """First completion tokens of the sentences or lines that some score asks for, by unit."""
    units = {part.unit for part in config.scores.values()} & {"sentence", "line"}
    return {unit: segment_starts(documents, tokenizer, unit) for unit in sorted(units)}


def segment_starts(documents: DocumentSet, tokenizer: Any, unit: str) -> NDArray[np.int64]:
    """First completion tokens of the sentences or lines, among all completion tokens."""
    token_ids, runs = documents.input_ids[documents.completion], completion_runs(documents)
    return sentences.segment_starts(unit, tokenizer, token_ids, runs, special_ids(tokenizer))


def special_ids(tokenizer: Any) -> NDArray[np.int64]:
    """EOS, end-of-turn and every other token that the tokenizer marks as special."""
    ids = set(tokenizer.all_special_ids)
    ids |= {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return np.asarray(sorted(ids), dtype=np.int64)


def completion_runs(documents: DocumentSet) -> NDArray[np.int64]:
    """(R + 1,) offsets of maximal runs of adjacent completion tokens (one answer, or one turn each) among all of
    them.
    """
    flat = np.flatnonzero(documents.completion)
    breaks = np.zeros(len(flat), dtype=bool)
    breaks[1:] = np.diff(flat) > 1
    starts = documents.completion_offsets
    breaks[starts[:-1][np.diff(starts) > 0]] = True  # a document's first completion token opens a run
    return np.concatenate([np.flatnonzero(breaks), [len(flat)]]).astype(np.int64)
