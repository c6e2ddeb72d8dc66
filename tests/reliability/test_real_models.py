"""Scores of real pretrained models against the definitions in float32, in every precision users load them in.

The short form scores SmolLM2 in 4 bits alone; tests/scoring/test_real_models.py has float32, through a stock command.
The full form adds Gemma 3 (sliding windows, a vocabulary of 262,144, no chat template) and Qwen2.5 (biases, own head).
"""

from __future__ import annotations

import pytest
import torch

from tests import real
from tests.reliability import LONG, amount, record

EXACT = 2e-4  # what float32 may differ by from the definitions
MODELS = [pytest.param(name, marks=real.needs(name)) for name in (real.NAMES if LONG else real.NAMES[:1])]


def loaded(name: str, precision: str, compute: torch.dtype | None = None):
    """A model, documents under its tokenizer, and all of its layers."""
    model = real.load(name, precision, compute=compute)
    return model, real.documents(name, amount(4, 12)), tuple(range(model.config.num_hidden_layers))


@pytest.mark.skipif(not LONG, reason="the short form is in tests/scoring/test_real_models.py; `make test-long` runs it")
@pytest.mark.parametrize("name", MODELS)
def test_float32_equals_the_definitions(name):
    model = loaded(name, "fp32")
    found, truth = real.ours(*model), real.definition(*model)
    for score, error in real.errors(truth, found).items():
        assert float(error.max()) <= EXACT, score
    assert float(truth.logprobs.nan_to_num().mean()) > -4, "the model does not read this text: a broken conversion"


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("precision", amount(["nf4"], ["bf16", "nf4"]))
def test_low_precision_is_no_further_off_than_eager_in_that_precision(name, precision):
    model = loaded(name, precision)
    found, naive = real.ours(*model), real.definition(*model)
    truth = real.definition(*loaded(name, "nf4" if precision == "nf4" else "fp32", torch.float32))
    ours, theirs = real.errors(truth, found), real.errors(truth, naive)
    for score in ours:
        mean, high, _ = real.spread(ours[score])
        record(f"real models: {name}, {precision}, {score}", tokens=len(ours[score]), mean=mean, high=high)
        assert real.verdict(ours[score], theirs[score], EXACT) == "kept", (score, mean, real.spread(theirs[score]))
        assert mean > 0, "equal to float32: this is not the precision it should be"


def test_the_rule_can_be_missed():
    naive = torch.rand(1_000, generator=torch.Generator().manual_seed(0))
    assert real.verdict(naive.flip(0), naive, EXACT) == "kept"
    assert real.verdict(naive * 1.2, naive, EXACT).startswith("missed")
