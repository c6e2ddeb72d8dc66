"""What a run drops, as a reader sees it: sentences or lines grouped by their text, and where in the answers they stand.

All of it comes from the score table. A piece is what is dropped of one sentence or line without a gap: with rules over
sentences a whole sentence, with rules over tokens often a word. Pieces whose texts differ in digits and capitals alone
are one text.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..data.ragged import Bools, Hashes, Ints, offsets_of, stretches
from ..data.sentences import segment_starts
from ..selection.recurring import FEWEST, bounded, pattern_of, written
from ..selection.select import CONTROL, FORCED, Reasons, rule_bits
from .score_table import ScoreTable
from .terminal import on_one_line

LISTED = 40  # texts of a reason
READ = 20_000  # distinct pieces whose text is read, the most frequent ones
SHOWN = 240  # characters of a text
LONGEST = 1_000  # characters of a text that a pattern may match
SAME_PLACE = 0.6  # share of the pieces of a suspected format that stand in one tenth of their answers
TENTHS = 10


@dataclass(frozen=True)
class Pieces:
    """What is dropped, (P,) each.

    Args:
        starts, ends: the first token, and the one after the last.
        documents, reasons, tenths: of the table, of its tokens together, of its answer.
        groups: equal tokens have the same.
        texts: of the most frequent groups.
    """

    starts: Ints
    ends: Ints
    documents: Ints
    reasons: Reasons
    tenths: Ints
    groups: Ints
    texts: Mapping[int, str]


def unit_starts(table: ScoreTable) -> Ints:
    """First tokens of the sentences, or of the lines if a rule judges lines and none sentences, (S,)."""
    if not len(table.token_ids):
        return np.zeros(0, dtype=np.int64)
    units = {part.unit for part in table.config.scores.values()}
    runs = np.append(np.flatnonzero(table.opens), len(table.token_ids))
    unit = "line" if "line" in units and "sentence" not in units else "sentence"
    return segment_starts(unit, table.pieces, table.token_ids, runs, special_tokens(table))


def special_tokens(table: ScoreTable) -> Ints:
    """Ids of the special tokens of a table."""
    special = [entry["token_id"] for entry in table.about.get("endings", {}).get("special_tokens", [])]
    return np.asarray([token for token in special if isinstance(token, int)], dtype=np.int64)  # may be a stranger's


def tenths(table: ScoreTable) -> Ints:
    """In which tenth of its answer each token stands, (M,)."""
    lengths = table.layout.lengths
    place = np.arange(len(table.token_ids)) - table.layout.spread(table.offsets[:-1])
    found: Ints = TENTHS * place // np.maximum(1, table.layout.spread(lengths))
    return found


def pieces(table: ScoreTable, starts: Ints) -> Pieces:
    """The pieces of a table; `starts` are those of its units."""
    opens, lost = np.zeros(len(table.keep) + 1, dtype=bool), np.append(~table.keep, False)
    opens[starts] = True
    before = np.append(False, lost[:-1])
    begins, ends = np.flatnonzero(lost & (opens | ~before)), np.flatnonzero(before & (opens | ~lost))
    documents = np.searchsorted(table.offsets, begins, side="right") - 1
    # a piece never reaches into the next one, so the kept tokens between two of them add nothing
    lists = np.where(table.keep, table.reasons.dtype.type(0), table.reasons)
    reasons = np.bitwise_or.reduceat(lists, begins) if len(begins) else table.reasons[:0]
    _, first, groups = np.unique(_hashes(table, begins, ends), return_index=True, return_inverse=True)
    number = np.bincount(groups.reshape(-1), table.counts[documents], len(first))
    most = np.argsort(-number, kind="stable")[:READ].tolist()
    texts = {group: _text(table, int(begins[first[group]]), int(ends[first[group]])) for group in most}
    return Pieces(begins, ends, documents, reasons, tenths(table)[begins], groups.reshape(-1), texts)


def _text(table: ScoreTable, start: int, end: int) -> str:
    return b"".join([table.pieces[i] for i in table.token_ids[start:end].tolist()]).decode(errors="replace")


def _hashes(table: ScoreTable, starts: Ints, ends: Ints) -> Hashes:
    """A hash of the token ids of each piece, (P,)."""
    if not len(starts):
        return np.zeros(0, dtype=np.uint64)
    lengths = ends - starts
    ids = table.token_ids[stretches(starts, lengths)].astype(np.uint64)
    opens = offsets_of(lengths)[:-1]
    place = (np.arange(len(ids)) - np.repeat(opens, lengths)).astype(np.uint64)
    mixed = (ids + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) ^ (place << np.uint64(40))
    mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
    found: Hashes = np.add.reduceat(mixed ^ (mixed >> np.uint64(32)), opens)
    return found


def kinds(table: ScoreTable, found: Pieces) -> list[dict[str, Any]]:
    """The reasons for which text is dropped, most tokens first, each with its texts, most frequent first."""
    bits, made = rule_bits(table.config), dict[str, _Kind]()
    read = np.isin(found.groups, list(found.texts))
    groups = np.where(read, found.groups, int(found.groups.max(initial=0)) + 1)  # the others are counted together
    keys, cell = np.unique(groups * (1 << 16) + found.reasons, return_inverse=True)
    counts, lengths = table.counts[found.documents], found.ends - found.starts
    fresh = np.zeros(len(counts))
    fresh[np.unique(found.groups * (1 << 16) + found.reasons, return_index=True)[1]] = 1
    number, tokens, different = (
        np.bincount(cell.reshape(-1), weights, len(keys)).astype(np.int64).tolist()
        for weights in (counts, counts * lengths, fresh)
    )
    for key, *sums in zip(keys.tolist(), number, tokens, different, strict=True):
        kind = made.setdefault(_why(key & 0xFFFF, bits), _Kind())
        kind.add(found.texts.get(key >> 16), *sums)
    listed = [{"why": why, **kind.listed()} for why, kind in made.items()]
    return sorted(listed, key=lambda kind: -int(kind["tokens"]))


class _Kind:
    """What is dropped for one reason."""

    def __init__(self) -> None:
        self.pieces = self.tokens = self.unread = 0
        self.texts: dict[str, _Text] = {}

    def add(self, text: str | None, number: int, tokens: int, different: int) -> None:
        self.pieces += number
        self.tokens += tokens
        if text is None:
            self.unread += different
        else:
            self.texts.setdefault(folded(text), _Text()).add(text, number, tokens)

    def listed(self) -> dict[str, Any]:
        ordered = sorted(self.texts.items(), key=lambda item: (-item[1].number, -item[1].tokens, item[0]))
        return {
            "pieces": self.pieces,
            "tokens": self.tokens,
            "texts": len(ordered) + self.unread,
            "listed": [text.listed() for _, text in ordered[:LISTED]],
        }


class _Text:
    """Pieces of one text: how often each spelling occurs, and their tokens in the dataset."""

    def __init__(self) -> None:
        self.spellings, self.number, self.tokens = Counter[str](), 0, 0

    def add(self, text: str, number: int, tokens: int) -> None:
        self.spellings[text] += number
        self.number += number
        self.tokens += tokens

    def listed(self) -> dict[str, Any]:
        """The most frequent spelling, what matches all of them, and numbers."""
        most = max(self.spellings, key=lambda text: (self.spellings[text], text))
        shown = on_one_line(most[: LONGEST + SHOWN])
        return {
            "text": shown if len(shown) <= SHOWN else shown[:SHOWN] + "…",
            "number": self.number,
            "spellings": len({each.strip() for each in self.spellings}),
            "tokens": self.tokens,
            "pattern": pattern(most, self.spellings),
        }


def _why(reason: int, bits: Mapping[str, int]) -> str:
    """`forced`, `control`, the name of the score whose rule fired, or `+` for several."""
    if reason & CONTROL:
        return "control"
    rules = [name for name, bit in bits.items() if reason & bit]
    return "forced" if reason & FORCED or not rules else rules[0] if len(rules) == 1 else "+"


def folded(text: str) -> str:
    """A text without what near-equal ones differ in: capitals, the digits of numbers, whitespace."""
    return _plain(text.lower())  # a regular expression without case matches no "ß" where "SS" stands


def _plain(text: str) -> str:
    return re.sub(r"\d+", "0", " ".join(text.split()))


def pattern(text: str, spellings: Mapping[str, int]) -> str | None:
    """A regular expression that matches a text in all its spellings; None: it is blank or too long for one."""
    inner = text.strip()
    if not inner or len(inner) > LONGEST or "\ufffd" in inner:
        return None
    ends_line = any("\n" in each[len(each.rstrip()) :] for each in spellings)
    others = {each.strip() for each in spellings}
    if len(others) == 1:
        return pattern_of(inner, ends_line=ends_line)
    made = bounded("".join(map(_varied, re.findall(r"\d+|\s+|.", inner))), inner, ends_line=ends_line)
    return made if len({_plain(each) for each in others}) == 1 else f"(?i:{made})"


def _varied(part: str) -> str:
    """A regular expression for a run of digits or whitespace, or for a character."""
    return r"\d+" if re.match(r"\d", part) else r"\s+" if part.isspace() else written(part)


def suspects(table: ScoreTable, found: Pieces) -> list[tuple[str, list[int]]]:
    """What may be a format: how pieces begin, and the documents of those that stand at the same place, most first.

    A beginning is two words, or one where a colon ends it. It is listed if three documents or more have it, and most of
    its pieces stand in the same tenth of their answers.
    """
    names: dict[str, int] = {}
    of_group = np.full(int(found.groups.max(initial=-1)) + 1, -1, dtype=np.int64)
    for group, text in found.texts.items():
        if beginning := _beginning(text):
            of_group[group] = names.setdefault(beginning, len(names))
    which = of_group[found.groups]
    some, number = which >= 0, len(names)
    places = np.bincount(TENTHS * which[some] + found.tenths[some], minlength=TENTHS * number).reshape(number, TENTHS)
    pairs = np.unique(which[some] * len(table.counts) + found.documents[some])
    owners, documents = pairs // max(1, len(table.counts)), pairs % max(1, len(table.counts))
    having = np.bincount(owners, table.counts[documents], number)
    listed = (having >= FEWEST) & (places.max(axis=1, initial=0) >= SAME_PLACE * places.sum(axis=1))
    order = sorted(np.flatnonzero(listed).tolist(), key=lambda name: (-having[name], name))[:LISTED]
    texts, begins = list(names), np.searchsorted(owners, np.arange(number + 1))
    return [(texts[name], documents[begins[name] : begins[name + 1]].tolist()) for name in order]


def _beginning(text: str) -> str:
    words = folded(text[:SHOWN]).split()[:2]
    return " ".join(words[:1] if words and words[0].endswith(":") else words)


def by_place(table: ScoreTable) -> dict[str, Any]:
    """Kept and dropped tokens of the dataset by tenth of the answer, and by the answer's length in tokens."""
    lengths = table.layout.lengths
    doubled = np.floor(np.log2(np.maximum(1, lengths))).astype(np.int64)
    classes = np.unique(doubled[lengths > 0])
    weights = table.weights
    lost = table.layout.count(~table.keep) * table.counts
    every = lengths * table.counts
    return {
        "touched": int(table.counts[lost > 0].sum()),
        "tenths": _split(tenths(table), table.keep, weights, TENTHS),
        "lengths": [
            {
                "from": 1 << level,
                "to": (2 << level) - 1,
                "documents": int(table.counts[doubled == level].sum()),
                "kept": int((every - lost)[doubled == level].sum()),
                "dropped": int(lost[doubled == level].sum()),
            }
            for level in classes.tolist()
        ],
    }


def _split(places: Ints, keep: Bools, weights: Ints, number: int) -> list[dict[str, int]]:
    sums: NDArray[Any] = np.bincount(2 * places + keep, weights, 2 * number).astype(np.int64).reshape(number, 2)
    return [{"kept": kept, "dropped": dropped} for dropped, kept in sums.tolist()]
