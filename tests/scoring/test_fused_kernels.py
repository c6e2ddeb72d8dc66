"""Forwards that Axolotl's fused LoRA kernels replace, with stand-ins; tests/axolotl/test_lora_kernels.py has the real.

The stand-ins compute wrong results, so that a scoring pass that calls one has other scores.
"""

from __future__ import annotations

import sys
from types import MethodType, ModuleType

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaAttention

from tests import tiny
from tests.scoring.test_engine import rows, run
from xtf_plugin.data.documents import collect
from xtf_plugin.scoring.reference import Reference

DOCUMENTS = collect(rows())


@pytest.fixture
def patches(monkeypatch):
    """A module with the name of Axolotl's, and attention whose new forward needs a method on each instance."""
    module = ModuleType("axolotl.monkeypatch.lora_kernels")
    asked = []

    def original_apply_qkv_optional_v(self, hidden):
        return self.q_proj(hidden), self.k_proj(hidden), self.v_proj(hidden)

    def original_apply_o(self, hidden):
        asked.append(self)
        return self.o_proj(hidden)

    module.original_apply_qkv_optional_v = original_apply_qkv_optional_v
    module.original_apply_o = original_apply_o
    forward = LlamaAttention.forward

    def patched(self, *args, **kwargs):
        self.apply_qkv(kwargs.get("hidden_states", args[0] if args else None))
        self.apply_o(torch.zeros(1, self.o_proj.in_features))
        return forward(self, *args, **kwargs)

    patched.__module__ = module.__name__
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(LlamaAttention, "forward", patched)
    return asked


def fused(self, *given):
    return torch.zeros(*given[0].shape[:2], 64)


fused.__module__ = "axolotl.kernels.lora"


def held(model):
    return [dict(vars(module)) for module in model.modules()]


def scores(model):
    found, _ = run(DOCUMENTS, model, (0, 1))
    return torch.cat([torch.as_tensor(records.logprobs) for records in found.values()]).nan_to_num()


def test_kernels_that_do_not_compute_the_base_model_are_bypassed(request):
    model = tiny.model()
    expected = scores(model)
    request.getfixturevalue("patches")
    for module in (model.model.embed_tokens, model.model.layers[-1].mlp):
        module.forward = MethodType(fused, module)
    before = held(model)
    assert torch.equal(scores(model), expected)
    assert held(model) == before, "training must use its kernels again"


def test_attention_without_kernels_under_a_patched_class(request):
    model = tiny.model()
    expected, before = scores(model), held(model)
    asked = request.getfixturevalue("patches")
    assert torch.equal(scores(model), expected) and asked
    assert held(model) == before


def test_an_instance_keeps_its_own_methods(patches):
    """Kernels for projections compute the base model with adapters off, and remain."""
    model, own = tiny.model(), []
    for layer in model.model.layers:
        attention = layer.self_attn
        attention.apply_qkv, attention.apply_o = own.append, own.append
    before = held(model)
    scores(model)
    assert own and not patches and held(model) == before


def test_other_replaced_forwards_remain():
    model = tiny.model()
    called, mlp = [], model.model.layers[0].mlp
    forward = mlp.forward
    mlp.forward = lambda hidden: called.append(0) or forward(hidden)
    with Reference(model, "tiny").scoring(record=False):
        model(input_ids=torch.arange(5, 9)[None])
    assert called
