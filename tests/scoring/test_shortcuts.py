"""Shortcuts of the scoring pass: documents packed into one row, and a last layer that skips unused tokens.

Both must give the scores of the pass without them, and are not used with models where they would not.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import (
    FalconH1Config,
    FalconH1ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
)

from tests import eager, tiny
from tests.scoring.test_engine import gpt_oss, little_memory, rows, run  # noqa: F401 (a fixture)
from xtf_plugin.data.documents import collect
from xtf_plugin.scoring import self_check
from xtf_plugin.scoring.batching import laid_out
from xtf_plugin.scoring.reference import Reference, last_feed_forward, only_where

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
            return own(self, hidden_states + 0.3 * hidden_states.roll(1, 1), *args, **kwargs)

        monkeypatch.setattr(type(model.model.layers[0].self_attn), "forward", leaking)
        _, stats = run(collect(rows()), model, (), batch_tokens=150, packing=PACKED)
        assert stats.padded_tokens > stats.tokens

    def test_rows_are_padded_on_a_cpu(self):
        _, stats = run(collect(rows()), tiny.model(), (0,), batch_tokens=150)
        assert stats.padded_tokens > stats.tokens


class TestNarrow:
    @pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
    def test_the_last_layer_computes_only_tokens_that_are_read(self, family, monkeypatch):
        model, documents = tiny.model(family), collect(rows())
        reference = Reference(model, "tiny")
        self_check.against_own_forward(reference, torch.arange(5, 60), 1e-3, ())
        module, seen = last_feed_forward(reference.decoder), []
        assert module is not None and reference.narrows
        own = module.forward
        monkeypatch.setattr(module, "forward", lambda x: seen.append(x.shape[:-1].numel()) or own(x))
        given = laid_out(documents, np.arange(len(documents)), reference.device)
        with reference.scoring(record=False):
            narrow = reference.forward(given.ids, given.lengths, (), wanted=given.read)[0].flatten(0, 1)
            whole = reference.forward(given.ids, given.lengths, ())[0].flatten(0, 1)
        assert seen == [len(given.read), given.ids.numel()]
        assert torch.allclose(narrow[given.read], whole[given.read], atol=1e-5)
        others = np.setdiff1d(np.arange(len(whole)), given.read.numpy())
        assert not torch.allclose(narrow[others], whole[others], atol=1e-3)

    def test_the_module_is_restored(self):
        model = tiny.model()
        module = last_feed_forward(model.model)
        for given in (None, lambda x: x):
            if given is not None:
                module.forward = given
            before = dict(vars(module))
            with only_where(module, torch.arange(4), 4):
                assert module.forward is not before.get("forward")
            assert vars(module) == before

    def test_a_module_that_mixes_tokens_is_not_narrowed(self, monkeypatch):
        model, documents = tiny.model(), collect(rows())
        mlp = type(last_feed_forward(model.model))
        own = mlp.forward
        monkeypatch.setattr(mlp, "forward", lambda self, x: own(self, x + x.cumsum(1)))
        reference = Reference(model, "tiny")
        self_check.against_own_forward(reference, torch.arange(5, 60), 1e-3, ())
        assert not reference.narrows
        found, _ = run(documents, model, (0, 1), batch_tokens=150)
        agrees(model, documents, found)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_a_module_that_reads_the_previous_token_is_not_narrowed(self, monkeypatch, dtype):
        """Of consecutive tokens that are read, only the first would be wrong."""
        model, documents = tiny.model().to(dtype), collect(rows())
        mlp = type(last_feed_forward(model.model))
        own = mlp.forward
        monkeypatch.setattr(mlp, "forward", lambda self, x: own(self, x + x.roll(1, 1)))
        reference = Reference(model, "tiny")
        self_check.against_own_forward(reference, torch.arange(5, 60), 0.1, ())
        assert not reference.narrows
        if dtype is torch.float32:
            agrees(model, documents, run(documents, model, (0, 1), batch_tokens=1)[0])

    def test_bfloat16_narrows_too(self):
        """Rounding alone does not prevent it."""
        for family in sorted(tiny.FAMILIES):
            reference = Reference(tiny.model(family).to(torch.bfloat16), "tiny")
            self_check.against_own_forward(reference, torch.arange(5, 60), 0.1, (0, 1))
            assert reference.narrows, family

    def test_a_module_that_returns_nan_is_not_narrowed(self, monkeypatch):
        """NaN on one side only is a difference: here for inputs of another length."""
        model = tiny.model()
        mlp = type(last_feed_forward(model.model))
        own = mlp.forward
        monkeypatch.setattr(mlp, "forward", lambda self, x: own(self, x) * (1 if x.shape[1] == 55 else float("nan")))
        reference = Reference(model, "tiny")
        self_check.against_own_forward(reference, torch.arange(5, 60), 1e-3, ())
        assert not reference.narrows

    def test_a_document_of_one_token_checks_nothing(self):
        reference = Reference(tiny.model(), "tiny")
        self_check.against_own_forward(reference, torch.tensor([5]), 1e-3, ())
        assert not reference.checked and not reference.narrows

    def test_a_module_that_returns_a_tuple_is_not_narrowed(self, monkeypatch):
        """Each batch would compute it twice. gpt-oss also returns the scores of its router."""
        model, seen = gpt_oss(), []
        mlp = type(last_feed_forward(model.model))
        own = mlp.forward
        monkeypatch.setattr(mlp, "forward", lambda self, x: seen.append(x.shape[:-1].numel()) or own(self, x))
        _, stats = run(collect(rows()), model, (), batch_tokens=150)
        assert sum(seen[-2 * stats.batches :]) == 2 * stats.padded_tokens  # of two layers

    def test_a_module_that_returns_a_tuple_is_called_unchanged(self):
        class Pair(torch.nn.Module):
            def forward(self, x):
                return x * 2, x.sum()

        module, x = Pair(), torch.randn(2, 3, 4)
        with only_where(module, torch.tensor([0, 3]), 6):
            result, total = module(x)
        assert torch.equal(result, x * 2) and total == x.sum()

    def test_without_tokens_to_read_the_module_is_called_unchanged(self):
        module = torch.nn.Linear(4, 4)
        x = torch.randn(1, 3, 4)
        whole = module(x)
        with only_where(module, torch.zeros(0, dtype=torch.long), 3) as counts:
            assert torch.equal(module(x), whole) and not counts
