"""The processes of one training run: what they exchange while scoring, and which of them scores which documents.

Every rank makes the same plan from the same data; only the forwards are divided between them. Ranks exchange new scores
every few seconds, so that no rank needs another's disk, and no collective stays open long enough for a watchdog to end
the run. Messages are bytes, never pickles, over the process group that the host has set up.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
import xxhash
from numpy.typing import NDArray

from ..data.ragged import offsets_of, runs
from ..errors import XTFError, XTFUserError
from ..store.records import Lookup, Records, merge

T = TypeVar("T")

BEAT_SECONDS = 20.0  # ranks exchange messages at least this often, unless one batch takes longer
CHUNK_BYTES = 4 << 20  # of all ranks' messages at a time, since they pass through the accelerator's memory
LOCKSTEP_BATCHES = 16  # forwards between two exchanges of a reference in lockstep
PIECE_TOKENS = 2_000_000  # stored scores sent at a time


@dataclass(frozen=True)
class Ranks:
    """The ranks of a run, seen from one of them; by default, a run in one process.

    Args:
        rank: of this process, from 0.
        size: number of ranks.
        device: where the process group moves data: the accelerator for NCCL, the CPU for gloo.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")

    @classmethod
    def of(cls, accelerator: Any) -> Ranks:
        """The ranks of an accelerate `Accelerator`.

        Raises:
            XTFUserError: several processes without torch.distributed, or that split a model or a sequence (tensor,
                context or sequence parallel).
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
        """Whether this rank writes files and logs."""
        return self.rank == 0

    def gather(self, mine: bytes) -> list[bytes]:
        """Every rank's bytes, in order of rank. A collective: all ranks must call it equally often."""
        if self.size == 1:
            return [mine]
        length = torch.tensor([len(mine)], dtype=torch.int64, device=self.device)
        sizes = [torch.zeros_like(length) for _ in range(self.size)]
        dist.all_gather(sizes, length)
        lengths = [int(size) for size in sizes]
        found = [bytearray() for _ in lengths]
        share = max(1, CHUNK_BYTES // self.size)
        for low in range(0, max(lengths), share):
            padded = np.zeros(min(share, max(lengths) - low), dtype=np.uint8)
            part = np.frombuffer(mine[low : low + share], dtype=np.uint8)
            padded[: len(part)] = part
            sent = torch.from_numpy(padded).to(self.device)
            received = [torch.empty_like(sent) for _ in range(self.size)]
            dist.all_gather(received, sent)
            for rank, theirs in enumerate(received):
                found[rank] += theirs[: max(0, lengths[rank] - low)].cpu().numpy().tobytes()
        return [bytes(part) for part in found]

    def agree(self, facts: bytes, what: str) -> None:
        """Check that all ranks hold the same bytes. A collective.

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

    def broadcast_if_different(self, column: NDArray[np.float32]) -> NDArray[np.float32]:
        """The column itself if all ranks hold the same, otherwise rank 0's. A collective."""
        if self.size == 1:
            return column
        mine = np.ascontiguousarray(column).tobytes()
        if len(set(self.gather(xxhash.xxh3_128_digest(mine)))) == 1:
            return column
        theirs: NDArray[np.float32] = np.frombuffer(self.gather(mine if self.main else b"")[0], np.float32).copy()
        return theirs

    def run_with_heartbeat(self, work: Callable[[], T]) -> T:
        """Run `work`, exchanging heartbeats until all ranks have finished; returns this rank's result. A collective.

        For work of unequal duration, such as loading a model or writing files. It runs in a thread.

        Raises:
            XTFError: `work` failed on another rank. An error of this rank is raised once the others have finished.
        """
        if self.size == 1:
            return work()
        with ThreadPoolExecutor(1, initializer=self._set_device) as thread:
            task = thread.submit(work)
            states = [b"0"]
            while b"0" in states:
                wait([task], BEAT_SECONDS)
                states = self.gather(b"0" if not task.done() else b"1" if task.exception() is None else b"!")
        result = task.result()
        if b"!" in states:
            raise XTFError(f"rank {states.index(b'!')} failed; its own message says why.")
        return result

    def from_main(self, work: Callable[[], bytes]) -> bytes:
        """Rank 0's result of `work`, on every rank; errors as in `run_with_heartbeat`. A collective."""
        return self.gather(self.run_with_heartbeat(work if self.main else bytes))[0]

    def _set_device(self) -> None:
        """Use this rank's GPU: a new thread uses the first one."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)


ALONE = Ranks()


def share_out(lengths: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """The rank of each document, (n,), such that the ranks' tokens differ by at most one document.

    Equals dealing the documents, longest first, to ranks 0, 1, ..., size - 1, size - 1, ..., 1, 0, 0, 1, ...
    """
    order = np.lexsort((np.arange(len(lengths)), -lengths))
    place = np.arange(len(lengths)) % (2 * size)
    rank = np.empty(len(lengths), dtype=np.int64)
    rank[order] = np.where(place < size, place, 2 * size - 1 - place)
    return rank


def exchange_results(
    ranks: Ranks,
    own: Iterator[Records],
    sink: Callable[[Records], None],
    others: Callable[[Records], None],
    stats: Callable[[], dict[str, float]],
    *,
    lockstep: bool,
) -> list[dict[str, float]]:
    """Pass this rank's records to `sink` and those of the other ranks to `others`, until all ranks have finished.

    Args:
        own: scores this rank's batches, one after the other.
        sink, others: called with records.
        stats: returns this rank's statistics; called before each exchange.
        lockstep: exchange after a fixed number of batches, not of seconds.

    Returns:
        every rank's statistics.

    Raises:
        XTFError: another rank failed. An error of this rank is raised once it has been sent to the others.
    """

    def exchange(finished: bool, failed: str, outbox: list[Records]) -> list[tuple[list[Any], bytes]]:
        head = json.dumps([finished, failed, stats()]).encode()
        sent = ranks.gather(head + b"\n" + (merge(outbox).to_bytes() if outbox else b""))
        parts = (message.partition(b"\n") for message in sent)
        return [(json.loads(head), records) for head, _, records in parts]

    finished = False
    while True:
        deadline, outbox = time.monotonic() + BEAT_SECONDS, list[Records]()
        while not finished and (len(outbox) < LOCKSTEP_BATCHES if lockstep else time.monotonic() < deadline):
            try:
                records = next(own, None)
                if records is not None:
                    sink(records)
            except BaseException as error:
                if isinstance(error, Exception) and not lockstep:  # in lockstep, the others are inside a forward
                    # with the type, since a MemoryError has no text
                    exchange(True, f"{type(error).__name__}: {error}", [])
                raise
            if records is None:
                finished = True
            else:
                outbox.append(records)
        received = exchange(finished, "", outbox)
        for rank, ((_, failed, _), theirs) in enumerate(received):
            if failed:
                raise XTFError(f"rank {rank} failed while scoring: {failed}")
            if rank != ranks.rank and theirs:
                others(Records.from_bytes(theirs))
        if all(done for (done, _, _), _ in received):
            return [theirs for (_, _, theirs), _ in received]


def pool(ranks: Ranks, stored: Lookup) -> None:
    """Add to `stored` the scores that only other ranks have on their disks. A collective.

    If several ranks have a document, the lowest sends its scores.
    """
    if ranks.size == 1:
        return
    sent = ranks.gather(np.packbits(stored.found).tobytes())
    count = len(stored.found)
    found = np.stack([np.unpackbits(np.frombuffer(bits, np.uint8), count=count) for bits in sent]).astype(bool)
    partial = np.flatnonzero(found.any(0) & ~found.all(0))
    owner = found.argmax(0)
    for run in runs(offsets_of(stored.lengths[partial]), PIECE_TOKENS):
        piece = partial[run]
        mine = stored.records(piece[owner[piece] == ranks.rank])
        for rank, theirs in enumerate(ranks.gather(mine.to_bytes())):
            if rank != ranks.rank:
                stored.take(Records.from_bytes(theirs))
