"""`check_scorer` passes what conforms and names what does not."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from pydantic import Field

from tests import tiny
from tests.test_repo_rules import loaded_by
from xtf_plugin.scorers import ReferenceConfig, ScoreConfig, registry
from xtf_plugin.scorers import scorer as made
from xtf_plugin.testing import check_scorer


class StrengthConfig(ScoreConfig):
    strength: float = Field(default=1.0, gt=0, description="Factor.")


def strong(context, config):
    """Log-probability times strength; low is dropped."""
    return context.logprobs * np.float32(config.strength)


def good(score=strong, config=StrengthConfig, **options):
    """A scorer that conforms, but for what is given."""
    return made("good", config, **{"per_document": True, **options})(score)


OTHER = {"reference": {"model": "other"}}
# every built-in scorer with other values than the defaults
BUILTIN = [
    ("attention_received", {"layers": "last"}),
    ("attention_received", {"layers": [0, 1], "drop": {"fence": 1.0}, "scale": "log"}),
    ("novelty", {"drop": {"known_above": 0.9, "unknown_below": 0.1}}),
    ("novelty", {"unit": "sentence"}),
    ("embedding_similarity", {"embedding": "output"}),
    ("embedding_similarity", {"domain": ["The", "answer"]}),
    ("typicality", OTHER),
    ("influence", {"doubtful": 3.0, "horizon": 5}),
    ("influence", {"among": None, "horizon": 5, "unit": "line", **OTHER}),
    ("new_text", {"shortest": 2}),
    ("new_text", {"shortest": 2, "unit": "line"}),
    ("explained", {"first": 2}),
    ("explained", {"unit": "line", "drop": {"below": 0.1}, **OTHER}),
    ("log_probability", {}),
    ("log_probability", OTHER),
    ("excess_loss", OTHER),
    ("token_cleaning", OTHER),
    ("running_text", {}),
    ("column", {"column": "noise", "format": "lines", "text": "answer"}),
]


def test_every_built_in_scorer_is_among_them():
    assert {name for name, _ in BUILTIN} == set(registry.BUILTIN)


@pytest.mark.parametrize(("name", "options"), BUILTIN, ids=str)
def test_built_in_scorers_conform(name, options):
    tokenizer = tiny.tokenizer() if "domain" in options or name in ("explained", "new_text", "running_text") else None
    assert check_scorer(registry.BUILTIN[name], options, tokenizer).dtype == np.float32


@pytest.mark.parametrize(
    ("scorer", "options"),
    [
        (good(), {"strength": 2.0}),
        (good(), {"strength": 2.0, "drop": {"fence": 1.0}, "scope": "document", "window": 3}),
        (good(), {"strength": 2.0, "unit": "line", "max_fraction": 0.5}),
    ],
)
def test_what_conforms_passes(scorer, options):
    assert check_scorer(scorer, options).dtype == np.float32


def test_the_tokenizer_reaches_the_scorer():
    def lengths(context, config):
        """Length of the token's text; low is dropped."""
        texts = context.tokenizer.convert_ids_to_tokens(context.token_ids.tolist())
        return np.asarray([len(text) for text in texts], dtype=np.float32)

    assert check_scorer(good(lengths, ScoreConfig), {}, tiny.tokenizer()).min() >= 1


class Loose(StrengthConfig, extra="ignore"):
    pass


class Unused(ScoreConfig):
    reference: ReferenceConfig = Field(description="Not used.")


_COUNTER = itertools.count()


def scoring(change):
    """A scorer like `good` whose scores are changed by `change(scores, context)`."""

    def score(context, config):
        """Low scores are dropped."""
        return change(strong(context, config), context)

    return good(score)


def idle(context, config):
    """Low scores are dropped."""
    return context.logprobs * 1


def silent(context, config):
    return context.logprobs * config.strength


def wild(scores, context):
    return np.where(context.positions > 2, scores, np.float32(-np.inf)).astype(np.float32)


def writing(context, config):
    """Low scores are dropped."""
    context.token_ids[:] = 0
    return context.logprobs


def test_a_scorer_cannot_write_to_what_it_is_given():
    with pytest.raises(ValueError, match="read-only"):
        check_scorer(good(writing), {})


@pytest.mark.parametrize(
    ("scorer", "options", "message"),
    [
        (good(silent), {}, "no docstring"),
        (good(config=Loose), {"strength": 2.0}, "does not forbid unknown keys"),
        (good(idle), {"strength": 2.0}, "'strength' changes no score"),
        (good(idle, Unused), OTHER, "'reference' changes no score"),
        (scoring(lambda scores, context: scores - np.nanmean(context.logprobs)), {}, "alone than among others"),
        (scoring(lambda scores, _: scores.astype(np.float64)), {}, "float64"),
        (scoring(lambda scores, _: scores[1:]), {}, "where float32"),
        (scoring(wild), {}, "infinite"),
        (scoring(lambda scores, _: np.full_like(scores, np.nan)), {}, "every score is NaN"),
        (scoring(lambda scores, _: scores + np.float32(next(_COUNTER))), {}, "not deterministic"),
        (good(version="1.0"), {}, "no whole number"),
        (good(config=dict), {}, "not a class derived"),
        (good(), {"strength": -1}, "refuses these options"),
        (strong, {}, "not made by the decorator"),
    ],
)
def test_what_does_not_conform_is_named(scorer, options, message):
    with pytest.raises(AssertionError, match=message):
        check_scorer(scorer, options)


def test_it_needs_no_torch():
    loaded = loaded_by("import xtf_plugin.testing")
    assert "xtf_plugin" in loaded and not loaded & {"torch", "transformers"}
