"""Scoring batches: how documents are cut into them, how many tokens memory allows, and how a forward reads them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .data.documents import DocumentSet
from .errors import XTFError
from .packing import Packed

logger = logging.getLogger(__name__)

PROBE_TOKENS = 4_096  # tokens of the batch that is measured
MAX_BATCH_TOKENS = 32_768  # tokens beyond which larger batches are no faster, and only risk memory that others want
FREE_SHARE = 0.7  # of what is free: later batches are shaped otherwise, and memory is cut into pieces

# What one more forward counts as, in tokens. An estimate on the safe side: kernel launches and a wait for the host are
# a millisecond or two on a GPU, in which a model of a billion weights reads a few hundred tokens, a larger one fewer.
FORWARD_TOKENS = 512


@dataclass
class ScoringStats:
    """What a scoring pass did: for the log and the summary."""

    documents: int = 0
    tokens: int = 0
    padded_tokens: int = 0
    batches: int = 0
    halvings: int = 0
    seconds: float = 0.0

    @classmethod
    def of_all(cls, ranks: list[list[float]]) -> ScoringStats:
        """Sums over ranks of what each has in its fields; the seconds are the slowest rank's."""
        *counts, seconds = zip(*ranks, strict=True)
        total = cls(*(int(sum(values)) for values in counts))
        total.seconds = max(seconds)
        return total

    def add(self, other: ScoringStats) -> None:
        """Count another pass in."""
        for name, value in asdict(other).items():
            setattr(self, name, getattr(self, name) + value)


def plan_wanted(
    lengths: NDArray[np.int64],
    wanted: NDArray[np.int64],
    budget: int,
    *,
    packed: bool = False,
    apart: int | None = None,
) -> list[NDArray[np.int64]]:
    """`plan_batches` for the `wanted` documents, with the batches that all documents would have wherever that can be.

    A score depends by a rounding on what else is in its batch. When a killed run goes on, whole batches are missing;
    they are made again as they would have been, and give the same scores to the last bit.

    Args:
        lengths: (N,) tokens of each document.
        wanted: (n,) indices into `lengths`.
        packed, apart: see `plan_batches`.

    Returns:
        indices into `lengths`; batches of documents that were together in no missing batch come last.
    """
    chosen = np.zeros(len(lengths), dtype=bool)
    chosen[wanted] = True
    planned = plan_batches(lengths, budget, packed=packed, apart=apart)
    whole = [batch for batch in planned if chosen[batch].all()]
    for batch in whole:
        chosen[batch] = False
    rest = np.flatnonzero(chosen)
    return [*whole, *(rest[part] for part in plan_batches(lengths[rest], budget, packed=packed, apart=apart))]


def plan_batches(
    lengths: NDArray[np.int64], budget: int, *, packed: bool = False, apart: int | None = None
) -> Iterator[NDArray[np.int64]]:
    """Cut documents, longest first, into batches of at most `budget` padded tokens (a longer document goes alone).

    Equals, over all ways to cut the sorted documents that respect the budget: the one with the fewest padded tokens, a
    forward counted as `FORWARD_TOKENS` more. Filling every batch would put documents of unlike length together where
    a budget is large and documents are few. Longest first: when memory is too small, that shows early.

    Args:
        lengths: (N,) tokens per document; empty documents are left out.
        packed: documents lie one behind the other, so that there is no padding to count.
        apart: documents longer than this share no batch with others.

    Yields:
        indices into `lengths`, ties in order of index.
    """
    order = np.lexsort((np.arange(len(lengths)), -lengths))
    order = order[lengths[order] > 0]
    longer = 0 if apart is None else int((lengths[order] > apart).sum())
    for part in (order[:longer], order[longer:]):
        sizes = _filled(lengths[part], budget) if packed else _cheapest(lengths[part].astype(np.int64), budget)
        low = 0
        while low < len(part):
            yield part[low : low + int(sizes[low])]
            low += int(sizes[low])


def _filled(lengths: NDArray[np.int64], budget: int) -> NDArray[np.int64]:
    """For each document, how many a packed batch holds that begins with it, (N,)."""
    ends = np.concatenate([[0], np.cumsum(lengths)])
    last = np.searchsorted(ends, ends[:-1] + budget, side="right") - 1
    sizes: NDArray[np.int64] = np.maximum(last - np.arange(len(lengths)), 1)
    return sizes


