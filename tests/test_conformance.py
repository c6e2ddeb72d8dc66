"""`check_scorer` passes what conforms and names what does not."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from pydantic import Field

from tests import tiny
from tests.test_repo_rules import loaded_by
from xtf_plugin.scorers import ReferenceConfig, Scorer, SelectorConfig, excess_loss as builtin
from xtf_plugin.testing import check_scorer


class StrengthConfig(SelectorConfig):
    strength: float = Field(default=1.0, gt=0, description="Factor.")


class Good(Scorer):
    """Surprisal times strength, negated: low goes."""

    name, Config, per_document = "good", StrengthConfig, True

    def score(self, context):
        return context.logprobs * np.float32(self.config.strength)


OTHER = {"reference": {"model": "other"}}


@pytest.mark.parametrize(
    ("scorer", "options"),
    [
        (Good, {"strength": 2.0}),
        (Good, {"strength": 2.0, "drop": {"fence": 1.0}, "scope": "document", "window": 3}),
        (builtin.LogProbability, {}),
        (builtin.LogProbability, OTHER),
        (builtin.ExcessLoss, OTHER),
        (builtin.TokenCleaning, OTHER),
    ],
)
def test_what_conforms_passes(scorer, options):
    assert check_scorer(scorer, options).dtype == np.float32


def test_the_tokenizer_reaches_the_scorer():
    class Lengths(Good):
        """Length of the token's text; low goes."""

        Config = SelectorConfig

        def score(self, context):
            texts = context.tokenizer.convert_ids_to_tokens(context.token_ids.tolist())
            return np.asarray([len(text) for text in texts], dtype=np.float32)

    assert check_scorer(Lengths, {}, tiny.tokenizer()).min() >= 1


class Silent(Scorer):
    name = "silent"

    def score(self, context):
        return context.logprobs


class Loose(Good):
    """Low goes."""

    class Config(StrengthConfig, extra="ignore"):
        pass


class Idle(Good):
    """Low goes."""

    def score(self, context):
        return context.logprobs * 1


class IdleReference(Good):
    """Low goes."""

    class Config(SelectorConfig):
        reference: ReferenceConfig = Field(description="Not used.")

    def score(self, context):
        return context.logprobs * 1


class Social(Good):
    """Low goes."""

    def score(self, context):
        return super().score(context) - np.nanmean(context.logprobs)


class Double(Good):
    """Low goes."""

    def score(self, context):
        return super().score(context).astype(np.float64)


class Short(Good):
    """Low goes."""

    def score(self, context):
        return super().score(context)[1:]


class Infinite(Good):
    """Low goes."""

    def score(self, context):
        return np.where(context.positions > 2, super().score(context), np.float32(-np.inf)).astype(np.float32)


class Undefined(Good):
    """Low goes."""

    def score(self, context):
        return np.full(len(context.token_ids), np.nan, dtype=np.float32)


_COUNTER = itertools.count()


class Moody(Good):
    """Low goes."""

    def score(self, context):
        return super().score(context) + np.float32(next(_COUNTER))


class Versionless(Good):
    version = "1.0"


@pytest.mark.parametrize(
    ("scorer", "options", "told"),
    [
        (Silent, {}, "no docstring"),
        (Loose, {"strength": 2.0}, "does not forbid unknown keys"),
        (Idle, {"strength": 2.0}, "'strength' changes no score"),
        (IdleReference, OTHER, "'reference' changes no score"),
        (Social, {}, "other scores alone than among others"),
        (Double, {}, "float64"),
        (Short, {}, "where float32"),
        (Infinite, {}, "infinite"),
        (Undefined, {}, "every score is NaN"),
        (Moody, {}, "not deterministic"),
        (Versionless, {}, "no whole number"),
        (Good, {"strength": -1}, "refuses these options"),
        (object, {}, "no class derived"),
    ],
)
def test_what_does_not_is_named(scorer, options, told):
    with pytest.raises(AssertionError, match=told):
        check_scorer(scorer, options)


def test_it_needs_no_torch():
    loaded = loaded_by("import xtf_plugin.testing")
    assert "xtf_plugin" in loaded and not loaded & {"torch", "transformers"}
