"""The same definitions on a CUDA device; one command on a machine that has one: `python -m pytest -m gpu`.

That collects all tests, and so asks for all that `.[dev]` installs. `python -m pytest tests/gpu/test_gpu.py` runs the
same with torch, Triton, transformers, PEFT, pyarrow and xxhash alone.
"""

from __future__ import annotations

import gc
import math

import numpy as np
import pytest
import torch

from tests import tiny
from tests.scoring.test_engine import rows, run
from tests.scoring.test_kernels import SHAPES, STARTS, each_alone, error, packed, parity, planted
from tests.scoring.test_shortcuts import PACKED
from xtf_plugin.data.documents import collect
from xtf_plugin.scoring import engine, self_check
from xtf_plugin.scoring.kernels import dispatch as kernels
from xtf_plugin.scoring.kernels import eager as attributes
from xtf_plugin.scoring.kernels import triton_dispatch
from xtf_plugin.scoring.kernels.eager import AttentionSpec
from xtf_plugin.scoring.reference import Reference, borrow
from xtf_plugin.store.store import ScoreStore

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def close(truth, found, *, absolute, relative=0.0):
    """Undefined in the same places, and otherwise alike; says by how much if not."""
    torch.testing.assert_close(found, truth, rtol=relative, atol=absolute, equal_nan=True)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 5e-2), (torch.float16, 1e-2)])
def test_attention_received(shape, dtype, tolerance):
    query, key, lengths, scaling = planted(shape)
    truth = attributes.attention_received(query, key, lengths, AttentionSpec(scaling))
    device = [x.to("cuda") for x in (query.to(dtype), key.to(dtype), lengths)]
    close(truth, kernels.attention_received(*device, AttentionSpec(scaling)).cpu(), absolute=tolerance)


def logsumexps(query, key, scaling):
    """Of every score row, in the dtype of what is given, by the definition."""
    scores = query @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).transpose(-1, -2) * scaling
    return scores.masked_fill(~attributes.visible(query.shape[2], None), float("-inf")).logsumexp(-1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 5e-2), (torch.float16, 1e-2)])
def test_attention_and_logsumexp(shape, dtype, tolerance):
    query, key, _, scaling = planted(shape)
    A = attributes.attention_map(query, key, AttentionSpec(scaling))
    expected = A @ key.repeat_interleave(shape[1] // shape[2], 1)
    truth, naive = (logsumexps(query.to(x), key.to(x), scaling) for x in (torch.float64, dtype))
    query, key = query.to("cuda", dtype), key.to("cuda", dtype)
    output, logsumexp = kernels.attention_and_logsumexp(query, key, key, AttentionSpec(scaling))
    assert logsumexp.shape == query.shape[:3] and logsumexp.dtype is torch.float32
    assert (output.float().cpu() - expected).abs().max() < 4 * tolerance
    parity(truth, logsumexp.cpu(), naive, slack=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_scores_agree_with_the_cpu(family, dtype):
    """Rows that hold several documents: by flash attention over offsets, or where there is none made to."""
    documents = collect(rows(sizes=range(20, 300, 7)))
    cpu, _ = run(documents, tiny.model(family), (0, 1))
    packing = self_check.WHERE_FASTER if (family, dtype) == ("llama", torch.bfloat16) else PACKED
    model = tiny.model(family).to("cuda", dtype)
    cuda, stats = run(documents, model, (0, 1), batch_tokens=1_000, packing=packing)
    assert stats.padded_tokens == stats.tokens and stats.batches > 3, "nothing was packed"
    for key, records in cpu.items():
        for name, values in records.columns.items():
            off = error(torch.as_tensor(values), torch.as_tensor(cuda[key].columns[name])).mean()
            assert off < (1e-4 if dtype is torch.float32 else 5e-2), (name, float(off))


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


def held():
    """Bytes on the device, without the workspaces that cuBLAS keeps between its calls."""
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()


def test_training_has_the_memory_that_it_has_without():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny.model(), LoraConfig(r=4, target_modules="all-linear")).to("cuda").train()
    ids = torch.randint(4, 400, (4, 64), device="cuda")

    def peak():
        before = held()
        torch.cuda.reset_peak_memory_stats()
        model(input_ids=ids, labels=ids).loss.backward()
        model.zero_grad(set_to_none=True)
        return torch.cuda.max_memory_allocated() - before

    peak()  # what is set up once
    gc.collect()
    before, without, found = held(), peak(), []
    documents = collect(rows(sizes=range(20, 300, 7)))
    torch.cuda.reset_peak_memory_stats()
    engine.score(documents, np.arange(len(documents)), borrow(model), (0, 1), found.append, progress=False)
    assert found and torch.cuda.max_memory_allocated() > before
    assert held() == before
    assert peak() == without > 0


@pytest.mark.parametrize("late", [False, True], ids=["begun", "waited for"])
def test_an_error_in_the_third_batch_leaves_the_first_two(tmp_path, monkeypatch, late):
    """Whether it shows when the batch is begun, or when its scores are waited for and the fourth is begun already."""
    documents, launch, begun = collect(rows(sizes=[60] * 5)), engine._Pass._launch, []

    def broken():
        raise RuntimeError("planted")

    def failing(*given, **options):
        begun.append(given)
        if len(begun) != 3:
            return launch(*given, **options)
        return broken if late else broken()

    monkeypatch.setattr(engine._Pass, "_launch", failing)
    reference = Reference(tiny.model().to("cuda"), "tiny")
    with pytest.raises(RuntimeError, match="planted"), ScoreStore(tmp_path, "0123456789abcdef", "0,1") as store:
        engine.score(documents, np.arange(5), reference, (0, 1), store.add, batch_tokens=60, progress=False)
    assert len(begun) == (4 if late else 3), "no batch is begun ahead"
    with ScoreStore(tmp_path, "0123456789abcdef", "0,1") as store:
        found = store.lookup(documents.keys, np.diff(documents.completion_offsets)).found
    assert found[:3].tolist() == [True, True, False]


@pytest.fixture(autouse=True)
def each_test_tries_triton_anew(monkeypatch):
    """A kernel that fails in one test must not make later ones run on torch, and no test may pass on torch unseen."""
    monkeypatch.setattr(triton_dispatch, "_broken", set())
    yield
    assert triton_dispatch._broken == set(), "torch ran in the place of Triton"


@pytest.fixture
def triton_works(monkeypatch):
    """Without it a test of Triton's implementations would pass on torch's."""
    if not triton_dispatch.usable(torch.zeros(1, device="cuda")):
        pytest.skip("needs Triton and compute capability 8.0")
    from xtf_plugin.scoring.kernels import triton_attention as triton_kernels

    taken = []
    for implementation in (triton_kernels.attention_received, triton_kernels.moments):

        def spied(*given, implementation=implementation, **options):
            taken.append(implementation)
            return implementation(*given, **options)

        monkeypatch.setattr(triton_kernels, implementation.__name__, spied)
    yield triton_kernels
    assert taken


LARGE = [(1, 8, 2, 4096, 128), (3, 4, 4, 1_001, 64), (2, 4, 1, 700, 256), (2, 4, 2, 333, 80), (2, 2, 2, 200, 24)]


@pytest.mark.usefixtures("triton_works")
@pytest.mark.parametrize("shape", LARGE)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-4), (torch.bfloat16, 5e-3), (torch.float16, 2e-3)])
@pytest.mark.parametrize("options", [{}, {"window": 100, "start": 37}, {"softcap": 5.0, "start": 150}], ids=str)
def test_triton_attention_received(monkeypatch, shape, dtype, tolerance, options):
    query, key, lengths, scaling = planted(shape, dtype=dtype)
    query, key, lengths = (x.to("cuda") for x in (query, key, lengths))
    options = {"scaling": scaling, **options}
    truth = attributes.attention_received(query.float(), key.float(), lengths, AttentionSpec(**options))
    ours = kernels.attention_received(query, key, lengths, AttentionSpec(**options))
    close(truth, ours, absolute=tolerance, relative=tolerance)
    close(ours, kernels.attention_received(query, key, lengths, AttentionSpec(**options)), absolute=0)
    monkeypatch.setattr(triton_dispatch, "usable", lambda tensor: False)
    torch_alone = kernels.attention_received(query, key, lengths, AttentionSpec(**options))
    close(torch_alone, ours, absolute=tolerance, relative=tolerance)


