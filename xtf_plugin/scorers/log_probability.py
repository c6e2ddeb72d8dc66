"""Perplexity filters: the token's log-probability. The shortest scorer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from ..fields import ReferenceConfig
from .base import ScoreConfig, ScoringContext, scorer

if TYPE_CHECKING:
    from ..data.ragged import Floats


class LogProbabilityConfig(ScoreConfig):
    """Scorer `log_probability`: log-probability of the token, in nats."""

    reference: ReferenceConfig | None = Field(
        default=None, description="Model that scores, same vocabulary; null: the run's own reference."
    )


@scorer("log_probability", LogProbabilityConfig, per_document=True)
def log_probability(context: ScoringContext, config: LogProbabilityConfig) -> Floats:
    """`log P(token)`, (M,) float32 in nats, at most 0; low is improbable to the reference, and dropped.

    The rule of arXiv 2501.14315, which drops tokens of high perplexity. Its threshold on perplexity, 2.5, is
    `drop: {below: -0.916}` here (minus its natural logarithm).
    """
    return context.log_probabilities(config.reference)
