"""Knowledge novelty of a sentence or line: whether it says what the document has not yet said.

A sentence of the prompt that is copied into the answer, or a line that is written twice, teaches nothing. To a language
model it is the most probable text there is, so no probability finds it; comparing tokens does, and needs no model.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from ..fields import Drop, Positive
from .base import DROP, ScoreConfig, ScoringContext, scorer

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..data.documents import DocumentSet
    from ..data.ragged import Bools, Floats, Ints

MULTIPLIER = 0x9E3779B97F4A7C15  # odd, so that a power of it never becomes 0
TABLE = 1 << 20  # places in both texts that are compared at a time
PLACES = 1_000  # of equally long runs of a unit whose ends are compared
_ESCAPED = re.compile(rb"(?:\\[nrt])+\Z")


class NewTextConfig(ScoreConfig):
    """Scorer `new_text`: the share of a sentence or line that does not repeat earlier text of its document."""

    unit: Literal["sentence", "line"] = Field(default="sentence", description="What gets one score.")
    shortest: Positive = Field(
        default=6,
        description="Units of fewer tokens, white space not counted, are not scored: short ones repeat in every text.",
    )
    drop: Drop = Field(default=Drop(below=0.1), description=DROP)


@scorer("new_text", NewTextConfig, finds_nothing=True, per_document=True, stored=True, version=4)
def new_text(context: ScoringContext, config: NewTextConfig) -> Floats:
    """`1 - longest / length` of a sentence or line, (M,) float32 in [0, 1]; low repeats earlier text, and is dropped.

    `longest` is the number of tokens in the longest run of the unit that stands before the unit in the same document,
    prompt included. White space does not count. The first and last words of a unit are compared by text if a tokenizer
    has cut them into other tokens, as it often does after a line break. 0: all of the unit is copied. Units of fewer
    than `shortest` tokens are NaN, and runs of fewer than half as many (and than two) count as none.

    Source: ours, for the paper's knowledge novelty; its Eq. (3) is the scorer `novelty`.
    """
    import numpy as np  # not at the top: a block is read without NumPy

    from ..data.ragged import CHUNK_TOKENS, runs

    documents, starts = context.documents, context.segments(config.unit)
    sizes = np.diff(starts, append=len(context.token_ids))
    vocabulary, scores = _Vocabulary.of(context.tokenizer, documents.input_ids), np.empty(len(starts), dtype=np.float32)
    for part in runs(documents.offsets, CHUNK_TOKENS):
        low, high = np.searchsorted(starts, documents.completion_offsets[[part.start, part.stop]])
        words = _Words.of(documents, part, vocabulary, starts[low:high], sizes[low:high])
        scores[low:high] = _scores(words, config.shortest)
    return np.repeat(scores, sizes)


def _scores(words: _Words, shortest: int) -> Floats:
    """The scores of some units, (S,)."""
    import numpy as np

    long, run = words.lengths >= shortest, max(2, shortest // 2)
    scores: Floats = np.where(long, np.float32(1), np.float32(np.nan))
    for unit in np.flatnonzero(long & _may_repeat(words, run)):
        past, own = words.around(int(unit))
        longest, ends = longest_copy(past, own)
        if longest >= run:  # else hashes were equal by chance
            more = max(_cut_otherwise(past, own, longest, *end, words.texts) for end in ends)
            scores[unit] = 1 - (longest + more) / len(own)
    return scores


def longest_copy(past: NDArray[Any], own: NDArray[Any]) -> tuple[int, list[tuple[int, int]]]:
    """Length of the longest run of `own` that stands in `past` (the longest common substring), and where it ends.

    Returns:
        the number of tokens, and the ends in `past` and in `own` of the runs of that length, at most `PLACES`.
    """
    import numpy as np

    best, ends = 0, list[tuple[int, int]]()
    together = max(1, TABLE // (len(past) + 1))
    last = np.zeros(len(past) + 1, dtype=np.int32)
    for low in range(0, len(own), together):
        equal = past == own[low : low + together, None]
        ending = np.zeros((len(equal), len(past) + 1), dtype=np.int32)  # length of the common run that ends there
        for row, same in zip(ending, equal, strict=True):
            np.multiply(last[:-1] + 1, same, out=row[1:])
            last = row
        longest = int(ending.max(initial=0))
        if longest > best:
            best, ends = longest, []
        if longest and longest == best and len(ends) < PLACES:  # a table of numbers may have millions
            here, there = np.nonzero(ending == best)
            left = PLACES - len(ends)
            ends += zip(there[:left].tolist(), (here[:left] + low + 1).tolist(), strict=True)
    return best, ends


def _cut_otherwise(
    past: NDArray[Any], own: NDArray[Any], longest: int, past_end: int, own_end: int, texts: dict[int, bytes]
) -> int:
    """Tokens of `own` on either side of a run whose text stands in `past`, too, cut into other tokens.

    An escaped line break, with which a sentence in a string of JSON ends, is white space.
    """

    def begins(there: NDArray[Any], here: NDArray[Any], step: int) -> bool:
        """Whether the first tokens of `there`, or with `step` -1 the last, are the text of `here`."""
        text, read = b"".join(texts[index] for index in here.tolist()), b""
        text = _ESCAPED.sub(b"", text) if step > 0 else text
        for index in there[::step].tolist():
            if len(read) >= len(text):
                break
            read = read + texts[index] if step > 0 else texts[index] + read
        return read == text

    begin = own_end - longest
    head, tail = own[:begin], own[own_end:]
    more = len(head) if begins(past[: past_end - longest], head, -1) else 0
    return more + (len(tail) if begins(past[past_end:], tail, 1) else 0)


@dataclass(frozen=True)
class _Vocabulary:
    """Which tokens have equal text.

    Args:
        first: (largest id + 1,) int32, the first id that has the same text, -1 for white space alone. A token without
            any text, which only a tokenizer of its own kind has, equals none but itself.
        texts: of each such id, without white space around it.
    """

    first: NDArray[Any]
    texts: dict[int, bytes]

    @classmethod
    def of(cls, tokenizer: Any, token_ids: NDArray[Any]) -> _Vocabulary:
        """Of the tokens that occur."""
        import numpy as np

        from ..data.token_text import distinct_ids, token_bytes

        distinct = distinct_ids(token_ids).tolist()
        found = np.zeros(max(distinct, default=-1) + 1, dtype=np.int32)
        first: dict[bytes, int] = {}
        for index, piece in zip(distinct, token_bytes(tokenizer, distinct), strict=True):
            spelt = piece.decode("utf-8", "surrogateescape").strip().encode("utf-8", "surrogateescape")
            text = spelt if piece else b"\0%d" % index
            found[index] = first.setdefault(text, index) if text else -1
        return cls(found, {index: text for text, index in first.items()})


@dataclass(frozen=True)
class _Words:
    """The tokens of some documents in a row without white space, and where their units are among them.

    Args:
        ids: (K,) int32, equal for tokens with equal text.
        offsets: (N + 1,) bounds of the documents.
        begins, lengths: (S,) of the units.
        texts: see `_Vocabulary`.
    """

    ids: Ints
    offsets: Ints
    begins: Ints
    lengths: Ints
    texts: dict[int, bytes]

    @classmethod
    def of(cls, documents: DocumentSet, part: slice, vocabulary: _Vocabulary, starts: Ints, sizes: Ints) -> _Words:
        """The words of the documents `part`, whose units begin at the completion tokens `starts`, (S,)."""
        import numpy as np

        from ..data.ragged import offsets_of

        bounds = documents.offsets[part.start : part.stop + 1]
        ids = vocabulary.first[documents.input_ids[bounds[0] : bounds[-1]]]
        before = offsets_of((ids >= 0).astype(np.int64))  # words before each token
        at = documents.completion_flat[starts] - bounds[0]
        begins = before[at]
        return cls(ids[ids >= 0], before[bounds - bounds[0]], begins, before[at + sizes] - begins, vocabulary.texts)

    def around(self, unit: int) -> tuple[Ints, Ints]:
        """The words of a unit's document before it, and the unit's own."""
        import numpy as np

        begin, end = self.begins[unit], self.begins[unit] + self.lengths[unit]
        document = np.searchsorted(self.offsets, begin, side="right") - 1
        return self.ids[self.offsets[document] : begin], self.ids[begin:end]


def _may_repeat(words: _Words, run: int) -> Bools:
    """Whether `run` tokens in a row of a unit stand before it in its document, or have the hash of such, (S,)."""
    import numpy as np

    from ..data.ragged import stretches

    found, number = np.zeros(len(words.begins), dtype=bool), len(words.ids) - run + 1
    long = np.flatnonzero(words.lengths >= run)
    if not len(long):
        return found
    factor, hashes = np.uint64(MULTIPLIER), np.zeros(number, dtype=np.uint64)
    for place in range(run):
        hashes += words.ids[place : place + number].astype(np.uint64) + np.uint64(1)
        hashes *= factor
    document = np.repeat(np.arange(len(words.offsets) - 1), np.diff(words.offsets))[:number]
    hashes ^= document.astype(np.uint64) * np.uint64(0xD1B54A32D192ED03)  # the same tokens of another document
    # the place in the lower bits of the hash: equal runs are then sorted by it, in a third of the time of np.unique
    bits = np.uint64(number.bit_length())
    hashes = (hashes >> bits << bits) | np.arange(number, dtype=np.uint64)
    hashes.sort()
    places = (hashes & ((np.uint64(1) << bits) - np.uint64(1))).astype(np.int64)
    opens = np.append(True, np.diff(hashes >> bits) > 0)
    earlier = np.empty(number, dtype=np.int64)  # where each run stands first
    earlier[places] = np.repeat(places[opens], np.diff(np.flatnonzero(opens), append=number))
    begins, counts = words.begins[long], words.lengths[long] - run + 1  # runs that begin and end in a unit
    repeats = earlier[stretches(begins, counts)] + run <= np.repeat(begins, counts)
    found[long] = np.logical_or.reduceat(repeats, np.cumsum(counts) - counts)
    return found
