"""What depends on the text and not on scores: protected and force-dropped tokens, sentences and lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ..data import sentences, token_text
from ..data.documents import DocumentSet
from ..data.formats import format_tokens, known_format_tokens
from ..data.ragged import Bools, Ints
from ..data.turns import Turns

if TYPE_CHECKING:
    from ..config.block import XTFConfig


@dataclass(frozen=True)
class Match:
    """What a regular expression of the block matches in the dataset.

    Args:
        key: `protect.patterns` or `force_drop`.
        documents, tokens: in which it matches, and which it marks.
        most: tokens that it marks in one document.
        special: whether it matches special tokens, which `protect.special_tokens` keeps and it does not mark.
    """

    key: str
    pattern: str
    documents: int
    tokens: int
    most: int
    special: bool = False

    @classmethod
    def find(
        cls, key: str, patterns: Sequence[str], documents: DocumentSet, tokenizer: Any, left_out: Bools | None = None
    ) -> tuple[Bools, Sequence[Match]]:
        """The completion tokens that some patterns mark, (M,), and what each of them matches; without `left_out`."""
        runs, ids = documents.completion_runs, documents.completion_ids
        marks, numbers, special = token_text.match_each(tokenizer, ids, runs, patterns, left_out)
        owners = np.searchsorted(documents.completion_offsets, runs[:-1], side="right") - 1
        matches = []
        for pattern, each, beyond in zip(patterns, numbers, special.tolist(), strict=True):
            sums = np.bincount(owners, each, len(documents.counts)).astype(np.int64)
            found, tokens = documents.counts[sums > 0].sum(), sums @ documents.counts
            matches.append(cls(key, pattern, int(found), int(tokens), int(sums.max(initial=0)), beyond))
        return marks, matches

    def warning(self) -> str:
        """What to say of a pattern that marks nothing."""
        nothing = (
            "only special tokens, which protect.special_tokens keeps" if self.special else "nothing in the dataset"
        )
        return f"{self.key}: {self.pattern!r} matches {nothing}"


@dataclass(frozen=True)
class TextRules:
    """What a block reads from the text of a set of documents.

    Args:
        protected: (M,) completion tokens that are never dropped.
        forced: (M,) completion tokens that are dropped unless protected; None: none.
        segments: first tokens of the sentences and lines that are some score's unit, by unit; of sentences also if
            they are searched for a format.
        formatted: (M,) completion tokens that are protected as format; None: none.
        formats: share of documents by opening that is protected as format, most frequent first.
        inside: (M,) completion tokens that begin inside a character; None: none.
        turns: how the answers begin and end; None: not looked at.
        matches: what each pattern of the block matches.
    """

    protected: Bools
    forced: Bools | None
    segments: Mapping[str, Ints]
    formatted: Bools | None = None
    formats: Mapping[str, float] = field(default_factory=dict)
    inside: Bools | None = None
    turns: Turns | None = None
    matches: Sequence[Match] = ()

    @classmethod
    def find(
        cls, config: XTFConfig, documents: DocumentSet, tokenizer: Any, sample: TextRules | None = None
    ) -> TextRules:
        """Match the block's regexes and special tokens, and split the text into the units that scores use.

        `sample`: the rules of a stream's calibration sample, for later documents of it; its formats are taken.
        """
        token_ids, runs = documents.completion_ids, documents.completion_runs
        protected = np.zeros(len(token_ids), dtype=bool)
        special = special_ids(tokenizer)
        known = None if sample is None or sample.turns is None else sample.turns.texts
        turns = Turns.find(documents, tokenizer, special, known)
        if config.protect.special_tokens:
            protected |= np.isin(token_ids, special)
            protected |= False if turns.marks is None else turns.marks
        always = protected.copy() if config.protect.special_tokens else None  # `.*` means the text, not its end
        marks, matches = Match.find("protect.patterns", config.protect.patterns, documents, tokenizer, always)
        protected |= marks
        marks, others = Match.find("force_drop", config.force_drop, documents, tokenizer, always)
        matches, forced = (*matches, *others), marks if config.force_drop else None
        share = config.protect.formats if len(token_ids) else None
        units = {part.unit for part in config.scores.values()} & {"sentence", "line"}
        units |= set() if share is None else {"sentence"}
        segments: dict[str, Ints] = {unit: segment_starts(documents, tokenizer, unit) for unit in sorted(units)}
        inside: Bools | None = sentences.inside_characters(tokenizer, token_ids, runs)
        if share is None:
            return cls(protected, forced, segments, inside=inside, turns=turns, matches=matches)
        starts = segments["sentence"]
        if sample is None:
            found, formats = format_tokens(documents, starts, share, tokenizer, special)
        else:
            formats = dict(sample.formats)
            found = known_format_tokens(documents, starts, formats, tokenizer)
        if forced is not None:
            found &= ~forced  # what the user asks for wins over what was found
        return cls(protected | found, forced, segments, found, formats, inside, turns, matches)


def segment_starts(documents: DocumentSet, tokenizer: Any, unit: str) -> Ints:
    """First completion tokens of the sentences or lines, among all completion tokens."""
    token_ids, runs = documents.completion_ids, documents.completion_runs
    return sentences.segment_starts(unit, tokenizer, token_ids, runs, special_ids(tokenizer))


def special_ids(tokenizer: Any) -> Ints:
    """Ids of EOS, end-of-turn and every other token that the tokenizer marks as special, ascending."""
    ids = set(tokenizer.all_special_ids)
    ids |= {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return np.asarray(sorted(ids), dtype=np.int64)
