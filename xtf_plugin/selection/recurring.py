"""Texts that several documents share, whether they are dropped, and the setting that would change it.

A sentence that stands in many documents may be a format to be learned or a phrase that says nothing. No score can tell
these apart, but a reader can at a glance. So the report lists them, each with a line for the block.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..data.documents import DocumentSet
from ..data.ragged import Bools, Hashes, Ints, Layout, runs
from ..data.token_text import token_bytes
from ..errors import escaped, harmless
from .select import Selection, rule_bits
from .text_rules import TextRules, special_ids

if TYPE_CHECKING:
    from ..config.block import XTFConfig

FEWEST = 3  # documents
SHARED = 0.2  # of the documents: a dropped text gives a warning
OFTEN = 0.01  # of the documents: a kept text that nothing protects is listed
MOST = 10  # texts listed of each decision
WARNED = 3  # texts in warnings
LONGEST = 300  # characters of a text; a longer one is a repeated document rather than a phrase
WORDS = 3  # a shorter text stands inside other texts as well: "9" in "19", "}" in all code
CHUNK_TOKENS = 1 << 20  # bounds temporaries to a few MB


@dataclass(frozen=True)
class Recurring:
    """A text that several documents share.

    Args:
        text: without whitespace at its ends.
        documents: occurrences of documents that have it.
        dropped_in: those of them in which most of its tokens are dropped.
        dropped: whether it is listed as dropped.
        why: names of the scores whose rules fired on it where it is dropped; `format` where that protects it; empty:
            no rule fires on it.
        setting: a line for the block that would reverse the decision.
    """

    text: str
    documents: int
    dropped_in: int
    dropped: bool
    why: list[str]
    setting: str


@dataclass(frozen=True)
class _Units:
    """Sentences or lines, (S,) each: group of equal token ids, document, and what was decided."""

    groups: Ints
    documents: Ints
    lost: Bools
    formatted: Bools
    reasons: NDArray[Any]


def recurring(
    config: XTFConfig, documents: DocumentSet, text: TextRules, selection: Selection, tokenizer: Any
) -> list[Recurring]:
    """Texts of sentences or lines that recur, the most frequent of each decision, dropped ones first.

    Texts that a regular expression of the block decides about are left out, and so are special tokens. Empty if no
    score or protection reads sentences or lines, and if a control draws the tokens.

    Args:
        config: the block.
        documents: N documents with M completion tokens.
        text, selection: of these documents.
        tokenizer: of the token ids.
    """
    starts = text.segments.get("sentence", text.segments.get("line"))
    if starts is None or not len(starts) or config.control is not None:
        return []
    ids = documents.completion_ids
    given = text.protected if text.formatted is None else text.protected & ~text.formatted
    given = given if text.forced is None else given | text.forced
    open_ = ~np.logical_or.reduceat(given, starts) & ~np.isin(ids[starts], special_ids(tokenizer))
    units, first = _units(documents, starts, open_, text, selection)
    spans = {group: (int(starts[at]), int(np.append(starts, len(ids))[at + 1])) for group, at in first.items()}
    texts = _texts(tokenizer, {group: ids[slice(*span)] for group, span in spans.items()})
    total, bits = int(documents.counts.sum()), rule_bits(config)
    made = (_described(*each, units, documents.counts, total, bits) for each in _by_text(texts))
    found = sorted((each for each in made if each is not None), key=lambda each: (-each.documents, each.text))
    dropped, kept = [each for each in found if each.dropped], [each for each in found if not each.dropped]
    return dropped[:MOST] + kept[:MOST]


def warnings_of(found: list[Recurring], documents: int) -> list[str]:
    """A warning for each of the most frequent texts that rules drop although many documents share them."""
    many = [each for each in found if each.dropped and each.documents >= SHARED * documents]
    return [
        f'{", ".join(each.why)}: drops "{harmless(each.text)}" in {each.dropped_in:,} of the {each.documents:,} '
        f"documents that have it ({each.documents / documents:.0%} of all). "
        f"If a model is to learn it, add to the block: {each.setting}"
        for each in many[:WARNED]
    ]


def written(char: str) -> str:
    """A regular expression that matches a character, in printable characters."""
    return f"\\{char}" if char in r"\.^$*+?{}[]|()" else char if char == " " else escaped(char)


def pattern_of(text: str, *, ends_line: bool = False) -> str:
    """A regular expression that matches a text, in printable characters; see `bounded`."""
    return bounded("".join(map(written, text)), text, ends_line=ends_line)


def bounded(body: str, text: str, *, ends_line: bool = False) -> str:
    """The regular expression `body` of a text with its ends.

    A text of a word or two is matched only as whole words. With `ends_line` the line breaks after it belong to it.
    """
    if len(text.split()) < WORDS:
        before, after = (r"\b" if char.isalnum() or char == "_" else "" for char in (text[0], text[-1]))
        body = before + body + after
    return body + r"\n*" if ends_line else body


def _units(
    documents: DocumentSet, starts: Ints, open_: Bools, text: TextRules, selection: Selection
) -> tuple[_Units, dict[int, int]]:
    """The open units whose tokens recur, and the first unit of each group that may be listed."""
    lengths = np.diff(starts, append=len(selection.keep))
    layout = Layout(np.append(starts, len(selection.keep)), np.ones_like(starts))
    owners = np.searchsorted(documents.completion_offsets, starts, side="right") - 1
    chosen = np.flatnonzero(open_)
    # of token ids: two units with equal text and other tokens are put together by `_by_text`
    hashes = _hashes(documents, starts)[chosen]
    order = np.argsort(hashes, kind="stable")
    opens = np.flatnonzero(np.append(True, np.diff(hashes[order]) != 0)[: len(order)])
    first, groups = order[opens], np.empty(len(order), dtype=np.int64)
    groups[order] = np.repeat(np.arange(len(opens)), np.diff(opens, append=len(order)))
    formatted = np.zeros(len(selection.keep), dtype=bool) if text.formatted is None else text.formatted
    units = _Units(
        groups,
        owners[chosen],
        (2 * layout.count(~selection.keep) > lengths)[chosen],
        (2 * layout.count(formatted) > lengths)[chosen],
        np.bitwise_or.reduceat(selection.reasons, starts)[chosen],
    )
    every = np.ones(len(chosen), dtype=bool)
    listed: set[int] = set()
    for marks in (units.lost, units.formatted, every):
        number = _documents(groups, units.documents, documents.counts, order[marks[order]])
        most = np.argsort(-number, kind="stable")[: 3 * MOST]  # some are too long, or are the same text
        listed |= set(most[number[most] >= FEWEST].tolist())
    return units, {group: int(chosen[first[group]]) for group in sorted(listed)}


def _documents(groups: Ints, owners: Ints, counts: Ints, order: Ints) -> Ints:
    """Occurrences of documents that have a unit of each group, of the units `order`, which go by group and document."""
    ordered, owner = groups[order], owners[order]
    fresh = np.append(True, (np.diff(ordered) != 0) | (np.diff(owner) != 0))[: len(order)]  # once per document
    return np.bincount(ordered[fresh], counts[owner[fresh]], int(groups.max(initial=-1)) + 1).astype(np.int64)


def _hashes(documents: DocumentSet, starts: Ints) -> Hashes:
    """A hash of the token ids of each unit, (S,)."""
    flat, bounds = documents.completion_flat, np.append(starts, len(documents.completion_flat))
    found = np.zeros(len(starts), dtype=np.uint64)
    for part in runs(bounds, CHUNK_TOKENS):
        begins = bounds[part]
        ids = documents.input_ids[flat[begins[0] : bounds[part.stop]]].astype(np.uint64)
        place = np.arange(len(ids)) - np.repeat(begins - begins[0], np.diff(bounds[part.start : part.stop + 1]))
        mixed = (ids + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) ^ (place.astype(np.uint64) << np.uint64(40))
        mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
        found[part] = np.add.reduceat(mixed ^ (mixed >> np.uint64(32)), begins - begins[0])
    return found


def _texts(tokenizer: Any, groups: Mapping[int, NDArray[Any]]) -> dict[int, str]:
    """The text of each group, whitespace included; groups that are not text, blank or too long are left out."""
    distinct = np.unique(np.concatenate([*groups.values(), np.zeros(0, dtype=np.int32)])).tolist()
    pieces = dict(zip(distinct, token_bytes(tokenizer, distinct), strict=True))
    found = {}
    for group, ids in groups.items():
        text = b"".join(pieces[i] for i in ids.tolist()).decode(errors="replace")
        if text.strip() and len(text) <= LONGEST and "\ufffd" not in text:
            found[group] = text
    return found


def _by_text(texts: Mapping[int, str]) -> list[tuple[str, list[int], bool]]:
    """Each distinct text without whitespace at its ends, its groups, and whether it ends a line somewhere."""
    groups: dict[str, list[int]] = {}
    for group, text in texts.items():
        groups.setdefault(text.strip(), []).append(group)
    return [(text, own, any(_ends_line(texts[group]) for group in own)) for text, own in groups.items()]


def _ends_line(text: str) -> bool:
    return "\n" in text[len(text.rstrip()) :]


def _described(
    text: str, groups: list[int], ends_line: bool, units: _Units, counts: Ints, total: int, bits: Mapping[str, int]
) -> Recurring | None:
    """The entry of a text; None if it is kept and there is nothing to ask about it."""
    here = np.flatnonzero(np.isin(units.groups, groups))
    lost = here[units.lost[here]]
    number, dropped_in = (int(counts[np.unique(units.documents[which])].sum()) for which in (here, lost))
    dropped = dropped_in >= FEWEST
    fired = int(np.bitwise_or.reduce(units.reasons[lost])) if dropped else 0
    why = [name for name, bit in bits.items() if fired & bit]
    if not dropped and units.formatted[here].any():
        why = ["format"]
    elif not dropped and (number < max(FEWEST, OFTEN * total) or len(text.split()) < WORDS):
        return None
    quoted = json.dumps([pattern_of(text, ends_line=ends_line)], ensure_ascii=False)
    setting = f"protect: {{patterns: {quoted}}}" if dropped else f"force_drop: {quoted}"
    return Recurring(text, number, dropped_in, dropped, why, setting)
