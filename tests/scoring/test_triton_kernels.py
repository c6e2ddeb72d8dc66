"""The Triton kernels without a GPU: run by the interpreter, compiled for several GPUs, replaced if they fail."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.reliability import amount
from tests.scoring.test_kernels import SHAPES, packed, planted
from tests.scoring.test_predictions import head_of
from xtf_plugin.scoring import kernels
from xtf_plugin.scoring.kernels import dispatch, eager, triton_dispatch
from xtf_plugin.scoring.kernels.eager import AttentionSpec

ROOT = Path(__file__).parents[2]

try:
    import triton
    from triton.backends.compiler import GPUTarget
except ImportError:  # Windows and macOS
    triton = None
needs_triton = pytest.mark.skipif(triton is None, reason="needs Triton")


@needs_triton
@pytest.mark.parametrize("kernel, short", [("received", "parity_float32 or documents_of_any_number"), ("moments", "")])
def test_in_the_interpreter(kernel, short):
    """In a process of its own, see `tests/interpreted`; `short`: what of it in every test run, all if empty."""
    test = ROOT / "tests" / "interpreted" / f"test_{kernel}.py"
    some = amount(["-k", short], [])
    result = subprocess.run(
        [sys.executable, "-m", "pytest", str(test), *some],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0 and " passed" in result.stdout, result.stdout + result.stderr


@needs_triton
@pytest.mark.parametrize("capability", [80, 90, 120])
class TestCompiled:
    """What the interpreter does not see: types, shapes of matrix products, arguments that Triton makes constants."""

    @pytest.fixture
    def compiled(self, monkeypatch, tmp_path, capability):
        """The kernels that our functions launch, in order, compiled and not run."""
        from triton.runtime import driver

        from xtf_plugin.scoring.kernels import triton_attention, triton_logit_stats

        device = SimpleNamespace(
            get_current_device=lambda: 0,
            get_current_stream=lambda device=None: 0,
            get_current_target=lambda: GPUTarget("cuda", capability, 32),
        )
        monkeypatch.setattr(driver, "_active", device)
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
        launched = []

        class Launch:
            def __init__(self, kernel, **constants):
                self.kernel, self.constants = kernel, constants

            def __getitem__(self, grid):
                return lambda *a, **k: launched.append(self.kernel.warmup(*a, grid=(1,), **k, **self.constants))

        tile = {"BLOCK_Q": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 2}
        monkeypatch.setattr(triton_attention, "_received", Launch(triton_attention._received.fn, **tile))
        monkeypatch.setattr(triton_logit_stats, "_row_moments", Launch(triton_logit_stats._row_moments))
        return triton_attention, launched

    def test_attention_received(self, compiled):
        implementations, launched = compiled
        for dtype in (torch.bfloat16, torch.float16):
            query, key, offsets, scaling = packed(D=80, tail=3)
            query, key, logsumexp = query.to(dtype), key.to(dtype), torch.zeros(query.shape[:3])
            lengths = torch.tensor([query.shape[2]])
            implementations.attention_received(query, key, lengths, AttentionSpec(scaling), logsumexp)
            spec = AttentionSpec(scaling, window=9, softcap=2.0, offsets=offsets.int(), starts=offsets[1:] * 0)
            implementations.attention_received(query, key, None, spec, logsumexp)
        assert len(launched) == 4
        assert all("mma" in kernel.asm["ptx"] for kernel in launched)  # tensor cores

    def test_a_new_length_or_number_of_documents_is_not_compiled_again(self, compiled):
        implementations, launched = compiled
        for B, T in [(1, 64), (2, 65), (3, 130), (2, 6)]:
            query, key, lengths, scaling = planted((B, 4, 2, T, 64), dtype=torch.bfloat16)
            spec = AttentionSpec(scaling, start=T // 3)
            implementations.attention_received(query, key, lengths, spec, torch.zeros(B, 4, T))
        assert len(launched) == 4 and len({id(kernel) for kernel in launched}) == 1

    def test_moments(self, compiled):
        implementations, launched = compiled
        for n, dtype in [(5, torch.bfloat16), (6, torch.bfloat16), (1, torch.float16), (3, torch.float32)]:
            implementations.moments(torch.zeros(n, 32_000, dtype=dtype), torch.zeros(n, dtype=torch.long), softcap=30.0)
        assert len({id(kernel) for kernel in launched}) == 3
        assert all(".v4." in kernel.asm["ptx"] for kernel in launched)  # 16 bytes at a time


class TestDispatch:
    """With implementations that are not Triton's, on a device that need not be CUDA."""

    @pytest.fixture
    def implementations(self, monkeypatch):
        calls = []

        def moments(logits, targets, **options):
            calls.append(len(logits))
            return eager.predictions(logits, lambda x: x, targets, **options)

        def attention_received(query, key, lengths, spec, logsumexp):
            calls.append(logsumexp.shape)
            return torch.zeros(len(query), query.shape[2])

        implementations = SimpleNamespace(
            calls=calls, moments=moments, attention_received=attention_received, FAILURES=(RuntimeError, OSError)
        )
        monkeypatch.setattr(triton_dispatch, "_triton", lambda: implementations)
        monkeypatch.setattr(triton_dispatch, "usable", lambda tensor: True)
        monkeypatch.setattr(triton_dispatch, "_broken", set())
        return implementations

    def test_the_cpu_is_left_to_torch(self, monkeypatch):
        def no_import():
            raise AssertionError("Triton imported for a CPU")

        monkeypatch.setattr(triton_dispatch, "_triton", no_import)
        assert triton_dispatch.attempt("moments", torch.zeros(1, 2), torch.zeros(1, dtype=torch.long)) is None

    def test_implementations_are_used_and_get_larger_chunks(self, implementations, monkeypatch):
        monkeypatch.setattr(dispatch, "TRITON_LOGIT_ELEMENTS", 301 * 100)
        given = head_of(300)
        assert torch.allclose(dispatch.predictions(*given), eager.predictions(*given), atol=2e-5)
        assert implementations.calls == [64, 100, 100, 36]

    def test_the_log_sum_exp_is_always_given(self, implementations):
        query, key, offsets, scaling = packed()
        dispatch.attention_received(query, key, None, AttentionSpec(scaling, offsets=offsets))
        query, key, lengths, scaling = planted(SHAPES[0])
        dispatch.attention_received(query, key, lengths, AttentionSpec(scaling))
        assert implementations.calls == [(1, 4, 138), (1, 4, 64)]

    @pytest.mark.parametrize("error", [RuntimeError("Failed to find C compiler"), OSError("ptxas")])
    def test_a_failure_is_reported_once_and_not_tried_again(self, implementations, monkeypatch, caplog, error):
        tried = []

        def broken(*_, **__):
            tried.append(1)
            raise error

        monkeypatch.setattr(implementations, "moments", broken)
        given = head_of(300)
        with caplog.at_level(logging.WARNING):
            for _ in range(2):
                assert torch.allclose(dispatch.predictions(*given), eager.predictions(*given), atol=2e-5)
        assert len(tried) == 1
        assert [str(error) in record.getMessage() for record in caplog.records] == [True]

    def test_out_of_memory_is_passed_on(self, implementations, monkeypatch):
        def full(*_, **__):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

        monkeypatch.setattr(implementations, "moments", full)
        for _ in range(2):  # and does not count as broken
            with pytest.raises(torch.OutOfMemoryError):
                dispatch.predictions(*head_of(3))

    def test_without_triton_one_warning(self, monkeypatch, caplog):
        monkeypatch.setitem(sys.modules, "xtf_plugin.scoring.kernels.triton_attention", None)
        monkeypatch.delattr(kernels, "triton_attention", raising=False)
        triton_dispatch._triton.cache_clear()
        try:
            with caplog.at_level(logging.WARNING):
                assert triton_dispatch._triton() is triton_dispatch._triton() is None
        finally:
            triton_dispatch._triton.cache_clear()
        assert [record.getMessage().startswith("xtf: Triton cannot be used") for record in caplog.records] == [True]
