"""Excess loss (Rho-1) and the influence of Token Cleaning: how much more probable a better model finds the token.

Both are the same difference of log-probabilities.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from ..fields import Problems, ReferenceConfig
from .base import ScoreConfig, ScoringContext, scorer

if TYPE_CHECKING:
    from ..data.ragged import Floats


class ExcessLossConfig(ScoreConfig):
    """Scorer `excess_loss`: loss of the run's own reference minus loss of another model, in nats (Rho-1)."""

    reference: ReferenceConfig = Field(
        description="Model that the run's own reference is compared with, usually trained on clean data."
    )

    @model_validator(mode="after")
    def _another_model(self) -> ExcessLossConfig:
        if self.reference.model is None:
            why = "names no model to compare with; name one that was trained on clean data, a path or a hub id"
            raise Problems(("reference.model", None, why))
        return self


class TokenCleaningConfig(ExcessLossConfig):
    """Scorer `token_cleaning`: how much more probable a better model finds the token, in nats."""

    mode: Literal["fixed"] = Field(default="fixed", description="fixed: compared with `reference`, once.")

    @model_validator(mode="before")
    @classmethod
    def _no_self_evolving(cls, part: Any) -> Any:
        if isinstance(part, dict) and part.get("mode") == "self_evolving":
            why = "was removed; remove it and name a `reference`, a model that was trained on clean data"
            raise Problems(("mode", "self_evolving", why))
        return part


@scorer("excess_loss", ExcessLossConfig, per_document=True)
def excess_loss(context: ScoringContext, config: ExcessLossConfig) -> Floats:
    """`log P_reference(token) - log P_base(token)`, (M,) float32 in nats; low is not worth training on, and dropped.

    Source: arXiv 2404.07965 ("selective language modeling"); `drop: {quantile: 0.4}` keeps the top 60 %. The paper
    takes the loss of the model being trained at each step and ranks the tokens of a batch. Here the base is the model
    before training, and the ranking is over the dataset or, with `scope: document`, each document.
    """
    return context.log_probabilities(config.reference) - context.logprobs


@scorer("token_cleaning", TokenCleaningConfig, per_document=True)
def token_cleaning(context: ScoringContext, config: TokenCleaningConfig) -> Floats:
    """`log P_reference(token) - log P_base(token)`, (M,) float32 in nats: the influence of the token; low is dropped.

    Source: arXiv 2502.01968, "fixed-model cleaning": one reference for the whole dataset. The paper ranks all tokens
    together, `scope: dataset`, and keeps 60 %, `drop: {quantile: 0.4}`.
    """
    return context.log_probabilities(config.reference) - context.logprobs
