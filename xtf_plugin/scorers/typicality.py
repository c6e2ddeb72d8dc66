"""Typicality: whether the reference is more surprised by a token than it expected to be.

A low probability alone says little: where anything could come, every token is improbable. What the reference expects to
be surprised by at a place is the entropy of its own prediction there, and noise is what goes beyond that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from ..fields import ReferenceConfig
from .base import ScoreConfig, ScoringContext, scorer

if TYPE_CHECKING:
    from .base import Floats, Predictions


class TypicalityConfig(ScoreConfig):
    """Scorer `typicality`: the token's log-probability plus the entropy of the prediction there, in nats."""

    reference: ReferenceConfig | None = Field(
        default=None, description="Model that scores, same vocabulary; null: the run's own reference."
    )


@scorer("typicality", TypicalityConfig, per_document=True)
def typicality(context: ScoringContext, config: TypicalityConfig) -> Floats:
    """`log P(token) + H`, (M,) float32 in nats, with H the entropy of the prediction at that place; low is dropped.

    H is the surprisal that the reference itself expects, so 0 is as surprising as expected and -4 is 4 nats more: a
    token of 1/55 of the probability that a typical one has there. Under the reference's own distribution the mean is 0
    at every place, however uncertain it is, so one threshold fits all places.

    Source: typical sets (Shannon 1948); as a rule for choosing tokens, "locally typical sampling", arXiv 2202.00666,
    which uses the absolute value. Here tokens that are less surprising than expected are no noise.
    """
    return typicality_of(context.predictions(config.reference))


def typicality_of(found: Predictions) -> Floats:
    """Log-probability plus entropy, (M,) float32; NaN where one of them is infinite: undefined, as everywhere."""
    import numpy as np  # reading a block needs no NumPy

    values = found.logprobs + found.entropy
    return np.where(np.isfinite(values), values, np.float32(np.nan))
