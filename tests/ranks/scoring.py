"""Cases of messages, scores and failures."""

from __future__ import annotations

import time

import numpy as np
import torch

from tests import tiny
from tests.ranks.common import FINGERPRINT, case, ending, lines, scored
from tests.ranks.fsdp import fsdp, sharded
from tests.test_plan import Provider, rows
from xtf_plugin.config.block import XTFConfig
from xtf_plugin.data.documents import collect
from xtf_plugin.errors import XTFError
from xtf_plugin.scorers import ScoringContext, registry
from xtf_plugin.scorers.new_text import NewTextConfig
from xtf_plugin.scoring import dataset_scores, distributed, engine
from xtf_plugin.scoring.cached_scores import ScoreSource
from xtf_plugin.scoring.distributed import ALONE, Ranks
from xtf_plugin.scoring.reference import Reference
from xtf_plugin.store.store import ScoreStore


def forbidden():
    raise AssertionError("this start must not open the reference")


@case
def messages(ranks, folder):
    """Bytes of unequal length, in several chunks."""
    distributed.CHUNK_BYTES = 10
    mine = bytes(range(7 + 20 * ranks.rank))
    found = ranks.gather(mine), ranks.gather(b"")
    distributed.CHUNK_BYTES = 4 << 20
    whole = [bytes(range(7 + 20 * rank)) for rank in range(ranks.size)]
    column = ranks.broadcast_if_different(np.float32([1, 2, ranks.rank]))
    return {"right": found == (whole, [b""] * ranks.size), "column": lines(column)}


@case
def a_table_that_one_rank_has(ranks, folder):
    """A vocabulary table on the disk of the last rank: no rank computes it, and every rank stores it."""
    config = XTFConfig.parse({"cache_dir": str(folder / f"table-{ranks.rank}")})
    key, values = "ab" * 16, np.float32([1, 2, 3])
    if ranks.rank == ranks.size - 1:
        ScoreSource(config, collect(rows(2)), None, Provider()).vocabulary_table(key, lambda: values)
    for compute in (forbidden, forbidden):
        found = ScoreSource(config, collect(rows(2)), None, Provider(), ranks=ranks).vocabulary_table(key, compute)
    return {"table": lines(found), "files": len(list((folder / f"table-{ranks.rank}").rglob("relevance-*.parquet")))}


@case
def scores_of_the_dataset_that_one_rank_has(ranks, folder):
    """On the disk of the first rank, as a start wrote them: every rank has them, and none computes any."""
    large, dataset_scores.LARGE = dataset_scores.LARGE, 1
    scorer, part = registry.find("new_text"), NewTextConfig(scorer="new_text")
    config = XTFConfig.parse({"cache_dir": str(folder / f"scores-{ranks.rank}")})

    def found(ranks, compute):
        source = ScoreSource(config, collect(rows(2)), tiny.tokenizer(), Provider(), ranks=ranks)
        context = ScoringContext(source.documents, source.tokenizer, source)
        return dataset_scores.dataset_scores(source, context, scorer, part, compute)

    values = np.arange(len(collect(rows(2)).completion_ids), dtype=np.float32)
    if ranks.main:
        found(ALONE, lambda *_: values)
    right = bool((found(ranks, lambda *_: forbidden()) == values).all())
    dataset_scores.LARGE = large
    return {"right": right}


@case
def disagreement(ranks, folder):
    ranks.agree(b"same", "reference")
    try:
        ranks.agree(bytes([ranks.rank]), "training data")
    except XTFError as error:
        return str(error)


@case
def work_of_the_main_rank(ranks, folder):
    """Work longer than a beat: the others exchange heartbeats, and get the result or an error."""
    distributed.BEAT_SECONDS, gathers, gather = 0.05, [], Ranks.gather
    Ranks.gather = lambda self, mine: gathers.append(1) or gather(self, mine)

    def slow():
        time.sleep(0.4)
        return b"done"

    def broken():
        raise XTFError("the disk is full")

    result, count = ranks.from_main(slow), len(gathers)
    try:
        ranks.from_main(broken)
        message = ""
    except XTFError as error:
        message = str(error)
    distributed.BEAT_SECONDS, Ranks.gather = 20.0, gather
    return {"result": result.decode(), "gathers": count, "error": message}


@case
def work_of_every_rank(ranks, folder):
    """A rank that finishes early exchanges heartbeats with the others; all ranks learn of a failure."""
    distributed.BEAT_SECONDS = 0.05

    def work():
        time.sleep(0.3 * ranks.rank)
        return ranks.rank

    def broken():
        if ranks.rank == 1:
            raise ValueError("no such file")

    result, message = ranks.run_with_heartbeat(work), ""
    try:
        ranks.run_with_heartbeat(broken)
    except (XTFError, ValueError) as error:
        message = f"{type(error).__name__}: {error}"
    distributed.BEAT_SECONDS = 20.0
    return {"result": result, "error": message}


