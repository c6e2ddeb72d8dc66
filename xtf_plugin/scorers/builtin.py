"""Scorers of the published peers: log-probability, excess loss (Rho-1), token cleaning.

All three are differences of log-probabilities in nats, so one stored pass per reference serves all of them. They run
before training, while the published methods choose tokens in each batch or after each part of the data; every class
says where that makes a difference.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from ..config_rules import Problems, ReferenceConfig
from .base import Scorer, ScoringContext, SelectorConfig

if TYPE_CHECKING:
    from .base import Floats

_OTHER_MODEL = "Model that the run's own reference is held against, usually trained on clean data."
_NEEDED = "names no model to compare with; name one that was trained on clean data, a path or a hub id"


class LogProbabilityConfig(SelectorConfig):
    """Scorer `log_probability`: log-probability of the token, in nats."""

    reference: ReferenceConfig | None = Field(
        default=None, description="Model that scores, same vocabulary; null: the run's own reference."
    )


class LogProbability(Scorer):
    """`score = log P(token)`: low is improbable to the reference, and goes.

    The school of arXiv 2501.14315, which drops tokens of high perplexity. Its threshold on perplexity, 2.5, is
    `drop: {below: -0.916}` here (minus its natural logarithm).
    """

    name = "log_probability"
    Config = LogProbabilityConfig
    per_document = True
    config: LogProbabilityConfig

    def score(self, context: ScoringContext) -> Floats:
        """Log-probabilities as they are, (M,) float32 in nats, at most 0."""
        return context.log_probabilities(self.config.reference)


class ExcessLossConfig(SelectorConfig):
    """Scorer `excess_loss`: loss of the run's own reference minus loss of another model, in nats (Rho-1)."""

    reference: ReferenceConfig = Field(description=_OTHER_MODEL)

    @model_validator(mode="after")
    def _another_model(self) -> ExcessLossConfig:
        if self.reference.model is None:
            raise Problems(("reference.model", None, _NEEDED))
        return self


class ExcessLoss(Scorer):
    """`score = log P_reference(token) - log P_base(token)`, that is `loss(base) - loss(reference)`: Rho-1, SLM.

    Source: arXiv 2404.07965 ("selective language modeling"): tokens of high excess loss are worth training on, low ones
    go; `drop: {quantile: 0.4}` keeps the top 60 %. Where this differs: the paper takes the loss of the model being
    trained at each step and ranks the tokens of a batch. Here the base is the model before training and the ranking is
    over the dataset (or, with `scope: document`, over each document), so the choice does not follow what is learnt
    meanwhile.
    """

    name = "excess_loss"
    Config = ExcessLossConfig
    per_document = True
    config: ExcessLossConfig

    def score(self, context: ScoringContext) -> Floats:
        """Excess loss, (M,) float32 in nats."""
        return context.log_probabilities(self.config.reference) - context.logprobs


class TokenCleaningConfig(ExcessLossConfig):
    """Scorer `token_cleaning`: how much more probable a better model finds the token, in nats."""

    mode: Literal["fixed"] = Field(default="fixed", description="fixed: against `reference`, once.")

    @model_validator(mode="before")
    @classmethod
    def _no_self_evolving(cls, part: Any) -> Any:
        if isinstance(part, dict) and part.get("mode") == "self_evolving":
            why = "is gone; remove it and name a `reference`, a model that was trained on clean data"
            raise Problems(("mode", "self_evolving", why))
        return part


class TokenCleaning(ExcessLoss):
    """`score = log P_reference(token) - log P_base(token)`: the influence score of arXiv 2502.01968; low goes.

    This is the paper's "fixed-model cleaning": one reference for the whole dataset. The paper ranks all tokens
    together, `scope: dataset`, and keeps 60 %, `drop: {quantile: 0.4}`.
    """

    name = "token_cleaning"
    Config = TokenCleaningConfig
