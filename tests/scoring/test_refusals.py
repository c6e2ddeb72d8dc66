"""Models and adapters that would be scored wrongly are refused by name, whatever transformers itself makes of them."""

from __future__ import annotations

import numpy as np
import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BloomConfig, FalconConfig, GPTNeoConfig, MptConfig

from tests import tiny
from xtf_plugin import XTFError, XTFUserError
from xtf_plugin.data.documents import collect
from xtf_plugin.scoring import self_check
from xtf_plugin.scoring.reference import borrow

ROWS = [{"input_ids": list(range(5, 25)), "labels": [-100] * 5 + list(range(10, 25))}]
FALCON = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
WITHOUT_ATTENTION = {
    "falcon": FalconConfig(**FALCON),
    "falcon with alibi": FalconConfig(**FALCON, alibi=True),
    "mpt": MptConfig(vocab_size=100, d_model=32, n_layers=2, n_heads=2),
    "bloom": BloomConfig(vocab_size=100, hidden_size=32, n_layer=2, n_head=2),
    "gpt_neo": GPTNeoConfig(
        vocab_size=100, hidden_size=32, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]]
    ),
}


@pytest.mark.parametrize("kind", WITHOUT_ATTENTION)
def test_architectures_whose_attention_cannot_be_recorded(kind):
    model = AutoModelForCausalLM.from_config(WITHOUT_ATTENTION[kind]).eval()
    self_check.check(collect(ROWS), np.arange(1), borrow(model), ())
    with pytest.raises(XTFError, match=f"{type(model).__name__}.*attention_received.*reference.model"):
        self_check.check(collect(ROWS), np.arange(1), borrow(model), (1,))


def test_an_adapter_that_rebuilds_the_stack():
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], layer_replication=[[0, 2], [1, 2]])
    with pytest.raises(XTFUserError, match=r"layer_replication=\[\[0, 2\], \[1, 2\]\].*reference.model"):
        borrow(get_peft_model(tiny.model(), config))