@case
def scores_without_a_shared_disk(ranks, folder):
    """Every rank has its own cache, which holds the documents that it scored; together they hold all."""
    documents, reference, root = collect(rows(13)), Reference(tiny.model(), "tiny"), folder / f"own-{ranks.rank}"
    found = scored(ranks, root, documents, lambda: reference)
    with ScoreStore(root, FINGERPRINT, "0,1") as store:
        kept = int(store.lookup(documents.keys, np.diff(documents.completion_offsets)).found.sum())
    again = scored(ranks, root, documents, forbidden)
    more = scored(ranks, root, collect(rows(16)), lambda: reference)
    return {**found, "stored_here": kept, "again": again, "more": more["stats"][0]}


@case
def scores_on_a_shared_disk(ranks, folder):
    documents, reference = collect(rows(13)), Reference(tiny.model(), "tiny")
    found = scored(ranks, folder / "shared", documents, lambda: reference)
    return {**found, "again": scored(ranks, folder / "shared", documents, forbidden)}


@case
def scores_handed_on_in_pieces(ranks, folder):
    """Every rank has stored other documents, and sends them to the others in several pieces."""
    data, root, reference = rows(13), folder / f"pieces-{ranks.rank}", Reference(tiny.model(), "tiny")
    scored(Ranks(), root, collect(data[ranks.rank :: ranks.size]), lambda: reference)
    whole, distributed.PIECE_TOKENS, gathers, gather = distributed.PIECE_TOKENS, 60, [], Ranks.gather
    Ranks.gather = lambda self, mine: gathers.append(1) or gather(self, mine)
    found = scored(ranks, root, collect(data), forbidden)
    distributed.PIECE_TOKENS, Ranks.gather = whole, gather
    return {**found, "gathers": len(gathers)}


@case
def caches_that_differ(ranks, folder):
    """Two caches with other scores of the same documents: the ranks must plan with the same ones."""
    documents, root = collect(rows(5)), folder / f"differ-{ranks.rank}"
    reference = Reference(tiny.model(seed=ranks.rank), "tiny")
    scored(Ranks(), root, documents, lambda: reference)
    return scored(ranks, root, documents, forbidden)


@case
def many_rounds(ranks, folder):
    """Ranks exchange scores between batches."""
    distributed.BEAT_SECONDS, gathers, gather = 0.06, [], Ranks.gather
    Ranks.gather = lambda self, mine: gathers.append(1) or gather(self, mine)
    documents = collect(rows(13))

    class Reluctant(Reference):
        def forward(self, *args, **kwargs):
            time.sleep(0.05 * ranks.rank)
            return super().forward(*args, **kwargs)

    reference = Reluctant(tiny.model(), "tiny")
    found = scored(ranks, folder / f"rounds-{ranks.rank}", documents, lambda: reference)
    distributed.BEAT_SECONDS, Ranks.gather = 20.0, gather
    return {**found, "gathers": len(gathers)}


@case
def a_rank_that_fails(ranks, folder):
    """In a forward, with or without a message, in the check before the first batch, or in the sink."""

    class Broken(Reference):
        error, when = ValueError("device-side assert"), True

        def forward(self, *args, **kwargs):
            if ranks.rank == 1 and bool(self.checked) is self.when:
                raise self.error
            return super().forward(*args, **kwargs)

    class Silent(Broken):
        error = MemoryError()

    class Unchecked(Broken):
        when = False

    def full(records):
        if ranks.rank == 1:
            raise OSError("no space left")

    def failed(kind, sink):
        documents = collect(rows(9))
        try:
            wanted = np.arange(len(documents))
            engine.score(documents, wanted, kind(tiny.model(), "tiny"), (), sink, progress=False, ranks=ranks)
        except (XTFError, ValueError, MemoryError, OSError) as error:
            return f"{type(error).__name__}: {error}"

    kinds = {"forward": Broken, "silent": Silent, "check": Unchecked}
    found = {name: failed(kind, lambda records: None) for name, kind in kinds.items()}
    return {**found, "sink": failed(Reference, full)}


@case
def weights_that_one_rank_did_not_load(ranks, folder):
    """transformers may load weights on one rank only, for FSDP; no check of a single rank can detect it."""
    model = tiny.model()
    if ranks.rank:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
    try:
        scored(ranks, folder / f"empty-{ranks.rank}", collect(rows(9)), lambda: Reference(model, "tiny"))
    except XTFError as error:
        return str(error)


@case
def memory_that_runs_out_on_one_rank(ranks, folder):
    class Small(Reference):
        def forward(self, input_ids, *args, **kwargs):
            if ranks.rank == 0 and len(input_ids) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().forward(input_ids, *args, **kwargs)

    reference = Small(tiny.model(), "tiny")
    return scored(ranks, folder / f"small-{ranks.rank}", collect(rows(13)), lambda: reference)


@ending
def memory_that_runs_out_in_step(ranks, folder):
    """The other ranks are inside the same forward, and receive no message."""
    _, reference = sharded(ranks, False)
    predictions = reference.predictions

    def short(*args):
        if ranks.rank == 1 and reference.checked:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return predictions(*args)

    reference.predictions = short
    scored(ranks, folder / f"short-{ranks.rank}", collect(rows(9)), lambda: reference)


@case
def fsdp_full(ranks, folder):
    return fsdp(ranks, folder, False, scored)


@case
def fsdp_adapters(ranks, folder):
    return fsdp(ranks, folder, True, scored)
