"""The same definitions on a CUDA device; one command on a machine that has one: `python -m pytest -m gpu`."""

from __future__ import annotations

import math

import pytest
import torch

from tests import tiny
from tests.test_attributes import SHAPES, STARTS, packed, planted
from tests.test_scorer import rows, run
from xtf_plugin import attributes, kernels, triton_dispatch
from xtf_plugin.documents import collect

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 5e-2), (torch.float16, 1e-2)])
def test_attention_received(shape, dtype, tolerance):
    query, key, lengths, scaling = planted(shape)
    truth = attributes.attention_received(query, key, lengths, scaling=scaling)
    device = [x.to("cuda") for x in (query.to(dtype), key.to(dtype), lengths)]
    ours = kernels.attention_received(*device, scaling=scaling).cpu()
    assert torch.equal(truth.isnan(), ours.isnan())
    assert (truth - ours).nan_to_num().abs().max() < tolerance


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 5e-2), (torch.float16, 1e-2)])
def test_attention_and_logsumexp(shape, dtype, tolerance):
    query, key, _, scaling = planted(shape)
    A = attributes.attention_map(query, key, scaling=scaling)
    expected = A @ key.repeat_interleave(shape[1] // shape[2], 1)
    query, key = query.to("cuda", dtype), key.to("cuda", dtype)
    output, logsumexp = kernels.attention(query, key, key, scaling=scaling)
    assert logsumexp.shape == query.shape[:3] and logsumexp.dtype is torch.float32
    assert (output.float().cpu() - expected).abs().max() < 4 * tolerance


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_scores_agree_with_the_cpu(family, dtype):
    """Rows that hold several documents, by flash attention over offsets where the dtype has it."""
    documents = collect(rows(sizes=range(20, 300, 7)))
    cpu, _ = run(documents, tiny.model(family), (0, 1))
    cuda, stats = run(documents, tiny.model(family).to("cuda", dtype), (0, 1), batch_tokens=1_000)
    assert stats.padded_tokens == stats.tokens and stats.batches > 3, "nothing was packed"
    for key, records in cpu.items():
        for name, values in records.columns.items():
            error = (torch.as_tensor(cuda[key].columns[name]) - torch.as_tensor(values)).nan_to_num().abs()
            assert error.mean() < (1e-4 if dtype is torch.float32 else 5e-2), (name, float(error.mean()))


def test_scores_agree_with_the_cpu():
    documents = collect(rows())
    cpu, _ = run(documents, tiny.model(), (0, 1))
    cuda, _ = run(documents, tiny.model().to("cuda"), (0, 1))
    for key, records in cpu.items():
        for name, values in records.columns.items():
            theirs = torch.as_tensor(cuda[key].columns[name])
            assert torch.allclose(theirs, torch.as_tensor(values), atol=1e-3, equal_nan=True)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.1), (torch.float16, 2e-2)])
def test_predictions(dtype, tolerance):
    torch.manual_seed(0)
    logits, targets = torch.randn(300, 1_000) * 3, torch.randint(1_000, (300,))
    truth = attributes.predictions(logits, lambda x: x, targets)
    ours = kernels.predictions(logits.to("cuda", dtype), lambda x: x, targets.to("cuda")).cpu()
    assert (truth - ours).abs().max() < tolerance


@pytest.fixture
def triton_works():
    """Without it a test of Triton's twins would pass on torch's."""
    if not triton_dispatch.usable(torch.zeros(1, device="cuda")):
        pytest.skip("needs Triton and compute capability 8.0")
    from xtf_plugin import triton_kernels

    yield triton_kernels
    assert triton_dispatch._broken == set()


def close(truth, found, tolerance):
    assert torch.equal(truth.isnan(), found.isnan())
    assert ((truth - found).abs() / (1 + truth.abs())).nan_to_num().max() < tolerance


LARGE = [(1, 8, 2, 4096, 128), (3, 4, 4, 1_001, 64), (2, 4, 1, 700, 256), (2, 4, 2, 333, 80), (2, 2, 2, 200, 24)]


