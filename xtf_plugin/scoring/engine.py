"""The scoring pass: documents in, scores out, in length-sorted batches.

Each batch takes one decoder forward, or two where documents have a shared prefix.

One forward yields attention received, log-probabilities and the entropy and deviation of the predictions. Each batch's
scores are passed to a sink at once, so a run that is killed loses only what the sink has not written. A batch that does
not fit into memory is split, but for a reference whose weights are split between ranks (FSDP).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from ..data.documents import DocumentSet
from ..errors import XTFError
from ..store.records import Records
from .batching import (
    PROBE_TOKENS,
    ScoringStats,
    budget_for,
    default_batch_tokens,
    halved_budget,
    laid_out,
    meter,
    out_of_memory,
    plan_batches,
    whole_batches_first,
    within_memory,
)
from .branches import agrees, can_branch, score_branches, share_out_rows
from .distributed import ALONE, Ranks, exchange_results, share_out
from .reference import Reference, rotary_switch
from .self_check import WHERE_FASTER, Packing, check

Sink = Callable[[Records], None]
LAG = {"cuda": 1}  # batches in flight per device type: the next one is launched before the last one's scores are read


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
    ranks: Ranks = ALONE,
    others: Sink | None = None,
    packing: Packing = WHERE_FASTER,
) -> ScoringStats:
    """Score the `wanted` documents and pass each batch's scores to `sink`.

    Equals, per document: run the decoder, then `kernels.eager.attention_received` averaged over `layers` and
    `kernels.eager.predictions` at every completion token. Each of several ranks scores a share and receives the rest.

    Args:
        wanted: (n,) indices into `documents`, the same on every rank.
        layers: layers whose attention is recorded; empty: no attention received.
        sink: called with the records of each batch.
        batch_tokens: padded tokens per batch; None: measured on a GPU, `default_batch_tokens` on a CPU, under FSDP, and
            where documents have a shared prefix.
        progress: show a progress bar, named `label`.
        others: called with records from other ranks; None: `sink`.
        packing: when to pack several documents into one row.

    Returns:
        the sum over all ranks, with the seconds of the slowest.

    Raises:
        XTFError: a single document does not fit into memory; the reference is not supported; another rank failed.
    """
    checked = partial(check, documents, wanted, reference, layers, packing)
    if reference.lockstep:  # its forwards are collectives
        checked()
    else:
        ranks.run_with_heartbeat(checked)
    lengths, branched = documents.lengths[wanted], not layers and shares_beginnings(documents, wanted, reference, ranks)
    if branched:
        rank_of = share_out_rows(documents, wanted, ranks.size, default_batch_tokens(reference.device))
    else:
        rank_of = share_out(lengths, ranks.size)
    own = wanted[rank_of == ranks.rank]
    name = f"xtf: {label}" if ranks.size == 1 else f"xtf: {label}, rank {ranks.rank} of {ranks.size}"
    bar = tqdm(total=int(documents.lengths[own].sum()), unit="tok", unit_scale=True, desc=name, disable=not progress)
    work = _Pass(documents, reference, layers, bar, ScoringStats(documents=len(own)), packing.windows, ranks.size > 1)
    with bar, reference.scoring(record=bool(layers) or (work.packs and not branched), masked=branched):
        batches = work.branches(own, batch_tokens) if branched else work.batches(own, batch_tokens)
        if ranks.size == 1:
            for records in batches:
                sink(records)
            return work.stats
        if reference.lockstep:
            budget = batch_tokens or default_batch_tokens(reference.device)
            shares = [lengths[rank_of == rank] for rank in range(ranks.size)]
            forwards = max(len(list(plan_batches(share, budget, apart=work.apart))) for share in shares)
            batches = work.in_step(own, budget, forwards, wanted[np.argmin(lengths)])
        stats = partial(asdict, work.stats)
        by_rank = exchange_results(ranks, batches, sink, others or sink, stats, lockstep=reference.lockstep)
    return ScoringStats.of_all(by_rank)


def shares_beginnings(
    documents: DocumentSet, wanted: NDArray[np.int64], reference: Reference, ranks: Ranks = ALONE
) -> bool:
    """Whether the documents have shared prefixes, and this reference reads each of them once. A collective."""
    if not len(wanted) or not can_branch(reference, documents):
        return False
    return ranks.from_main(lambda: b"y" if agrees(documents, wanted, reference) else b"") == b"y"


@dataclass
class _Pass:
    """One rank's scoring pass: its batches and their statistics."""

    documents: DocumentSet
    reference: Reference
    layers: tuple[int, ...]
    bar: Any
    stats: ScoringStats
    windows: bool
    shared_out: bool  # between ranks: each scores its own documents

    def __post_init__(self) -> None:
        config, longest = self.reference.text_config, int(self.documents.lengths.max())
        switch, window = rotary_switch(config), getattr(config, "sliding_window", None)
        self.apart = None if switch is None else switch[1]
        # kernels take a packed row directly only if no document is longer than the window
        self.packs = self.reference.packs and (not window or longest <= window or self.windows)
        self._start = time.perf_counter()

    def batches(self, wanted: NDArray[np.int64], budget: int | None) -> Iterator[Records]:
        """Scores of the `wanted` documents; a batch that does not fit into memory is split.

        With `budget` None on a GPU, the memory of a small first batch decides the size of the others. After an error,
        batches that were launched before it are yielded first.
        """
        launched: deque[Callable[[], Records]] = deque()
        failed = None
        try:
            for collect in self._launches(wanted, budget):
                launched.append(collect)
                if len(launched) > LAG.get(self.reference.device.type, 0):
                    yield launched.popleft()()
        except (RuntimeError, ValueError) as error:
            failed = error
        while launched:
            yield launched.popleft()()
        if failed is not None:
            raise failed

    def branches(self, wanted: NDArray[np.int64], budget: int | None) -> Iterator[Records]:
        """Scores of the `wanted` documents, with each shared prefix read once per row of a batch."""
        budget = budget or default_batch_tokens(self.reference.device)
        planned = None if self.shared_out else np.flatnonzero(np.diff(self.documents.completion_offsets) > 0)
        mean = float(self.documents.lengths[wanted].mean()) if len(wanted) else 0.0
        for records in score_branches(self.documents, wanted, self.reference, budget, self.stats, planned=planned):
            self.stats.seconds = time.perf_counter() - self._start
            self.bar.update(int(mean * len(records.keys)))
            yield records

    def _launches(self, wanted: NDArray[np.int64], budget: int | None) -> Iterator[Callable[[], Records]]:
        """Launch one batch after the other, and yield the function that waits for its scores."""
        lengths, packs = self.documents.lengths, self.packs
        gauge = meter(self.reference.device) if budget is None else None
        limit = budget or (default_batch_tokens(self.reference.device) if gauge is None else PROBE_TOKENS)

        def plan(documents: NDArray[np.int64]) -> list[NDArray[np.int64]]:
            split = plan_batches(lengths[documents], limit, packed=packs, apart=self.apart)
            return [documents[batch] for batch in split]

        pending = whole_batches_first(plan, wanted, np.arange(len(lengths)))[::-1]
        while pending:
            batch = pending.pop()
            tokens = int(lengths[batch].sum()) if packs else len(batch) * int(lengths[batch[0]])
            if gauge is not None:
                gauge.reset()
            collect, problem = within_memory(partial(self._launch, batch))
            if collect is None:
                limit = halved_budget(len(batch), int(lengths[batch[0]]), tokens, self.reference.device, problem)
                pending.append(batch)
                self.stats.halvings += 1
            else:
                yield collect
                if gauge is None:
                    continue
                limit = budget_for(tokens, gauge.grown(), gauge.free())
            gauge = None
            pending = plan(np.concatenate([wanted[:0], *pending[::-1]]))[::-1]

    def in_step(self, wanted: NDArray[np.int64], budget: int, forwards: int, filler: int) -> Iterator[Records]:
        """Scores of the `wanted` documents in exactly `forwards` forwards: the document `filler` makes up the number.

        A lack of memory ends the run, since the other ranks wait for this one in the same forward.
        """

        def at_once(documents: NDArray[np.int64]) -> Records:
            return self._launch(documents)()

        done = 0
        for batch in plan_batches(self.documents.lengths[wanted], budget, apart=self.apart):
            records, problem = within_memory(partial(at_once, wanted[batch]))
            if records is None:
                raise XTFError(
                    f"out of memory while scoring {len(batch)} documents with a model that is sharded between ranks "
                    f"({problem}). Set xtf `batch_tokens` below {budget}."
                )
            done += 1
            yield records
        for _ in range(done, forwards):
            self._launch(np.asarray([filler]))  # its scores are not read

    def _launch(self, batch: NDArray[np.int64]) -> Callable[[], Records]:
        """Launch the forward of one batch; the function that is returned waits for its scores, and counts the batch."""
        reference, keys, lengths = self.reference, self.documents.keys[batch], self.documents.lengths[batch]
        rows = laid_out(self.documents, batch, reference.device, packed=self.packs)

        def run() -> tuple[Tensor, Tensor | None]:
            hidden, received = reference.forward(rows.ids, rows.lengths, self.layers, rows.start, packed=rows.packed)
            states = hidden.flatten(0, 1)[rows.read.to(hidden.device)]  # (P, D)
            found = reference.predictions(states, rows.ids.flatten()[rows.predicted])
            return found, None if received is None else received.flatten()[rows.completion].float()

        predicted, received = reference.with_full_weights(run)

        def collect() -> Records:
            columns = np.full((3, int(rows.offsets[-1])), np.nan, dtype=np.float32)
            columns[:, rows.places] = predicted.cpu().numpy()
            attention, tokens = None if received is None else received.cpu().numpy(), int(lengths.sum())
            self.stats.tokens += tokens
            self.stats.padded_tokens += tokens if self.packs else len(batch) * int(lengths.max())
            self.stats.batches += 1
            self.stats.seconds = time.perf_counter() - self._start  # a disabled bar measures no time
            self.bar.update(tokens)
            logprobs, entropy, deviation = columns
            return Records(logprobs, entropy, deviation, attention, keys=keys, offsets=rows.offsets)

        return collect