def _cheapest(longest: NDArray[np.int64], budget: int) -> NDArray[np.int64]:
    """For each document, how many a padded batch holds that begins with it, in the cheapest cut from there on, (N,)."""
    n = len(longest)
    sizes = np.clip(budget // np.maximum(longest, 1), 1, np.arange(n, 0, -1))
    counts = np.arange(1, int(sizes.max(initial=1)) + 1)
    cost = np.zeros(n + 1, dtype=np.int64)  # of everything from there on
    best = np.ones(n, dtype=np.int64)
    for low in range(n - 1, -1, -1):
        size = int(sizes[low])
        after = counts[:size] * longest[low] + cost[low + 1 : low + 1 + size]
        chosen = int(after.argmin())
        cost[low], best[low] = after[chosen] + FORWARD_TOKENS, chosen + 1
    return best


def default_batch_tokens(device: torch.device) -> int:
    """Padded tokens per batch for `batch_tokens: auto`."""
    return 16_384 if device.type == "cuda" else 4_096


def meter(device: torch.device) -> Meter | None:
    """Measures the device's memory; None for devices other than GPUs."""
    return Meter(device) if device.type == "cuda" else None


@dataclass(frozen=True)
class Meter:
    """Memory of a CUDA device, in bytes."""

    device: torch.device

    def reset(self) -> None:
        """Begin to measure."""
        torch.cuda.reset_peak_memory_stats(self.device)

    def grown(self) -> int:
        """Bytes taken at the peak since `reset` beyond what is held now."""
        return torch.cuda.max_memory_allocated(self.device) - torch.cuda.memory_allocated(self.device)

    def free(self) -> int:
        """Bytes free on the device, or held by PyTorch and not in use."""
        held = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return int(torch.cuda.mem_get_info(self.device)[0]) + held


def budget_for(tokens: int, grown: int, free: int) -> int:
    """Tokens of a batch, after one of `tokens` took `grown` bytes and `free` bytes are left, within the two limits."""
    fits = MAX_BATCH_TOKENS if grown <= 0 else int(FREE_SHARE * free * tokens / grown)
    found = max(PROBE_TOKENS, min(MAX_BATCH_TOKENS, fits))
    logger.info("xtf: batches of %d tokens: %d took %.2f GB, %.2f GB are free", found, tokens, grown / 1e9, free / 1e9)
    return found


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a forward ran out of memory; a CPU's allocator raises a plain RuntimeError."""
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text or "out of memory" in text


def too_little(longest: int, problem: str) -> XTFError:
    """The error for a device that has no room for a single document; `problem`: the text of the error."""
    return XTFError(
        f"out of memory while scoring a single document of {longest} tokens ({problem}). Lower max_length, or name "
        "a smaller or more strongly quantised model under xtf `reference.model`."
    )


def halved(size: int, longest: int, tokens: int, device: torch.device, problem: str) -> int:
    """The token budget to go on with after a batch of `size` documents did not fit, `tokens` with their padding.

    Raises:
        XTFError: it was a single document, see `too_little`.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if size == 1:
        raise too_little(longest, problem)
    budget = max(longest, tokens // 2)
    logger.warning(
        f"xtf: out of memory with {size} documents of up to {longest} tokens; going on with batches of {budget} "
        f"tokens. Setting `batch_tokens: {budget}` avoids the retry."
    )
    return budget


@dataclass(frozen=True)
class Rows:
    """Documents on the reference's device: rows with right padding, or one row of documents packed in it.

    M completion tokens, of which P are predicted. They are given as indices: a mask on a GPU would have to be counted
    there first, and everything would wait for the number.

    Args:
        ids: (B, T) token ids; packed: (1, T).
        lengths: (n,) tokens of each document.
        completion: (M,) where completion tokens are in the flattened rows.
        predicted: (P,) where those are that something predicts: not a document's first token.
        start: the first column of attention received that is wanted, of all rows.
        offsets: (n + 1,) of the documents among the M completion tokens; places: (P,) of the predicted ones among
            them. Both on the CPU.
        packed: where the documents of a packed row are.
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
        """Where the states are that predict: each one token before, (P,)."""
        return self.predicted - 1


def laid_out(documents: DocumentSet, batch: NDArray[np.int64], device: torch.device, *, packed: bool = False) -> Rows:
    """The documents `batch` (n,), in that order, as rows for one forward."""
    lengths = documents.lengths[batch]
    shape = (1, int(lengths.sum())) if packed else (len(batch), int(lengths.max()))
    ids, mask = np.zeros(shape[0] * shape[1], dtype=np.int64), np.zeros(shape[0] * shape[1], dtype=bool)
    begins = np.cumsum(lengths) - lengths if packed else np.arange(len(batch)) * shape[1]
    starts, sizes = np.zeros(len(batch), dtype=np.int64), np.zeros(len(batch), dtype=np.int64)
    for row, index in enumerate(batch):
        tokens, completion = documents.document(int(index))
        here = slice(int(begins[row]), int(begins[row]) + len(tokens))
        ids[here], mask[here] = tokens, completion
        starts[row], sizes[row] = np.argmax(completion) if completion.any() else len(tokens), completion.sum()
    bounds = np.append(begins, shape[1])
    at = np.flatnonzero(mask)
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
        offsets=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
        places=places,
        packed=Packed(there(bounds), there(starts), bounds) if packed else None,
    )
