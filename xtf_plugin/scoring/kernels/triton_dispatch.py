"""Runs the Triton implementations on CUDA devices if Triton is installed and compiles.

A failure to compile is logged once, and PyTorch computes the result. Out of memory is raised.
"""

from __future__ import annotations

import functools
import logging
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LARGEST_HEAD = 1024  # bytes of one head of a token: a block of 32 columns and two of 32 queries then take 96 KB
_broken: set[str] = set()  # implementations that failed in this process


def usable(tensor: Tensor) -> bool:
    """Whether Triton takes this tensor; on GPUs before compute capability 8.0 it may abort the process."""
    if tensor.device.type != "cuda" or tensor.dtype not in DTYPES or _triton() is None:
        return False
    return torch.version.cuda is not None and torch.cuda.get_device_capability(tensor.device) >= (8, 0)


def head_fits(query: Tensor) -> bool:
    """Whether the smallest tiles of this head size fit a GPU's shared memory."""
    padded = 1 << (query.shape[-1] - 1).bit_length()
    return padded * query.element_size() <= LARGEST_HEAD


def attempt(name: str, tensor: Tensor, *arguments: Any, **options: Any) -> Tensor | None:
    """The result of the Triton implementation `name`, or None if PyTorch has to compute it.

    Raises:
        torch.OutOfMemoryError, RuntimeError: the device is out of memory.
    """
    implementations = _triton() if name not in _broken and usable(tensor) else None
    if implementations is None:
        return None
    try:
        result: Tensor = getattr(implementations, name)(tensor, *arguments, **options)
    except implementations.FAILURES as error:
        if "out of memory" in str(error).lower() or "CUDA error" in str(error):  # "CUDA error": of an earlier kernel
            raise
        _broken.add(name)
        _warn(error)
        return None
    return result


@functools.cache
def _triton() -> ModuleType | None:
    try:
        from . import triton_attention
    except (ImportError, AttributeError) as error:  # AttributeError: a Triton older than what torch 2.9 brings
        _warn(error)
        return None
    return triton_attention


def _warn(error: Exception) -> None:
    what = f"{type(error).__name__}: {str(error).strip()[:300]}"
    logger.warning("xtf: Triton cannot be used (%s); scoring uses PyTorch instead, and takes longer.", what)
