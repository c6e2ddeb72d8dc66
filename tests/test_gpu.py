"""The same definitions on a CUDA device; one command on a machine that has one: `python -m pytest -m gpu`."""

from __future__ import annotations

import pytest
import torch

from tests import tiny
from tests.test_attributes import SHAPES, planted
from tests.test_scorer import rows, run
from xtf_plugin import attributes, kernels
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
