"""A reference whose weights are split between ranks (FSDP): scoring runs inside the wrapper's own forward.

A rank holds a part of every weight. The wrapper gathers what a module needs when that module's forward begins, and what
belongs to no wrapped layer (embeddings, last norm, LM head) only while its own forward runs. So that is where decoder
and head are called. Each forward is a collective: the ranks have to run the same number of them, see `sharing`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.distributed.fsdp import FSDPModule

from .reference import Reference

T = TypeVar("T")


@dataclass
class ShardedReference(Reference):
    """A `Reference` under FSDP.

    Args:
        root: the outermost wrapper, which gathers the weights; the causal language model itself may be it (FSDP2).
    """

    root: Any = None

    @property
    def lockstep(self) -> bool:
        """Every forward gathers weights from all ranks."""
        return True

    @contextmanager
    def scoring(self, record: bool) -> Iterator[None]:
        """As any reference's; afterwards no rank keeps the whole weights that the root's forward leaves gathered."""
        with super().scoring(record):
            yield
        for module in self.root.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def whole(self, run: Callable[[], T]) -> T:
        """What `run` gives, called in place of the model's forward while the wrapper's forward is under way."""
        found: list[T] = []

        def forward(*_: Any, **__: Any) -> torch.Tensor:
            found.append(run())
            return torch.zeros((), device=self.device)

        own = self.model.__dict__.get("forward")  # TRL and accelerate put theirs on the instance
        self.model.forward = forward
        try:
            self.root(input_ids=torch.zeros((1, 1), dtype=torch.int64, device=self.device))
        finally:
            del self.model.forward
            if own is not None:
                self.model.forward = own
        return found[0]
