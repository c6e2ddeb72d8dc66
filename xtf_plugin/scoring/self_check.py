"""Checks of a reference before it scores: against the model's own forward, and whether it may pack documents.

What an architecture computes besides decoder, attention and head is not known in advance. A reference whose scores
differ from the model's own is refused, and documents are not packed into one row where that changes them.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.modules.conv import _ConvNd

from ..data.documents import DocumentSet
from ..errors import XTFError
from .batching import is_out_of_memory, out_of_memory
from .kernels.packing import Packed
from .reference import Reference, rotary_switch

logger = logging.getLogger(__name__)

CHECK_TOKENS = 128  # length of the document of the check
NEAR = 8  # tokens before a change that are looked at
ROUNDING = 1e-4  # packing may change scores by this ...
TIMES = 3.0  # ... or by this multiple of the difference between two forwards that are equal but for rounding
CANNOT = (XTFError, TypeError, ValueError, RuntimeError, LookupError, AttributeError)


@dataclass(frozen=True)
class Packing:
    """When documents are packed into one row; otherwise rows are padded, which is faster there.

    Args:
        devices: device types whose attention takes packed rows directly.
        apart: also pack for attention that splits the rows again.
        windows: also pack documents longer than a sliding window.
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
    """Check that a reference can score these documents, and compare it with its own forward on the start of one.

    Args:
        documents, wanted, reference, layers, packing: see `engine.score`.

    Raises:
        XTFError: token ids beyond the vocabulary; rotary embeddings that depend on other documents; too little memory
            for one document; or from `against_own_forward`.
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
            "xtf: %s computes in 8 bits (LLM.int8()), where rounding depends on all documents of a batch: other "
            "batches give slightly other scores. `nf4` and `none` avoid this.",
            reference.name,
        )
    if len(wanted):
        ids, _ = documents.document(int(wanted[np.minimum(documents.lengths[wanted], CHECK_TOKENS).argmax()]))
        sample = torch.from_numpy(ids[:CHECK_TOKENS].astype(np.int64)).to(reference.device)
        try:
            against_own_forward(reference, sample, 0.1 if low_precision(reference) else 1e-3, layers, packing)
        except CANNOT as error:
            if isinstance(error, XTFError):
                raise
            if is_out_of_memory(error):
                raise out_of_memory(len(sample), str(error)) from None
            raise _unknown(reference, layers, error) from error


def _unknown(reference: Reference, layers: tuple[int, ...], error: Exception) -> XTFError:
    """The error for an architecture whose forward fails where documents are scored."""
    cure = "Name another reference under `reference.model`."
    if layers:
        cure = "Remove the scores with `scorer: attention_received` (usual in `reasoning_importance`), or n" + cure[1:]
    return XTFError(
        f"{reference.name} ({type(reference.model).__name__}) cannot be scored here: its forward fails with "
        f"{type(error).__name__}: {error}. {cure}"
    )


def _in_8_bits(reference: Reference) -> bool:
    """Whether the model uses LLM.int8() of bitsandbytes."""
    return any(type(module).__name__ == "Linear8bitLt" for module in reference.model.modules())


def low_precision(reference: Reference) -> bool:
    """Whether any part of the forward runs in 16 bits; QLoRA has float32 norms around bfloat16 products."""
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
    """Compare log-probabilities with the model's own forward, and attention received with its definition.

    Finds heads and attention of an unknown kind, attention to later tokens, and kernels that return wrong results here.
    Sets `packs` and `checked` of the reference. Runs once for a reference, and again when attention is first recorded.

    Args:
        input_ids: (T,) of a short document; fewer than 2 tokens: nothing is checked.
        tolerance: mean absolute difference allowed, in nats, and relative to uniform attention. In 16 bits,
            log-probabilities may agree with eager attention or with that of the model; in 8 bits, they may differ by
            rounding too.
        layers: whose attention is recorded.

    Raises:
        XTFError: a difference beyond the tolerance, or no logits to compare with; names the model.
    """
    part = "attention" if layers else "log-probabilities"
    if part in reference.checked or len(input_ids) < 2:
        return
    lengths = torch.tensor([len(input_ids)], device=input_ids.device)
    trained_with = reference.model.config._attn_implementation  # the pass below sets its own

    def run(plainly: bool) -> _Scores:
        hidden, received = reference.forward(input_ids[None], lengths, layers, plainly=plainly)
        return _Scores.of(reference, hidden[0], input_ids, received)

    def own(attention: str) -> Tensor:
        found = reference.with_full_weights(lambda: _own_forward(reference, input_ids, attention))
        return found.to(ours.logprobs.device)

    with reference.scoring(record=bool(layers)):
        ours = reference.with_full_weights(lambda: run(False))
        ahead = reference.with_full_weights(lambda: _looking_ahead(reference, input_ids, ours.logprobs, layers))
        plain = reference.with_full_weights(lambda: run(True)) if layers else ours
        theirs = other = own("eager")
        if _in_8_bits(reference):  # rounding can change a value by a full step: two forwards show by how much
            other = own("sdpa")
        elif _mean_gap(ours.logprobs, theirs) > tolerance and low_precision(reference):
            # in 16 bits two right attention functions may differ by more than that: the training's own decides
            theirs = other = own(trained_with)
        rounding = _mean_gap(other, theirs)
    _check_log_probabilities(reference, ours.logprobs, theirs, max(tolerance, TIMES * rounding))
    _check_attention(reference, ours.received, plain.received, tolerance)
    _check_causal(reference, ahead, max(tolerance, TIMES * rounding))
    if not reference.lockstep and input_ids.device.type in packing.devices:  # all ranks would have to try the same
        equal = _Scores(theirs, plain.received)  # equal but for rounding, which affects packing as much
        reference.packs = _packs(reference, input_ids, ours, ours.gap(equal), layers, packing)
    reference.checked |= {part, "log-probabilities"}


def _own_forward(reference: Reference, input_ids: Tensor, attention: str) -> Tensor:
    """Log-probabilities (T - 1,) by the model's own forward, with an attention implementation of transformers."""
    config, length = reference.model.config, len(input_ids)
    before, config._attn_implementation = config._attn_implementation, attention
    try:
        logits = type(reference.model).forward(reference.model, input_ids=input_ids[None], use_cache=False).logits
    finally:
        config._attn_implementation = before
    vocabulary = int(getattr(reference.text_config, "vocab_size", 0))
    shape = tuple(logits.shape) if isinstance(logits, Tensor) else ()
    if len(shape) != 3 or shape[:2] != (1, length) or shape[2] < vocabulary:
        raise XTFError(
            f"{reference.name} ({type(reference.model).__name__}) gives no logits for its log-probabilities to be "
            f"compared with: for {length} tokens and a vocabulary of {vocabulary} it gives "
            f"{shape or type(logits).__name__}. Let its forward return them (in Unsloth the environment variable "
            "UNSLOTH_RETURN_LOGITS=1, and no UNSLOTH_RETURN_HIDDEN_STATES), or name another reference under "
            "`reference.model`."
        )
    picked = logits[0, :-1].float().log_softmax(-1)
    found: Tensor = picked.gather(-1, input_ids[1:, None].to(picked.device))[:, 0]
    return found


