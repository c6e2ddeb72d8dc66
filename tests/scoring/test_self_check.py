"""The check of a reference before it scores, and references whose scores would depend on other documents."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import GptOssConfig, GptOssForCausalLM

from tests import tiny
from tests.scoring.test_engine import rows, run
from tests.scoring.test_shortcuts import PACKED
from xtf_plugin.data.documents import collect
from xtf_plugin.errors import XTFError
from xtf_plugin.scoring import self_check
from xtf_plugin.scoring.batching import laid_out
from xtf_plugin.scoring.reference import Reference


class TestRotarySwitch:
    """Rotary embeddings that change for all documents of a batch when one of them is long."""

    def model(self, kind):
        rope = {"rope_type": kind, "rope_theta": 10_000.0}
        if kind == "dynamic":
            return tiny.model(rope_parameters={**rope, "factor": 4.0}, max_position_embeddings=64)
        rope |= {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "partial_rotary_factor": 1.0}
        return tiny.model("phi3", rope_parameters=rope, original_max_position_embeddings=64)

    @pytest.mark.parametrize("packing", [self_check.WHERE_FASTER, PACKED], ids=["padded", "packed"])
    def test_long_documents_are_batched_apart(self, packing):
        model, documents = self.model("longrope"), collect(rows(sizes=(90, 50, 64, 65, 70, 3)))
        alone, _ = run(documents, model, (0, 1), batch_tokens=1, packing=packing)
        together, stats = run(documents, model, (0, 1), batch_tokens=10_000, packing=packing)
        assert stats.batches == 2
        for key, records in alone.items():
            for name, values in records.columns.items():
                np.testing.assert_allclose(values, together[key].columns[name], atol=1e-5)
        mixed = laid_out(documents, np.arange(2), torch.device("cpu"))
        one = laid_out(documents, np.arange(1, 2), torch.device("cpu"))
        reference = Reference(model, "tiny")
        with reference.scoring(record=False):
            states = [reference.forward(given.ids, given.lengths, ())[0][-1, :50] for given in (mixed, one)]
        assert not torch.allclose(*states, atol=1e-2), "the embeddings must change for this test"

    def test_embeddings_that_depend_on_the_data_are_refused(self):
        model = self.model("dynamic")
        run(collect(rows(sizes=(60, 64))), model, (1,))
        with pytest.raises(XTFError, match="`dynamic`, .* beyond 64 tokens; the longest here has 70.*max_length"):
            run(collect(rows(sizes=(60, 70))), model, (1,))


class TestCheck:
    def test_wrong_attention_received_is_refused(self, monkeypatch):
        own = self_check.Reference.forward

        def half(self, *given, plainly=False, **options):
            hidden, received = own(self, *given, plainly=plainly, **options)
            return hidden, received if plainly or received is None else received / 2

        monkeypatch.setattr(Reference, "forward", half)
        with pytest.raises(XTFError, match="attention received differs from its definition by 0.5"):
            run(collect(rows()), tiny.model(), (0, 1))

    def test_attention_is_checked_when_it_is_first_recorded(self):
        reference, documents = Reference(tiny.model(), "tiny"), collect(rows())
        for layers, checked in (((), {"log-probabilities"}), ((0,), {"log-probabilities", "attention"})):
            self_check.check(documents, np.arange(len(documents)), reference, layers)
            assert reference.checked == checked

    def test_the_longest_document_is_checked(self):
        documents, reference = collect(rows(sizes=(2, 3, 90, 60))), Reference(tiny.model(), "tiny")
        tried = []
        own = reference.forward
        reference.forward = lambda ids, *args, **options: tried.append(ids.shape[-1]) or own(ids, *args, **options)
        self_check.check(documents, np.arange(4), reference, ())
        assert max(tried) == 90

    def test_a_document_of_one_token_checks_nothing(self):
        reference = Reference(tiny.model(), "tiny")
        self_check.against_own_forward(reference, torch.tensor([5]), 1e-3, ())
        assert not reference.checked


class TestRounding:
    """The check allows for rounding in 8 bits, and for two attention functions in 16.

    tests/reliability/test_drift.py has a real model in 8 bits.
    """

    def odd(self, model, factor):
        """A model whose own forward scales its logits, as an unknown architecture might."""
        forward = type(model).forward

        class Odd(type(model)):
            def forward(self, *args, **kwargs):
                output = forward(self, *args, **kwargs)
                output.logits = output.logits * factor
                return output

        model.__class__ = Odd
        return Reference(model, "odd")

    def test_a_difference_between_eager_and_sdpa_does_not_widen_the_tolerance(self):
        """sdpa ignores the sinks of GPT-OSS: the two differ by more than rounding."""
        torch.manual_seed(0)
        shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = GptOssConfig(
            vocab_size=500, num_key_value_heads=2, head_dim=16, num_local_experts=2, num_experts_per_tok=1, **shape
        )
        model = GptOssForCausalLM(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0.0, 0.15)
        with pytest.raises(XTFError, match="log-probabilities differ from the model's own forward"):
            self_check.against_own_forward(self.odd(model, 1.05), torch.arange(5, 60), 1e-3, ())

    @pytest.mark.parametrize("dtype, accepted", [(torch.bfloat16, True), (torch.float32, False)])
    def test_in_16_bits_the_attention_of_the_training_decides(self, monkeypatch, dtype, accepted):
        """Eager attention of Qwen2.5-Coder-0.5B in bfloat16 differs from SDPA by 0.13 nats, on a CPU."""
        own = self_check._own_forward
        shift = {"eager": 0.3}
        monkeypatch.setattr(
            self_check, "_own_forward", lambda one, ids, attention: own(one, ids, attention) + shift.get(attention, 0)
        )
        reference = Reference(tiny.model().to(dtype), "tiny")
        reference.model.config._attn_implementation = "sdpa"
        if accepted:
            self_check.against_own_forward(reference, torch.arange(5, 60), 0.1, ())
            shift["sdpa"] = 0.3
        with pytest.raises(XTFError, match="log-probabilities differ from the model's own forward"):
            reference.checked = frozenset()
            self_check.against_own_forward(reference, torch.arange(5, 60), 0.1, ())

    def test_other_differences_are_refused_in_eight_bits_too(self):
        class Linear8bitLt(torch.nn.Identity):
            pass

        model = tiny.model()
        model.model.layers[0].mlp.extra = Linear8bitLt()
        with pytest.raises(XTFError, match="log-probabilities differ from the model's own forward"):
            self_check.against_own_forward(self.odd(model, 1.5), torch.arange(5, 60), 1e-3, ())
