"""What the processes of one training run tell each other while they score.

Every rank runs the same plan on the same data; only the forwards are shared out. So ranks must agree on everything that
steers the plan, and a rank that has nothing to do must not wait in a collective for long: watchdogs kill a run whose
collective is open for minutes. Messages are bytes, never pickles, over the process group that the host has set up.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
import xxhash
from numpy.typing import NDArray

from .errors import XTFError, XTFUserError

T = TypeVar("T")

BEAT_SECONDS = 20.0  # ranks meet at least this often, a batch that takes longer aside
CHUNK_BYTES = 4 << 20  # of all ranks' messages at a time: they go through the accelerator's memory


@dataclass(frozen=True)
class Ranks:
    """The ranks of a run, seen from one of them; without arguments, a run in one process.

    Args:
        rank: this process, from 0.
        size: how many there are.
        device: where the process group moves data: the accelerator's for NCCL, the CPU for gloo.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")

    @classmethod
    def of(cls, accelerator: Any) -> Ranks:
        """The ranks of an accelerate `Accelerator`.

        Raises:
            XTFUserError: several processes that torch.distributed does not connect, or that share one copy of the
                model or of a batch (tensor, context or sequence parallel).
        """
        if accelerator.num_processes == 1:
            return cls()
        if not (dist.is_available() and dist.is_initialized()):
            raise XTFUserError(
                f"xtf: {accelerator.num_processes} processes that are not connected by torch.distributed "
                f"({accelerator.distributed_type}) are not supported. Use DDP, FSDP, or DeepSpeed up to ZeRO-2."
            )
        layout = getattr(accelerator, "parallelism_config", None)
        for kind in ("tp", "cp", "sp"):
            if layout is not None and (getattr(layout, f"{kind}_size", 1) or 1) > 1:
                raise XTFUserError(
                    f"xtf: {kind}_size {getattr(layout, f'{kind}_size')} splits a model or a sequence between "
                    "processes, which xtf does not support. Use data parallel ranks (DDP, FSDP) alone."
                )
        return cls(accelerator.process_index, accelerator.num_processes, accelerator.device)

    @property
    def main(self) -> bool:
        """Whether this is the rank that writes files and tells the user."""
        return self.rank == 0

    def gather(self, mine: bytes) -> list[bytes]:
        """Every rank's bytes, in order of rank; a collective: each rank has to call it as often as the others."""
        if self.size == 1:
            return [mine]
        length = torch.tensor([len(mine)], dtype=torch.int64, device=self.device)
        sizes = [torch.zeros_like(length) for _ in range(self.size)]
        dist.all_gather(sizes, length)
        lengths = [int(size) for size in sizes]
        found = [bytearray() for _ in lengths]
        share = max(1, CHUNK_BYTES // self.size)
        for low in range(0, max(lengths), share):
            width = min(share, max(lengths) - low)
            padded = np.zeros(width, dtype=np.uint8)
            part = np.frombuffer(mine[low : low + width], dtype=np.uint8)
            padded[: len(part)] = part
            sent = torch.from_numpy(padded).to(self.device)
            received = [torch.empty_like(sent) for _ in range(self.size)]
            dist.all_gather(received, sent)
            for rank, whole in enumerate(lengths):
                if low < whole:
                    found[rank] += received[rank][: min(width, whole - low)].cpu().numpy().tobytes()
        return [bytes(part) for part in found]

    def first(self, mine: bytes | None) -> bytes | None:
        """What the lowest rank that has something has; None if none does. A collective."""
        if self.size == 1:
            return mine
        flags = self.gather(b"0" if mine is None else b"1")
        if b"1" not in flags:
            return None
        owner = flags.index(b"1")
        return self.gather(mine if mine is not None and self.rank == owner else b"")[owner]

    def agree(self, facts: bytes, what: str) -> None:
        """Check that all ranks hold the same. A collective.

        Raises:
            XTFError: on every rank, naming `what` and the ranks that differ from rank 0.
        """
        found = self.gather(xxhash.xxh3_128_digest(facts))
        others = [str(rank) for rank, digest in enumerate(found) if digest != found[0]]
        if others:
            raise XTFError(
                f"the processes of this run do not hold the same {what}: rank {', '.join(others)} differs from rank 0. "
                "Every process must be given the same data, model and block."
            )

    def same(self, column: NDArray[np.float32]) -> NDArray[np.float32]:
        """The column itself if all ranks hold the same; else rank 0's. A collective."""
        if self.size == 1:
            return column
        found = self.gather(xxhash.xxh3_128_digest(np.ascontiguousarray(column).tobytes()))
        if len(set(found)) == 1:
            return column
        sent = self.gather(np.ascontiguousarray(column).tobytes() if self.main else b"")[0]
        theirs: NDArray[np.float32] = np.frombuffer(sent, dtype=np.float32).copy()
        return theirs

    def each(self, work: Callable[[], T]) -> T:
        """What `work` gives; ranks that are through wait for the others without being taken for dead. A collective.

        For what takes ranks differently long: loading a model, writing files. It runs on a thread of its own.

        Raises:
            XTFError: `work` failed on another rank. What it raises here is raised once the others are through.
        """
        if self.size == 1:
            return work()
        with ThreadPoolExecutor(1, initializer=self._on_device) as thread:
            task = thread.submit(work)
            states = [b"0"]
            while b"0" in states:
                wait([task], BEAT_SECONDS)
                states = self.gather(b"0" if not task.done() else b"1" if task.exception() is None else b"!")
        result = task.result()  # raises what `work` raised
        if b"!" in states:
            raise XTFError(f"rank {states.index(b'!')} failed; its own message says why.")
        return result

    def from_main(self, work: Callable[[], bytes]) -> bytes:
        """What `work` gives in rank 0, on every rank; errors as in `each`. A collective."""
        found = self.each(work if self.main else bytes)
        return self.gather(found)[0] if self.size > 1 else found

    def _on_device(self) -> None:
        """A new thread begins on the first GPU, whichever is this rank's."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)


ALONE = Ranks()