@dataclass(frozen=True)
class _Scores:
    """Log-probabilities of a document's tokens but the first, (T - 1,), and attention received, (T,) or None."""

    logprobs: Tensor
    received: Tensor | None

    @classmethod
    def of(cls, reference: Reference, hidden: Tensor, ids: Tensor, received: Tensor | None) -> _Scores:
        """From states (T, D), token ids (T,) and attention received (1, T)."""
        found = reference.predictions(hidden[:-1], ids[1:])[0]
        return cls(found, None if received is None else received[0].float())

    def gap(self, other: _Scores) -> float:
        """The largest difference; infinite if a score is undefined on one side only."""
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


def _looking_ahead(reference: Reference, ids: Tensor, ours: Tensor, layers: tuple[int, ...]) -> float:
    """By how much log-probabilities `ours` change, on average over some tokens, if only later tokens change."""
    half = len(ids) // 2
    near, lengths = slice(max(0, half - NEAR), half), torch.tensor([len(ids)], device=ids.device)
    later = ids[half:].flip(0)
    if torch.equal(later, ids[half:]):  # it reads the same backwards
        later = ids[: len(ids) - half].flip(0)
    hidden, _ = reference.forward(torch.cat([ids[:half], later])[None], lengths, layers)
    return _mean_gap(reference.predictions(hidden[0, near], ids[1:][near])[0], ours[near])


def _check_causal(reference: Reference, gap: float, tolerance: float) -> None:
    if not gap <= tolerance:
        raise XTFError(
            f"{reference.name} ({type(reference.model).__name__}): its tokens attend to later ones: log-probabilities "
            f"change by {gap:.2g} nats when only later tokens change (allowed: {tolerance:.2g}). Such scores say "
            "nothing about a token; name a causal language model under `reference.model`."
        )


def _check_attention(reference: Reference, ours: Tensor | None, plain: Tensor | None, tolerance: float) -> None:
    if ours is None or plain is None:
        return
    gap = _mean_gap(ours[:-1], plain[:-1])  # the last token receives no attention
    if not gap <= tolerance:
        raise XTFError(
            f"{reference.name}: attention received differs from its definition by {gap:.2g} on average (1 is uniform "
            f"attention, allowed: {tolerance:.2g}): a kernel of this PyTorch or device returns wrong results. "
            "Please report this; only `attention_received` (usual in `reasoning_importance`) needs it."
        )


def _packs(
    reference: Reference, ids: Tensor, ours: _Scores, rounding: float, layers: tuple[int, ...], packing: Packing
) -> bool:
    """Whether packed rows preserve the scores `ours` of the document `ids` (T,) up to rounding.

    The largest difference counts: an error may affect a single token.
    """
    try:
        with reference.scoring(record=True):
            found = _packed(reference, ids, layers, packing)
    except CANNOT as error:
        logger.info("xtf: %s is scored without packed rows: %s", reference.name, error)
        return False
    gap = found.gap(ours)
    if gap <= max(ROUNDING, TIMES * rounding):
        return True
    logger.info("xtf: %s is scored without packed rows: scores change by %.2g", reference.name, gap)
    return False


def _packed(reference: Reference, ids: Tensor, layers: tuple[int, ...], packing: Packing) -> _Scores:
    """The scores of a document in a row between unrelated ones."""
    if any(isinstance(module, _ConvNd) for module in reference.decoder.modules()):
        raise LookupError("its convolutions, and maybe a state, do not separate documents")
    stranger = ids.flip(0)
    row = torch.cat([stranger[: 1 + len(ids) // 3], ids, stranger])
    bounds = np.asarray([0, 1 + len(ids) // 3, len(row) - len(ids), len(row)])
    offsets = torch.from_numpy(bounds).to(ids.device)
    packed = Packed(offsets, torch.zeros_like(offsets[1:]), bounds, whole=not packing.apart)
    hidden, received = reference.forward(row[None], offsets.diff(), layers, packed=packed)
    here = slice(int(bounds[1]), int(bounds[2]))
    return _Scores.of(reference, hidden[0, here], ids, None if received is None else received[:, here])
