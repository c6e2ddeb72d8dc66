"""Scorers that ask whether the reference is more surprised than it expected to be.

A low probability alone says little: where anything could come, every token is improbable. What the reference expects to
be surprised by at a place is the entropy of its own prediction there, and noise is what goes beyond that. A token that
was put into a sentence stands out by itself. A sentence that does not belong, however fluent, stands out where it
begins: its later tokens follow from its first ones, and averaging over them hides what gave it away.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from ..config_rules import Positive, ReferenceConfig
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
    """Scorer `opening`: how typical the first tokens of a sentence or line are, for all of its tokens."""

    unit: Literal["sentence", "line"] = Field(
        default="sentence", description="What is judged as a whole by how it begins."
    )
    tokens: Positive = Field(default=2, description="How many of its first tokens are looked at.")


class Opening(Scorer):
    """`score = mean of log P + H over the first tokens of the sentence or line`, the same for all its tokens; low goes.

    Equals, for each unit, `np.nanmean(typicality[unit][:tokens])`, repeated over the unit. A special token is a unit of
    its own. Units are those of `window: sentence` and `window: line`.

    Ours: boilerplate and digressions are fluent, so that a good reference finds most of their tokens likely once they
    have begun. What it does not find likely is that they begin. docs/evidence.md has the comparison with averages over
    whole sentences and over windows.
    """

    name = "opening"
    Config = OpeningConfig
    config: OpeningConfig
    per_document = True

    def score(self, context: ScoringContext) -> Floats:
        """Typicality of the unit's first tokens, (M,) float32 in nats; NaN where none of them has one."""
        import numpy as np  # reading a block needs no NumPy

        found = context.predictions(self.config.reference)
        typical = (found.logprobs + found.entropy).astype(np.float64)
        starts = context.segments(self.config.unit)
        if not len(typical):
            return found.logprobs
        lengths = np.diff(starts, append=len(typical))
        place = np.arange(len(typical)) - np.repeat(starts, lengths)
        counts = (place < self.config.tokens) & ~np.isnan(typical)
        number = np.add.reduceat(counts.astype(np.int64), starts)
        total = np.add.reduceat(np.where(counts, typical, 0.0), starts)
        mean = np.where(number > 0, total / np.maximum(number, 1), np.nan)
        return np.repeat(mean, lengths).astype(np.float32)
