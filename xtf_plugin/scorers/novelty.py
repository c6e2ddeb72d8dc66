"""Knowledge novelty: one minus the probability that the reference gives the token, Eq. (3)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from ..fields import Drop, Probability, Problems
from .base import ScoreConfig, ScoringContext, scorer

if TYPE_CHECKING:
    from ..data.ragged import Floats


class NoveltyDrop(Drop):
    """Rule over novelty: Eq. (6) is {known_above: 0.95}; {unknown_below: p} drops the opposite end."""

    rules = (("known_above",), ("unknown_below",), ("known_above", "unknown_below"), *Drop.rules)
    known_above: Probability | None = Field(default=None, description="Drop tokens more probable than this, Eq. (6).")
    unknown_below: Probability | None = Field(default=None, description="Drop tokens less probable than this.")

    @model_validator(mode="after")
    def _keeps_some(self) -> NoveltyDrop:
        if self.known_above is not None and self.unknown_below is not None and self.unknown_below >= self.known_above:
            why = f"is not below known_above ({self.known_above}), so every token would be dropped; write a smaller one"
            raise Problems(("unknown_below", self.unknown_below, why))
        return self

    def bounds(self) -> list[tuple[str, str, float]]:
        """Probabilities as thresholds on novelty."""
        keys = (("known_above", "below"), ("unknown_below", "above"))
        given = ((key, side, getattr(self, key)) for key, side in keys)
        return [*super().bounds(), *((key, side, 1 - value) for key, side, value in given if value is not None)]


class NoveltyConfig(ScoreConfig):
    """Scorer `novelty`: 1 - P(token); a unit or window averages log-probabilities, not probabilities."""

    drop: NoveltyDrop = Field(
        default=NoveltyDrop(known_above=0.95), description="Which tokens are dropped: exactly one rule."
    )


def _one_minus_probability(logprobs: Floats) -> Floats:
    import numpy as np  # not at the top: a block is read without NumPy

    return -np.expm1(logprobs)


@scorer("novelty", NoveltyConfig, per_document=True, seen=_one_minus_probability)
def novelty(context: ScoringContext, config: NoveltyConfig) -> Floats:
    """Log-probabilities, which the rule sees as `1 - P(token)`, (M,) float32 in [0, 1]; low is known, and dropped."""
    return context.logprobs
