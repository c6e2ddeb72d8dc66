"""What Triton's interpreter needs to run our kernels."""

from __future__ import annotations

import numpy as np
import pytest

try:
    from triton import Config, knobs
    from triton import language as tl
except ImportError:  # Windows and macOS
    knobs = None


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    """One choice of blocks, as nothing can be timed; and a product that reads a bfloat16 as one, not as an integer."""
    if knobs is None or not knobs.runtime.interpret:
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    from xtf_plugin.scoring.kernels import triton_attention

    def widened(x):
        if x.dtype != tl.bfloat16:
            return x
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    dot = InterpreterBuilder.create_dot
    monkeypatch.setattr(
        InterpreterBuilder, "create_dot", lambda self, a, b, *rest: dot(self, widened(a), widened(b), *rest)
    )
    monkeypatch.setattr(triton_attention._received, "configs", [Config({"BLOCK_Q": 64, "BLOCK_K": 64})])
