"""First tokens of sentences, lines and characters, so that a rule can judge them as units.

Each distinct token is decoded once, into one word of flags; everything else is array arithmetic on these flags.

Which characters end a sentence is Unicode's property Sentence_Break (UAX #29), as the package `regex` knows it. The
rules are shorter than those of UAX #29, since answers hold code and loose spelling: `.`, `!` and `?` end a sentence
before whitespace only, and what follows may begin with a small letter.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import regex
from numpy.typing import ArrayLike, NDArray

from . import json_strings
from .ragged import Bools, Ints, runs
from .token_text import distinct_ids, token_bytes

Flags = NDArray[np.uint32]

CHUNK_TOKENS = 1 << 20  # bounds temporaries to a few MB

SPECIAL, BLANK, EMPTY, NEWLINE, ABBREVIATION, LETTER, DOT, NUMBER = (np.uint32(1 << bit) for bit in range(8))
SPACED = np.uint32(1 << 8)  # begins with whitespace
CLOSED = np.uint32(1 << 9)  # holds the end of a sentence and something after it, if only a space
OPEN = np.uint32(1 << 10)  # ends with `.`, `!` or `?`, and perhaps a quote: the next token decides
WIDE = np.uint32(1 << 11)  # ends with a mark that needs no whitespace after it
CLOSER = np.uint32(1 << 12)  # quotes, brackets and combining marks alone
MORE = np.uint32(1 << 13)  # CLOSER but for what also opens a quote, or further marks that end a sentence
SPACES = np.uint32(1 << 14)  # ends with a letter of a script that has spaces between sentences and not between words
HIGH = np.uint32(1 << 15)  # begins, after whitespace, with a character beyond ASCII
LEAD, TAIL = np.uint32(1 << 16), np.uint32(1 << 17)  # begins, or ends, inside a character
BRACE = np.uint32(1 << 18)  # holds the brace that opens an object of JSON

_CLOSERS = r"[\p{Pe}\p{Pf}\p{M}\u200d\"'“‘*_`]"
_MARK = r"[\p{SB=STerm}．｡།༎--[!?]]"
_CLOSED = regex.compile(rf"[.!?]{_CLOSERS}*\s|{_MARK}{_CLOSERS}*+.", regex.V1 | regex.S)
_OPEN = regex.compile(rf"[.!?]{_CLOSERS}*\Z", regex.V1)
_WIDE = regex.compile(rf"{_MARK}{_CLOSERS}*\Z", regex.V1)
_CLOSER = regex.compile(rf"{_CLOSERS}+", regex.V1)
_MORE = regex.compile(rf"(?:[\p{{Pe}}\p{{Pf}}\p{{M}}\u200d\"']|{_MARK}|[!?])+", regex.V1)
_SPACES = regex.compile(r"[\p{Thai}\p{Lao}]\Z")
_TITLES = (
    "Mr Mrs Ms Dr Prof Rev Gen Sen Rep Gov Capt Lt Col Sgt St vs cf approx Fig Figs Eq Eqs Sec vol pp resp "
    "bzw ca Nr Abs Hr Fr Sra Sr Mme г ул рис стр т"
)
_ABBREVIATION = regex.compile(rf"\s*(?:{'|'.join(_TITLES.split())}|(?:.*\W)?\p{{L}}?\.\p{{L}})")
_ABBREVIATED = regex.compile(rf"(?:.*\W)?(?:{'|'.join(_TITLES.split())}|\p{{L}}\.\p{{L}})\.\s*")


def segment_starts(
    unit: str, tokenizer: Any, token_ids: ArrayLike, run_offsets: ArrayLike, special_ids: ArrayLike
) -> Ints:
    """Index of the first token of every sentence or line.

    A line ends with a token that contains a line feed. A sentence ends there too, and:
    - with `.`, `!` or `?` before whitespace, so a decimal point ends none; with quotes and brackets between them;
    - with a mark of another script (`。`, `।`, `؟`, ...), with or without whitespace;
    - in Thai and Lao, which have no such mark, with a space between two letters.
    - in a string of JSON, with an escaped line break; lines end there, too. A string in which a sentence or line ends
      is cut from the quotes around it, so that keys, quotes and braces are segments of their own.
    The dot of a known abbreviation, of letters with dots (`e.g.`) and of a number that begins a line ends none. Tokens
    of whitespace alone belong to the sentence before them. A special token is a segment of its own. No segment begins
    inside a character, and none spans two runs.

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
    flags, pieces = _vocabulary_flags(tokenizer, ids, np.asarray(special_ids))
    found = []
    for part in runs(offsets, CHUNK_TOKENS):
        start, stop = offsets[part.start], offsets[part.stop]
        here = flags[ids[start:stop]]
        begins = np.zeros(len(here) + 1, dtype=bool)  # an empty last run begins after the last token
        begins[offsets[part] - start] = True
        if len(here):
            _join_characters(here, ids[start:stop], begins[:-1], pieces)
            starts = _starts(here, begins[:-1], unit)
            _cut_strings(starts, here, ids[start:stop], begins[:-1], pieces, unit)
            found.append(np.flatnonzero(starts) + start)
    return np.concatenate(found) if found else np.zeros(0, dtype=np.int64)


