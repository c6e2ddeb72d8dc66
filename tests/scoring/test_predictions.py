"""Statistics of the LM head's predictions: cases by hand, and the optimised implementation against the definition.

Parity rule: see tests/scoring/test_kernels.py.
"""

from __future__ import annotations

import math

import pytest
import torch

from xtf_plugin.scoring.kernels import dispatch, eager, logit_stats


def head_of(N, V=301, D=24):
    """Hidden states, a head and targets; the first rows are planted: very sure, uniform, and 9 tokens impossible."""
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(N, D) * 4, torch.randn(V, D) / 5, torch.randint(V, (N,))
    hidden[:3], hidden[3:, :2], targets[:3] = 0, 0, 7
    hidden[0, 0] = 1  # what the head is very sure at
    hidden[2:3, 1] = 1  # what it rules tokens out at
    weight[:, :2] = 0
    weight[7, 0] = 60

    def head(x):
        impossible = (x[:, 1:2] == 1) & (torch.arange(V) >= V - 9)
        return (x @ weight.T.to(x.dtype)).masked_fill(impossible, float("-inf"))

    return hidden, head, targets


class TestPredictions:
    @pytest.mark.parametrize("N", [1, 63, 64, 65, 300])
    @pytest.mark.parametrize("scale,softcap", [(1.0, None), (0.25, None), (1.0, 5.0)])
    def test_parity_float32(self, monkeypatch, N, scale, softcap):
        monkeypatch.setattr(dispatch, "LOGIT_ELEMENTS", 5_000)  # several chunks and a partial last one
        monkeypatch.setattr(logit_stats, "MOMENT_ELEMENTS", 1_000)  # and several pieces of each
        given = head_of(N)
        truth = eager.predictions(*given, scale=scale, softcap=softcap)
        fast = dispatch.predictions(*given, scale=scale, softcap=softcap)
        assert truth.shape == fast.shape == (3, N) and fast.dtype is torch.float32 and fast.isfinite().all()
        assert torch.allclose(truth, fast, atol=2e-5)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_parity_low_precision(self, dtype):
        hidden, head, targets = head_of(300)
        truth = eager.predictions(hidden, head, targets)
        low = hidden.to(dtype), head, targets
        logp = head(low[0]).log_softmax(-1)
        p, surprisal = logp.exp(), -logp.masked_fill(logp.isinf(), 0)
        mean = (p * surprisal).sum(-1)
        deviation = (p * (surprisal - mean[:, None]) ** 2).sum(-1).sqrt()
        naive = torch.stack([logp.gather(-1, targets[:, None])[:, 0], mean, deviation]).float()
        error = (dispatch.predictions(*low) - truth).abs().amax(-1)
        assert (error <= (naive - truth).abs().amax(-1) + 1e-5).all()

    @pytest.mark.parametrize("module", [eager, dispatch])
    def test_a_sure_row_a_uniform_row_and_one_with_impossible_tokens(self, module):
        logprobs, entropy, deviation = module.predictions(*head_of(5))
        assert logprobs[0] == 0 and entropy[0] < 1e-6 and deviation[0] < 1e-6
        expected = torch.tensor([301.0, 292.0]).log()  # 9 of 301 tokens cannot come
        assert torch.allclose(entropy[1:3], expected, atol=1e-6) and torch.allclose(-logprobs[1:3], expected)
        assert (deviation[1:3] < 1e-3).all()
        assert (entropy[3:] > 0.01).all() and (deviation[3:] > 0.01).all()

    def test_two_tokens_by_hand(self):
        """p = 1/4, 3/4: the surprisals are log 4 and log 4/3."""
        logits = torch.tensor([[0.25, 0.75]]).log()
        found = dispatch.predictions(logits, lambda x: x, torch.tensor([0]))[:, 0].double()
        mean = 0.25 * math.log(4) + 0.75 * math.log(4 / 3)
        deviation = math.sqrt(0.25 * math.log(4) ** 2 + 0.75 * math.log(4 / 3) ** 2 - mean**2)
        assert found.tolist() == pytest.approx([-math.log(4), mean, deviation], abs=1e-6)

    @pytest.mark.parametrize("module", [eager, dispatch])
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_undefined_together(self, module, value):
        logits = torch.randn(4, 9)
        logits[2, 3] = value
        found = module.predictions(logits, lambda x: x, torch.zeros(4, dtype=torch.long))
        assert found.isnan().any(0).tolist() == found.isnan().all(0).tolist() == [False, False, True, False]

    def test_a_target_that_cannot_come(self):
        logits = torch.tensor([[0.0, 0.0, -math.inf]])
        found = dispatch.predictions(logits, lambda x: x, torch.tensor([2]))[:, 0]
        assert found[0] == -math.inf and found[1:].tolist() == pytest.approx([math.log(2), 0.0])

    def test_the_head_is_asked_and_its_logits_are_left_as_they_are(self):
        logits = torch.randn(5, 9)
        before = logits.clone()
        dispatch.predictions(logits, lambda x: x, torch.zeros(5, dtype=torch.long))
        assert torch.equal(logits, before)

    def test_no_targets(self):
        none = torch.zeros(0, dtype=torch.long)
        assert dispatch.predictions(torch.zeros(0, 4), torch.nn.Linear(4, 9), none).shape == (3, 0)


class TestReusedLogits:
    def test_a_plain_head_gives_the_same_in_one_buffer(self, monkeypatch):
        torch.manual_seed(0)
        head, hidden, targets = torch.nn.Linear(24, 301, bias=False), torch.randn(70, 24), torch.randint(301, (70,))
        monkeypatch.setattr(dispatch, "REUSED_ELEMENTS", 301 * 20)
        with torch.no_grad():
            product = logit_stats.reusing(head, hidden)
            assert product(hidden[:20]).data_ptr() == product(hidden[20:30]).data_ptr()
            ours = dispatch.predictions(hidden, head, targets)
            assert torch.allclose(ours, eager.predictions(hidden, head, targets), atol=2e-5)
            assert torch.equal(ours, dispatch.predictions(hidden, lambda x: head(x), targets))

    def test_a_head_that_does_more_is_called_itself(self):
        hidden = torch.randn(3, 4)
        plain, biased, hooked, replaced = (torch.nn.Linear(4, 5, bias=on) for on in (False, True, False, False))
        hooked.register_forward_hook(lambda module, given, result: 2 * result)
        replaced.forward = lambda x: x @ torch.ones(4, 5)
        with torch.no_grad():
            assert logit_stats.reusing(plain, hidden) is not plain
            for head in (biased, hooked, replaced, lambda x: x):
                assert logit_stats.reusing(head, hidden) is head
            assert logit_stats.reusing(plain, hidden.bfloat16()) is plain
            with torch.autocast("cpu"):
                assert logit_stats.reusing(plain, hidden) is plain
        assert logit_stats.reusing(plain, hidden) is plain  # gradients are wanted

    @pytest.mark.parametrize("scale,softcap", [(1.0, None), (0.5, None), (1.0, 5.0)])
    def test_hidden_states_that_the_head_hands_on_stay_what_they_are(self, scale, softcap):
        logits = torch.randn(70, 9)
        before = logits.clone()
        dispatch.predictions(logits, lambda x: x, torch.zeros(70, dtype=torch.long), scale=scale, softcap=softcap)
        assert torch.equal(logits, before)
