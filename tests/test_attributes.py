"""The definitions against hand-made cases, and the fast twins against the definitions.

Parity rule: |fast - truth| <= |naive in the same low precision - truth| + tolerance, truth in float32, on ragged
shapes, with a planted token that every head attends to, so that a shuffled or shifted score fails.
"""

from __future__ import annotations

import pytest
import torch

from xtf_plugin import attributes, kernels

# B, H, K, T, D: aligned and ragged
SHAPES = [(1, 4, 4, 64, 16), (3, 4, 2, 150, 16), (2, 6, 1, 129, 24), (2, 2, 2, 7, 8)]
PLANTED = 5


def planted(shape, seed=0, dtype=torch.float32):
    B, H, K, T, D = shape
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(B, H, T, D, generator=generator)
    key = torch.randn(B, K, T, D, generator=generator)
    query[..., 0] = 3.0
    key[:, :, PLANTED, 0] = 6.0  # every query leans on this token
    lengths = torch.tensor([T, max(2, T - 40), 3][:B])
    return query.to(dtype), key.to(dtype), lengths, D**-0.5


class TestAttentionReceived:
    def test_uniform_attention_reads_one(self):
        query = torch.zeros(1, 2, 9, 4)
        received = attributes.attention_received(query, query, torch.tensor([9]), scaling=0.5)
        assert torch.allclose(received[0, :8], torch.ones(8))
        assert received[0, 8].isnan()

    def test_planted_token_wins_and_its_neighbours_do_not(self):
        query, key, lengths, scaling = planted((1, 4, 2, 150, 16))
        received = kernels.attention_received(query, key, lengths, scaling=scaling)
        assert int(received[0].nan_to_num().argmax()) == PLANTED
        assert received[0, PLANTED] > 5 * received[0, PLANTED + 1]

    def test_row_average_of_a_softmax_is_constant(self):
        """What averaging over the key axis yields: 1/T for every token, whatever the attention; hence the column
        mean.
        """
        query, key, _, scaling = planted((1, 4, 2, 50, 16))
        A = attributes.attention_map(query, key, scaling=scaling)
        assert torch.allclose(A.mean(1).mean(-1), torch.full((1, 50), 1 / 50))

    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("window", [None, 9])
    @pytest.mark.parametrize("softcap", [None, 2.0])
    @pytest.mark.parametrize("start", [0, 3])
    def test_parity_float32(self, shape, window, softcap, start):
        query, key, lengths, scaling = planted(shape)
        options = {"scaling": scaling, "window": window, "softcap": softcap, "start": start}
        truth = attributes.attention_received(query, key, lengths, **options)
        fast = kernels.attention_received(query, key, lengths, **options)
        assert torch.equal(truth.isnan(), fast.isnan())
        assert (truth - fast).nan_to_num().abs().max() < 1e-5

    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_parity_low_precision(self, shape, dtype):
        query, key, lengths, scaling = planted(shape)
        truth = attributes.attention_received(query, key, lengths, scaling=scaling)
        low = [x.to(dtype) for x in (query, key)]
        fast = kernels.attention_received(*low, lengths, scaling=scaling)
        scores = low[0] @ low[1].repeat_interleave(shape[1] // shape[2], 1).transpose(-1, -2) * scaling
        naive_map = scores.masked_fill(~attributes.visible(shape[3], None), float("-inf")).softmax(-1)
        naive = received_from_map(naive_map, lengths)
        fast_error, naive_error = ((x - truth).nan_to_num().abs() for x in (fast, naive))
        assert fast_error.mean() <= naive_error.mean() + 1e-5
        assert fast_error.max() <= naive_error.max() + 5e-4

    def test_blocks_change_nothing(self, monkeypatch):
        query, key, lengths, scaling = planted((3, 4, 2, 150, 16))
        whole = kernels.attention_received(query, key, lengths, scaling=scaling)
        monkeypatch.setattr(kernels, "QUERY_BLOCK", 7)
        monkeypatch.setattr(kernels, "SCORE_ELEMENTS", 1)
        assert torch.allclose(whole, kernels.attention_received(query, key, lengths, scaling=scaling), equal_nan=True)

    def test_padding_has_no_say(self):
        query, key, lengths, scaling = planted((3, 4, 2, 150, 16))
        before = kernels.attention_received(query, key, lengths, scaling=scaling)
        query[1, :, int(lengths[1]) :] = 50.0
        key[1, :, int(lengths[1]) :] = 50.0
        after = kernels.attention_received(query, key, lengths, scaling=scaling)
        assert torch.equal(before.nan_to_num(), after.nan_to_num())


def received_from_map(A, lengths):
    B, _, T, _ = A.shape
    mean = A.mean(1)
    q = torch.arange(T)
    out = torch.full((B, T), float("nan"))
    for b in range(B):
        for k in range(int(lengths[b]) - 1):
            out[b, k] = ((q[k + 1 : lengths[b]] + 1).to(A.dtype) * mean[b, k + 1 : lengths[b], k]).mean()
    return out


class TestAttention:
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("window,softcap", [(None, None), (9, None), (None, 2.0), (9, 2.0)])
    def test_output_and_logsumexp(self, shape, window, softcap):
        query, key, _, scaling = planted(shape)
        value = torch.randn(key.shape, generator=torch.Generator().manual_seed(3))
        A = attributes.attention_map(query, key, scaling=scaling, window=window, softcap=softcap)
        output, logsumexp = kernels.attention(query, key, value, scaling=scaling, window=window, softcap=softcap)
        assert torch.allclose(output, A @ value.repeat_interleave(shape[1] // shape[2], 1), atol=1e-5)
        diagonal = (query.float() * key.repeat_interleave(shape[1] // shape[2], 1)).sum(-1) * scaling
        if softcap is not None:
            diagonal = softcap * torch.tanh(diagonal / softcap)
        assert torch.allclose((diagonal - logsumexp).exp(), A.diagonal(dim1=-2, dim2=-1), atol=1e-5)


class TestLogProbabilities:
    @pytest.mark.parametrize("N", [1, 63, 64, 65, 300])
    @pytest.mark.parametrize("scale,softcap", [(1.0, None), (0.25, None), (1.0, 5.0)])
    def test_parity_float32(self, monkeypatch, N, scale, softcap):
        monkeypatch.setattr(kernels, "LOGIT_ELEMENTS", 5_000)  # several chunks and a partial last one
        torch.manual_seed(0)
        head, hidden, targets = torch.nn.Linear(24, 301), torch.randn(N, 24) * 4, torch.randint(301, (N,))
        truth = attributes.log_probabilities(hidden, head, targets, scale=scale, softcap=softcap)
        fast = kernels.log_probabilities(hidden, head, targets, scale=scale, softcap=softcap)
        assert torch.allclose(truth, fast, atol=1e-5)

    def test_parity_bfloat16(self):
        torch.manual_seed(0)
        head, hidden, targets = torch.nn.Linear(24, 301), torch.randn(300, 24) * 4, torch.randint(301, (300,))
        truth = attributes.log_probabilities(hidden, head, targets)
        low = hidden.bfloat16(), head.bfloat16(), targets
        naive = low[1](low[0]).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
        error = (kernels.log_probabilities(*low) - truth).abs().max()
        assert error <= (naive.float() - truth).abs().max() + 1e-5

    def test_no_targets(self):
        none = torch.zeros(0, dtype=torch.long)
        assert kernels.log_probabilities(torch.zeros(0, 4), torch.nn.Linear(4, 9), none).shape == (0,)


class TestTaskRelevance:
    def test_closest_is_one_and_farthest_zero(self):
        vectors = torch.tensor([[1.0, 0.0], [1.0, 1.0], [-1.0, 0.0]])
        scores = attributes.task_relevance(vectors, torch.tensor([2.0, 0.0]))
        assert torch.allclose(scores, torch.tensor([1.0, (2**-0.5 + 1) / 2, 0.0]))

    def test_zero_vector_is_undefined_and_does_not_spoil_the_others(self):
        vectors = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]])
        scores = attributes.task_relevance(vectors, torch.tensor([1.0, 0.0]))
        assert scores[1].isnan() and scores[0] == 1 and scores[2] == 0

    def test_all_alike_is_undefined(self):
        assert attributes.task_relevance(torch.ones(3, 2), torch.ones(2)).isnan().all()
