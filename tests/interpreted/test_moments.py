"""The Triton kernel of moments against the definition in float64: what it is off by is then its own rounding."""

from __future__ import annotations

import math

import pytest
import torch
from triton import knobs

from tests.scoring.test_predictions import head_of
from xtf_plugin.scoring.kernels import eager, logit_stats, triton_attention, triton_logit_stats

if not knobs.runtime.interpret:
    pytest.skip("runs with TRITON_INTERPRET=1", allow_module_level=True)

moments = triton_attention.moments


def exact(logits, targets, scale=1.0, softcap=None):
    logits = logits.double() * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logp = logits.log_softmax(-1)
    p, logp_or_0 = logp.exp(), logp.masked_fill(logp.isinf(), 0)
    entropy = -(p * logp_or_0).sum(-1)
    deviation = (p * (logp_or_0 + entropy[:, None]) ** 2).sum(-1).sqrt()
    return torch.stack([logp.gather(-1, targets[:, None])[:, 0], entropy, deviation])


def definition(logits, targets, **options):
    return eager.predictions(logits, lambda x: x, targets, **options)


@pytest.fixture(params=[64, 4096])
def block(monkeypatch, request):
    monkeypatch.setattr(triton_logit_stats, "VOCABULARY_BLOCK", request.param)


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"scale": 0.25}, {"softcap": 5.0}, {"scale": 2.0, "softcap": 30.0}], ids=str)
def test_parity(dtype, options):
    """Against the naive sums in the dtype of the logits, by the parity rule; those in float32 are beside the point."""
    hidden, head, targets = head_of(12)  # 301 tokens: no multiple of any block
    logits = head(hidden).to(dtype)
    truth = exact(logits, targets, **options)
    low = logits * options.get("scale", 1.0)
    if "softcap" in options:
        low = options["softcap"] * torch.tanh(low / options["softcap"])
    naive = logit_stats.moments(low.clone(), targets) if dtype is torch.float32 else naive_moments(low, targets)
    error, naive_error = ((x - truth).abs().amax(-1) for x in (moments(logits, targets, **options), naive))
    assert (error <= naive_error + 1e-5).all(), (error, naive_error)
    assert (error < 5e-5).all(), error


def naive_moments(logits, targets):
    logp = logits.log_softmax(-1)
    p, logp_or_0 = logp.exp(), logp.masked_fill(logp.isinf(), 0)
    entropy = -(p * logp_or_0).sum(-1)
    deviation = (p * (logp_or_0 + entropy[:, None]) ** 2).sum(-1).sqrt()
    return torch.stack([logp.gather(-1, targets[:, None])[:, 0], entropy, deviation])


@pytest.mark.usefixtures("block")
class TestRows:
    def test_a_maximum_that_moves_in_every_block(self):
        for logits in (torch.linspace(-40, 40, 500), torch.linspace(40, -40, 500)):
            rows = torch.stack([logits, logits / 10, logits * 100])
            targets = torch.tensor([0, 250, 499])
            truth = exact(rows, targets)
            assert ((moments(rows, targets) - truth).abs() / truth.abs().clamp(min=1) < 2e-6).all()

    def test_huge_logits(self):
        torch.manual_seed(0)
        rows, targets = torch.randn(4, 301) * 1e4, torch.randint(301, (4,))
        rows[1:3] = torch.randn(2, 301) + torch.tensor([[1e4], [-1e4]])
        truth, naive = exact(rows, targets), definition(rows, targets)
        assert ((moments(rows, targets) - truth).abs() <= (naive - truth).abs() + 1e-5).all()

    def test_logits_of_all_sizes(self):
        largest = torch.finfo(torch.float32).max
        rows = torch.tensor([[-largest, 0.0, largest] * 50, [-largest, -largest, -largest / 2] * 50])
        found = moments(rows, torch.tensor([2, 2]))
        assert torch.allclose(found, torch.tensor([[-math.log(50)] * 2, [math.log(50)] * 2, [0.0] * 2]), atol=1e-5)

    def test_nearly_uniform_and_very_sure_rows(self):
        rows = torch.zeros(3, 1_000)
        rows[0] = torch.linspace(0, 1e-3, 1_000)
        rows[1, 77] = 30.0
        rows[2, 999] = 200.0
        targets = torch.tensor([3, 77, 4])
        truth = exact(rows, targets)
        found = moments(rows, targets)
        assert (found - truth).abs().max() < 2e-5 and (found[2] >= 0).all()
        assert found[0, 2] == -200

    def test_impossible_tokens_add_nothing(self):
        torch.manual_seed(0)
        rows, targets = torch.randn(4, 301), torch.tensor([0, 300, 5, 5])
        rows[0, 1:] = -math.inf  # all but one
        rows[1, :300] = -math.inf
        rows[2, :290] = -math.inf  # whole blocks before anything possible, the target among them
        rows[3, 7] = -math.inf
        found, truth = moments(rows, targets), exact(rows, targets)
        assert found[:, :2].abs().max() == 0 and found[0, 2] == -math.inf
        assert torch.allclose(found.double().clamp(min=-99), truth.clamp(min=-99), atol=1e-5)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    @pytest.mark.parametrize("place", [0, 150, 300])
    def test_undefined_together(self, value, place):
        rows = torch.randn(4, 301)
        rows[2, place] = value
        rows[3] = -math.inf  # nothing can come
        found = moments(rows, torch.tensor([1, 1, 1, place]))
        assert found.isnan().any(0).tolist() == found.isnan().all(0).tolist() == [False, False, True, True]
        assert definition(rows, torch.tensor([1, 1, 1, place])).isnan().equal(found.isnan())

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    def test_a_soft_cap_bounds_infinities(self, value):
        rows = torch.randn(2, 301)
        rows[1, 7] = value
        truth = definition(rows, torch.tensor([7, 7]), softcap=3.0)
        assert torch.allclose(moments(rows, torch.tensor([7, 7]), softcap=3.0), truth, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("V", [1, 2, 3, 4_097])
def test_vocabularies_of_any_size(V):
    torch.manual_seed(0)
    rows, targets = torch.randn(2, V), torch.tensor([0, V - 1])
    assert (moments(rows, targets) - exact(rows, targets)).abs().max() < 1e-5


def test_any_layout_is_read_and_not_changed():
    torch.manual_seed(0)
    rows, targets = torch.randn(301, 6), torch.randint(301, (12,))
    before = rows.clone()
    found = moments(rows.T[:, 1:], targets[::2].clamp(max=299))
    assert torch.equal(rows, before)
    assert torch.equal(found, moments(rows.T[:, 1:].contiguous(), targets[::2].clamp(max=299)))


def test_no_rows():
    assert moments(torch.zeros(0, 9), torch.zeros(0, dtype=torch.long)).shape == (3, 0)


def test_a_target_that_is_no_token_is_not_read():
    found = moments(torch.zeros(2, 4), torch.tensor([4, -100]))
    assert found[0].isnan().all() and torch.allclose(found[1], torch.tensor(4.0).log())
