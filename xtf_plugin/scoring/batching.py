"""Scoring batches: how documents are grouped, how many tokens fit into memory, and how they are laid out as tensors."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..data.documents import INT64_MAX, DocumentSet
from ..data.ragged import Bools, Ints, offsets_of, runs, stretches
from ..errors import XTFError
from .kernels.packing import Packed

T = TypeVar("T")
B = TypeVar("B", bound=Ints | list[Ints])

logger = logging.getLogger(__name__)

PROBE_TOKENS = 4_096  # tokens of the batch that is measured
MAX_BATCH_TOKENS = 32_768  # larger batches are no faster
FREE_SHARE = 0.7  # of the free memory: later batches have other shapes, and memory fragments

# The fixed cost of a forward, in tokens. A cautious estimate: launching its kernels takes a GPU a millisecond or two,
# in which a model of a billion weights processes a few hundred tokens.
FORWARD_TOKENS = 512


@dataclass
class ScoringStats:
    """What a scoring pass did, for the log and the summary; `documents` are those that it ran through the model."""

    documents: int = 0
    tokens: int = 0
    padded_tokens: int = 0
    batches: int = 0
    halvings: int = 0
    seconds: float = 0.0
    stored_documents: int = 0

    @classmethod
    def of_all(cls, ranks: list[dict[str, Any]]) -> ScoringStats:
        """Sum every rank's values; the seconds are those of the slowest rank."""
        total = cls()
        for values in ranks:
            total.add(cls(**values))
        total.seconds = max(values["seconds"] for values in ranks)
        return total

    def add(self, other: ScoringStats) -> None:
        """Add the values of another pass."""
        for name, value in asdict(other).items():
            setattr(self, name, getattr(self, name) + value)

    def part(self, documents: int, tokens: int, stored_documents: int) -> ScoringStats:
        """Move what some documents took into an object of its own: all batches and halvings, the rest by tokens."""
        share = tokens / max(self.tokens, 1)
        padded, seconds = round(self.padded_tokens * share), self.seconds * share
        part = ScoringStats(documents, tokens, padded, seconds=seconds, stored_documents=stored_documents)
        if documents:
            part.batches, part.halvings = self.batches, self.halvings
        for name, value in asdict(part).items():
            setattr(self, name, getattr(self, name) - value)
        return part


def whole_batches_first(plan: Callable[[Ints], list[B]], wanted: Ints, everything: Ints) -> list[B]:
    """Batches of the `wanted` documents, keeping the batches of a plan for `everything` where possible.

    The other documents of a batch change a score by rounding. A run that resumes after a kill lacks whole batches, and
    so scores them with the same bits as an uninterrupted run.

    Args:
        plan: splits documents into batches: arrays of their indices, or lists of such arrays.
        wanted: (n,) indices of documents, all in `everything`.
    """
    missing: Bools = np.zeros(int(everything.max(initial=-1)) + 1, dtype=bool)
    missing[wanted] = True
    whole: list[B] = []
    for batch in plan(everything):
        documents = np.concatenate(batch) if isinstance(batch, list) else batch
        if missing[documents].all():
            whole.append(batch)
            missing[documents] = False
    return [*whole, *plan(np.flatnonzero(missing))]


def plan_batches(
    lengths: NDArray[np.int64], budget: int, *, packed: bool = False, apart: int | None = None
) -> Iterator[NDArray[np.int64]]:
    """Split documents, longest first, into batches of at most `budget` padded tokens; a longer document has its own.

    Equals, of all splits of the sorted documents within the budget, the one that minimises padded tokens plus
    `FORWARD_TOKENS` per batch. The longest come first, so that a lack of memory shows early.

    Args:
        lengths: (N,) tokens per document; empty documents are left out.
        packed: the documents of a batch share one row without padding.
        apart: documents longer than this share no batch with shorter ones.

    Yields:
        indices into `lengths`, ties in order of index.
    """
    order = np.lexsort((np.arange(len(lengths)), -lengths))
    order = order[lengths[order] > 0]
    longer = 0 if apart is None else int((lengths[order] > apart).sum())
    for part in (order[:longer], order[longer:]):
        split = runs(offsets_of(lengths[part]), budget) if packed else cheapest(lengths[part][:, None], budget)
        yield from (part[batch] for batch in split)


