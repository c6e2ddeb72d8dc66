"""Reasoning importance of a sentence or line: whether it makes what comes after it easier to predict.

Attention received, the paper's score, says where a model looks. This says what it gains: how much less probable the
text after a sentence is when the sentence is left out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from ..errors import XTFUserError
from ..fields import Drop, NonNegative, Positive, ReferenceConfig
from .base import DROP, Score, ScoreConfig, ScoringContext, scorer

if TYPE_CHECKING:
    from ..data.ragged import Bools, Floats, Ints

CLIP = 1.0  # nats: a single token shows at most this much
SKIPPED = 2  # first tokens after a unit: they show how a text goes on, not what it says


class InfluenceConfig(ScoreConfig):
    """Scorer `influence`: how much more probable a sentence or line makes the text after it, in nats."""

    unit: Literal["sentence", "line"] = Field(default="sentence", description="What gets one score.")
    horizon: Positive = Field(default=64, description="How many completion tokens after a unit are read.")
    among: str | None = Field(
        default="task_relevance",
        description="Name of a score of this block, for the same unit: units in which it is doubtful are scored, the "
        "others kept. null: all units are scored, which costs several passes.",
    )
    doubtful: NonNegative = Field(
        default=0.4,
        description="Doubtful in `among`: not dropped by its rule, but below this share of the dataset's median.",
    )
    drop: Drop = Field(default=Drop(below=0.0), description=DROP)
    reference: ReferenceConfig | None = Field(
        default=None, description="Model that scores, same vocabulary; null: the run's own reference."
    )


def _frozen(context: ScoringContext, config: InfluenceConfig) -> Score:
    doubtful = _doubtful(context, config)
    return lambda later, part: _influence(later, part, doubtful)


@scorer("influence", InfluenceConfig, finds_nothing=True, reads_scores=True, stored=True, frozen=_frozen, version=2)
def influence(context: ScoringContext, config: InfluenceConfig) -> Floats:
    """`sum_t clip(log P(t | all before) - log P(t | all before but the unit), -1, 1)`, (M,) float32 in nats.

    t runs over the completion tokens of the document after the unit, `horizon` of them, without the first two, which
    show how a text goes on rather than what it says. Below 0 the text after the unit is better off without it; low is
    dropped. NaN where fewer than two such tokens follow, and for units that are not among those asked about.

    Source: ours, for the paper's reasoning importance; its Eq. (2) is the scorer `attention_received`.
    """
    return _influence(context, config, _doubtful(context, config))


def _doubtful(context: ScoringContext, config: InfluenceConfig) -> tuple[float, float]:
    """Units with a value of the score `among` from the first to below the second are scored."""
    from ..data.ragged import Layout, dataset_quantiles  # not at the top: a block is read without NumPy

    if config.among is None:
        return -float("inf"), float("inf")
    if config.among not in context.scores:
        known = ", ".join(context.scores) or "none"
        raise XTFUserError(f"among: {config.among!r} is not a score that runs before this one. Legal: {known}, or null")
    values = context.scores[config.among]
    median = float(dataset_quantiles(values, Layout(context.offsets, context.counts), [0.5])[0])
    if not median > 0:
        if median == median:  # else all scores are undefined, and that score has said why
            context.warn(
                f"no unit is doubtful in {config.among}, whose median is {median:.3g}: a share of it needs a positive "
                "one; name another score in `among`, or null"
            )
        return 0.0, 0.0
    drop = context.parts[config.among].drop
    dropped = drop.below if drop.of_median is None else drop.of_median * median
    return -float("inf") if dropped is None else dropped, config.doubtful * median


def _influence(context: ScoringContext, config: InfluenceConfig, doubtful: tuple[float, float]) -> Floats:
    import numpy as np

    from ..data.splices import Splices

    starts, total = context.segments(config.unit), len(context.token_ids)
    lengths = np.diff(starts, append=total)
    judged = np.ones(len(starts), dtype=bool)
    if config.among is not None:
        values = context.scores[config.among][starts]
        judged = (values >= doubtful[0]) & (values < doubtful[1])
    stops = context.offsets[np.searchsorted(context.offsets, starts, side="right")]
    begin, end = starts + lengths, np.minimum(starts + lengths + config.horizon, stops)
    asked: Bools = judged & ~context.protected[starts] & (context.positions[starts] > 0) & (end - begin >= SKIPPED + 2)
    chosen = np.flatnonzero(asked)
    result = np.full(len(starts), np.nan, dtype=np.float32)
    if len(chosen):
        template = np.zeros(0, dtype=np.int32)
        splices = Splices(starts[chosen], begin[chosen], end[chosen], template)
        without = context.predictions_of(splices, config.reference).logprobs
        with_it = context.log_probabilities(config.reference)

        def change(tokens: slice, place: Ints, at: Ints) -> Floats:
            more = np.clip(with_it[at] - without[tokens], -CLIP, CLIP)
            changes: Floats = np.where(place < SKIPPED, np.float32(0), more)
            return changes

        result[chosen] = splices.sums(change)
    return np.repeat(result, lengths)