def blanks(tokenizer: Any, token_ids: ArrayLike) -> Bools:
    """Which tokens are white space and nothing else, (M,)."""
    ids = np.asarray(token_ids)
    flags, _ = _vocabulary_flags(tokenizer, ids, np.zeros(0, dtype=np.int64))
    marked: Bools = ((flags & BLANK) > 0)[ids]
    return marked


def ends_sentence(text: str) -> bool:
    """Whether a text ends with the mark of a sentence, perhaps with quotes and brackets after it."""
    return _OPEN.search(text) is not None or _WIDE.search(text) is not None


def inside_characters(tokenizer: Any, token_ids: ArrayLike, run_offsets: ArrayLike) -> Bools | None:
    """Which tokens begin inside a character that the token before has begun, (M,); None if none does.

    Args:
        tokenizer, token_ids, run_offsets: as in `segment_starts`.
    """
    ids, offsets = np.asarray(token_ids), np.asarray(run_offsets, dtype=np.int64)
    flags, _ = _vocabulary_flags(tokenizer, ids, np.zeros(0, dtype=np.int64))
    inside: Bools = ((flags & LEAD) > 0)[ids]
    inside[offsets[offsets < len(ids)]] = False
    return inside if inside.any() else None


@lru_cache(maxsize=1 << 18)
def _flags_of(piece: bytes) -> int:
    """The flags of a token's bytes."""
    text = piece.decode("utf-8", errors="surrogateescape")
    stripped, first = text.strip(), text.lstrip()[:1]
    abbreviated = _ABBREVIATED.fullmatch(text) is not None
    facts = {
        BLANK: not stripped,
        EMPTY: not text,
        SPACED: text[:1].isspace(),
        NEWLINE: "\n" in text,
        CLOSED: not abbreviated and _CLOSED.search(text) is not None,
        OPEN: not abbreviated and _OPEN.search(text) is not None,
        WIDE: _WIDE.search(text) is not None,
        CLOSER: _CLOSER.fullmatch(text) is not None,
        MORE: _MORE.fullmatch(text) is not None,
        ABBREVIATION: _ABBREVIATION.fullmatch(text) is not None,
        LETTER: len(text) == 1 and text.isalpha(),
        DOT: text.endswith("."),
        NUMBER: stripped.isdecimal(),
        SPACES: _SPACES.search(text) is not None,
        HIGH: first > "\x7f",
        BRACE: "{" in text,
        LEAD: bool(piece) and piece[0] & 0xC0 == 0x80,
        TAIL: bool(text) and "\udc80" <= text[-1] <= "\udcff" and _unfinished(piece),
    }
    return sum(int(flag) for flag, holds in facts.items() if holds)


def _unfinished(piece: bytes) -> bool:
    """Whether bytes end with the beginning of a character."""
    lead = next((at for at in range(1, min(4, len(piece) + 1)) if piece[-at] & 0xC0 != 0x80), 0)
    return lead > 0 and piece[-lead] >= 0xC0


def _vocabulary_flags(tokenizer: Any, ids: NDArray[Any], special_ids: NDArray[Any]) -> tuple[Flags, dict[int, bytes]]:
    """Flags by token id, 0 for ids that do not occur; and the bytes of each id that does."""
    distinct = distinct_ids(ids)
    flags = np.zeros(int(ids.max(initial=-1)) + 1, dtype=np.uint32)
    pieces = token_bytes(tokenizer, distinct.tolist())
    flags[distinct] = [_flags_of(piece) for piece in pieces]
    flags[distinct[np.isin(distinct, special_ids)]] = SPECIAL
    return flags, dict(zip(distinct.tolist(), pieces, strict=True))


def _join_characters(flags: Flags, ids: NDArray[Any], begins: Bools, pieces: dict[int, bytes]) -> None:
    """Give the last token of a character that is spread over tokens the flags of its end; changes `flags`."""
    inner = ((flags & LEAD) > 0) & ~begins
    at = np.flatnonzero((flags & TAIL) > 0)
    for more in (1, 2, 3):  # a character has at most four bytes
        at = at[at + more < len(flags)]
        at = at[inner[at + more]]
        complete = at[(flags[at + more] & TAIL) == 0] if more < 3 else at
        windows, which = np.unique(ids[complete[:, None] + np.arange(more + 1)], axis=0, return_inverse=True)
        spelt = [b"".join(pieces[i] for i in window) for window in windows.tolist()]
        joined = [_flags_of.__wrapped__(character) for character in spelt]  # not kept: a stream brings ever more
        ends = np.asarray(joined, dtype=np.uint32)[which.reshape(-1)] if joined else np.zeros(0, dtype=np.uint32)
        flags[complete + more] |= ends & (CLOSED | OPEN | WIDE | SPACES)
        for step in range(more + 1):
            flags[complete + step] |= ends & (CLOSER | MORE)


