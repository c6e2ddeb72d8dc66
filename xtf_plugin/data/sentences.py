"""First tokens of sentences and lines, so that a rule can judge them as units.

Each distinct token is decoded once, into one byte of flags; everything else is array arithmetic on these flags.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .ragged import Bools, Ints, chunks, runs
from .token_text import token_bytes

Flags = NDArray[np.uint8]

CHUNK_TOKENS = 1 << 20  # bounds temporaries to a few MB
SPECIAL, BLANK, EMPTY, SPACED, NEWLINE, CLOSED, OPEN = (np.uint8(1 << bit) for bit in range(7))
_CLOSED, _OPEN = re.compile(r"[.!?]\s"), re.compile(r"[.!?]\Z")  # a sentence's end with and without its whitespace


def segment_starts(
    unit: str, tokenizer: Any, token_ids: ArrayLike, run_offsets: ArrayLike, special_ids: ArrayLike
) -> Ints:
    """Index of the first token of every sentence or line.

    A line ends with a token that contains a line feed. A sentence ends there too, and with a token that contains `.`,
    `!` or `?` followed by whitespace, in the same token or at the beginning of the next one; so a decimal point and the
    inner dot of "e.g." end none. Tokens of whitespace alone belong to the sentence before them. A special token is a
    segment of its own. No segment spans two runs.

    Args:
        unit: `sentence` or `line`.
        tokenizer: a transformers tokenizer.
        token_ids: (M,) completion tokens.
        run_offsets: (R + 1,) ascending, from 0 to M; run `r` is `token_ids[run_offsets[r] : run_offsets[r + 1]]`.
        special_ids: ids of special tokens.

    Returns:
        (S,) int64, strictly ascending; segment `s` ends before `starts[s + 1]`, the last one at M. Every non-empty run
        begins one.
    """
    ids, offsets = np.asarray(token_ids), np.asarray(run_offsets, dtype=np.int64)
    flags = _vocabulary_flags(tokenizer, ids, np.asarray(special_ids))
    found = []
    for part in runs(offsets, CHUNK_TOKENS):
        start, stop = offsets[part.start], offsets[part.stop]
        here = flags[ids[start:stop]]
        begins = np.zeros(len(here) + 1, dtype=bool)  # an empty last run begins after the last token
        begins[offsets[part] - start] = True
        if len(here):
            found.append(np.flatnonzero(_starts(here, begins[:-1], unit)) + start)
    return np.concatenate(found) if found else np.zeros(0, dtype=np.int64)


def line_breaks(tokenizer: Any, token_ids: ArrayLike) -> Bools:
    """Which tokens contain a line feed, (M,)."""
    ids = np.asarray(token_ids)
    marked: Bools = (_vocabulary_flags(tokenizer, ids, np.zeros(0, dtype=np.int64)) & NEWLINE)[ids] > 0
    return marked


def _flags_of(text: str) -> int:
    """The flags of a token's text."""
    facts = {
        BLANK: not text.strip(),
        EMPTY: not text,
        SPACED: text[:1].isspace(),
        NEWLINE: "\n" in text,
        CLOSED: _CLOSED.search(text) is not None,
        OPEN: _OPEN.search(text) is not None,
    }
    return sum(int(flag) for flag, holds in facts.items() if holds)


def _vocabulary_flags(tokenizer: Any, ids: NDArray[Any], special_ids: NDArray[Any]) -> Flags:
    """Flags by token id; 0 for ids that do not occur."""
    seen = np.zeros(int(ids.max(initial=-1)) + 1, dtype=bool)
    for part in chunks(len(ids), CHUNK_TOKENS):  # np.unique would sort a copy of the dataset
        seen[ids[part]] = True
    distinct = np.flatnonzero(seen)
    flags = np.zeros(len(seen), dtype=np.uint8)
    pieces = token_bytes(tokenizer, distinct.tolist())
    flags[distinct] = [_flags_of(piece.decode("utf-8", errors="replace")) for piece in pieces]
    flags[distinct[np.isin(distinct, special_ids)]] = SPECIAL
    return flags


def _starts(flags: Flags, begins: Bools, unit: str) -> Bools:
    """Which tokens begin a segment, given which begin a run; there is at least one token."""
    special = (flags & SPECIAL) > 0
    forced: Bools = begins | special
    forced[1:] |= special[:-1]
    ends = (flags & NEWLINE) > 0
    if unit == "line":
        forced[1:] |= ends[:-1]
        return forced
    ends |= (flags & CLOSED) > 0
    ends |= ((flags & OPEN) > 0) & _before_space(flags, begins)
    blank = (flags & BLANK) > 0
    # a token begins a sentence if the last token before it that is not merely whitespace ends one
    decisive = ~blank | ends | forced
    last = np.maximum.accumulate(np.where(decisive, np.arange(len(flags)), 0))  # token 0 is decisive: it begins a run
    starts: Bools = forced.copy()
    starts[1:] |= ~blank[1:] & ends[last[:-1]]
    return starts


def _before_space(flags: Flags, begins: Bools) -> Bools:
    """Tokens whose next non-empty token in the same run begins with whitespace."""
    full, run = np.flatnonzero((flags & EMPTY) == 0), np.cumsum(begins)
    found = np.zeros(len(flags), dtype=bool)
    found[full[:-1]] = ((flags[full[1:]] & SPACED) > 0) & (run[full[1:]] == run[full[:-1]])
    return found
