"""Models and adapters that would be scored wrongly are refused by name, whatever transformers itself makes of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CpmAntConfig,
    FalconConfig,
    GPTNeoConfig,
    Llama4TextConfig,
    MptConfig,
)

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


def looking_ahead(monkeypatch):
    """The first tokens are seen by all, as in a prefix LM."""
    from transformers.models.llama import modeling_llama

    original = modeling_llama.create_causal_mask
    seen = {"or_mask_function": lambda batch, head, query, key: key < 60}
    monkeypatch.setattr(modeling_llama, "create_causal_mask", lambda *a, **k: original(*a, **k, **seen))
    return tiny.model()


def cpm_ant(monkeypatch):
    config = CpmAntConfig(vocab_size=500, hidden_size=32, num_attention_heads=4, num_hidden_layers=2, dim_head=8)
    return AutoModelForCausalLM.from_config(config).eval()


def of_llama(part, name, change):
    """A tiny model, one of whose methods is wrapped by `change(original, self, *args, **kwargs)`."""

    def made(monkeypatch):
        model = tiny.model()
        owner = model if part == "head" else model.model
        kind = type(type(owner).__name__ + "OfTomorrow", (type(owner),), {})
        original = getattr(kind, name)
        setattr(kind, name, lambda self, *args, **kwargs: change(original, self, *args, **kwargs))
        owner.__class__ = kind
        return model

    return made


def scaled(original, self, *args, **kwargs):
    out = original(self, *args, **kwargs)
    out.logits = out.logits / 1.7
    return out


def by_position(original, self, *args, **kwargs):
    out = original(self, *args, **kwargs)
    out.logits[..., 7] += torch.arange(out.logits.shape[1])
    return out


def without_logits(original, self, *args, **kwargs):
    return (original(self, *args, **kwargs).logits,)


def pooled(original, self, input_ids=None, **kwargs):
    embedded = self.embed_tokens(input_ids)
    summary = (embedded * torch.arange(input_ids.shape[1])[None, :, None]).mean(1, keepdim=True)
    return original(self, **{**kwargs, "inputs_embeds": embedded + summary})


def shortened(original, self, input_ids=None, **kwargs):
    return original(self, input_ids=input_ids[:, 1:], **kwargs)


def remembering(original, self, *args, **kwargs):
    out = original(self, *args, **kwargs)
    self.calls = getattr(self, "calls", 0) + 1
    out.last_hidden_state = out.last_hidden_state * self.calls
    return out


UNKNOWN = {  # architectures; what is said of them
    "a prefix LM": (looking_ahead, "attend to later ones"),
    "CPM-Ant": (cpm_ant, "attend to later ones"),
    "a summary of all tokens": (of_llama("decoder", "forward", pooled), "attend to later ones"),
    "scaled logits": (of_llama("head", "forward", scaled), "differ from the model's own forward"),
    "logits by position": (of_llama("head", "forward", by_position), "differ from the model's own forward"),
    "no logits": (of_llama("head", "forward", without_logits), "cannot be scored here"),
    "fewer states than tokens": (of_llama("decoder", "forward", shortened), "was given"),
    "a state that is kept": (of_llama("decoder", "forward", remembering), "differ from the model's own forward"),
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_architectures_that_compute_something_else_are_refused(monkeypatch, kind):
    made, message = UNKNOWN[kind]
    torch.manual_seed(0)
    ids = torch.randint(5, 400, (80,)).tolist()
    with pytest.raises(XTFError, match=message):
        self_check.check(collect([{"input_ids": ids, "labels": ids}]), np.arange(1), borrow(made(monkeypatch)), ())


def test_a_decoder_that_transformers_does_not_find():
    """`get_decoder` of Llama 4 returns the model with its head."""
    config = Llama4TextConfig(
        **{"vocab_size": 100, "hidden_size": 32, "intermediate_size": 32, "intermediate_size_mlp": 32, "head_dim": 8},
        **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 2},
        **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    )
    reference = borrow(AutoModelForCausalLM.from_config(config).eval())
    assert type(reference.decoder).__name__ == "Llama4TextModel"
    self_check.check(collect(ROWS), np.arange(1), reference, (1,))