@pytest.mark.usefixtures("triton_works")
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-4), (torch.bfloat16, 5e-3), (torch.float16, 2e-3)])
@pytest.mark.parametrize("options", [{}, {"window": 9}, {"softcap": 2.0}], ids=str)
@pytest.mark.parametrize("lengths, starts", [(None, STARTS), ([1, 1_500, 64, 2_000, 3], None), ([2, 3] * 70, None)])
def test_packed_documents(dtype, tolerance, options, lengths, starts):
    query, key, offsets, scaling = packed(D=64) if lengths is None else packed(lengths, D=64)
    query, key, offsets = query.to("cuda", dtype), key.to("cuda", dtype), offsets.to("cuda")
    options = {"scaling": scaling, **options}
    output, logsumexp = kernels.attention_and_logsumexp(query, key, key, AttentionSpec(**options, offsets=offsets))
    expected = kernels.attention_and_logsumexp(
        query.cpu().float(), key.cpu().float(), key.cpu().float(), AttentionSpec(**options, offsets=offsets.cpu())
    )
    assert (output.float().cpu() - expected[0]).abs().max() < 20 * tolerance
    assert (logsumexp.cpu() - expected[1]).abs().max() < tolerance
    starts = None if starts is None else starts.to("cuda")
    options |= {"offsets": offsets, "starts": starts}
    truth = each_alone(query.float(), key.float(), AttentionSpec(**options))
    found = kernels.attention_received(query, key, None, AttentionSpec(**options), logsumexp)
    close(truth, found, absolute=tolerance, relative=tolerance)


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
    logsumexp = kernels.attention_and_logsumexp(*near, near[1], AttentionSpec(scaling))[1]
    received = triton_works.attention_received
    found = [received(*x, lengths.to("cuda"), AttentionSpec(scaling), logsumexp) for x in (views, near)]
    close(*found, absolute=0)
    assert found[0].isfinite().any()
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
    close(ours, triton_works.moments(logits, targets, **options), absolute=0)
    truth = attributes.predictions(logits, lambda x: x, targets, **options)
    assert torch.allclose(truth, ours, atol=2e-4, equal_nan=True)
    monkeypatch.setattr(triton_dispatch, "usable", lambda tensor: False)
    theirs = kernels.predictions(logits.float(), lambda x: x, targets, **options)
    assert torch.allclose(theirs, ours, atol=2e-4, equal_nan=True)
