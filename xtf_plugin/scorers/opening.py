"""The scorer of the `default` preset: finds sentences and lines that are out of place by how they begin.

A sentence that does not belong, however fluent, is unlikely where it begins. Its later tokens follow from its first
ones, so an average over all of them hides the beginning. A good sentence after it is unlikely too, because the
reference has just read text that does not belong; so flagged sentences are scored again without that text.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator, model_validator

from ..fields import NonNegative, Problems
from .base import ScoringContext, scorer
from .typicality import TypicalityConfig, typicality_of

if TYPE_CHECKING:
    from ..data.ragged import Bools, Doubles, Floats, Ints

UNITS: dict[str, tuple[Literal["sentence", "line"], ...]] = {
    "sentence": ("sentence",),
    "line": ("line",),
    "both": ("sentence", "line"),
}


class OpeningConfig(TypicalityConfig):
    """Scorer `opening`: mean typicality of a sentence or line, its first tokens weighing most, in nats."""

    unit: Literal["sentence", "line", "both"] = Field(  # type: ignore[assignment]  # a unit of its own
        default="sentence",
        description="What gets one score; both: the lower of the sentence's and of its line's up to the sentence's "
        "end.",
    )
    clip: NonNegative = Field(
        default=8.0,
        description="A token's typicality counts as at least minus this many nats, so that one odd token does not "
        "drop a sentence.",
    )
    context: Literal["document", "kept"] = Field(
        default="document",
        description="What the reference reads before a sentence or line. document: everything before it. kept: "
        "flagged ones are scored again after the text that this score and force_drop keep, so that good text after "
        "noise is kept. Needs `drop: {below: x}`.",
    )

    @field_validator("window", mode="before")
    @classmethod
    def _no_window(cls, window: Any) -> Any:
        if window in ("sentence", "line"):
            raise ValueError("does not go with `opening`, which scores complete units; remove it (scores change)")
        return window

    @model_validator(mode="after")
    def _can_fire(self) -> OpeningConfig:
        if self.drop.below is not None and self.drop.below <= -self.clip:
            why = f"keeps every score at or above {-self.clip:g}, so {self.drop} can never fire; raise it"
            raise Problems(("clip", self.clip, why))
        return self

    @model_validator(mode="after")
    def _rescoring_knows_the_rule(self) -> OpeningConfig:
        if self.context == "kept" and self.drop.below is None:
            why = (
                "has a threshold that depends on other documents, which `context: kept` does "
                "not allow; use {below: x}, or add `context: document`"
            )
            raise Problems(("drop", self.drop.model_dump(), why))
        if self.context == "kept" and self.max_fraction is not None:
            why = "would keep text that `context: kept` leaves out when it scores; remove it, or use context: document"
            raise Problems(("max_fraction", self.max_fraction, why))
        return self


@scorer("opening", OpeningConfig, version=2, per_document=True)
def opening(context: ScoringContext, config: OpeningConfig) -> Floats:
    """`sum_i w_i max(t_i, -clip) / sum_i w_i` over a sentence or line, `w_i = 1 / (i + 1)`, in nats; low is dropped.

    t_i is the typicality of the unit's token i = 0, 1, ..., and all tokens of the unit get the same score. With `unit:
    both` a sentence's score is the lower of its own and of its line's up to the sentence's end, so no score depends on
    later text. A special token is a unit of its own. Undefined tokens are left out; the score is NaN if all are.

    With `context: kept`, in the order of the document: a unit whose score is below the threshold is scored again after
    the text that was kept before it, for the reference and within its line, and gets the higher of the two scores.
    Prompts and protected tokens are always kept; so is the line break of a line of which a token is kept. A unit
    before which nothing is dropped is not scored again: nothing would change.

    Source: ours. Boilerplate and digressions are fluent: once they have begun, a good reference finds most of their
    tokens likely. Broken text is unlikely throughout. Weights that fall with the distance from the beginning find both;
    docs/evidence.md compares them with plain averages.
    """
    import numpy as np  # not at the top: a block is read without NumPy

    from .iterative_rescoring import IterativeRescoring

    values = typicality_of(context.predictions(config.reference))
    if not len(values):
        return values
    levels = [context.segments(unit) for unit in UNITS[config.unit]]
    pieces = levels[0] if len(levels) == 1 else np.union1d(*levels)

    def judge(values: Floats, gone: Bools) -> Floats:
        return _judged(values, gone, levels, pieces, context.offsets, config.clip)

    limit = config.drop.below
    if config.context == "document" or limit is None:
        return judge(values, np.zeros(len(values), dtype=bool))
    return IterativeRescoring(context, pieces, limit, config.reference).scores(values, judge)


def _judged(typical: Floats, gone: Bools, levels: list[Ints], pieces: Ints, offsets: Ints, clip: float) -> Floats:
    """The score of every token, (M,): the lowest over the levels."""
    import numpy as np

    from ..data.ragged import Layout

    scores = np.empty(len(typical), dtype=np.float32)
    for tokens, _, part in Layout(offsets, np.ones_like(offsets[1:])).chunks():
        size = int(part.offsets[-1])
        if size:
            here, *parts = (_within(starts, tokens) for starts in (pieces, *levels))
            found = [_openings(typical[tokens], gone[tokens], starts, here, clip) for starts in parts]
            worst = found[0] if len(found) == 1 else np.fmin(*found)
            scores[tokens] = np.repeat(worst, np.diff(here, append=size))
    return scores


def _within(starts: Ints, tokens: slice) -> Ints:
    """The starts within a run of tokens, counted from its first token."""
    import numpy as np

    low, high = np.searchsorted(starts, [tokens.start, tokens.stop])
    inside: Ints = starts[low:high] - tokens.start
    return inside


def _openings(typical: Floats, gone: Bools, starts: Ints, pieces: Ints, clip: float) -> Doubles:
    """Weighted mean of clipped typicality from a unit's beginning to each piece's end, (S,); NaN: none is defined.

    Tokens before the piece that are gone neither count nor advance i. Sums are taken per piece: the rounding of a
    running sum would depend on the order of the documents.
    """
    import numpy as np

    size = len(typical)
    known, clipped = ~np.isnan(typical), np.maximum(np.nan_to_num(typical.astype(np.float64)), -clip)
    counted = np.concatenate([[0], np.cumsum(~gone)])
    lengths, begins = np.diff(pieces, append=size), starts[np.searchsorted(starts, pieces, side="right") - 1]
    unit = np.repeat(starts, np.diff(starts, append=size))
    earlier = (known & ~gone) / (counted[:-1] - counted[unit] + 1.0)  # weight of a token that stands before a piece
    ahead = counted[pieces] - counted[begins]  # tokens that count before each piece in its unit
    own = known / (np.arange(size) - np.repeat(pieces - ahead, lengths) + 1.0)
    bounds = np.stack([begins, pieces], axis=1).reshape(-1)

    def summed(before: Doubles, within: Doubles) -> Doubles:
        past = np.where(begins < pieces, np.add.reduceat(before, bounds)[::2], 0.0)
        return past + np.add.reduceat(within, pieces)

    total, weight = summed(clipped * earlier, clipped * own), summed(earlier, own)
    mean: Doubles = np.where(weight > 0, total / np.where(weight > 0, weight, 1.0), np.nan)
    return mean
