"""The scorer behind the `default` preset: sentences and lines that are out of place, told by how they begin.

A sentence that does not belong, however fluent, stands out where it begins: its later tokens follow from its first
ones, and averaging over them hides what gave it away. A good sentence behind it stands out too, because the reference
has just read something that does not belong; so what would be dropped is looked at again without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from ..config_rules import NonNegative, Problems
from .base import Scorer, ScoringContext
from .typical import TypicalityConfig

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from .base import Floats

    Ints = NDArray[np.int64]

UNITS: dict[str, tuple[Literal["sentence", "line"], ...]] = {
    "sentence": ("sentence",),
    "line": ("line",),
    "both": ("sentence", "line"),
}


class OpeningConfig(TypicalityConfig):
    """Scorer `opening`: how typical a sentence or line begins, for all of its tokens, in nats."""

    unit: Literal["sentence", "line", "both"] = Field(
        default="sentence",
        description="What is judged as a whole by how it begins; both: the worse of the sentence and of its line up to "
        "the sentence's end.",
    )
    clip: NonNegative = Field(
        default=8.0,
        description="Nats below 0 beyond which a single token counts no further, so that one odd token condemns no "
        "sentence.",
    )
    context: Literal["document", "kept"] = Field(
        default="document",
        description="What stands before a sentence or line when it is judged. document: all of it. kept: what would be "
        "dropped is looked at again behind what was kept alone, so that what follows noise is not taken for noise. "
        "Needs `drop: {below: x}`.",
    )

    @model_validator(mode="after")
    def _can_fire(self) -> OpeningConfig:
        if self.drop.below is not None and self.drop.below <= -self.clip:
            why = f"keeps every score at or above {-self.clip:g}, so that {self.drop} can never fire; raise it"
            raise Problems(("clip", self.clip, why))
        return self

    @model_validator(mode="after")
    def _verdicts_are_the_rules(self) -> OpeningConfig:
        if self.context == "kept" and self.drop.below is None:
            why = f"has to know what is dropped from one score alone, not {self.drop}; use {{below: x}}, or document"
            raise Problems(("context", self.context, why))
        if self.context == "kept" and self.window != 1:
            why = "beside `context: kept` would drop other tokens than it looked at again; remove it"
            raise Problems(("window", self.window, why))
        return self


class Opening(Scorer):
    """`score = sum_i w_i max(t_i, -clip) / sum_i w_i` over a sentence or line, `w_i = 1 / (i + 1)`; low goes.

    t_i is the typicality of the unit's token i = 0, 1, ..., and all tokens of the unit get the same score. With `unit:
    both` a sentence's score is the lower of its own and of its line's up to the sentence's end: what follows an odd
    beginning in a line goes with it, and nothing is judged by what comes later. A special token is a unit of its own;
    units are those of `window: sentence` and `window: line`. An undefined token counts nowhere.

    With `context: kept`, in order of the document: a unit goes if its score is below the threshold, and still is when
    the reference has read nothing before it but what was kept (prompts and protected tokens always are). Its score is
    the higher of the two. A unit behind which nothing was dropped is not looked at again: nothing would change.

    Ours: boilerplate and digressions are fluent, so that a good reference finds most of their tokens likely once they
    have begun; what it does not find likely is that they begin. Broken text is unlikely throughout. Weights that fall
    with the distance from the beginning find both; docs/evidence.md compares them with plain averages over sentences,
    lines and windows, and shows what the second look spares.
    """

    name = "opening"
    version = 2
    Config = OpeningConfig
    config: OpeningConfig
    per_document = True

    def score(self, context: ScoringContext) -> Floats:
        """Weighted mean of the unit's clipped typicality, (M,) float32 in nats; NaN where no token has one."""
        found = context.predictions(self.config.reference)
        typical = found.logprobs + found.entropy
        if not len(typical):
            return typical
        if self.config.context == "document":
            return self._judged(typical, context)
        return self._second_looks(typical, context)

    def _pieces(self, context: ScoringContext) -> Ints:
        """First completion token of every piece that no unit cuts, (S,)."""
        import numpy as np  # reading a block needs no NumPy

        levels = [context.segments(unit) for unit in UNITS[self.config.unit]]
        return levels[0] if len(levels) == 1 else np.union1d(*levels)

    def _judged(self, typical: Floats, context: ScoringContext) -> Floats:
        """The score of every token from the typicality of all, (M,)."""
        import numpy as np

        pieces = self._pieces(context)
        levels = [context.segments(unit) for unit in UNITS[self.config.unit]]
        scores = [_openings(typical, starts, pieces, self.config.clip) for starts in levels]
        worst = scores[0] if len(scores) == 1 else np.fmin(*scores)
        return np.repeat(worst, np.diff(pieces, append=len(typical))).astype(np.float32)

    def _second_looks(self, typical: Floats, context: ScoringContext) -> Floats:
        """The same where what would be dropped is judged behind what was kept."""
        from .again import SecondLooks

        limit = self.config.drop.below
        assert limit is not None
        looks = SecondLooks(context, self._pieces(context), limit, self.config.reference)
        return looks.scores(typical, lambda values: self._judged(values, context))


def _openings(typical: Floats, starts: Ints, pieces: Ints, clip: float) -> NDArray[np.float64]:
    """Weighted mean of clipped typicality from a unit's beginning to each piece's end, (S,); NaN without any.

    Each is summed by itself: a running sum over the dataset would round by where a document stands in it.
    """
    import numpy as np

    lengths = np.diff(starts, append=len(typical))
    place = np.arange(len(typical)) - np.repeat(starts, lengths)
    known = ~np.isnan(typical)
    weights = known / (place + 1.0)
    clipped = np.where(known, np.maximum(typical.astype(np.float64), -clip), 0.0)
    ends = np.append(pieces[1:], len(typical))
    begins = starts[np.searchsorted(starts, pieces, side="right") - 1]
    bounds = np.stack([begins, ends], axis=1).reshape(-1)
    total, weight = (np.add.reduceat(np.append(values, 0.0), bounds)[::2] for values in (clipped * weights, weights))
    mean: NDArray[np.float64] = np.where(weight > 0, total / np.where(weight > 0, weight, 1.0), np.nan)
    return mean
