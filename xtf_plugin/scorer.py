"""Documents in, scores out: length-sorted batches under a token budget, one decoder forward each.

One forward gives reasoning importance, log-probabilities and what the reference expected there together. Results go to
a sink as they come, so a run that is killed loses no more than the sink's unwritten part. Out of memory halves the
batches and goes on.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from .documents import DocumentSet
from .errors import XTFError
from .records import Records
from .reference import Reference

logger = logging.getLogger(__name__)

Sink = Callable[[Records], None]
CHECK_TOKENS = 128  # length of the document on which the reference is held against its own forward


@dataclass
class ScoringStats:
    """What a scoring pass did: for the log and the summary."""

    documents: int = 0
    tokens: int = 0
    padded_tokens: int = 0
    batches: int = 0
    halvings: int = 0
    seconds: float = 0.0

    def add(self, other: ScoringStats) -> None:
        """Count another pass in."""
        for name, value in asdict(other).items():
            setattr(self, name, getattr(self, name) + value)


def plan_batches(lengths: NDArray[np.int64], budget: int) -> Iterator[NDArray[np.int64]]:
    """Cut documents, longest first, into batches of at most `budget` padded tokens (a longer document goes alone).

    Longest first: memory runs out at once or not at all, and neighbours in length waste little padding.

    Args:
        lengths: (N,) tokens per document; empty documents are left out.

    Yields:
        indices into `lengths`, ties in order of index.
    """
    order = np.lexsort((np.arange(len(lengths)), -lengths))
    order = order[lengths[order] > 0]
    low = 0
    while low < len(order):
        size = max(1, budget // int(lengths[order[low]]))
        yield order[low : low + size]
        low += size


def default_batch_tokens(device: torch.device) -> int:
    """Padded tokens per batch for `batch_tokens: auto`."""
    return 16_384 if device.type == "cuda" else 4_096


def score(
    documents: DocumentSet,
    wanted: NDArray[np.int64],
    reference: Reference,
    layers: tuple[int, ...],
    sink: Sink,
    *,
    batch_tokens: int | None = None,
    progress: bool = True,
    label: str = "scoring",
) -> ScoringStats:
    """Score the `wanted` documents and hand each batch's scores to `sink`.

    Equals, per document: run the decoder, `attributes.attention_received` averaged over `layers` and
    `attributes.predictions` at every completion token.

    Args:
        wanted: (n,) indices into `documents`.
        layers: layers for reasoning importance; empty: no attention received.
        sink: called with the records of each batch of documents.
        batch_tokens: padded tokens per batch; None: by device.
        progress: show a bar, called by `label`.

    Raises:
        XTFError: a single document does not fit into memory; the reference is not supported.
    """
    budget = batch_tokens or default_batch_tokens(reference.device)
    _check_reference(documents, wanted, reference, layers)
    stats = ScoringStats(documents=len(wanted))
    lengths = documents.lengths[wanted]
    pending = list(plan_batches(lengths, budget))[::-1]
    bar = tqdm(total=int(lengths.sum()), unit="tok", unit_scale=True, desc=f"xtf: {label}", disable=not progress)
    start = time.perf_counter()
    with bar, reference.scoring(record=bool(layers)):
        while pending:
            batch = pending.pop()
            try:
                records, padded = _score_batch(documents, wanted[batch], reference, layers)
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not _is_out_of_memory(error):
                    raise
                budget = _halve(len(batch), int(lengths[batch[0]]), reference.device, error)
                rest = np.concatenate([batch, *pending[::-1]])
                pending = [rest[part] for part in plan_batches(lengths[rest], budget)][::-1]
                stats.halvings += 1
                continue
            sink(records)
            done = int(lengths[batch].sum())
            stats.tokens += done
            stats.padded_tokens += padded
            stats.batches += 1
            bar.update(done)
    stats.seconds = time.perf_counter() - start  # a bar that is switched off keeps no time
    return stats


def _score_batch(
    documents: DocumentSet, batch: NDArray[np.int64], reference: Reference, layers: tuple[int, ...]
) -> tuple[Records, int]:
    """Scores of one batch of documents, in the order given, and the tokens it took with its padding."""
    lengths = documents.lengths[batch]
    T = int(lengths.max())
    input_ids = np.zeros((len(batch), T), dtype=np.int64)
    completion = np.zeros((len(batch), T), dtype=bool)
    for row, index in enumerate(batch):
        tokens, labelled = documents.document(int(index))
        input_ids[row, : len(tokens)], completion[row, : len(tokens)] = tokens, labelled
    device = reference.device
    ids = torch.from_numpy(input_ids).to(device)
    mask = torch.from_numpy(completion).to(device)
    picked_columns = np.flatnonzero(completion.any(0))
    start = int(picked_columns[0]) if len(picked_columns) else T
    hidden, received = reference.forward(ids, torch.from_numpy(lengths).to(device), layers, min(start, T - 1))
    predicted = mask.clone()
    predicted[:, 0] = False  # nothing predicts a document's first token
    predictions = torch.full((3, *mask.shape), float("nan"), dtype=torch.float32, device=device)
    states = hidden[:, :-1][predicted[:, 1:].to(hidden.device)]  # (N, D): the state before each predicted token
    predictions[:, predicted] = reference.predictions(states, ids[predicted])
    offsets = np.concatenate([[0], np.cumsum(completion.sum(1))]).astype(np.int64)
    attention = None if received is None else received[mask].float().cpu().numpy()
    logprobs, entropy, deviation = predictions[:, mask].cpu().numpy()
    return Records(documents.keys[batch], offsets, logprobs, entropy, deviation, attention), int(input_ids.size)


def _check_reference(
    documents: DocumentSet, wanted: NDArray[np.int64], reference: Reference, layers: tuple[int, ...]
) -> None:
    """Hold the reference's scoring path against its own forward, once, on the start of one document."""
    vocabulary = reference.model.get_input_embeddings().weight.shape[0]
    highest = int(documents.input_ids.max())
    if highest >= vocabulary:
        raise XTFError(
            f"the data holds token id {highest}, but {reference.name} has only {vocabulary} embeddings. Tokenizer and "
            "model "
            "do not belong together."
        )
    candidates = wanted[documents.lengths[wanted] > 1]
    if len(candidates):
        ids, _ = documents.document(int(candidates[0]))
        sample = torch.from_numpy(ids[:CHECK_TOKENS].astype(np.int64)).to(reference.device)
        reference.check_against_own_forward(sample, 0.1 if _low_precision(reference) else 1e-3, layers)


