"""Typicality: whether a token is more surprising to the reference than the reference expected.

A low probability alone says little: where any token may follow, every token is improbable. The surprise that the
reference expects at a place is the entropy of its prediction there; noise is what exceeds it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from ..fields import ReferenceConfig
from .base import ScoreConfig, ScoringContext, scorer

if TYPE_CHECKING:
    from ..data.ragged import Floats


class TypicalityConfig(ScoreConfig):
    """Scorer `typicality`: the token's log-probability plus the entropy of the prediction there, in nats."""

    reference: ReferenceConfig | None = Field(
        default=None, description="Model that scores, same vocabulary; null: the run's own reference."
    )


@scorer("typicality", TypicalityConfig, per_document=True)
def typicality(context: ScoringContext, config: TypicalityConfig) -> Floats:
    """`log P(token) + H`, (M,) float32 in nats, with H the entropy of the prediction at that place; low is dropped.

    H is the mean surprisal under the reference's own distribution: 0 is as surprising as expected, -4 is 4 nats more.
    Under that distribution the mean is 0 at every place, however uncertain it is, so one threshold fits all places.

    Source: typical sets (Shannon 1948); as a rule for choosing tokens, "locally typical sampling", arXiv 2202.00666,
    which uses the absolute value. Here tokens that are less surprising than expected are not noise.
    """
    import numpy as np  # not at the top: a block is read without NumPy

    found = context.predictions(config.reference)
    values = found.logprobs + found.entropy
    return np.where(np.isfinite(values), values, np.float32(np.nan))
