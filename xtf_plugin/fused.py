"""Axolotl's fused LoRA kernels are bypassed where a reference would not be the base model through them.

They replace the forward of feed-forward parts and embeddings on each instance, and that of attention on its class. With
adapters off, three things remain that are not the base model: Gemma's embeddings lose their factor, its feed-forward
parts get the exact GELU instead of the tanh approximation, and attention of a model without kernels (a separate
reference) lacks the two methods that the class's new forward calls.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import MethodType

from torch import nn

_KERNELS = "axolotl.kernels.lora"
_PATCHES = "axolotl.monkeypatch.lora_kernels"
_PROJECTIONS = {"apply_qkv": "original_apply_qkv_optional_v", "apply_o": "original_apply_o"}


@contextmanager
def bypass_fused_kernels(model: nn.Module) -> Iterator[None]:
    """Modules whose forward Axolotl replaced run their own; attention that has no kernels runs as it is.

    Kernels for the projections of attention stay: with adapters off they give what the projections give.
    """
    patches = sys.modules.get(_PATCHES)
    if patches is None:
        yield
        return
    with ExitStack() as stack:
        for module in model.modules():
            own = vars(module)
            if getattr(own.get("forward"), "__module__", None) == _KERNELS:
                stack.callback(own.__setitem__, "forward", own.pop("forward"))
            if getattr(type(module).forward, "__module__", None) != _PATCHES:
                continue
            for name in _PROJECTIONS.keys() - own.keys():
                own[name] = MethodType(getattr(patches, _PROJECTIONS[name]), module)
                stack.callback(own.pop, name)
        yield
