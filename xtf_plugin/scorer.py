"""Documents in, scores out: length-sorted batches under a token budget, one decoder forward each.

One forward gives reasoning importance, log-probabilities and what the reference expected there together. Results go to
a sink as they come, so a run that is killed loses no more than the sink's unwritten part. Out of memory halves the
batches and goes on.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from .batches import (
    PROBE_TOKENS,
    ScoringStats,
    budget_for,
    default_batch_tokens,
    halved,
    is_out_of_memory,
    laid_out,
    meter,
    plan_batches,
    plan_wanted,
    too_little,
)
from .data.documents import DocumentSet
from .errors import XTFError
from .ranks import ALONE, Ranks, exchange_results, share_out
from .records import Records
from .reference import Reference, rotary_switch
from .trial import WHERE_FASTER, Packing, check

logger = logging.getLogger(__name__)

Sink = Callable[[Records], None]
_Begun = deque[Callable[[], Records]]
LAG = {"cuda": 1}  # batches that are begun before the scores of one are waited for


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
    """Score the `wanted` documents and hand each batch's scores to `sink`.

    Equals, per document: run the decoder, `attributes.attention_received` averaged over `layers` and
    `attributes.predictions` at every completion token. Of several ranks each scores its share and receives the rest.

    Args:
        wanted: (n,) indices into `documents`, the same on every rank.
        layers: layers for reasoning importance; empty: no attention received.
        sink: called with the records of each batch of documents.
        batch_tokens: padded tokens per batch; None: by the device's memory, if it has a meter.
        progress: show a bar, called by `label`.
        ranks: of the run.
        others: called with the records of other ranks; None: `sink`.
        packing: where documents are packed into one row.

    Returns:
        what all ranks did together; the seconds are the slowest one's.

    Raises:
        XTFError: a single document does not fit into memory; the reference is not supported; another rank failed.
    """
    checked = partial(check, documents, wanted, reference, layers, packing)
    if reference.lockstep:  # its forwards are collectives
        checked()
    else:
        ranks.run_with_heartbeat(checked)
    lengths = documents.lengths[wanted]
    rank_of = share_out(lengths, ranks.size)
    own = wanted[rank_of == ranks.rank]
    name = f"xtf: {label}" if ranks.size == 1 else f"xtf: {label}, rank {ranks.rank} of {ranks.size}"
    bar = tqdm(total=int(documents.lengths[own].sum()), unit="tok", unit_scale=True, desc=name, disable=not progress)
    work = _Work(documents, reference, layers, bar, ScoringStats(documents=len(own)), packing.windows)
    with bar, reference.scoring(record=bool(layers) or work.packs):
        if ranks.size == 1:
            for records in work.batches(own, batch_tokens):
                sink(records)
            return work.stats
        if reference.lockstep:
            budget = batch_tokens or default_batch_tokens(reference.device)
            shares = [lengths[rank_of == rank] for rank in range(ranks.size)]
            by_rank = [len(list(plan_batches(share, budget, apart=work.apart))) for share in shares]
            batches = work.in_step(own, budget, max(by_rank), wanted[np.argmin(lengths)])
        else:
            batches = work.batches(own, batch_tokens)

        def take(records: Records, mine: bool) -> None:
            (sink if mine or others is None else others)(records)

        def counts() -> list[float]:
            return list(asdict(work.stats).values())

        totals = exchange_results(ranks, batches, counts, take, lockstep=reference.lockstep)
    return ScoringStats.of_all(totals)


class _Work:
    """One rank's scoring pass: its batches one after the other, and what they took."""

    def __init__(
        self,
        documents: DocumentSet,
        reference: Reference,
        layers: tuple[int, ...],
        bar: Any,
        stats: ScoringStats,
        windows: bool,
    ) -> None:
        self.documents, self.reference, self.layers, self.bar, self.stats = documents, reference, layers, bar, stats
        switch, window = rotary_switch(reference.text_config), getattr(reference.text_config, "sliding_window", None)
        self.apart = None if switch is None else switch[1]
        # attention takes packed rows as they are only where no window cuts a document
        self.packs = reference.packs and (not window or int(documents.lengths.max()) <= window or windows)
        self._start = time.perf_counter()

    def batches(self, wanted: NDArray[np.int64], budget: int | None) -> Iterator[Records]:
        """Scores of the `wanted` documents; batches are halved when memory runs out.

        With `budget` None the first batch is small, and the others are as large as its memory says. An error takes no
        batch with it that was begun before.
        """
        begun: _Begun = deque()
        try:
            yield from self._batches(wanted, budget, begun)
        except (RuntimeError, ValueError):
            while begun:
                yield begun.popleft()()
            raise

    def _batches(self, wanted: NDArray[np.int64], budget: int | None, begun: _Begun) -> Iterator[Records]:
        lengths, packs = self.documents.lengths, self.packs
        gauge = meter(self.reference.device) if budget is None else None
        budget = budget or (default_batch_tokens(self.reference.device) if gauge is None else PROBE_TOKENS)
        cut: dict[str, Any] = {"packed": packs, "apart": self.apart}
        pending = plan_wanted(lengths, wanted, budget, **cut)[::-1]
        while pending:
            batch = pending.pop()
            tokens = int(lengths[batch].sum()) if packs else len(batch) * int(lengths[batch[0]])
            problem = None
            try:
                if gauge is not None:
                    gauge.reset()
                begun.append(self._launch(batch))
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                problem = str(error)  # not the error itself, whose traceback holds all tensors of the forward
            if problem is not None:
                budget = halved(len(batch), int(lengths[batch[0]]), tokens, self.reference.device, problem)
                pending.append(batch)
                self.stats.halvings += 1
            else:
                if len(begun) > LAG.get(self.reference.device.type, 0):
                    yield begun.popleft()()
                if gauge is None:
                    continue
                budget = budget_for(tokens, gauge.grown(), gauge.free())
            gauge = None
            rest = np.concatenate([np.zeros(0, dtype=np.int64), *pending[::-1]])
            pending = [rest[part] for part in plan_batches(lengths[rest], budget, **cut)][::-1]
        while begun:
            yield begun.popleft()()

    def in_step(self, wanted: NDArray[np.int64], budget: int, forwards: int, filler: int) -> Iterator[Records]:
        """The same in exactly `forwards` forwards: the shortest document, `filler`, makes up the number.

        Memory that runs out ends the run: the other ranks are in the same forward, and wait for this one.
        """
        done = 0
        for batch in plan_batches(self.documents.lengths[wanted], budget, apart=self.apart):
            try:
                records = self._launch(wanted[batch])()
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                raise XTFError(
                    f"out of memory while scoring {len(batch)} documents with a model that is sharded between ranks "
                    f"({error}). Set xtf `batch_tokens` below {budget}."
                ) from error
            done += 1
            yield records
        for _ in range(done, forwards):
            _launch(self.documents, np.asarray([filler]), self.reference, self.layers)()

    def _launch(self, batch: NDArray[np.int64]) -> Callable[[], Records]:
        begun = _launch(self.documents, batch, self.reference, self.layers, packed=self.packs)
        return partial(self._counted, begun, batch)

    def _counted(self, collect: Callable[[], Records], batch: NDArray[np.int64]) -> Records:
        """A batch's scores, when they are there, and what it took."""
        records, lengths = collect(), self.documents.lengths[batch]
        self.stats.tokens += (tokens := int(lengths.sum()))
        self.stats.padded_tokens += tokens if self.packs else len(batch) * int(lengths.max())
        self.stats.batches += 1
        self.stats.seconds = time.perf_counter() - self._start  # a bar that is switched off keeps no time
        self.bar.update(tokens)
        return records


