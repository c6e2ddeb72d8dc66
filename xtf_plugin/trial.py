"""A reference is tried once before it scores: against its own forward, and for which shortcuts give the same.

What an architecture does besides decoder, attention and head cannot be known in advance. So scores that differ from
the model's own are refused, and a shortcut that changes them is not taken.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .errors import XTFError
from .narrowing import last_feed_forward
from .packing import Packed
from .reference import Reference

logger = logging.getLogger(__name__)

PACKED_ON = ("cuda",)  # devices whose attention takes packed rows as they are; elsewhere padding costs less
CANNOT = (XTFError, TypeError, ValueError, RuntimeError, LookupError, AttributeError)


def against_own_forward(reference: Reference, input_ids: Tensor, tolerance: float, layers: tuple[int, ...]) -> None:
    """Compare our log-probabilities with those of the model's own forward and attention on one short document.

    Catches a model whose head or attention does something that we do not know of. Sets the reference's `packs` and
    `narrows`.

    Raises:
        XTFError: they differ by more than `tolerance` nats on average; names the model.
    """
    if reference.checked or len(input_ids) < 2:
        return
    model, name = reference.model, reference.name
    lengths = torch.tensor([len(input_ids)], device=input_ids.device)

    def run() -> tuple[Tensor, Tensor]:
        hidden, _ = reference.forward(input_ids[None], lengths, layers)
        with _own_attention(reference):
            logits = type(model).forward(model, input_ids=input_ids[None], use_cache=False).logits
        _check_logits(reference, logits, len(input_ids))
        return reference.predictions(hidden[0, :-1], input_ids[1:])[0], logits

    with reference.scoring(record=bool(layers)):
        ours, logits = reference.whole(run)
    theirs = logits[0, :-1].float().log_softmax(-1).gather(-1, input_ids[1:, None])[:, 0]
    if not bool(theirs.isfinite().any()):
        raise XTFError(
            f"the reference {name} gives NaN or infinite log-probabilities: its weights or its precision are broken. "
            "Try `reference.dtype: float32`, or another reference."
        )
    gap = float((ours - theirs).abs().mean())
    if not gap <= tolerance:
        raise XTFError(
            f"{name} ({type(model).__name__}): log-probabilities differ from the model's own forward by {gap:.2g} nats "
            f"on average (allowed: {tolerance:.2g}). This architecture is not supported as a reference; name another "
            "one under `reference.model`."
        )
    if not reference.lockstep:  # what one rank tries all would have to
        _try_shortcuts(reference, input_ids, ours, tolerance, layers)
    reference.checked = True


def _try_shortcuts(reference: Reference, ids: Tensor, ours: Tensor, tolerance: float, layers: tuple[int, ...]) -> None:
    """Take what gives the log-probabilities `ours` (T - 1,) of the document `ids` (T,)."""

    def narrow() -> tuple[Tensor, Tensor]:
        wanted = torch.arange(len(ids) // 2, len(ids) - 1, device=ids.device)
        length = torch.tensor([len(ids)], device=ids.device)
        hidden, _ = reference.forward(ids[None], length, layers, wanted=wanted)
        return reference.predictions(hidden[0, wanted], ids[wanted + 1])[0], ours[wanted]

    def pack() -> tuple[Tensor, Tensor]:
        row = torch.cat([ids[: 1 + len(ids) // 3], ids])
        offsets = torch.tensor([0, len(row) - len(ids), len(row)], device=ids.device)
        packed = Packed(offsets, torch.zeros_like(offsets[1:]), len(ids))
        hidden, _ = reference.forward(row[None], offsets.diff(), layers, packed=packed)
        return reference.predictions(hidden[0, int(offsets[1]) : -1], ids[1:])[0], ours

    if last_feed_forward(reference.decoder) is not None:
        reference.narrows = True
        reference.narrows = _same(reference, narrow, tolerance, bool(layers))
    if ids.device.type in PACKED_ON:
        reference.packs = _same(reference, pack, tolerance, True)


def _same(reference: Reference, run: Callable[[], tuple[Tensor, Tensor]], tolerance: float, record: bool) -> bool:
    try:
        with reference.scoring(record=record):
            found, expected = reference.whole(run)
    except CANNOT as error:
        logger.debug("xtf: %s is scored without a shortcut: %s", reference.name, error)
        return False
    if not len(found) or not torch.equal(found.isnan(), expected.isnan()):  # nothing was compared, or it broke
        return False
    return float((found - expected).nan_to_num().abs().mean()) <= tolerance


def _check_logits(reference: Reference, logits: Any, length: int) -> None:
    """Refuse a forward that leaves its logits out, or puts something else in their place, to save memory."""
    vocabulary = int(getattr(reference.text_config, "vocab_size", 0))
    shape = tuple(logits.shape) if isinstance(logits, Tensor) else ()
    if len(shape) != 3 or shape[:2] != (1, length) or shape[2] < vocabulary:
        raise XTFError(
            f"{reference.name} ({type(reference.model).__name__}) gives no logits for its log-probabilities to be held "
            f"against: for {length} tokens and a vocabulary of {vocabulary} it gives "
            f"{shape or type(logits).__name__}. Let its forward give them (in Unsloth the environment variable "
            "UNSLOTH_RETURN_LOGITS=1, and no UNSLOTH_RETURN_HIDDEN_STATES), or name another reference under "
            "`reference.model`."
        )


@contextmanager
def _own_attention(reference: Reference) -> Iterator[None]:
    """Inside `scoring()`: a plain implementation of the model's attention instead of ours."""
    config = reference.model.config
    before = config._attn_implementation
    config._attn_implementation = "eager"
    try:
        yield
    finally:
        config._attn_implementation = before
