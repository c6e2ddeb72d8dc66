"""Marks of a dataset column: what somebody else has judged in the text of a row, as flags of the row's tokens.

A critic, a reward model or a person marks text, and hosts train on tokens. So the text of a row is found again in what
its tokens spell, and each mark becomes flags of tokens. Everything that does not fit is refused, since a mark in the
wrong place would drop good text without a sign.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from ..errors import XTFUserError
from .documents import DocumentSet
from .keys import document_key
from .ragged import Bools, Ints
from .token_text import byte_offsets, token_bytes

Span = tuple[int, int]  # [start, end)

ASSISTANTS = ("assistant", "gpt", "model")
HEADER = 32  # characters that a template may put before a message, beside special tokens


class Misfit(ValueError):
    """A mark that does not fit its row: what is wrong, what is legal, and what to do."""


class Part(NamedTuple):
    """A text of a row, in its order; marks count within the `marked` ones."""

    text: str
    marked: bool


@dataclass(frozen=True)
class RowTexts:
    """The texts of a row; `chat`: they are messages."""

    parts: Sequence[Part]
    chat: bool

    @property
    def own(self) -> list[str]:
        """The texts that marks count in."""
        return [part.text for part in self.parts if part.marked]


def texts_of(row: Mapping[str, Any], names: Sequence[str], eos: str | None) -> RowTexts:
    """The texts of a row: its completion, the messages of its assistant, or the text of a column.

    Args:
        row: with its columns of text.
        names: the first of these columns that the row has holds the text or the messages.
        eos: the text of the EOS token, which hosts add to a text.
    """
    name = next((name for name in names if row.get(name) is not None), None)
    if name is None:
        missing = (
            f"the row has no text in {' or '.join(names)}" if names else "xtf cannot tell which column is trained on"
        )
        raise Misfit(f"{missing}; name the column of the text in the block, `text: a_column`")
    value = row[name]
    prompt = row.get("prompt") if name == "completion" else None
    if isinstance(value, str):
        before = [Part(prompt, False)] if isinstance(prompt, str) else []
        return RowTexts([*before, Part(value.removesuffix(eos) if eos else value, True)], chat=False)
    if not isinstance(value, list) or not all(isinstance(message, Mapping) for message in value):
        raise Misfit(f"the column {name} holds {reprlib.repr(value)}; text or a list of messages is needed")
    parts = [Part(_content(message), False) for message in prompt or [] if isinstance(message, Mapping)]
    parts += [Part(_content(message), message.get("role", message.get("from")) in ASSISTANTS) for message in value]
    return RowTexts(parts, chat=True)


def _content(message: Mapping[str, Any]) -> str:
    content = message.get("content", message.get("value"))
    if isinstance(content, list):
        content = "".join(str(item.get("text") or "") for item in content if isinstance(item, Mapping))
    return content if isinstance(content, str) else ""


def spans_of(value: Any, texts: RowTexts, form: str) -> list[list[Span]]:
    """The marked characters of each of `texts.own`, as [start, end) spans; no mark at all gives empty lists.

    Args:
        value: of the column: see the scorer `column`.
        form: spans, lines or messages.

    Raises:
        Misfit: anything that does not fit the texts.
    """
    own = texts.own
    if value is None or len(found := _listed(value, form)) == 0:
        return [[] for _ in own]
    if form == "messages":
        if not texts.chat:
            raise Misfit("`format: messages` needs a chat, and the row is plain text; use `format: spans` or `lines`")
        chosen = {_index(item, len(own), "assistant messages") for item in found}
        return [[(0, len(text))] if place in chosen else [] for place, text in enumerate(own)]
    if not texts.chat:
        return [_of_text(found, own[0], form)]
    if len(found) != len(own):
        raise Misfit(
            f"it holds {len(found)} lists, and the row has {len(own)} assistant messages; give one list for each, an "
            "empty one where nothing is marked"
        )
    return [
        [] if item is None else _of_text(_listed(item, form), text, form) for item, text in zip(found, own, strict=True)
    ]


def _of_text(found: list[Any], text: str, form: str) -> list[Span]:
    if form == "spans":
        return [_span(item, len(text)) for item in found]
    lines = line_spans(text)
    return [lines[_index(item, len(lines), "lines that are not blank")] for item in found]


def line_spans(text: str) -> list[Span]:
    """The lines of a text that are not blank, each with the line feeds and blank lines after it."""
    starts, place = [], 0
    for line in text.split("\n"):
        if line.strip():
            starts.append(place)
        place += len(line) + 1
    return list(pairwise([*starts, len(text)]))


def _listed(value: Any, form: str) -> list[Any]:
    value = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(value, (list, tuple)):
        what = "[start, end) spans" if form == "spans" else f"indices of {form}"
        raise Misfit(
            f"{reprlib.repr(value)} is not a list; a list of {what} is needed, or null where nothing is marked"
        )
    return list(value)


def _span(item: Any, length: int) -> Span:
    pair = list(item) if isinstance(item, (list, tuple)) else []
    if len(pair) != 2 or not all(type(number) is int for number in pair):
        raise Misfit(f"{reprlib.repr(item)} is not a span; a span is [start, end) of two whole numbers of characters")
    start, end = pair
    if not 0 <= start < end <= length:
        raise Misfit(
            f"the span {pair} does not fit a text of {length} characters: 0 <= start < end <= {length} is needed. "
            "Count characters, not bytes or tokens, from the beginning of the text"
        )
    return start, end


def _index(item: Any, number: int, what: str) -> int:
    if type(item) is not int:
        raise Misfit(f"{reprlib.repr(item)} is not an index; whole numbers from 0 are needed")
    if not 0 <= item < number:
        legal = f"0 to {number - 1} are legal" if number else "none is legal"
        raise Misfit(f"the index {item} does not fit: the row has {number} {what}, so {legal}")
    return item


class Speller:
    """What the tokens of a tokenizer spell; reads its vocabulary once."""

    def __init__(self, tokenizer: Any) -> None:
        size = max(tokenizer.get_vocab().values(), default=-1) + 1
        self.pieces = token_bytes(tokenizer, range(size))
        self.eos: str | None = getattr(tokenizer, "eos_token", None)
        self.special = np.zeros(size, dtype=bool)
        ids = {*tokenizer.all_special_ids, *(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)}
        self.special[[index for index in ids if index < size]] = True

    def spelled(self, ids: Ints, completion: Bools) -> Spelled:
        """The text of some tokens."""
        known = [self.pieces[index] if index < len(self.pieces) else b"" for index in ids.tolist()]
        sizes = np.asarray([len(piece) for piece in known], dtype=np.int64)
        special = np.asarray([index < len(self.special) and self.special[index] for index in ids.tolist()], dtype=bool)
        text = b"".join(known).decode("utf-8", errors="surrogateescape")
        return Spelled(text, sizes, byte_offsets(text, int(sizes.sum())), completion, special)


@dataclass(frozen=True)
class Spelled:
    """The text of a row's tokens.

    Args:
        text: C characters; bytes that are not characters are escaped.
        sizes: bytes of each token, (T,).
        bytes_at: first byte of each character, and the number of all bytes, (C + 1,).
        completion, special: flags of tokens, (T,).
    """

    text: str
    sizes: Ints
    bytes_at: Ints
    completion: Bools
    special: Bools

    def of_characters(self, flags: Bools) -> Bools:
        """Flags of tokens as flags of the characters that begin in them, (C,)."""
        spread: Bools = np.repeat(flags, self.sizes)[self.bytes_at[:-1]]
        return spread

    def without_special(self) -> str:
        """The text with NUL in place of special tokens, whose own text does not belong in a message."""
        codes = np.frombuffer(self.text.encode("utf-32-le", errors="surrogatepass"), dtype="<u4").copy()
        codes[self.of_characters(self.special)] = 0
        text: str = codes.tobytes().decode("utf-32-le", errors="surrogatepass")
        return text

    def tokens(self, spans: Sequence[Span]) -> Bools:
        """Completion tokens of which the spans of characters hold at least half of the bytes, (T,)."""
        change = np.zeros(int(self.bytes_at[-1]) + 1, dtype=np.int64)
        for start, end in spans:
            change[self.bytes_at[start]] += 1
            change[self.bytes_at[end]] -= 1
        held = np.concatenate([[0], np.cumsum(np.cumsum(change[:-1]) > 0)])
        ends = np.cumsum(self.sizes)
        inside = held[ends] - held[ends - self.sizes]
        flags: Bools = (2 * inside >= self.sizes) & (self.sizes > 0) & self.completion
        return flags


class Place(NamedTuple):
    """Where a text stands in what tokens spell: its character 0 would be at `origin`; `start` to `end` are there."""

    origin: int
    start: int
    end: int


class Finder:
    """Finds the texts of a row, in their order, in what its tokens spell.

    Args:
        spelled: of the row.
        texts: of the row.
        cut: whether the row may be cut off at its end.
    """

    def __init__(self, spelled: Spelled, texts: RowTexts, cut: bool) -> None:
        self.texts, self.cut = texts, cut
        trained = spelled.of_characters(spelled.completion)
        self.trained = np.concatenate([[0], np.cumsum(trained)])
        self.views = spelled.without_special(), spelled.text
        turns = _runs(trained)
        self.turns = turns if texts.chat and len(turns) == len(texts.own) else None

    def places(self) -> list[Place | None]:
        """The place of each of `texts.own`; None: it is not there, or could be at several places."""
        pairs = zip(self._walk(1), self._walk(-1), strict=True)
        # true places lie between the earliest and the latest ones, so they are certain where these agree; what is cut
        # off has an earliest one alone
        return [one if one == other or (self.cut and other is None) else None for one, other in pairs]

    def _walk(self, step: int) -> list[Place | None]:
        """The earliest (1) or latest (-1) place of each text behind (before) the one that was found before it."""
        low, high = 0, len(self.views[0])
        found: list[Place | None] = []
        parts = self.texts.parts[::step]
        for index, part in enumerate(parts):
            place = self._place(part, self._region(low, high, len(found), step, part.marked), step)
            if place is None and self.cut and step > 0:
                place = self._cut_off(parts[index:], low, high)
            if place is not None:
                low, high = (place.end, high) if step > 0 else (low, place.start)
            if part.marked:
                found.append(place)
        return found[::step]

    def _region(self, low: int, high: int, done: int, step: int, marked: bool) -> Span:
        """Where to search a text: in the turn of its message, if messages and turns correspond."""
        if not marked or self.turns is None:
            return low, high
        start, end = self.turns[done if step > 0 else -1 - done]
        return max(low, start), min(high, end)

    def _place(self, part: Part, region: Span, step: int) -> Place | None:
        """The first (1) or last (-1) place of a text in a region; templates may strip it."""
        lead = len(part.text) - len(part.text.lstrip())
        for view in self.views:
            for text, offset in ((part.text, 0), (part.text.strip(), lead)):
                at = self._search(view, text, region, step, part.marked) if text else -1
                if at >= 0:
                    return Place(at - offset, at, at + len(text))
        return None

    def _search(self, view: str, text: str, region: Span, step: int, marked: bool) -> int:
        low, high = region
        search = view.find if step > 0 else view.rfind
        at = search(text, low, high)
        while at >= 0 and marked and self.trained[at + len(text)] == self.trained[at]:
            low, high = (at + 1, high) if step > 0 else (low, at + len(text) - 1)
            at = search(text, low, high)
        return at

    def _cut_off(self, parts: Sequence[Part], low: int, high: int) -> Place | None:
        """The place of the first of some texts if the row ends within it or before it, so that no other is there."""
        if any(part.marked and self._place(part, (low, high), 1) for part in parts[1:]):
            return None
        text = parts[0].text
        for length in range(min(len(text), high - low), 0, -1):
            if self.views[1].endswith(text[:length], low, high):
                return Place(high - length, high - length, high)
        left = sum(char != "\0" for char in self.views[0][low:high])
        ends = self.trained[low] == self.trained[high] or left < len(text) + HEADER
        return Place(high, high, high) if ends else None


def token_flags(value: Any, texts: RowTexts, spelled: Spelled, form: str, *, cut: bool = False) -> Bools | None:
    """Completion tokens that a value of the column marks, (T,); None: it marks nothing.

    Args:
        value, form: see `spans_of`.
        texts, spelled: of the row.
        cut: whether the row may be cut off at its end.

    Raises:
        Misfit: the value does not fit the texts, or a marked text is not in the tokens.
    """
    spans = spans_of(value, texts, form)
    if not any(spans):
        return None
    runs = _runs(spelled.completion)
    if form == "messages" and len(runs) == len(spans):  # a run is all of a message, with its calls of tools
        flags = np.zeros(len(spelled.completion), dtype=bool)
        for (start, end), marked in zip(runs, spans, strict=True):
            flags[start:end] = bool(marked)
        return flags
    inside: list[Span] = []
    for index, (place, marks) in enumerate(zip(Finder(spelled, texts, cut).places(), spans, strict=True)):
        if marks and place is None:
            raise Misfit(_lost(texts, index, spelled))
        if place is not None:
            moved = ((max(place.start, place.origin + a), min(place.end, place.origin + b)) for a, b in marks)
            inside += [(a, b) for a, b in moved if a < b]
    return spelled.tokens(inside)


def _lost(texts: RowTexts, index: int, spelled: Spelled) -> str:
    which = f"assistant message {index}" if texts.chat else "the text"
    own = spelled.of_characters(spelled.completion)
    spelt = "".join(char for char, kept in zip(spelled.text, own, strict=True) if kept)
    return (
        f"{which} ({reprlib.repr(texts.own[index])}) does not occur exactly once in the trained text "
        f"({reprlib.repr(spelt)}): the chat template or the tokenizer changes it, it is not trained on, or it stands "
        "there twice. Mark the text as the tokens spell it, or leave the row unmarked (null)"
    )


def _runs(flags: Bools) -> list[Span]:
    """Runs of adjacent flags."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]]).astype(np.int8)))
    return [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]