@pytest.mark.usefixtures("triton_works")
@pytest.mark.parametrize("shape", LARGE)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-4), (torch.bfloat16, 5e-3), (torch.float16, 2e-3)])
@pytest.mark.parametrize("options", [{}, {"window": 100, "start": 37}, {"softcap": 5.0, "start": 150}], ids=str)
def test_triton_attention_received(monkeypatch, shape, dtype, tolerance, options):
    query, key, lengths, scaling = planted(shape, dtype=dtype)
    query, key, lengths = (x.to("cuda") for x in (query, key, lengths))
    options = {"scaling": scaling, **options}
    truth = attributes.attention_received(query.float(), key.float(), lengths, **options)
    ours = kernels.attention_received(query, key, lengths, **options)
    close(truth, ours, tolerance)
    assert torch.equal(ours.nan_to_num(-1), kernels.attention_received(query, key, lengths, **options).nan_to_num(-1))
    monkeypatch.setattr(triton_dispatch, "usable", lambda tensor: False)
    close(kernels.attention_received(query, key, lengths, **options), ours, tolerance)


@pytest.mark.usefixtures("triton_works")
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-4), (torch.bfloat16, 5e-3), (torch.float16, 2e-3)])
@pytest.mark.parametrize("options", [{}, {"window": 9}, {"softcap": 2.0}], ids=str)
@pytest.mark.parametrize("lengths, starts", [(None, STARTS), ([1, 1_500, 64, 2_000, 3], None), ([2, 3] * 70, None)])
def test_packed_documents(dtype, tolerance, options, lengths, starts):
    query, key, offsets, scaling = packed(D=64) if lengths is None else packed(lengths, D=64)
    query, key, offsets = query.to("cuda", dtype), key.to("cuda", dtype), offsets.to("cuda")
    options = {"scaling": scaling, **options}
    output, logsumexp = kernels.attention(query, key, key, **options, offsets=offsets)
    expected = kernels.attention(
        query.cpu().float(), key.cpu().float(), key.cpu().float(), **options, offsets=offsets.cpu()
    )
    assert (output.float().cpu() - expected[0]).abs().max() < 20 * tolerance
    assert (logsumexp.cpu() - expected[1]).abs().max() < tolerance
    starts = None if starts is None else starts.to("cuda")
    options |= {"offsets": offsets, "starts": starts}
    truth = attributes.attention_received(query.float(), key.float(), None, **options)
    close(truth, kernels.attention_received(query, key, None, **options, logsumexp=logsumexp), tolerance)


def test_triton_reaches_beyond_32_bits(triton_works):
    """Two rows more than 2^31 elements apart."""
    if torch.cuda.mem_get_info()[0] < 6 << 30:
        pytest.skip("needs 6 GB")
    far = 2**31 + 4_096
    storage = torch.empty(far + 500_000, dtype=torch.bfloat16, device="cuda")
    query, key, lengths, scaling = planted((2, 4, 2, 300, 64), dtype=torch.bfloat16)
    views = [
        storage[offset:].as_strided(x.shape, (far, *x.stride()[1:])).copy_(x)
        for offset, x in ((0, query), (200_000, key))
    ]
    near = query.to("cuda"), key.to("cuda")
    logsumexp = kernels.attention(*near, near[1], scaling=scaling)[1]
    options = {"scaling": scaling, "logsumexp": logsumexp}
    found = [triton_works.attention_received(*x, lengths.to("cuda"), **options) for x in (views, near)]
    assert torch.equal(*(x.nan_to_num(-1) for x in found))
    logits, targets = torch.randn(2, 5_000, device="cuda").bfloat16(), torch.tensor([1, 4_999], device="cuda")
    rows = storage.as_strided((2, 5_000), (far, 1)).copy_(logits)
    assert torch.equal(triton_works.moments(rows, targets), triton_works.moments(logits, targets))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("V", [1, 301, 32_000, 151_936])
@pytest.mark.parametrize("options", [{}, {"scale": 0.25, "softcap": 5.0}], ids=str)
def test_triton_moments(monkeypatch, triton_works, dtype, V, options):
    torch.manual_seed(0)
    logits, targets = torch.randn(70, V, device="cuda") * 3, torch.randint(V, (70,), device="cuda")
    logits[0], logits[1, V // 2] = 0.0, 40.0
    logits[2, : V // 2] = -math.inf
    logits[3, V - 1], logits[4, 0] = math.inf, math.nan
    logits = logits.to(dtype)
    ours = triton_works.moments(logits, targets, **options)
    assert torch.equal(ours.nan_to_num(-1), triton_works.moments(logits, targets, **options).nan_to_num(-1))
    truth = attributes.predictions(logits, lambda x: x, targets, **options)
    assert torch.allclose(truth, ours, atol=2e-4, equal_nan=True)
    monkeypatch.setattr(triton_dispatch, "usable", lambda tensor: False)
    theirs = kernels.predictions(logits.float(), lambda x: x, targets, **options)
    assert torch.allclose(theirs, ours, atol=2e-4, equal_nan=True)
