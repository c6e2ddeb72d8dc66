"""How many tokens a device has memory for, measured: model, kernels and quantisation have their say in it. And what to
do when it had not."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from .errors import XTFError

logger = logging.getLogger(__name__)

FIRST = 4_096  # tokens of the batch that is measured
MOST = 32_768  # tokens beyond which larger batches are no faster, and only risk memory that others want
SHARE = 0.7  # of what is free: later batches are shaped otherwise, and memory is cut into pieces


@dataclass(frozen=True)
class Meter:
    """Memory of a CUDA device, in bytes."""

    device: torch.device

    def reset(self) -> None:
        """Begin to measure."""
        torch.cuda.reset_peak_memory_stats(self.device)

    def grown(self) -> int:
        """What was taken at the peak beyond what is held now, since `reset`."""
        return torch.cuda.max_memory_allocated(self.device) - torch.cuda.memory_allocated(self.device)

    def free(self) -> int:
        """What could still be taken: free on the device, or held by PyTorch and not in use."""
        held = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return int(torch.cuda.mem_get_info(self.device)[0]) + held


def meter(device: torch.device) -> Meter | None:
    """A meter of the device's memory, or None for devices that have none."""
    return Meter(device) if device.type == "cuda" else None


def budget_for(tokens: int, grown: int, free: int) -> int:
    """Tokens of a batch, after one of `tokens` took `grown` bytes and `free` bytes are left: FIRST to MOST."""
    fits = MOST if grown <= 0 else int(SHARE * free * tokens / grown)
    found = max(FIRST, min(MOST, fits))
    logger.info("xtf: batches of %d tokens: %d took %.2f GB, %.2f GB are free", found, tokens, grown / 1e9, free / 1e9)
    return found


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a forward failed for want of memory; a CPU's allocator says so in a plain RuntimeError."""
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text or "out of memory" in text


def too_little(longest: int, problem: str) -> XTFError:
    """The error for a device that has no room for a single document; `problem`: the text of the error that told."""
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
        "xtf: out of memory with %d documents of up to %d tokens; going on with batches of %d tokens. Setting "
        "`batch_tokens: %d` avoids the retry.",
        size,
        longest,
        budget,
        budget,
    )
    return budget
