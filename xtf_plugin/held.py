"""A reference that stays open while training goes on, and what must be true for that."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import numpy as np
import torch
from torch import nn

from .errors import XTFUserError
from .fingerprint import base_tensors
from .plan import ReferenceProvider
from .reference import Reference


def check_base(model: nn.Module) -> None:
    """Refuse a model whose base weights are trained: it is the reference throughout a streamed run.

    Raises:
        XTFUserError: names one such weight.
    """
    trained = [name for name, tensor in base_tensors(model) if tensor.requires_grad]
    if trained:
        raise XTFUserError(
            f"xtf: the training data is streamed, so scoring goes on while the model is trained, but training changes "
            f"its base weights ({trained[0]} and {len(trained) - 1} more): scores would drift. Name the base model "
            "under xtf `reference.model`, train adapters alone (use_peft, no `bias`), or do not stream."
        )


class HeldReference:
    """A reference that is opened when it is first needed, and stays.

    Args:
        provider: of the reference.
        trained: whether it is the model being trained, whose base weights must stay as they are.
    """

    def __init__(self, provider: ReferenceProvider, trained: bool) -> None:
        self.provider, self.trained = provider, trained
        self.fingerprint, self.description = provider.fingerprint, provider.description
        self.text_config = provider.text_config
        self._stack = ExitStack()
        self._reference: Reference | None = None
        self._base: list[torch.Tensor] = []

    def open(self) -> AbstractContextManager[Reference]:
        """See `pipeline.ReferenceProvider`; closing it does nothing."""
        return nullcontext(self.reference())

    def reference(self) -> Reference:
        """The reference itself."""
        if self._reference is None:
            self._reference = self._stack.enter_context(self.provider.open())
            if self.trained:
                self._base = [tensor for _, tensor in base_tensors(self._reference.model)]
        return self._reference

    def check(self) -> None:
        """Refuse to score on once some base weight is being trained; see `check_base`."""
        if self._reference is not None and any(tensor.requires_grad for tensor in self._base):
            check_base(self._reference.model)

    def close(self) -> None:
        """Free it, if it is a separate one."""
        self._reference, self._base = None, []
        self._stack.close()


@contextmanager
def random_state_kept(device: torch.device | None = None) -> Iterator[None]:
    """What is drawn inside changes no number that training draws: dropout, and whatever the dataset does."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = [device] if device is not None and device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
