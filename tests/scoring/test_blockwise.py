"""Blocks of attention on a CPU: their sizes and threads do not change results, and memory limits hold."""

from __future__ import annotations

import pytest
import torch

from tests.scoring.test_kernels import planted, same_values
from xtf_plugin.scoring.kernels import blockwise, dispatch, eager
from xtf_plugin.scoring.kernels.eager import AttentionSpec


@pytest.mark.parametrize(
    ("shape", "threads", "heads"),
    [((1, 6, 3, 129, 8), 2, 6), ((3, 4, 1, 70, 16), 2, 4), ((1, 10, 5, 70, 16), 2, 5)],
)
@pytest.mark.parametrize("options", [{}, {"start": 3}, {"window": 9, "softcap": 2.0}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_repeated_for_threads_change_nothing(shape, threads, heads, options, dtype, monkeypatch):
    query, key, lengths, scaling = planted(shape, dtype=dtype)
    value = torch.randn(*key.shape[:3], 10, generator=torch.Generator().manual_seed(3)).to(dtype)
    seen = []
    scores = blockwise._scores
    monkeypatch.setattr(blockwise, "_scores", lambda q, k, *rest: seen.append(k.shape[1]) or scores(q, k, *rest))
    found = {}
    for count in (1, threads):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=count: count)
        spec = AttentionSpec(scaling, **options)
        output, received = dispatch.attention_and_received(query, key, value, lengths, spec)
        found[count] = output.float(), received, dispatch.attention_received(query, key, lengths, spec)
        assert set(seen) == {shape[2] if count == 1 else heads}  # of five on two threads it would not pay
        seen.clear()
    for alone, shared in zip(*found.values(), strict=True):
        assert torch.allclose(alone, shared, atol=1e-5 if dtype is torch.float32 else 2e-2, equal_nan=True)


SIZES = [{}, {"FEW_ROWS": 0}, {"ALONE_ELEMENTS": 1}, {"SCORE_ELEMENTS": 1}, {"QUERY_BLOCK": 7, "SCORE_ELEMENTS": 1}]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("window", [None, 9, 100])
def test_sizes_of_blocks_change_nothing(sizes, window, monkeypatch):
    query, key, lengths, scaling = planted((3, 4, 2, 150, 16))
    options = {"scaling": scaling, "window": window}
    output, received = eager.attention_and_received(query, key, key, lengths, AttentionSpec(**options))
    for name, value in sizes.items():
        monkeypatch.setattr(blockwise, name, value)
    ours = dispatch.attention_and_received(query, key, key, lengths, AttentionSpec(**options))
    assert torch.allclose(output, ours[0], atol=1e-5) and same_values(received, ours[1], 1e-5)
    assert same_values(received, dispatch.attention_received(query, key, lengths, AttentionSpec(**options)), 1e-5)


@pytest.mark.parametrize("T", [700, 2_000])  # an unrecorded layer takes PyTorch's kernel for the latter
@pytest.mark.parametrize("recorded", [True, False])
def test_float16_does_not_overflow_where_attention_is_even(T, recorded):
    query = torch.zeros(1, 2, T, 8, dtype=torch.float16)
    value, lengths = torch.full_like(query, 100.0), torch.tensor([T])
    found = dispatch.attention_and_received(query, query, value, lengths, AttentionSpec(1.0)) if recorded else None
    output = dispatch.attention(query, query, value, AttentionSpec(1.0)) if found is None else found[0]
    assert torch.allclose(output.float(), torch.tensor(100.0), rtol=2e-3)


@pytest.mark.parametrize("shape", [(1, 6, 3000), (13, 6, 300), (40, 6, 90), (5, 32, 768), (2, 64, 40_000), (3, 4, 7)])
@pytest.mark.parametrize("window", [None, 512])
@pytest.mark.parametrize("start", [0, 5])
def test_blocks_hold_every_query_once_within_their_limits(shape, window, start):
    B, H, T = shape
    found = torch.zeros(B, T, dtype=torch.int64)
    for low, high, rows in blockwise._query_blocks(torch.empty(B, H, T, 1, device="meta"), start, window):
        keys = high - start if window is None else min(high - start, high - low + window - 1)
        for b in rows:
            found[b, low:high] += 1
            scores, together = H * (high - low) * keys, b.stop - b.start
            alone = together == 1 and scores <= max(blockwise.ALONE_ELEMENTS, H * keys)
            assert alone or together * scores <= blockwise.SCORE_ELEMENTS
    assert (found[:, start:] == 1).all() and (found[:, :start] == 0).all()


@pytest.mark.parametrize("heads", [2, 4])
def test_no_documents_are_no_error(heads):
    query, key = torch.empty(0, 4, 9, 8), torch.empty(0, heads, 9, 8)
    output, received = dispatch.attention_and_received(query, key, key, torch.empty(0, dtype=int), AttentionSpec(1.0))
    assert output.shape == query.shape and received.shape == (0, 9)


@pytest.mark.parametrize("shape", [(1, 4, 4, 64, 16), (3, 4, 2, 150, 16), (2, 6, 1, 129, 24)])
def test_pytorchs_kernel_gives_the_same(shape, monkeypatch):
    """What unrecorded layers of long documents take."""
    query, key, _, scaling = planted(shape)
    blocks = dispatch.attention(query, key, key, AttentionSpec(scaling))
    monkeypatch.setattr(dispatch, "SHORT", 0)
    monkeypatch.setattr(blockwise, "attention", None)
    assert torch.allclose(dispatch.attention(query, key, key, AttentionSpec(scaling)), blocks, atol=1e-5)
