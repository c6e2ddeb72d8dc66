"""Torch in place of the CUDA calls of Axolotl's fused LoRA kernels, so that the rest of them runs on a CPU as it is.

Three things: the C functions of bitsandbytes that take apart doubly quantised nf4, and the Triton launches of SwiGLU
and GEGLU, forward and backward. Each is replaced by what it computes, in the precision in which it does.
"""

from __future__ import annotations

import bitsandbytes
import torch
import torch.nn.functional as F
from axolotl.kernels import geglu, lora, quantize, swiglu
from torch import Tensor

NAMES = [
    (quantize, "_ctypes_nf4_dequant"),
    (lora, "swiglu_forward"),
    (lora, "geglu_forward"),
    (swiglu, "_swiglu_bwd_op"),
    (geglu, "_geglu_bwd_op"),
]


def nf4(W, absmax, code2, absmax2, offset, blocksize, blocksize2, shape, dtype) -> Tensor:
    """Two values a byte, the high half first; blocks have scales, which are bytes in blocks that have scales."""
    scales = code2[absmax.int()] * absmax2.repeat_interleave(blocksize2)[: len(absmax)] + offset
    packed = W.reshape(-1).view(torch.uint8)  # stored as numbers of any type, for FSDP's sake
    code = bitsandbytes.functional.get_4bit_type("nf4", device=W.device)
    values = code[torch.stack([packed >> 4, packed & 15], 1).flatten().int()]
    values = values * scales.repeat_interleave(blocksize)[: len(values)]
    out = values[: shape.numel()].reshape(shape).to(dtype)
    return out.t() if W.shape[0] == 1 else out


def gated(activation):
    """The forward of a gated feed-forward part: the activation in float32, then in the dtype of `up`."""

    def forward(gate: Tensor, up: Tensor) -> Tensor:
        return activation(gate.float()).to(up.dtype) * up

    return forward


def gated_backward(activation):
    """Its backward, in place: the forward's output, the gradient of `gate` and that of `up`."""

    def backward(grad_output: Tensor, gate: Tensor, up: Tensor) -> None:
        with torch.enable_grad():
            wide = gate.detach().float().clone().requires_grad_()
            active = activation(wide)
            (slope,) = torch.autograd.grad(active.sum(), wide)
        active = active.detach().to(grad_output.dtype)
        grad_gate = ((grad_output * up).float() * slope).to(grad_output.dtype)
        grad_up = grad_output * active
        grad_output.copy_(active * up)
        gate.copy_(grad_gate)
        up.copy_(grad_up)

    return backward


REPLACED = [nf4, gated(F.silu), gated(F.gelu), gated_backward(F.silu), gated_backward(F.gelu)]


def replace_cuda_calls(setattr=setattr) -> None:
    """Put all of them in place; `setattr` may be pytest's."""
    for (module, name), function in zip(NAMES, REPLACED, strict=True):
        setattr(module, name, function)
