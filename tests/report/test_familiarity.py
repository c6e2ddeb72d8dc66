"""How well the reference knows the data: the numbers, the levels, and advice that fits the block."""

from __future__ import annotations

import dataclasses
import logging

import numpy as np
import pytest
import yaml

from tests import tiny
from tests.report.tables import plan_of
from tests.test_plan import rows
from xtf_plugin.config.block import XTFConfig
from xtf_plugin.report.familiarity import RULE, familiarity
from xtf_plugin.report.summary import show, summary

OWN = {"scorer": "log_probability", "drop": {"quantile": 0.1}}
IMPROBABLE = {"scorer": "novelty", "drop": {"unknown_below": 0.1}}
BLOCK = {"preset": "none", "selectors": {"mine": OWN}}


@pytest.fixture
def plan(tmp_path):
    """A plan whose tokens have made-up probabilities."""

    def make(chances, block=BLOCK, data=None):
        made = plan_of(tmp_path, data, **BLOCK)
        logprobs = np.log(np.resize(np.asarray(chances, dtype=np.float32), len(made.scores.token_ids)))
        scores = dataclasses.replace(made.scores, logprobs=logprobs)
        return dataclasses.replace(made, scores=scores, config=XTFConfig.parse(block))

    return make


def test_numbers_count_occurrences_and_leave_out_what_is_undefined(plan):
    data = rows()
    made = plan([0.9, 0.6, 0.05, 0.2, np.nan], data=[*data, data[0], data[0]])
    chances, weights = np.exp(made.scores.logprobs.astype(np.float64)), made.weights
    known = ~np.isnan(chances)
    spread = np.repeat(chances[known], weights[known])
    found = familiarity(made)
    assert len(set(weights)) == 2 and not known.all()
    expected = [np.log(spread).mean(), spread.mean(), (spread > 0.5).mean(), (spread < 0.1).mean()]
    names = ("mean_log_probability", "mean_probability", "above_half", "below_tenth")
    assert [found[name] for name in names] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("chance", "level"), [(0.61, "strong"), (0.59, "between"), (0.31, "between"), (0.29, "weak")])
def test_levels(plan, chance, level):
    assert familiarity(plan([chance]))["level"] == level


def test_advice_for_a_strong_reference_is_a_block_that_is_accepted(plan):
    advice = familiarity(plan([0.9]))["advice"]
    assert RULE in advice and "in place of" not in advice and "100% of the answer tokens" in advice
    XTFConfig.parse({"preset": "none", **yaml.safe_load(RULE)})
    default = familiarity(plan([0.9], {"preset": "default"}))["advice"]
    assert f"{RULE}, in place of its new_text" in default


@pytest.mark.parametrize(
    ("chance", "block", "said"),
    [
        (0.9, {**BLOCK, "selectors": {"mine": IMPROBABLE}}, "as mine does"),
        (0.1, BLOCK, "So read what is dropped before you train"),
        (0.1, BLOCK, "No rule here drops improbable tokens, and on such data none should"),
        (0.1, {**BLOCK, "selectors": {"mine": IMPROBABLE}}, "consider removing mine"),
        (0.5, BLOCK, "neither keeping nor dropping"),
        (0.9, {**BLOCK, "reference": {"model": "other"}}, "it is not the model that is trained"),
    ],
)
def test_advice_fits_the_block(plan, chance, block, said):
    advice = familiarity(plan([chance], block))["advice"]
    assert said in advice and RULE not in advice


def test_without_log_probabilities_there_is_nothing_to_say(plan, capsys):
    made = plan([0.5])
    for logprobs in (None, np.full(len(made.scores.token_ids), np.nan, np.float32)):
        without = dataclasses.replace(made, scores=dataclasses.replace(made.scores, logprobs=logprobs))
        assert familiarity(without) == {}
        show(without, [])
        assert "knows this data" not in capsys.readouterr().err


def test_it_is_printed_and_logged(plan, capsys, caplog):
    made = plan([0.9])
    with caplog.at_level(logging.INFO):
        show(made, [])
    advice = familiarity(made)["advice"]
    assert f"xtf: {advice}" in capsys.readouterr().err and advice in caplog.text


@pytest.mark.parametrize(("chance", "warned"), [(0.1, True), (0.5, False)])
def test_a_reference_that_knows_the_data_badly_is_a_warning(plan, capsys, chance, warned):
    """In summary.json, and so at the top of the page, and in the terminal."""
    made = plan([chance])
    facts = summary(made, tiny.tokenizer())
    assert (familiarity(made)["advice"] in facts["warnings"]) == warned
    assert ("finds this data hard to predict" in "".join(facts["warnings"])) == warned
    show(made, [])
    assert ("xtf: warning: The reference finds this data hard to predict" in capsys.readouterr().err) == warned
