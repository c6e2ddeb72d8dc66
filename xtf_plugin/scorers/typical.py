"""The scorer that asks whether the reference is more surprised than it expected to be.

A low probability alone says little: where anything could come, every token is improbable. What the reference expects to
be surprised by at a place is the entropy of its own prediction there, and noise is what goes beyond that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from ..config_rules import ReferenceConfig
from .base import Scorer, ScoringContext, SelectorConfig

if TYPE_CHECKING:
    from .base import Floats, Predictions


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
        return typicality(context.predictions(self.config.reference))


def typicality(found: Predictions) -> Floats:
    """Log-probability plus entropy, (M,) float32; NaN where one of them is infinite: undefined, as everywhere."""
    import numpy as np  # reading a block needs no NumPy

    typical = found.logprobs + found.entropy
    return np.where(np.isfinite(typical), typical, np.float32(np.nan))
