"""The Triton kernel of attention received against the definition, by the parity rule of `test_kernels.py`."""

from __future__ import annotations

import pytest
import torch
from triton import Config, knobs

from tests.scoring.test_kernels import (
    LENGTHS,
    SHAPES,
    STARTS,
    each_alone,
    packed,
    parity,
    planted,
    received_from_map,
    same_values,
)
from xtf_plugin.scoring.kernels import dispatch, eager, triton_attention
from xtf_plugin.scoring.kernels.eager import AttentionSpec

if not knobs.runtime.interpret:
    pytest.skip("runs with TRITON_INTERPRET=1", allow_module_level=True)

WIDE = (1, 4, 2, 70, 80)  # a head size that is padded
OPTIONS = [
    {},
    {"window": 9},  # within a block
    {"window": 100, "start": 3},  # over several
    {"softcap": 2.0, "start": 70},
    {"window": 9, "softcap": 2.0, "start": 3},
]


def ours(query, key, lengths, *, scaling, start=0, starts=None, **options):
    logsumexp = dispatch.attention_and_logsumexp(query, key, key, AttentionSpec(scaling, **options))[1]
    spec = AttentionSpec(scaling, start=start, starts=starts, **options)
    return triton_attention.attention_received(query, key, lengths, spec, logsumexp)


@pytest.fixture
def tile(monkeypatch):
    def choose(q, k):
        config = Config({"BLOCK_Q": q, "BLOCK_K": k})
        monkeypatch.setattr(triton_attention._received, "configs", [config])

    return choose


@pytest.mark.parametrize("shape", [*SHAPES, WIDE])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_parity_float32(shape, options):
    query, key, lengths, scaling = planted(shape)
    truth = eager.attention_received(query, key, lengths, AttentionSpec(scaling, **options))
    assert same_values(truth, ours(query, key, lengths, scaling=scaling, **options), 1e-5)


@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[2], WIDE])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parity_low_precision(shape, dtype):
    query, key, lengths, scaling = planted(shape)
    truth = eager.attention_received(query, key, lengths, AttentionSpec(scaling))
    low = [x.to(dtype) for x in (query, key)]
    fast = ours(*low, lengths, scaling=scaling)
    scores = low[0] @ low[1].repeat_interleave(shape[1] // shape[2], 1).transpose(-1, -2) * scaling
    naive_map = scores.masked_fill(~eager.visible(shape[3], None), float("-inf")).softmax(-1)
    parity(truth, fast, received_from_map(naive_map, lengths), slack=5e-4)


@pytest.mark.parametrize("sizes", [(16, 16), (32, 16), (16, 128)])
@pytest.mark.parametrize("options", [{}, {"window": 40, "start": 3}], ids=str)
def test_blocks_change_nothing(tile, sizes, options):
    given = planted((2, 2, 1, 150, 16))
    whole = ours(*given[:3], scaling=given[3], **options)
    tile(*sizes)
    assert same_values(whole, ours(*given[:3], scaling=given[3], **options), 1e-5)


@pytest.mark.parametrize("heads, wanted, splits", [((4, 2), 7, (2, 1)), ((4, 2), 1_000, (2, 2)), ((6, 1), 30, (1, 6))])
def test_heads_split_between_programs_change_nothing(monkeypatch, heads, wanted, splits):
    query, key, lengths, scaling = planted((2, *heads, 150, 16))
    whole = ours(query, key, lengths, scaling=scaling)
    monkeypatch.setattr(triton_attention, "_wanted", lambda device: wanted)
    assert triton_attention._splits(2 * 3, heads[1], heads[0] // heads[1], query.device) == splits
    assert same_values(whole, ours(query, key, lengths, scaling=scaling), 1e-5)


def test_splits_are_even():
    splits = triton_attention._splits
    device = torch.device("cpu")
    for K, G in [(1, 1), (8, 4), (3, 5), (7, 1)]:
        for programs in (0, 1, 6, 10_000):
            kv, members = splits(programs, K, G, device)
            assert K % kv == G % members == 0


@pytest.mark.parametrize("fill", [50.0, float("nan")])
def test_padding_changes_nothing(fill):
    query, key, lengths, scaling = planted((3, 4, 2, 150, 16))
    logsumexp = dispatch.attention_and_logsumexp(query, key, key, AttentionSpec(scaling))[1]
    before = triton_attention.attention_received(query, key, lengths, AttentionSpec(scaling), logsumexp)
    for row, length in enumerate(lengths.tolist()):
        for x in (query, key, logsumexp):
            x[row, :, length:] = fill
    after = triton_attention.attention_received(query, key, lengths, AttentionSpec(scaling), logsumexp)
    assert same_values(before, after, 0)


def test_any_layout_is_read():
    query, key, lengths, scaling = planted((3, 4, 2, 150, 16))
    expected = ours(query, key, lengths, scaling=scaling)
    tokens_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key)]
    with_gaps = [torch.stack([x, x], -1)[..., 0] for x in (query, key)]
    logsumexp = (
        dispatch.attention_and_logsumexp(query, key, key, AttentionSpec(scaling))[1]
        .permute(2, 0, 1)
        .contiguous()
        .permute(1, 2, 0)
    )
    lengths = torch.stack([lengths, lengths * 0], 1)[:, 0]
    for given in (tokens_first, with_gaps):
        found = triton_attention.attention_received(*given, lengths, AttentionSpec(scaling), logsumexp)
        assert same_values(expected, found, 0)