def cheapest(lengths: NDArray[np.int64], budget: int) -> Iterator[slice]:
    """The cheapest split into padded batches; see `plan_batches`.

    Args:
        lengths: (n, K) lengths of the K parts of each document, in order; each part is padded to the batch's longest.
        budget: padded tokens of a batch of several documents.
    """
    n = len(lengths)
    sizes = np.clip(budget // np.maximum(lengths.sum(axis=1), 1), 1, np.arange(n, 0, -1))
    counts = np.arange(1, int(sizes.max(initial=1)) + 1)
    cost = np.zeros(n + 1, dtype=np.int64)  # of all documents from this one on
    best = np.ones(n, dtype=np.int64)  # size of the batch that begins with this document
    for low in range(n - 1, -1, -1):
        size = int(sizes[low])
        padded = counts[:size] * np.maximum.accumulate(lengths[low : low + size]).sum(axis=1)
        after = padded + cost[low + 1 : low + 1 + size]
        after[1:][padded[1:] > budget] = INT64_MAX
        chosen = int(after.argmin())
        cost[low], best[low] = after[chosen] + FORWARD_TOKENS, chosen + 1
    low = 0
    while low < n:
        yield slice(low, low + int(best[low]))
        low += int(best[low])


def default_batch_tokens(device: torch.device) -> int:
    """Padded tokens per batch for `batch_tokens: auto` where memory is not measured."""
    return 16_384 if device.type == "cuda" else 4_096


@dataclass(frozen=True)
class Meter:
    """Measures the memory of a CUDA device, in bytes."""

    device: torch.device

    def reset(self) -> None:
        """Start a measurement."""
        torch.cuda.reset_peak_memory_stats(self.device)

    def grown(self) -> int:
        """Peak memory since `reset`, minus what is allocated now."""
        return torch.cuda.max_memory_allocated(self.device) - torch.cuda.memory_allocated(self.device)

    def free(self) -> int:
        """Memory that is free on the device or cached by PyTorch."""
        held = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return int(torch.cuda.mem_get_info(self.device)[0]) + held


def meter(device: torch.device) -> Meter | None:
    """A meter of the device's memory; None unless it is a GPU."""
    return Meter(device) if device.type == "cuda" else None


def budget_for(tokens: int, grown: int, free: int) -> int:
    """Tokens per batch, between the two limits, after a batch of `tokens` took `grown` bytes and left `free` bytes."""
    fits = MAX_BATCH_TOKENS if grown <= 0 else int(FREE_SHARE * free * tokens / grown)
    found = max(PROBE_TOKENS, min(MAX_BATCH_TOKENS, fits))
    logger.info("xtf: batches of %d tokens: %d took %.2f GB, %.2f GB are free", found, tokens, grown / 1e9, free / 1e9)
    return found


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error is a lack of memory; the CPU allocator raises a plain RuntimeError."""
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text or "out of memory" in text


def within_memory(run: Callable[[], T]) -> tuple[T | None, str]:
    """The result of `run`, or None and the text of the error if there is too little memory for it.

    Only the text is kept: the error's traceback would keep the tensors of a forward alive.
    """
    try:
        return run(), ""
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return None, str(error)


def out_of_memory(longest: int, problem: str) -> XTFError:
    """The error for a document of `longest` tokens that alone does not fit; `problem`: the text of the cause."""
    return XTFError(
        f"out of memory while scoring a single document of {longest} tokens ({problem}). Lower max_length, or set "
        "xtf `reference.model` to a smaller or more strongly quantised model."
    )


def halved_budget(size: int, longest: int, tokens: int, device: torch.device, problem: str) -> int:
    """The token budget after a batch of `size` documents and `tokens` padded tokens did not fit.

    Raises:
        XTFError: the batch was a single document; see `out_of_memory`.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if size == 1:
        raise out_of_memory(longest, problem)
    budget = max(longest, tokens // 2)
    logger.warning(
        f"xtf: out of memory with {size} documents of up to {longest} tokens; continuing with batches of "
        f"{budget} tokens. Setting `batch_tokens: {budget}` avoids the retry."
    )
    return budget


@dataclass(frozen=True)
class Rows:
    """Documents on the reference's device: one a row with right padding, or all packed into one row.

    P of the M completion tokens are predicted: all but first tokens of documents. Indices are used in place of masks,
    since indexing with a mask makes the host wait for a GPU.

    Args:
        ids: (B, T) token ids; packed: (1, T).
        lengths: (n,) tokens of each document.
        completion: (M,) indices of completion tokens in the flattened rows.
        predicted: (P,) indices of predicted tokens in the flattened rows.
        start: first column for which attention received is computed.
        offsets: (n + 1,) bounds of the documents among the M completion tokens, on the CPU.
        places: (P,) indices of the predicted tokens among the M completion tokens, on the CPU.
        packed: the documents of a packed row.
    """

    ids: Tensor
    lengths: Tensor
    completion: Tensor
    predicted: Tensor
    start: int
    offsets: NDArray[np.int64]
    places: NDArray[np.int64]
    packed: Packed | None = None

    @property
    def read(self) -> Tensor:
        """Indices of the states that predict: each one token before the predicted one, (P,)."""
        return self.predicted - 1


def laid_out(documents: DocumentSet, batch: NDArray[np.int64], device: torch.device, *, packed: bool = False) -> Rows:
    """Lay out the documents `batch` (n,), in that order, for one forward."""
    lengths = documents.lengths[batch]
    shape = (1, int(lengths.sum())) if packed else (len(batch), int(lengths.max()))
    begins = np.cumsum(lengths) - lengths if packed else np.arange(len(batch)) * shape[1]
    source, into = stretches(documents.offsets[batch], lengths), stretches(begins, lengths)
    ids = np.zeros(shape[0] * shape[1], dtype=np.int64)
    ids[into] = documents.input_ids[source]
    first, after = documents.completion_offsets[batch], documents.completion_offsets[batch + 1]
    starts, some = lengths.copy(), after > first
    starts[some] = documents.completion_positions[first[some]]
    bounds = np.append(begins, shape[1])
    at = into[documents.completion[source]]
    places = np.flatnonzero(~np.isin(at, begins))  # nothing predicts a document's first token

    def there(array: NDArray[Any]) -> Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)

    return Rows(
        ids=there(ids.reshape(shape)),
        lengths=there(lengths),
        completion=there(at),
        predicted=there(at[places]),
        start=0 if packed else min(int(starts.min()), shape[1] - 1),
        offsets=offsets_of(after - first),
        places=places,
        packed=Packed(there(bounds), there(starts), bounds) if packed else None,
    )