def _starts(flags: Flags, begins: Bools, unit: str) -> Bools:
    """Which tokens begin a segment, given which begin a run; there is at least one token."""
    special, newline = (flags & SPECIAL) > 0, (flags & NEWLINE) > 0
    starts: Bools = begins | special
    starts[1:] |= special[:-1]
    if unit == "line":
        starts[1:] |= newline[:-1]
        return starts
    forced = starts.copy()
    ends = (flags & (NEWLINE | CLOSED | WIDE)) > 0
    ends[_before_space(flags, begins, forced, np.flatnonzero(((flags & (OPEN | SPACES)) > 0) & ~ends))] = True
    # the next sentence begins after whitespace, the rest of a character and, where none is needed, further marks
    wide = (flags & WIDE) > 0
    for at, quiet in ((ends & wide, BLANK | LEAD | MORE), (ends & ~wide, BLANK | LEAD)):
        next_ = _walk(flags, np.flatnonzero(at) + 1, quiet, forced | ends)
        next_ = next_[next_ < len(flags)]
        starts[next_[(flags[next_] & quiet) == 0]] = True
    return starts


def _cut_strings(
    starts: Bools, flags: Flags, ids: NDArray[Any], begins: Bools, pieces: dict[int, bytes], unit: str
) -> None:
    """Cut strings of JSON behind line breaks, and those in which something ends from what is around; changes `starts`.

    What is between two such strings is one segment, unless it has line feeds.
    """
    bounds = np.append(np.flatnonzero(begins), len(flags))
    for run in np.unique(np.searchsorted(bounds, np.flatnonzero((flags & BRACE) > 0), side="right")).tolist():
        low, high = bounds[run - 1], bounds[run]
        own, holds = starts[low:high], flags[low:high]
        for (first, last), breaks in json_strings.strings([pieces[index] for index in ids[low:high].tolist()]):
            for begin, behind in breaks:  # white space, which belongs to what it ends
                own[begin:behind] = False
            cuts = [behind for _, behind in breaks if behind < last]
            if first < last and (cuts or (unit == "sentence" and own[first + 1 : last].any())):
                own[last + 1 : last + 2] &= (holds[last : last + 1] & NEWLINE) > 0
                places = np.asarray([at for at in (first, *cuts, last) if at < len(own)])
                own[places[(holds[places] & LEAD) == 0]] = True


def _walk(flags: Flags, at: Ints, over: np.uint32, stop: Bools) -> Ints:
    """From each of `at` on, the first place that is `stop` or has no flag of `over`; the number of tokens if none."""
    at = at.copy()
    moving = np.flatnonzero(at < len(flags))
    while len(moving):
        moving = moving[((flags[at[moving]] & over) > 0) & ~stop[at[moving]]]
        at[moving] += 1
        moving = moving[at[moving] < len(flags)]
    return at


def _before_space(flags: Flags, begins: Bools, forced: Bools, at: Ints) -> Ints:
    """The last token of each sentence that ends at one of the tokens `at`, which are OPEN or SPACES.

    Whitespace must follow, after OPEN perhaps behind quotes. After SPACES, letters beyond ASCII must follow that.
    """
    at = at[~_unending(flags, begins, forced, at)]
    open_, last = (flags[at] & OPEN) > 0, len(flags) - 1
    closed = np.where(open_, _walk(flags, at + 1, CLOSER, forced), at + 1)
    next_ = _walk(flags, closed, EMPTY, begins)
    here = np.minimum(next_, last)
    spaced = (next_ <= last) & ~begins[here] & ((flags[here] & SPACED) > 0)
    behind = np.minimum(here + 1, last)
    high = ((flags[here] & HIGH) > 0) | (((flags[here] & BLANK) > 0) & ~begins[behind] & ((flags[behind] & HIGH) > 0))
    ends: Ints = closed[spaced & (open_ | high)] - 1
    return ends


def _unending(flags: Flags, begins: Bools, forced: Bools, at: Ints) -> Bools:
    """Which of the tokens `at` end with the dot of an abbreviation, or of a number of up to three digits in a line."""

    def before(number: int) -> Flags:
        """The flags of the token that many places before, 0 beyond the run."""
        nearest = [begins[np.maximum(at - step, 0)] for step in range(number)]
        return np.where(np.any(nearest, axis=0), np.uint32(0), flags[np.maximum(at - number, 0)])

    def opens_line(number: int) -> Bools:
        """Whether the token that many places before is the first of a line."""
        opens: Bools = forced[np.maximum(at - number, 0)] | ((before(number + 1) & NEWLINE) > 0)
        return opens

    dotted = ((before(1) & LETTER) > 0) & ((before(2) & DOT) > 0)  # g in e.g.
    short = ((before(1) & ABBREVIATION) > 0) | dotted
    digits = np.ones(len(at), dtype=bool)
    for number in (1, 2, 3):
        digits &= (before(number) & NUMBER) > 0
        short |= digits & opens_line(number)
    unending: Bools = short & ((flags[at] & DOT) > 0)
    return unending
