"""Scorers that ask whether the reference is more surprised than it expected to be.

A low probability alone says little: where anything could come, every token is improbable. What the reference expects to
be surprised by at a place is the entropy of its own prediction there, and noise is what goes beyond that. A token that
was put into a sentence stands out by itself. A sentence that does not belong, however fluent, stands out where it
begins: its later tokens follow from its first ones, and averaging over them hides what gave it away.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from ..config_rules import NonNegative, Problems, ReferenceConfig
from .base import Scorer, ScoringContext, SelectorConfig

if TYPE_CHECKING:
    from .base import Floats


class TypicalityConfig(SelectorConfig):
    """Scorer `typicality`: the token's log-probability plus the entropy of the prediction there, in nats."""

    reference: ReferenceConfig | None = Field(
        default=None, description="Model that scores, same vocabulary; null: the run's own reference."
    )


class Typicality(Scorer):
    """`score = log P(token) + H`, with H the entropy of the reference's prediction at that place; low goes.

    H is the surprisal that the reference itself expects, so 0 reads "as surprising as was to be expected" and -4 "4
    nats more": a token of 1/55 of the probability that a typical one has there. Under the reference's own distribution
    the mean is 0 at every place, however uncertain it is; that is what makes one threshold fit all places.

    Source: typical sets (Shannon 1948); as a rule for choosing tokens, "locally typical sampling", arXiv 2202.00666,
    which uses the absolute value. Here tokens that are less surprising than expected are no noise.
    """

    name = "typicality"
    Config = TypicalityConfig
    per_document = True
    config: TypicalityConfig

    def score(self, context: ScoringContext) -> Floats:
        """Minus the surprisal in excess of the expected one, (M,) float32 in nats."""
        found = context.predictions(self.config.reference)
        return found.logprobs + found.entropy


class OpeningConfig(TypicalityConfig):
    """Scorer `opening`: how typical a sentence or line begins, for all of its tokens, in nats."""

    unit: Literal["sentence", "line"] = Field(
        default="sentence", description="What is judged as a whole by how it begins."
    )
    clip: NonNegative = Field(
        default=8.0,
        description="Nats below 0 beyond which a single token counts no further, so that one odd token condemns no "
        "sentence.",
    )

    @model_validator(mode="after")
    def _can_fire(self) -> OpeningConfig:
        if self.drop.below is not None and self.drop.below <= -self.clip:
            why = f"keeps every score at or above {-self.clip:g}, so that {self.drop} can never fire; raise it"
            raise Problems(("clip", self.clip, why))
        return self


class Opening(Scorer):
    """`score = sum_i w_i max(t_i, -clip) / sum_i w_i` over a sentence or line, `w_i = 1 / (i + 1)`; low goes.

    t_i is the typicality of the unit's token i = 0, 1, ..., and all tokens of the unit get the same score. A special
    token is a unit of its own; units are those of `window: sentence` and `window: line`. An undefined token counts
    nowhere.

    Ours: boilerplate and digressions are fluent, so that a good reference finds most of their tokens likely once they
    have begun; what it does not find likely is that they begin. Broken text is unlikely throughout. Weights that fall
    with the distance from the beginning find both; docs/evidence.md compares them with plain averages over sentences,
    lines and windows.
    """

    name = "opening"
    Config = OpeningConfig
    config: OpeningConfig
    per_document = True

    def score(self, context: ScoringContext) -> Floats:
        """Weighted mean of the unit's clipped typicality, (M,) float32 in nats; NaN where no token has one."""
        import numpy as np  # reading a block needs no NumPy

        found = context.predictions(self.config.reference)
        typical = (found.logprobs + found.entropy).astype(np.float64)
        starts = context.segments(self.config.unit)
        if not len(typical):
            return found.logprobs
        lengths = np.diff(starts, append=len(typical))
        place = np.arange(len(typical)) - np.repeat(starts, lengths)
        known = ~np.isnan(typical)
        weights = known / (place + 1.0)
        total = np.add.reduceat(np.where(known, np.maximum(typical, -self.config.clip), 0.0) * weights, starts)
        weight = np.add.reduceat(weights, starts)
        mean = np.where(weight > 0, total / np.where(weight > 0, weight, 1.0), np.nan)
        return np.repeat(mean, lengths).astype(np.float32)
