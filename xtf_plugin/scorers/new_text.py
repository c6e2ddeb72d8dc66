"""Knowledge novelty of a sentence or line, taken at its word: whether it says what the document has not yet said.

A sentence of the prompt that is copied into the answer, or a line that is written twice, teaches nothing. To a language
model it is the most probable text there is, so no probability finds it; comparing tokens does, and needs no model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from ..fields import Drop, Positive
from .base import ScoreConfig, ScoringContext, scorer

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..data.documents import DocumentSet
    from ..data.ragged import Bools, Floats, Ints

MULTIPLIER = 0x9E3779B97F4A7C15  # odd, so that a power of it never becomes 0


class NewTextConfig(ScoreConfig):
    """Scorer `new_text`: the share of a sentence or line that does not repeat earlier text of its document."""

    unit: Literal["sentence", "line"] = Field(default="sentence", description="What gets one score.")
    shortest: Positive = Field(
        default=8, description="Units of fewer tokens are not scored: short ones repeat in every text."
    )
    drop: Drop = Field(
        default=Drop(below=0.25), description="Which tokens are dropped: exactly one rule. Low scores are dropped."
    )


@scorer("new_text", NewTextConfig, finds_nothing=True, per_document=True)
def new_text(context: ScoringContext, config: NewTextConfig) -> Floats:
    """`1 - longest / length` of a sentence or line, (M,) float32 in [0, 1]; low repeats earlier text, and is dropped.

    `longest` is the number of tokens in the longest run of the unit that stands, token for token, before the unit in
    the same document, prompt included. 0: all of the unit is copied. Units of fewer than `shortest` tokens are NaN, and
    runs of fewer than half as many (and than two) count as none.

    Source: ours, for the paper's knowledge novelty; its Eq. (3) is the scorer `novelty`.
    """
    import numpy as np  # not at the top: a block is read without NumPy

    starts = context.segments(config.unit)
    lengths = np.diff(starts, append=len(context.token_ids))
    scores = np.where(lengths >= config.shortest, np.float32(1), np.float32(np.nan))
    run = max(2, config.shortest // 2)
    for unit in np.flatnonzero((lengths >= config.shortest) & _may_repeat(context.documents, starts, run)):
        past, own = _texts(context.documents, int(starts[unit]), int(lengths[unit]))
        longest = longest_copy(past, own)
        if longest >= run:  # else hashes were equal by chance
            scores[unit] = 1 - longest / len(own)
    return np.repeat(scores, lengths)


def longest_copy(past: NDArray[Any], own: NDArray[Any]) -> int:
    """Tokens in the longest run of `own` that stands in `past`: the longest common substring."""
    import numpy as np

    best, ending = 0, np.zeros(len(past) + 1, dtype=np.int64)  # common runs that end at each place of `past`
    for token in own:
        ending[1:] = np.where(past == token, ending[:-1] + 1, 0)
        best = max(best, int(ending.max()))
    return best


def _texts(documents: DocumentSet, start: int, length: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """The tokens of a unit's document before it, and the unit's own."""
    import numpy as np

    at = int(documents.completion_flat[start])
    begin = int(documents.offsets[np.searchsorted(documents.offsets, at, side="right") - 1])
    return documents.input_ids[begin:at], documents.input_ids[at : at + length]


def _may_repeat(documents: DocumentSet, starts: Ints, run: int) -> Bools:
    """Whether `run` tokens in a row of a unit stand before it in its document, or have the hash of such, (S,)."""
    import numpy as np

    ids = documents.input_ids.astype(np.uint64)
    if len(ids) < run:
        return np.zeros(len(starts), dtype=bool)
    factor, hashes = np.uint64(MULTIPLIER), np.zeros(len(ids) - run + 1, dtype=np.uint64)
    for place in range(run):
        hashes = hashes * factor + ids[place : place + len(hashes)] + np.uint64(1)
    document = np.repeat(np.arange(len(documents)), documents.lengths)[: len(hashes)]
    hashes ^= document.astype(np.uint64) * np.uint64(0xD1B54A32D192ED03)  # the same tokens of another document
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    earlier = np.concatenate([first[inverse], np.full(run - 1, len(ids))])  # where each run of tokens stands first
    flat = documents.completion_flat
    begins = flat[starts]
    lengths = np.diff(starts, append=len(flat))
    opens, ends = np.repeat(begins, lengths), np.repeat(begins + lengths, lengths)
    repeats = (earlier[flat] + run <= opens) & (flat + run <= ends)
    found: Bools = np.add.reduceat(repeats.astype(np.int64), starts) > 0
    return found
