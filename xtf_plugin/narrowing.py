"""The last layer's feed-forward part only for the tokens whose prediction somebody reads.

Behind it nothing looks at the other tokens any more: their part, two thirds of a layer, would be thrown away. With
prompts as long as the answers that is a third of the last layer; for a shallow model or long prompts some percent of
all.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

LAYERS = ("layers", "h", "blocks")
FEED_FORWARD = ("mlp", "feed_forward", "ffn")


def last_feed_forward(decoder: nn.Module) -> nn.Module | None:
    """The feed-forward module of a decoder's last layer, by the names that transformers' models give it, or None."""
    for name in LAYERS:
        layers = getattr(decoder, name, None)
        if isinstance(layers, nn.ModuleList) and len(layers):
            found = (getattr(layers[-1], part, None) for part in FEED_FORWARD)
            return next((module for module in found if isinstance(module, nn.Module)), None)
    return None


@dataclass
class Narrowed:
    """Whether something was left out."""

    happened: bool = False


@contextmanager
def only_where(module: nn.Module | None, wanted: Tensor, tokens: int) -> Iterator[Narrowed]:
    """Within this, the module gives 0 for tokens that are not `wanted`, and does not work them out.

    A call with anything but one tensor of such tokens, and a module that gives anything but one tensor, stay as they
    are.

    Args:
        wanted: (P,) indices into the flattened tokens (B * T,); tokens: B * T.
    """
    told = Narrowed()
    if module is None:
        yield told
        return
    before = vars(module).get("forward")  # accelerate and PEFT put theirs on the instance
    forward = module.forward

    def narrowed(*given: Any, **options: Any) -> Any:
        hidden = given[0] if len(given) == 1 and not options else None
        if not isinstance(hidden, Tensor) or hidden.shape[:-1].numel() != tokens or not len(wanted):
            return forward(*given, **options)
        at = wanted.to(hidden.device)  # a model may be spread over devices
        result = forward(hidden.flatten(0, -2)[at][None])
        if not isinstance(result, Tensor):
            return forward(hidden)
        told.happened = True
        output = torch.zeros(tokens, result.shape[-1], dtype=result.dtype, device=result.device)
        return output.index_copy_(0, at, result[0]).view(*hidden.shape[:-1], -1)

    module.forward = narrowed
    try:
        yield told
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before
