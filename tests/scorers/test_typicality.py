"""Typicality: surprise beyond what the reference expected."""

from __future__ import annotations

import numpy as np
import torch

from tests import tiny
from tests.scorers.test_selectors import OFF
from tests.test_plan import Provider, rows
from xtf_plugin.config.block import XTFConfig
from xtf_plugin.data.documents import collect
from xtf_plugin.plan import make_plan
from xtf_plugin.scoring.kernels import eager


def test_typicality_of_what_the_reference_itself_would_write_is_zero_on_average():
    torch.manual_seed(0)
    logits = torch.randn(7, 50) * torch.tensor([0.0, 0.5, 1, 2, 4, 8, 16])[:, None]  # from uniform to sure
    p = logits.softmax(-1)
    for row in range(7):
        every = torch.arange(50)
        found = eager.predictions(logits[row].expand(50, 50), lambda x: x, every)
        assert abs(float((p[row] * (found[0] + found[1])).sum())) < 1e-4


def test_it_selects_in_a_plan(tmp_path):
    documents = collect(rows(12))
    provider = Provider()
    base = {**OFF, "min_kept": 0, "cache_dir": str(tmp_path)}

    def kept(**selector):
        config = XTFConfig.parse({**base, "selectors": {"odd": {"drop": {"quantile": 0.3}, **selector}}})
        return make_plan(config, documents, provider, tiny.tokenizer(), progress=False)

    plan = kept(scorer="typicality")
    scores = plan.scores.values["odd"]
    defined = ~np.isnan(scores)
    assert not plan.selection.keep.all()
    assert scores[~plan.selection.keep].max() <= scores[plan.selection.keep & defined].min()


def test_a_reference_that_does_not_know_the_text_gives_a_warning(tmp_path):
    """A reference that is sure and wrong finds everything odd, so the rule drops most of the data."""
    documents, model = collect(rows(12)), tiny.model()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)  # sure of itself everywhere, for no reason
    rule = {"odd_tokens": {"scorer": "typicality", "drop": {"below": -10}}}
    config = XTFConfig.parse({"cache_dir": str(tmp_path), "selectors": rule})
    plan = make_plan(config, documents, Provider(model), tiny.tokenizer(), progress=False)
    assert plan.selection.keep.mean() < 0.5
    assert any("odd_tokens: fires on" in one and "may not know" in one for one in plan.warnings)
    calm = make_plan(config, documents, Provider(), tiny.tokenizer(), progress=False)
    assert not any("may not know" in one for one in calm.warnings)
