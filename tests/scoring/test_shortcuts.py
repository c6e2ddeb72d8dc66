"""Documents packed into one row, which gives the scores of padded rows, and no packing where a model gives others."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import FalconH1Config, FalconH1ForCausalLM, GPT2Config, GPT2LMHeadModel

from tests import eager, tiny
from tests.scoring.test_engine import little_memory, rows, run  # noqa: F401 (a fixture)
from xtf_plugin.data.documents import collect
from xtf_plugin.scoring import self_check

PACKED = self_check.Packing(("cpu", "cuda"), apart=True, windows=True)  # on the CPU too, where it is slower


def agrees(model, documents, found, layers=(0, 1)):
    for index in range(len(documents)):
        ids, completion = documents.document(index)
        logprobs, received = eager.scores(model, ids.astype(np.int64), layers)
        ours = found[documents.keys[index].tobytes()]
        np.testing.assert_allclose(ours.logprobs, logprobs[completion].numpy(), atol=2e-5, rtol=0)
        if ours.attention is not None:
            np.testing.assert_allclose(ours.attention, received[completion].numpy(), atol=2e-5, rtol=0)


class TestPacked:
    @pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
    def test_agrees_with_eager_maps_and_full_logits(self, family):
        model, documents = tiny.model(family), collect(rows())
        found, stats = run(documents, model, (0, 1), batch_tokens=150, packing=PACKED)
        assert stats.padded_tokens == stats.tokens, "no row was packed"
        agrees(model, documents, found)

    def test_without_layers_too(self):
        model, documents = tiny.model(), collect(rows())
        found, stats = run(documents, model, (), batch_tokens=150, packing=PACKED)
        assert stats.padded_tokens == stats.tokens
        agrees(model, documents, found)
        assert model.config._attn_implementation != "xtf_received"

    @pytest.mark.parametrize("family", ["gemma2", "gemma3", "mistral"])
    def test_windows_do_not_cross_documents(self, family):
        """Rows longer than the window, of documents shorter and longer than it."""
        model = tiny.model(family)
        documents = collect(rows(sizes=(model.config.sliding_window - 2, model.config.sliding_window + 30, 9)))
        found, stats = run(documents, model, (0, 1), batch_tokens=10_000, packing=PACKED)
        assert stats.batches == 1 and stats.padded_tokens == stats.tokens
        agrees(model, documents, found)

    def test_a_batch_that_does_not_fit_is_halved(self, little_memory):  # noqa: F811
        model, documents = tiny.model(), collect(rows(sizes=range(10, 60)))
        found, stats = run(documents, model, (1,), batch_tokens=4_000, packing=PACKED)
        assert len(found) == len(documents) and stats.halvings >= 2 and stats.padded_tokens == stats.tokens

    @pytest.mark.parametrize("ignored", [False, True])
    def test_a_model_that_ignores_positions_is_padded(self, monkeypatch, ignored):
        """GPT-2 has absolute position embeddings; rotary ones do not depend on where a document begins."""
        fast = tiny.tokenizer()
        config = GPT2Config(vocab_size=len(fast), n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
        torch.manual_seed(0)
        model, documents = GPT2LMHeadModel(config).eval(), collect(rows())
        model.transformer.wpe.weight.data.normal_()
        own = type(model.transformer).forward

        def counting(self, *args, position_ids=None, **kwargs):
            return own(self, *args, position_ids=None if ignored else position_ids, **kwargs)

        monkeypatch.setattr(type(model.transformer), "forward", counting)
        found, stats = run(documents, model, (0, 1), batch_tokens=150, packing=PACKED)
        assert (stats.padded_tokens > stats.tokens) == ignored
        agrees(model, documents, found)

    def test_a_model_that_takes_no_positions_is_padded(self, monkeypatch):
        model, documents = tiny.model(), collect(rows())
        own = type(model.model).forward

        def without(self, *args, position_ids=None, **kwargs):
            if position_ids is not None:
                raise TypeError("forward() got an unexpected keyword argument 'position_ids'")
            return own(self, *args, **kwargs)

        monkeypatch.setattr(type(model.model), "forward", without)
        found, stats = run(documents, model, (0, 1), batch_tokens=150, packing=PACKED)
        assert stats.padded_tokens > stats.tokens
        agrees(model, documents, found)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_a_model_with_a_state_beside_attention_is_padded(self, dtype):
        """Falcon-H1 has a state space in every layer, which is not reset between documents."""
        sizes = {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1}
        sizes["use_cache"] = None  # transformers 5.4 refuses its own default
        fast = tiny.tokenizer()
        config = FalconH1Config(**{**tiny.BASE, **sizes, "vocab_size": len(fast), "pad_token_id": 0, "bos_token_id": 0})
        torch.manual_seed(0)
        model = FalconH1ForCausalLM(config).eval().to(dtype)
        _, stats = run(collect(rows()), model, (0, 1), batch_tokens=150, packing=PACKED)
        assert stats.padded_tokens > stats.tokens

    def test_rows_are_not_packed_for_attention_that_splits_them(self, caplog):
        """Padding is faster where attention cannot take packed rows."""
        with caplog.at_level("INFO"):
            packing = self_check.Packing(("cpu", "cuda"))
            _, stats = run(collect(rows()), tiny.model(), (0, 1), batch_tokens=150, packing=packing)
        assert stats.padded_tokens > stats.tokens
        assert "without packed rows" in caplog.text and "taken apart" in caplog.text

    def test_documents_that_a_window_cuts_are_padded(self):
        model, packing = tiny.model("mistral"), replace(PACKED, windows=False)
        short, long = (collect(rows(sizes=(size, 9, 12))) for size in (20, 21))
        passes = [run(documents, model, (), packing=packing)[1] for documents in (short, long)]
        padded = [stats.padded_tokens > stats.tokens for stats in passes]
        assert padded == [False, True]

    def test_a_leak_between_packed_documents_is_found(self, monkeypatch):
        """Here each token also reads the one before it in the row."""
        model = tiny.model()
        own = type(model.model.layers[0].self_attn).forward

        def leaking(self, hidden_states, *args, **kwargs):
            before = torch.nn.functional.pad(hidden_states[:, :-1], (0, 0, 1, 0))
            return own(self, hidden_states + 0.3 * before, *args, **kwargs)

        monkeypatch.setattr(type(model.model.layers[0].self_attn), "forward", leaking)
        _, stats = run(collect(rows()), model, (), batch_tokens=150, packing=PACKED)
        assert stats.padded_tokens > stats.tokens

    def test_rows_are_padded_on_a_cpu(self):
        _, stats = run(collect(rows()), tiny.model(), (0,), batch_tokens=150)
        assert stats.padded_tokens > stats.tokens
