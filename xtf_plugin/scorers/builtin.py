"""Scorers of the published peers: log-probability, excess loss (Rho-1), token cleaning.

All three are differences of log-probabilities in nats, so one stored pass per reference serves all of them. They run
before training, while the published methods choose tokens in each batch or after each part of the data; every class
says where that makes a difference.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

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


class TokenCleaningConfig(SelectorConfig):
    """Scorer `token_cleaning`: how much more probable a better model finds the token, in nats."""

    mode: Literal["fixed", "self_evolving"] = Field(
        default="fixed",
        description="fixed: against `reference`, once. self_evolving: against the model being trained, adapters on, at "
        "the start of every epoch from the second on.",
    )
    reference: ReferenceConfig | None = Field(default=None, description=_OTHER_MODEL + " Only with `mode: fixed`.")

    @model_validator(mode="after")
    def _a_reference_where_one_is_used(self) -> TokenCleaningConfig:
        if self.mode == "self_evolving" and self.reference is not None:
            why = "has no effect on mode: self_evolving, whose reference is the model being trained; remove it"
            raise Problems(("reference", self.reference.model, why))
        if self.mode == "fixed" and (self.reference is None or self.reference.model is None):
            why = _NEEDED if self.reference is not None else f"{_NEEDED}; or use mode: self_evolving"
            raise Problems(("reference.model", None, why))
        return self


class TokenCleaning(Scorer):
    """`score = log P_reference(token) - log P_base(token)`: the influence score of arXiv 2502.01968; low goes.

    `mode: fixed` is its "fixed-model cleaning": one reference for the whole dataset. The paper ranks all tokens
    together, `scope: dataset`, and keeps 60 %, `drop: {quantile: 0.4}`.

    `mode: self_evolving` differs from the paper's "self-evolving cleaning": there the data is cut into parts, and the
    model trained on one part is the reference for the next, so each token is seen once. Here the parts are epochs: the
    first trains on whatever the other rules keep, and at the start of each later one the model as it stands scores the
    whole dataset again. The base stays the run's own reference, as it was before training, as in the paper.
    """

    name = "token_cleaning"
    Config = TokenCleaningConfig
    per_document = True
    config: TokenCleaningConfig

    @property
    def evolves(self) -> bool:
        """True in mode self_evolving."""
        return self.config.mode == "self_evolving"

    def score(self, context: ScoringContext) -> Floats:
        """Influence, (M,) float32 in nats."""
        if self.evolves:
            return context.current_log_probabilities() - context.logprobs
        return context.log_probabilities(self.config.reference) - context.logprobs