def _launch(
    documents: DocumentSet,
    batch: NDArray[np.int64],
    reference: Reference,
    layers: tuple[int, ...],
    packed: bool = False,
) -> Callable[[], Records]:
    """Begin to score one batch of documents; what is returned waits for the scores and gives them, in the order given.

    On a GPU the next batch can be laid out and begun before the last one's scores are waited for.
    """
    rows = laid_out(documents, batch, reference.device, packed=packed)

    def run() -> tuple[Tensor, Tensor | None]:
        hidden, received = reference.forward(
            rows.ids, rows.lengths, layers, rows.start, packed=rows.packed, wanted=rows.read
        )
        states = hidden.flatten(0, 1)[rows.read.to(hidden.device)]  # (P, D): the state before each predicted token
        found = reference.predictions(states, rows.ids.flatten()[rows.predicted])
        return found, None if received is None else received.flatten()[rows.completion].float()

    predicted, received = reference.with_full_weights(run)

    def collect() -> Records:
        columns = np.full((3, int(rows.offsets[-1])), np.nan, dtype=np.float32)
        columns[:, rows.places] = predicted.cpu().numpy()
        attention = None if received is None else received.cpu().numpy()
        logprobs, entropy, deviation = columns
        return Records(documents.keys[batch], rows.offsets, logprobs, entropy, deviation, attention)

    return collect


def gather_vectors(reference: Reference, token_ids: NDArray[Any], kind: str, chunk: int = 4_096) -> Tensor:
    """Context-free embeddings of token ids, (n, D) float32 on the CPU.

    Args:
        kind: `input`: the row of the input embedding; `output`: the last hidden state of the token run alone.
        chunk: tokens at a time; halved when memory runs out.

    Raises:
        XTFError: a single one does not fit; or see `Reference.check_ids`.
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

            try:
                # hooks for gradient checkpointing mark embeddings as needing grad
                parts.append(reference.with_full_weights(run).detach().float().cpu())
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not is_out_of_memory(error) or reference.lockstep:  # in step, the others are in the same forward
                    raise
                if len(ids) == 1:
                    raise too_little(1, str(error)) from None
                chunk = len(ids) // 2
            else:
                low += len(ids)
    return torch.cat(parts)
