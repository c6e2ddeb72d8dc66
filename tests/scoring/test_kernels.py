"""The definitions against hand-made cases, and the optimised implementations against the definitions.

Parity rule: |fast - truth| <= |naive in the same low precision - truth| + tolerance, truth in float32, on ragged
shapes, with a planted token that every head attends to, so that a shuffled or shifted score fails.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from xtf_plugin.scoring.kernels import dispatch, eager, packing
from xtf_plugin.scoring.kernels.eager import AttentionSpec

# B, H, K, T, D: aligned and ragged
SHAPES = [(1, 4, 4, 64, 16), (3, 4, 2, 150, 16), (2, 6, 1, 129, 24), (2, 2, 2, 7, 8), (3, 6, 3, 100, 8)]
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


def same_values(expected, found, tolerance):
    """Undefined in the same places, and otherwise alike; with a tolerance of 0 equal to the bit."""
    same_places = torch.equal(expected.isnan(), found.isnan())
    return same_places and torch.allclose(expected, found, rtol=0, atol=tolerance, equal_nan=True)


def error(truth, found):
    """How far off each value is, 0 where both are undefined. Undefined in other places is no rounding, and fails."""
    assert torch.equal(truth.isnan(), found.isnan())
    return (found - truth).abs().masked_fill(truth.isnan(), 0)


def parity(truth, fast, naive, slack):
    """The parity rule, on average and at worst."""
    ours, theirs = error(truth, fast), error(truth, naive)
    assert ours.mean() <= theirs.mean() + 1e-5
    assert ours.max() <= theirs.max() + slack


class TestAttentionReceived:
    def test_uniform_attention_reads_one(self):
        query = torch.zeros(1, 2, 9, 4)
        received = eager.attention_received(query, query, torch.tensor([9]), AttentionSpec(0.5))
        assert torch.allclose(received[0, :8], torch.ones(8))
        assert received[0, 8].isnan()

    def test_planted_token_wins_and_its_neighbours_do_not(self):
        query, key, lengths, scaling = planted((1, 4, 2, 150, 16))
        received = dispatch.attention_received(query, key, lengths, AttentionSpec(scaling))
        assert int(received[0].nan_to_num().argmax()) == PLANTED
        assert received[0, PLANTED] > 5 * received[0, PLANTED + 1]

    def test_row_average_of_a_softmax_is_constant(self):
        """What averaging over the key axis yields: 1/T for every token, whatever the attention; hence the column
        mean.
        """
        query, key, _, scaling = planted((1, 4, 2, 50, 16))
        A = eager.attention_map(query, key, AttentionSpec(scaling))
        assert torch.allclose(A.mean(1).mean(-1), torch.full((1, 50), 1 / 50))

    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("window", [None, 9])
    @pytest.mark.parametrize("softcap", [None, 2.0])
    @pytest.mark.parametrize("start", [0, 3])
    def test_parity_float32(self, shape, window, softcap, start):
        query, key, lengths, scaling = planted(shape)
        options = {"scaling": scaling, "window": window, "softcap": softcap, "start": start}
        truth = eager.attention_received(query, key, lengths, AttentionSpec(**options))
        fast = dispatch.attention_received(query, key, lengths, AttentionSpec(**options))
        assert same_values(truth, fast, 1e-5)

    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_parity_low_precision(self, shape, dtype):
        query, key, lengths, scaling = planted(shape)
        truth = eager.attention_received(query, key, lengths, AttentionSpec(scaling))
        low = [x.to(dtype) for x in (query, key)]
        fast = dispatch.attention_received(*low, lengths, AttentionSpec(scaling))
        scores = low[0] @ low[1].repeat_interleave(shape[1] // shape[2], 1).transpose(-1, -2) * scaling
        naive_map = scores.masked_fill(~eager.visible(shape[3], None), float("-inf")).softmax(-1)
        parity(truth, fast, received_from_map(naive_map, lengths), slack=5e-4)

    def test_padding_changes_nothing(self):
        query, key, lengths, scaling = planted((3, 4, 2, 150, 16))
        before = dispatch.attention_received(query, key, lengths, AttentionSpec(scaling))
        query[1, :, int(lengths[1]) :] = 50.0
        key[1, :, int(lengths[1]) :] = 50.0
        after = dispatch.attention_received(query, key, lengths, AttentionSpec(scaling))
        assert same_values(before, after, 0)


LENGTHS = [1, 50, 1, 70, 2, 9]
STARTS = torch.tensor([0, 3, 0, 66, 0, 40])  # of a document, within it; some leave nothing


def packed(lengths=LENGTHS, tail=5, H=4, K=2, D=16):
    """Query, key, offsets, scaling of documents in one row, with what must not count behind them."""
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    query, key, _, scaling = planted((1, H, K, int(offsets[-1]) + tail, D))
    query[:, :, offsets[-1] :], key[:, :, offsets[-1] :] = float("nan"), 50.0
    return query, key, offsets, scaling


def each_alone(query, key, spec):
    """Attention received of packed documents by the definition, each document alone."""
    received = torch.full((1, query.shape[2]), float("nan"), device=query.device)
    for i, (low, high) in enumerate(pairwise(spec.offsets.tolist())):
        own = spec.unpacked(spec.start if spec.starts is None else int(spec.starts[i]))
        part = (x[:, :, low:high] for x in (query, key))
        received[:, low:high] = eager.attention_received(*part, torch.tensor([high - low]), own)
    return received


class TestPacked:
    OPTIONS = [{}, {"window": 9}, {"softcap": 2.0}, {"window": 60, "softcap": 2.0}]

    @pytest.mark.parametrize("options", OPTIONS, ids=str)
    @pytest.mark.parametrize("starts", [None, STARTS])
    def test_each_document_as_if_alone(self, options, starts):
        query, key, offsets, scaling = packed()
        spec = AttentionSpec(scaling, **options, start=2, offsets=offsets, starts=starts)
        row = dispatch.attention_received(query, key, None, spec)
        assert row.shape == (1, query.shape[2]) and row[:, offsets[-1] :].isnan().all()
        assert same_values(each_alone(query, key, spec), row, 1e-5)

    @pytest.mark.parametrize("lengths", [[150], [1], [1] * 5, [3, 0, 100, 3, 60, 33]])
    @pytest.mark.parametrize("options", OPTIONS, ids=str)
    def test_attention(self, lengths, options):
        query, key, offsets, scaling = packed(lengths)
        value = torch.randn(*key.shape[:3], 24, generator=torch.Generator().manual_seed(3))
        output, logsumexp = dispatch.attention_and_logsumexp(
            query, key, value, AttentionSpec(scaling, offsets=offsets, **options)
        )
        assert output.shape == (*query.shape[:3], 24) and logsumexp.dtype is torch.float32
        assert not output[:, :, offsets[-1] :].any() and not logsumexp[:, :, offsets[-1] :].any()
        for part in (slice(low, high) for low, high in zip(offsets[:-1], offsets[1:], strict=True) if high > low):
            alone = dispatch.attention_and_logsumexp(
                *(x[:, :, part] for x in (query, key, value)), AttentionSpec(scaling, **options)
            )
            assert torch.allclose(alone[0], output[:, :, part], atol=1e-5)
            assert torch.allclose(alone[1], logsumexp[:, :, part], atol=1e-5)

    @pytest.mark.parametrize("kernel", ["flash", "efficient"])
    def test_fused_kernels_return_what_is_expected(self, monkeypatch, kernel):
        """Shapes only: torch's own description of the kernels stands in for a GPU."""
        monkeypatch.setattr(dispatch, "_fused_kernel", lambda query: kernel)
        query, key, offsets, _ = (x.to("meta") if isinstance(x, torch.Tensor) else x for x in packed())
        rows = [{"offsets": offsets, "longest": longest} for longest in (None, 70) if kernel == "flash"]
        for row in ({}, *rows):
            output, logsumexp = dispatch.attention_and_logsumexp(query, key, key, AttentionSpec(1.0, **row))
            assert output.shape == query.shape and logsumexp.shape == query.shape[:3]
            assert logsumexp.dtype is torch.float32

    def test_padding_stays_under_half_of_a_batch(self):
        generator = torch.Generator().manual_seed(0)
        lengths = torch.cat([torch.randint(0, 30, (200,), generator=generator), torch.tensor([4_000])])
        found = packing.groups(torch.cat([torch.zeros(1, dtype=torch.long), lengths]).cumsum(0))
        assert sum(group.inside.numel() for group in found) < 2 * int(lengths.sum())
        assert sorted(i for group in found for i in group.members.tolist()) == lengths.nonzero()[:, 0].tolist()


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
        A = eager.attention_map(query, key, AttentionSpec(scaling, window, softcap))
        output, logsumexp = dispatch.attention_and_logsumexp(
            query, key, value, AttentionSpec(scaling, window=window, softcap=softcap)
        )
        assert torch.allclose(output, A @ value.repeat_interleave(shape[1] // shape[2], 1), atol=1e-5)
        diagonal = (query.float() * key.repeat_interleave(shape[1] // shape[2], 1)).sum(-1) * scaling
        if softcap is not None:
            diagonal = softcap * torch.tanh(diagonal / softcap)
        assert torch.allclose((diagonal - logsumexp).exp(), A.diagonal(dim1=-2, dim2=-1), atol=1e-5)


class TestAttentionAndReceived:
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("window", [None, 9])
    @pytest.mark.parametrize("softcap", [None, 2.0])
    @pytest.mark.parametrize("start", [0, 3])
    def test_parity_float32(self, shape, window, softcap, start):
        query, key, lengths, scaling = planted(shape)
        value = torch.randn(*key.shape[:3], 10, generator=torch.Generator().manual_seed(3))
        options = {"scaling": scaling, "window": window, "softcap": softcap, "start": start}
        output, received = eager.attention_and_received(query, key, value, lengths, AttentionSpec(**options))
        ours, ours_received = dispatch.attention_and_received(query, key, value, lengths, AttentionSpec(**options))
        assert torch.allclose(output, ours, atol=1e-5)
        assert same_values(received, ours_received, 1e-5)

    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_parity_low_precision(self, shape, dtype):
        query, key, lengths, scaling = planted(shape)
        value = torch.randn(key.shape, generator=torch.Generator().manual_seed(3))
        truth = eager.attention_and_received(query, key, value, lengths, AttentionSpec(scaling))
        low = [x.to(dtype) for x in (query, key, value)]
        fast = dispatch.attention_and_received(*low, lengths, AttentionSpec(scaling))
        assert fast[0].dtype is dtype and fast[1].dtype is torch.float32
        groups = shape[1] // shape[2]
        scores = low[0] @ low[1].repeat_interleave(groups, 1).transpose(-1, -2) * scaling
        A = scores.masked_fill(~eager.visible(shape[3], None), float("-inf")).softmax(-1)
        naive = A @ low[2].repeat_interleave(groups, 1), received_from_map(A, lengths)
        for ours, theirs, exact, slack in zip(fast, naive, truth, (2e-3, 5e-4), strict=True):
            parity(exact, ours.float(), theirs.float(), slack)

    def test_packed_documents_do_not_see_each_other(self):
        query, key, _, scaling = planted((1, 4, 2, 150, 16))
        offsets = torch.tensor([0, 1, 60, 61, 150])
        given = query, key, key, offsets.diff()
        output, received = dispatch.attention_and_received(*given, AttentionSpec(scaling, offsets=offsets))
        for low, high in pairwise(offsets.tolist()):
            part = (x[:, :, low:high] for x in (query, key, key))
            truth = eager.attention_and_received(*part, torch.tensor([high - low]), AttentionSpec(scaling))
            assert same_values(truth[0], output[:, :, low:high], 1e-5)
            assert same_values(truth[1], received[:, low:high], 1e-5)
