"""Where sentences and lines begin among the completion tokens, so that a window can follow the text.

Noise comes in sentences and lines, not in fixed numbers of tokens. Each distinct token is read once; what is done to
every occurrence is array arithmetic on one byte of flags per token, a stretch of runs at a time.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .ragged import chunks
from .token_text import token_bytes

Bools = NDArray[np.bool_]
Flags = NDArray[np.uint8]
Ints = NDArray[np.int64]

CHUNK_TOKENS = 1 << 20  # temporaries of a few MB, whatever the size of the dataset
SPECIAL, BLANK, EMPTY, SPACED, NEWLINE, CLOSED, OPEN = (np.uint8(1 << bit) for bit in range(7))
_CLOSED = re.compile(r"[.!?]\s")
_OPEN = re.compile(r"[.!?]\Z")


def segment_starts(
    unit: str, tokenizer: Any, token_ids: ArrayLike, run_offsets: ArrayLike, special_ids: ArrayLike
) -> Ints:
    """Index of the first token of every sentence or line.

    A line ends with a token that contains a line feed. A sentence ends there too, and with a token that contains `.`,
    `!` or `?` with whitespace behind it, in the same token or at the beginning of the next one; so a decimal point ends
    none, nor does the inner dot of "e.g.". Tokens of nothing but whitespace belong to the sentence before them. A
    special token is a segment of its own. No segment spans two runs: the end of a run ends everything.

    Equals, for `unit="line"` and one run without special tokens, cutting the decoded run behind every line feed, as far
    as tokens can be cut.

    Args:
        unit: `sentence` or `line`.
        tokenizer: a transformers tokenizer.
        token_ids: (M,) completion tokens.
        run_offsets: (R + 1,) ascending, from 0 to M; run `r` is `token_ids[run_offsets[r] : run_offsets[r + 1]]`.
        special_ids: ids of special tokens.

    Returns:
        (S,) int64, strictly ascending; segment `s` reaches up to `starts[s + 1]`, the last one to M. Every run that is
        not empty begins one.
    """
    ids, offsets = np.asarray(token_ids), np.asarray(run_offsets, dtype=np.int64)
    flags = _vocabulary_flags(tokenizer, ids, np.asarray(special_ids))
    found = []
    low = 0
    while low < len(offsets) - 1:
        high = max(low + 1, int(np.searchsorted(offsets, offsets[low] + CHUNK_TOKENS, side="right")) - 1)
        here = flags[ids[offsets[low] : offsets[high]]]
        begins = np.zeros(len(here) + 1, dtype=bool)  # an empty run at the very end begins behind the last token
        begins[offsets[low:high] - offsets[low]] = True
        if len(here):
            found.append(np.flatnonzero(_starts(here, begins[:-1], unit)) + offsets[low])
        low = high
    return np.concatenate(found) if found else np.zeros(0, dtype=np.int64)


def line_breaks(tokenizer: Any, token_ids: ArrayLike) -> Bools:
    """Which tokens contain a line feed, (M,)."""
    ids = np.asarray(token_ids)
    marked: Bools = (_vocabulary_flags(tokenizer, ids, np.zeros(0, dtype=np.int64)) & NEWLINE)[ids] > 0
    return marked


def token_flags(pieces: Sequence[bytes]) -> Flags:
    """What matters about each token's bytes, (n,) uint8.

    BLANK: nothing but whitespace, or nothing. EMPTY: nothing. SPACED: begins with whitespace. NEWLINE: contains a line
    feed. CLOSED: contains `.`, `!` or `?` followed by whitespace. OPEN: ends with one of them.
    """
    flags = np.zeros(len(pieces), dtype=np.uint8)
    for index, piece in enumerate(pieces):
        text = piece.decode("utf-8", errors="replace")
        facts = {
            BLANK: not text or text.isspace(),
            EMPTY: not text,
            SPACED: text[:1].isspace(),
            NEWLINE: "\n" in text,
            CLOSED: _CLOSED.search(text) is not None,
            OPEN: _OPEN.search(text) is not None,
        }
        flags[index] = sum(int(flag) for flag, holds in facts.items() if holds)
    return flags


def _vocabulary_flags(tokenizer: Any, ids: NDArray[Any], special_ids: NDArray[Any]) -> Flags:
    """Flags by token id; those that do not occur are left 0."""
    seen = np.zeros(int(ids.max(initial=-1)) + 1, dtype=bool)
    for part in chunks(len(ids), CHUNK_TOKENS):  # np.unique would sort a copy of the dataset
        seen[ids[part]] = True
    distinct = np.flatnonzero(seen)
    flags = np.zeros(len(seen), dtype=np.uint8)
    flags[distinct] = token_flags(token_bytes(tokenizer, distinct.tolist()))
    flags[distinct[np.isin(distinct, special_ids)]] = SPECIAL
    return flags


def _starts(flags: Flags, begins: Bools, unit: str) -> Bools:
    """Which tokens begin a segment, given which begin a run; whole runs, at least one token."""
    special = (flags & SPECIAL) > 0
    forced: Bools = begins | special
    forced[1:] |= special[:-1]
    ends = (flags & NEWLINE) > 0
    if unit == "line":
        forced[1:] |= ends[:-1]
        return forced
    ends |= (flags & CLOSED) > 0
    ends |= ((flags & OPEN) > 0) & _spaced_behind(flags, begins)
    blank = (flags & BLANK) > 0
    # a token begins a sentence if the last token before it that is more than whitespace, or ends one, does end one
    telling = ~blank | ends | forced
    last = np.maximum.accumulate(np.where(telling, np.arange(len(flags)), 0))  # token 0 begins a run, so it is telling
    starts: Bools = forced.copy()
    starts[1:] |= ~blank[1:] & ends[last[:-1]]
    return starts


def _spaced_behind(flags: Flags, begins: Bools) -> Bools:
    """Where the next token that is not empty begins with whitespace; False at the end of a run, which ends anyway."""
    full = np.flatnonzero((flags & EMPTY) == 0)
    run = np.cumsum(begins)
    behind = np.zeros(len(flags), dtype=bool)
    behind[full[:-1]] = ((flags[full[1:]] & SPACED) > 0) & (run[full[1:]] == run[full[:-1]])
    return behind