@pytest.mark.parametrize("start", [149, 150, 200])
def test_nothing_wanted(start):
    query, key, lengths, scaling = planted((3, 4, 2, 150, 16))
    assert ours(query, key, lengths, scaling=scaling, start=start).isnan().all()


class TestPacked:
    @pytest.mark.parametrize("options", OPTIONS, ids=str)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("wanted, tolerance", [(1, 0), (6, 1e-6)])
    def test_each_document_as_if_alone(self, monkeypatch, options, dtype, wanted, tolerance):
        """To the bit where heads are not split: blocks are counted from a document's own start, so sums have the same
        order. A GPU splits the heads of one document into more parts than those of a row, and adds the parts up.
        """
        monkeypatch.setattr(triton_attention, "_wanted", lambda device: wanted)
        query, key, offsets, scaling = packed()
        in_a_row, alone = (triton_attention._splits(blocks, 2, 2, query.device) for blocks in (3, 1))
        assert (in_a_row == alone) == (wanted == 1)
        query, key = query.to(dtype), key.to(dtype)
        starts = STARTS if options.get("start") else None
        given = {"scaling": scaling, **options}
        logsumexp = dispatch.attention_and_logsumexp(query, key, key, AttentionSpec(**given, offsets=offsets))[1]
        row = triton_attention.attention_received(
            query, key, None, AttentionSpec(**given, offsets=offsets, starts=starts), logsumexp=logsumexp
        )
        for i, length in enumerate(LENGTHS):
            part = slice(int(offsets[i]), int(offsets[i + 1]))
            own = {**given, "start": given.get("start", 0) if starts is None else int(STARTS[i])}
            one = [x[:, :, part] for x in (query, key)]
            expected = triton_attention.attention_received(
                *one, torch.tensor([length]), AttentionSpec(**own), logsumexp=logsumexp[:, :, part]
            )
            torch.testing.assert_close(row[:, part], expected, rtol=tolerance, atol=0, equal_nan=True)
        truth = each_alone(query.float(), key.float(), AttentionSpec(**given, offsets=offsets, starts=starts))
        assert same_values(truth, row, 1e-5 if dtype is torch.float32 else 2e-2)

    @pytest.mark.parametrize("lengths", [[150], [1], [1] * 5, [2, 3] * 70])  # the last: more than are looked up at once
    def test_documents_of_any_number(self, lengths):
        query, key, offsets, scaling = packed(lengths, H=2, K=1)
        truth = each_alone(query, key, AttentionSpec(scaling, offsets=offsets))
        assert same_values(truth, ours(query, key, None, scaling=scaling, offsets=offsets), 1e-5)

    def test_no_document(self):
        query, key, _, scaling = packed([9])
        offsets = torch.zeros(1, dtype=torch.int32)
        found = triton_attention.attention_received(
            query, key, None, AttentionSpec(scaling, offsets=offsets), logsumexp=query[..., 0]
        )
        assert found.shape == (1, 14) and found.isnan().all()


class TestChoiceOfBlocks:
    def configs(self, dtype, D):
        tiles = [(64, 64, 4, 3), (128, 128, 8, 2), (32, 32, 4, 2)]
        configs = [
            triton_attention.triton.Config({"BLOCK_Q": q, "BLOCK_K": k}, num_warps=w, num_stages=s)
            for q, k, w, s in tiles
        ]
        fitting = triton_attention.fitting(configs, {"query": torch.empty(1, dtype=dtype)}, D_PADDED=D)
        return [configs.index(config) for config in fitting]

    def test_only_what_fits_is_tried(self):
        assert self.configs(torch.bfloat16, 64) == [0, 1, 2]
        assert self.configs(torch.bfloat16, 256) == [2]
        assert self.configs(torch.bfloat16, 1024) == self.configs(torch.float32, 16) == [2]

    def test_deterministic_algorithms_leave_nothing_to_the_clock(self):
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True)
        try:
            assert self.configs(torch.bfloat16, 64) == [0]
        finally:
            torch.use_deterministic_algorithms(before)

    def test_a_new_length_is_not_timed_again(self):
        assert triton_attention._received.keys == ["D_PADDED", "WINDOWED", "reach"]
