"""A whole scoring run in a process of its own, started in a few milliseconds so that hundreds of them can be killed.

The processes are forked from a server that has imported everything (multiprocessing's `forkserver`). All runs score the
same documents; shards are small, so that a run writes many. Documents are of unlike length and the reference rounds by
the batch, so that scores show to the last bit which documents shared their batch.
"""

from __future__ import annotations

import functools
import hashlib
import json
import multiprocessing
import os
import time
from collections.abc import Container, Iterable
from contextlib import contextmanager
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from tests import tiny
from tests.test_plan import ATTRIBUTES_ON, Provider, rows
from xtf_plugin.config.block import XTFConfig
from xtf_plugin.data.documents import DocumentSet, collect
from xtf_plugin.plan import Plan, make_plan
from xtf_plugin.report import writer
from xtf_plugin.scoring import cached_scores
from xtf_plugin.scoring.distributed import ALONE, Ranks
from xtf_plugin.store.records import Records
from xtf_plugin.store.store import ScoreStore

SHARD_TOKENS = 200  # more than any batch has, and less than two have: what a process holds back is little
BATCH_TOKENS = 256
DOCUMENTS = 60
NAMES = ("summary.json", "report.html", "scores.parquet")

_END = bytes(16)  # of a batch, in the log of what was scored

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["tests.reliability.scoring"])


class Rounding(Provider):
    """A reference whose scores depend by a rounding on all that is in the batch, as a large one's do on a GPU.

    The tiny one's are mostly equal to the last bit in any company, and where they differ depends on the machine.

    Args:
        pause: seconds that each forward takes longer, for the pace of a larger reference.
    """

    def __init__(self, model: Any = None, pause: float = 0.0) -> None:
        super().__init__(model)
        self.pause = pause

    @contextmanager
    def open(self):
        def forwarded(module: Any, inputs: Any, output: Any) -> None:
            time.sleep(self.pause)
            states = output.last_hidden_state
            states *= 1 + 1e-6 * float(states.double().sum() % 1)

        with super().open() as reference:
            hook = reference.decoder.register_forward_hook(forwarded)
            try:
                yield reference
            finally:
                hook.remove()


class _Logging(ScoreStore):
    """A store that first logs to a file which documents were scored."""

    log: Path

    def add(self, records: Records) -> None:
        with self.log.open("ab") as file:
            file.write(records.keys.tobytes() + _END)
        super().add(records)


def ragged(count: int, seed: int = 0, only: Container[int] | None = None) -> DocumentSet:
    """Documents of 40 to 110 tokens, hardly two alike; or `only` these of them."""
    made = enumerate(rows(count, seed))
    cut = [(40 + 13 * i * i % 71, row) for i, row in made if only is None or i in only]
    return collect([{name: (part * 3)[:size] for name, part in row.items()} for size, row in cut])


@functools.cache
def documents(seed: int = 0) -> DocumentSet:
    return ragged(DOCUMENTS, seed)


def tokens(keys: Iterable[bytes]) -> int:
    """Completion tokens of documents, which is what shards are measured by."""
    sizes = np.diff(documents().completion_offsets).tolist()
    size = {key.tobytes(): size for key, size in zip(documents().keys, sizes, strict=True)}
    return sum(size[key] for key in keys)


def run(folder: str, cache: str, options: dict[str, Any]) -> None:
    """Score, select, and write all that a run writes; then, and only then, `done.json`."""
    torch.set_num_threads(1)
    if options.get("unsynced"):  # a kill loses nothing of what is written, and a busy disk takes longer than scoring
        os.fsync = lambda descriptor: None
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    _Logging.log = place / "scored.log"
    cached_scores.ScoreStore = partial(_Logging, shard_tokens=SHARD_TOKENS)
    block = {**ATTRIBUTES_ON, "cache_dir": cache, "batch_tokens": BATCH_TOKENS, **options.get("block", {})}
    data = ragged(DOCUMENTS, only=options["only"]) if "only" in options else documents()
    provider = Rounding(pause=options.get("pause", 0.0))
    ranks = _connected(*options["rank"]) if "rank" in options else ALONE
    plan = make_plan(XTFConfig.parse(block), data, provider, tiny.tokenizer(), progress=False, ranks=ranks)
    (place / "xtf").mkdir(exist_ok=True)
    writer.write(plan, tiny.tokenizer(), place / "xtf")
    masks = plan.masks()
    facts = {
        "scored": plan.stats.documents,
        "reused": plan.stats.stored_documents,
        "masks": hashlib.sha256(masks.bits.tobytes() + masks.keys.tobytes() + masks.best.tobytes()).hexdigest(),
        "table": table_hash(place / "xtf" / "scores.parquet"),
        "documents": document_hashes(plan),
    }
    (place / "done.json").write_text(json.dumps(facts))


def _connected(rank: int, size: int, meeting: str) -> Ranks:
    """This process as one of several ranks, which find each other by the file `meeting`."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size)
    return Ranks(rank, size)


def document_hashes(plan: Plan) -> list[str]:
    """Of every bit of each document's scores."""
    bounds = zip(plan.scores.offsets[:-1], plan.scores.offsets[1:], strict=True)
    columns = list(plan.scores.values.values())
    return [hashlib.sha256(b"".join(c[low:high].tobytes() for c in columns)).hexdigest() for low, high in bounds]


def table_hash(path: Path) -> str:
    """Of every byte of a score table's columns, without its metadata, which holds times and counts."""
    table = pq.read_table(path).replace_schema_metadata(None).combine_chunks()
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return hashlib.sha256(sink.getvalue()).hexdigest()


def start(folder: Path, cache: Path, **options: Any) -> BaseProcess:
    process = _processes.Process(target=run, args=(str(folder), str(cache), options))
    process.start()
    return process


def finish(process: BaseProcess, folder: Path) -> dict[str, Any]:
    process.join(120)
    assert process.exitcode == 0, process.exitcode
    return json.loads((folder / "done.json").read_text())


def batches(folder: Path) -> list[list[bytes]]:
    """Keys of the documents that were scored in the runs of a folder: the batches, in order, with repetitions."""
    log = folder / "scored.log"
    data, found = log.read_bytes() if log.exists() else b"", [[]]
    for at in range(0, len(data) - 15, 16):
        key = data[at : at + 16]
        if key == _END:
            found.append([])
        else:
            found[-1].append(key)
    return [batch for batch in found if batch]


def scored(folder: Path) -> list[bytes]:
    """The documents of all `batches`."""
    return [key for batch in batches(folder) for key in batch]


def stored(cache: Path) -> set[bytes]:
    """Keys of the documents in the shards of a cache."""
    return {
        key
        for path in cache.rglob("*.parquet")
        if not path.name.startswith("relevance-")
        for key in pq.read_table(path, columns=["key"])["key"].to_pylist()
    }


def strays(cache: Path, folder: Path) -> list[str]:
    """Files that a finished run must not leave: neither shards, tables, descriptions nor what it is asked to write."""
    known = ("reference.json",)
    found = [p for p in cache.rglob("*") if p.is_file() and p.suffix != ".parquet" and p.name not in known]
    found += [p for p in (folder / "xtf").iterdir() if p.name not in NAMES]
    return [path.name for path in found]
