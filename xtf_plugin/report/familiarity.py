"""How well the reference knows the data, from stored log-probabilities, and what publications make of that.

Whether improbable tokens should be dropped depends on it: where a model is strong they are mostly other ways to say the
same, where it is weak they are what it has to learn. So this is advice, and changes nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from ..plan import Plan


# Mean probabilities of a completion token. They are rough: publications compare some models that are strong or weak in
# a domain, and give no bound.
STRONG, WEAK = 0.6, 0.3
RULE = "knowledge_novelty: {scorer: novelty, drop: {unknown_below: 0.1}}"


def familiarity(plan: Plan) -> dict[str, Any]:
    """What summary.json says of it; empty if nothing was scored.

    Averages are over the dataset's completion tokens with a log-probability under the run's own reference.
    """
    if plan.scores.logprobs is None:
        return {}
    known = ~np.isnan(plan.scores.logprobs)
    weights, logprobs = plan.weights[known], plan.scores.logprobs[known].astype(np.float64)
    if not weights.sum():
        return {}
    chances = np.exp(logprobs)
    columns = {
        "mean_log_probability": logprobs,
        "mean_probability": chances,
        "above_half": chances > 0.5,
        "below_tenth": chances < 0.1,
    }
    facts = {name: round(float(np.average(values, weights=weights)), 4) for name, values in columns.items()}
    mean = facts["mean_probability"]
    level = "strong" if mean > STRONG else "weak" if mean < WEAK else "between"
    return {**facts, "level": level, "advice": _sentence(plan, facts, level)}


def _sentence(plan: Plan, facts: dict[str, float], level: str) -> str:
    how = {"strong": "easy", "weak": "hard", "between": "neither easy nor hard"}[level]
    numbers = (
        f"The reference finds this data {how} to predict: {facts['above_half']:.0%} of the answer tokens have a "
        f"probability above 0.5, {facts['below_tenth']:.0%} one below 0.1 (mean {facts['mean_probability']:.2f})"
    )
    if plan.config.reference.model is not None:
        return f"{numbers}; it is not the model that is trained, so nothing follows for improbable tokens."
    rules = [name for name, part in plan.config.scores.items() if getattr(part.drop, "unknown_below", None) is not None]
    has = ", ".join(rules)
    if level == "strong":
        do = f"as {has} does" if rules else f"{RULE}{_replaced(plan)}"
        evidence = "ProFit, arXiv 2601.09195: +3 to 11 % on models of 1.5 to 32 B"
        return f"{numbers}; published evidence ({evidence}) then favours dropping improbable tokens: {do}."
    if level == "weak":
        if rules:
            found = "published evidence (arXiv 2510.00526) is against dropping improbable tokens"
            return f"{numbers}; on such data, {found}: consider removing {has}."
        return (
            f"{numbers}. So read what is dropped before you train; a larger model of the same family may score better "
            f"(`reference: {{model: ...}}`). No rule here drops improbable tokens, and on such data none should "
            "(arXiv 2510.00526)."
        )
    return f"{numbers}; publications then favour neither keeping nor dropping improbable tokens."


def _replaced(plan: Plan) -> str:
    """What the slot of `RULE` holds already."""
    part = plan.config.scores.get("knowledge_novelty")
    return "" if part is None else f", in place of its {part.scorer}"
