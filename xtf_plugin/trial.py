"""A reference is tried once before it scores: against its own forward, and for which shortcuts give the same.

What an architecture does besides decoder, attention and head cannot be known in advance. So scores that differ from
the model's own are refused, and a shortcut that changes them is not taken.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.modules.conv import _ConvNd

from .batches import is_out_of_memory, too_little
from .data.documents import DocumentSet
from .errors import XTFError
from .packing import Packed
from .reference import Reference, last_feed_forward, rotary_switch

logger = logging.getLogger(__name__)

CHECK_TOKENS = 128  # length of the document on which the reference is held against its own forward
ROUNDING = 1e-4  # what scores may move by in any case, and ...
TIMES = 3.0  # ... by how many times as much as between two forwards that are equal but for rounding
CANNOT = (XTFError, TypeError, ValueError, RuntimeError, LookupError, AttributeError)


@dataclass(frozen=True)
class Packing:
    """Where documents are packed into one row; elsewhere rows are padded, which costs less there.

    Args:
        devices: types of devices whose attention takes packed rows as they are.
        apart: also for attention that takes the rows apart again.
        windows: also documents that are longer than a sliding window.
    """

    devices: tuple[str, ...] = ("cuda",)
    apart: bool = False
    windows: bool = False


WHERE_FASTER = Packing()


def check(
    documents: DocumentSet,
    wanted: NDArray[np.int64],
    reference: Reference,
    layers: tuple[int, ...],
    packing: Packing = WHERE_FASTER,
) -> None:
    """Refuse a reference that cannot score these documents, and hold it against its own forward on the start of one.

    Args:
        documents, wanted, layers, packing: see `scorer.score`.

    Raises:
        XTFError: ids beyond its vocabulary, rotary embeddings that follow the data, no room for this one document; or
            see `against_own_forward`.
    """
    reference.check_ids(int(documents.input_ids.max()))
    switch, longest = rotary_switch(reference.text_config), int(documents.lengths.max())
    if switch is not None and switch[0] != "longrope" and longest > switch[1]:
        raise XTFError(
            f"{reference.name} has rotary embeddings of type `{switch[0]}`, which change with the longest document so "
            f"far beyond {switch[1]} tokens; the longest here has {longest}. A document's scores would depend on the "
            f"others. Set max_length to at most {switch[1]}, or name another reference under `reference.model`."
        )
    if _in_8_bits(reference):
        logger.warning(
            "xtf: %s multiplies in 8 bits (LLM.int8()), where rounding depends on every document of a batch: other "
            "batches give somewhat other scores. `nf4` and `none` do not do that.",
            reference.name,
        )
    if len(wanted):
        ids, _ = documents.document(int(wanted[np.minimum(documents.lengths[wanted], CHECK_TOKENS).argmax()]))
        sample = torch.from_numpy(ids[:CHECK_TOKENS].astype(np.int64)).to(reference.device)
        try:
            against_own_forward(reference, sample, 0.1 if _low_precision(reference) else 1e-3, layers, packing)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not is_out_of_memory(error) or isinstance(error, XTFError):
                raise
            raise too_little(len(sample), str(error)) from None


def _in_8_bits(reference: Reference) -> bool:
    """Whether the model multiplies with LLM.int8() of bitsandbytes."""
    return any(type(module).__name__ == "Linear8bitLt" for module in reference.model.modules())


def _low_precision(reference: Reference) -> bool:
    """Whether any part of the forward runs in 16 bits; QLoRA keeps norms in float32 around a bfloat16 product."""
    low = (torch.float16, torch.bfloat16)
    with reference.autocast():
        autocast = torch.is_autocast_enabled(reference.device.type)
    return (
        autocast
        or _in_8_bits(reference)  # its inputs are float16, whatever the model's dtype
        or any(parameter.dtype in low for parameter in reference.model.parameters())
        or any(getattr(module, "compute_dtype", None) in low for module in reference.model.modules())
    )


def against_own_forward(
    reference: Reference,
    input_ids: Tensor,
    tolerance: float,
    layers: tuple[int, ...],
    packing: Packing = WHERE_FASTER,
) -> None:
    """Hold our log-probabilities against those of the model's own forward and attention, on one short document, and
    attention received against its definition.

    Catches a model whose head or attention does something that we do not know of, and kernels that do not give what
    they should here. Sets the reference's `packs` and `narrows`. Once for a reference, and once more when attention is
    recorded for the first time.

    Raises:
        XTFError: they differ by more than `tolerance` on average, in nats and in parts of uniform attention, and
            log-probabilities in 8 bits by more than rounding accounts for; names the model.
    """
    part = "attention" if layers else "log-probabilities"
    if part in reference.checked or len(input_ids) < 2:
        return
    model = reference.model
    lengths = torch.tensor([len(input_ids)], device=input_ids.device)

    def run(plainly: bool) -> _Given:
        hidden, received = reference.forward(input_ids[None], lengths, layers, plainly=plainly)
        return _Given.of(reference, hidden[0], input_ids, received)

    def own(attention: str = "eager") -> Tensor:
        with _own_attention(reference, attention):
            logits = type(model).forward(model, input_ids=input_ids[None], use_cache=False).logits
        _check_logits(reference, logits, len(input_ids))
        picked = logits[0, :-1].float().log_softmax(-1)
        found: Tensor = picked.gather(-1, input_ids[1:, None].to(picked.device))[:, 0]
        return found

    # In 8 bits a change of the last bit can move a value by a whole step: how far, the model's own forward says.
    with reference.scoring(record=bool(layers)):
        ours, theirs = reference.with_full_weights(lambda: (run(False), own()))
        plain = reference.with_full_weights(lambda: run(True)) if layers else ours
        theirs = theirs.to(ours.logprobs.device)
        other = reference.with_full_weights(lambda: own("sdpa")) if _in_8_bits(reference) else theirs
        rounding = _mean_gap(other.to(theirs.device), theirs)
    _check_log_probabilities(reference, ours.logprobs, theirs, max(tolerance, TIMES * rounding))
    _check_attention(reference, ours.received, plain.received, tolerance)
    if not reference.lockstep:  # what one rank tries all would have to
        equal = _Given(theirs, plain.received)  # equal but for rounding: how much it does, it does to shortcuts too
        _try_shortcuts(reference, input_ids, ours, ours.gap(equal), layers, packing)
    reference.checked |= {part, "log-probabilities"}


@dataclass(frozen=True)
class _Given:
    """Log-probabilities of all tokens of a document but the first, and the attention that its tokens receive."""

    logprobs: Tensor
    received: Tensor | None

    @classmethod
    def of(cls, reference: Reference, hidden: Tensor, ids: Tensor, received: Tensor | None) -> _Given:
        """From states (T, D), token ids (T,) and attention received (1, T)."""
        found = reference.predictions(hidden[:-1], ids[1:])[0]
        return cls(found, None if received is None else received[0].float())

    def gap(self, other: _Given) -> float:
        """The largest difference; infinite where one is undefined and the other is not."""
        gap = 0.0
        for one, two in ((self.logprobs, other.logprobs), (self.received, other.received)):
            if one is None or two is None or not len(one):
                continue
            if not torch.equal(one.isnan(), two.isnan()):
                return float("inf")
            gap = max(gap, float((one - two).nan_to_num().abs().max()))
        return gap


def _mean_gap(one: Tensor, two: Tensor) -> float:
    return float((one - two).abs().mean())


def _check_log_probabilities(reference: Reference, ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    if not bool(theirs.isfinite().any()):
        raise XTFError(
            f"the reference {reference.name} gives NaN or infinite log-probabilities: its weights or its precision are "
            "broken. Try `reference.dtype: float32`, or another reference."
        )
    gap = _mean_gap(ours, theirs)
    if not gap <= tolerance:
        raise XTFError(
            f"{reference.name} ({type(reference.model).__name__}): log-probabilities differ from the model's own "
            f"forward by {gap:.2g} nats on average (allowed: {tolerance:.2g}). This architecture is not supported as a "
            "reference; name another one under `reference.model`."
        )


def _check_attention(reference: Reference, ours: Tensor | None, plain: Tensor | None, tolerance: float) -> None:
    if ours is None or plain is None:
        return
    gap = float((ours - plain)[:-1].abs().mean())  # nothing follows the last token, which receives nothing
    if not gap <= tolerance:
        raise XTFError(
            f"{reference.name}: attention received differs from its definition by {gap:.2g} on average (1 is uniform "
            f"attention, allowed: {tolerance:.2g}): a kernel of this PyTorch or device does not give what it should. "
            "Please report this; `reasoning_importance: false` scores without."
        )


def _try_shortcuts(
    reference: Reference, ids: Tensor, ours: _Given, rounding: float, layers: tuple[int, ...], packing: Packing
) -> None:
    """Take the shortcuts that give `ours` of the document `ids` (T,), but for a few times the `rounding`."""
    stranger = ids.flip(0)  # a document that tells another one nothing, as far as that can be had from it
    length = torch.tensor([len(ids)] * 2, device=ids.device)

    def narrow() -> tuple[_Given, _Given]:
        rows = torch.stack([ids, stranger])
        wanted = torch.arange(1, rows.numel() - 1, 3, device=ids.device)  # neighbours of what is read are not read
        targets, found = rows.flatten()[wanted + 1], []
        for read in (wanted, None):
            hidden, received = reference.forward(rows, length, layers, wanted=read)
            states = hidden.flatten(0, 1)[wanted.to(hidden.device)]
            found.append(_Given(reference.predictions(states, targets)[0], None if received is None else received[0]))
            if read is not None and not reference.narrowed:
                raise LookupError("its last feed-forward part takes or gives something else than one tensor")
        return found[0], found[1]

    def pack() -> tuple[_Given, _Given]:
        if any(isinstance(module, _ConvNd) for module in reference.decoder.modules()):
            raise LookupError("it has convolutions, and maybe a state, that know no documents")
        row = torch.cat([stranger[: 1 + len(ids) // 3], ids, stranger])
        bounds = np.asarray([0, 1 + len(ids) // 3, len(row) - len(ids), len(row)])
        offsets = torch.from_numpy(bounds).to(ids.device)
        packed = Packed(offsets, torch.zeros_like(offsets[1:]), bounds, whole=not packing.apart)
        hidden, received = reference.forward(row[None], offsets.diff(), layers, packed=packed)
        here = slice(int(bounds[1]), int(bounds[2]))
        return _Given.of(reference, hidden[0, here], ids, None if received is None else received[:, here]), ours

    if last_feed_forward(reference.decoder) is not None:
        reference.narrows = True
        reference.narrows = _same(reference, narrow, rounding, bool(layers), "narrowing its last layer")
    if ids.device.type in packing.devices:
        reference.packs = _same(reference, pack, rounding, True, "packed rows")


def _same(
    reference: Reference, run: Callable[[], tuple[_Given, _Given]], rounding: float, record: bool, what: str
) -> bool:
    """Whether a shortcut gives the same, by the largest difference: a leak may show at one token alone."""
    try:
        with reference.scoring(record=record):
            found, expected = reference.with_full_weights(run)
    except CANNOT as error:
        logger.info("xtf: %s is scored without %s: %s", reference.name, what, error)
        return False
    gap, allowed = found.gap(expected), max(ROUNDING, TIMES * rounding)
    if len(found.logprobs) and gap <= allowed:
        return True
    logger.info("xtf: %s is scored without %s: scores move by %.2g", reference.name, what, gap)
    return False


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
def _own_attention(reference: Reference, attention: str) -> Iterator[None]:
    """Inside `scoring()`: an implementation of transformers (eager or sdpa) instead of ours."""
    config = reference.model.config
    before = config._attn_implementation
    config._attn_implementation = attention
    try:
        yield
    finally:
        config._attn_implementation = before