def _low_precision(reference: Reference) -> bool:
    """Whether any part of the forward runs in 16 bits; QLoRA keeps norms in float32 around a bfloat16 product."""
    low = (torch.float16, torch.bfloat16)
    with reference.autocast():
        if torch.is_autocast_enabled(reference.device.type):
            return True
    if any(parameter.dtype in low for parameter in reference.model.parameters()):
        return True
    return any(getattr(module, "compute_dtype", None) in low for module in reference.model.modules())


def _is_out_of_memory(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text or "out of memory" in text


def _halve(size: int, longest: int, device: torch.device, error: BaseException) -> int:
    """The token budget to go on with after a batch of `size` documents did not fit."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if size == 1:
        raise XTFError(
            f"out of memory while scoring a single document of {longest} tokens ({error}). Lower max_length, or name a "
            "smaller or more strongly quantised model under xtf `reference.model`."
        ) from error
    budget = size // 2 * longest
    logger.warning(
        "xtf: out of memory with %d documents of up to %d tokens; going on with batches of %d tokens. Setting "
        "`batch_tokens: %d` avoids the retry.",
        size,
        longest,
        budget,
        budget,
    )
    return budget


def gather_vectors(reference: Reference, token_ids: NDArray[Any], kind: str, chunk: int = 4_096) -> Tensor:
    """Context-free embeddings of token ids, (n, D) float32 on the CPU.

    Args:
        kind: `input`: the row of the input embedding; `output`: the last hidden state of the token run alone.
    """
    parts = []
    with reference.scoring(record=False):
        for low in range(0, len(token_ids), chunk):
            ids = torch.from_numpy(np.asarray(token_ids[low : low + chunk], dtype=np.int64)).to(reference.device)
            if kind == "input":
                vectors = reference.embeddings(ids)
            else:
                vectors, _ = reference.forward(ids[:, None], torch.ones_like(ids), ())
                vectors = vectors[:, 0]
            # hooks for gradient checkpointing mark embeddings as needing grad
            parts.append(vectors.detach().float().cpu())
    return torch.cat(parts)