@dataclass
class Marks:
    """The marks of a column by document, for `documents` of the dataset that it was read from.

    Args:
        column: its name, for messages.
        flags: marked completion tokens by the document's key; None: no mark.
        differing: documents that occur in several rows with different marks.
        idle: rows with marks of which no token that is trained on holds half.
    """

    column: str
    flags: dict[bytes, Bools | None] = field(default_factory=dict)
    differing: set[bytes] = field(default_factory=set)
    idle: int = 0

    def add(self, ids: Ints, completion: Bools, flags: Bools | None) -> None:
        """Add a document with its marked tokens, (T,); in a second row of the same document marks are added."""
        key = document_key(ids, completion)
        self._add(key, None if flags is None or not flags[completion].any() else flags[completion])

    def _add(self, key: bytes, own: Bools | None) -> None:
        known = self.flags.setdefault(key, own)
        if known is None and own is None:
            return
        if known is None or own is None or not np.array_equal(known, own):
            self.differing.add(key)
            self.flags[key] = own if known is None else known if own is None else known | own

    def of(self, documents: DocumentSet) -> Bools:
        """The marked completion tokens of some documents, (M,).

        Raises:
            XTFUserError: a document with completion tokens is not among those that were read.
        """
        offsets = documents.completion_offsets
        marked = np.zeros(int(offsets[-1]), dtype=bool)
        unknown = 0
        for index, key in enumerate(documents.keys):
            start, stop = offsets[index], offsets[index + 1]
            found = self.flags.get(key.tobytes(), ...)
            unknown += found is ... and stop > start
            if isinstance(found, np.ndarray):
                marked[start:stop] = found
        if unknown:
            raise XTFUserError(
                f"column: {self.column!r} was read from rows that do not hold {unknown} of the {len(documents)} "
                "documents that are trained on: something cut or changed them afterwards. Leave out what does "
                "(padding, splitting, another preparation of the dataset), or remove this score."
            )
        return marked

    def notes(self) -> list[str]:
        """What to warn of."""
        found = []
        if self.differing:
            found.append(
                f"{len(self.differing)} documents occur in several rows with different marks in the column "
                f"{self.column}; what is marked in any of them counts"
            )
        if self.idle:
            found.append(
                f"the marks of {self.idle} rows in the column {self.column} hold less than half of every token that is "
                "trained on, so they mark nothing"
            )
        return found

    def join(self, other: Marks) -> None:
        """Add the documents of another dataset."""
        for key, own in other.flags.items():
            self._add(key, own)
        self.differing |= other.differing
        self.idle += other.idle


AllMarks = Mapping[tuple[str, str, str | None], Marks]  # by column, format and column of the text