def gather_vectors(reference: Reference, token_ids: NDArray[Any], kind: str, chunk: int = 4_096) -> Tensor:
    """Context-free embeddings of token ids, (n, D) float32 on the CPU.

    Args:
        token_ids: (n,).
        kind: `input`: the row of the input embedding; `output`: the last hidden state of the token alone.
        chunk: tokens at a time; halved on a lack of memory.

    Raises:
        XTFError: a single token does not fit into memory; or from `Reference.check_ids`.
    """
    reference.check_ids(int(np.max(token_ids)))
    parts: list[Tensor] = []
    low = 0
    with reference.scoring(record=False):
        while low < len(token_ids):
            ids = torch.from_numpy(np.asarray(token_ids[low : low + chunk], dtype=np.int64)).to(reference.device)

            def run(ids: Tensor = ids) -> Tensor:
                if kind == "input":
                    return reference.embeddings(ids)  # type: ignore[no-any-return]
                return reference.forward(ids[:, None], torch.ones_like(ids), ())[0][:, 0]

            weighted = partial(reference.with_full_weights, run)
            # in lockstep, other ranks wait in the same forward
            vectors, problem = (weighted(), "") if reference.lockstep else within_memory(weighted)
            if vectors is not None:
                # detach: hooks for gradient checkpointing set requires_grad on embeddings
                parts.append(vectors.detach().float().cpu())
                low += len(ids)
            elif len(ids) == 1:
                raise out_of_memory(1, problem)
            else:
                chunk = len(ids) // 2
    return torch.cat(parts)
