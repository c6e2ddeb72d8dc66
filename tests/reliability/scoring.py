"""A whole scoring run in a process of its own, started in a few milliseconds so that hundreds of them can be killed.

The processes are forked from a server that has imported everything (multiprocessing's `forkserver`). All runs score the
same documents; shards are small, so that a run writes many.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import time
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
from tests.test_pipeline import ATTRIBUTES_ON, Provider, rows
from xtf_plugin import output, pipeline
from xtf_plugin.config import XTFConfig
from xtf_plugin.documents import DocumentSet, collect
from xtf_plugin.passes import Neighbours
from xtf_plugin.records import Records
from xtf_plugin.store import ScoreStore

SHARD_TOKENS = 400
BATCH_TOKENS = 256
DOCUMENTS = 90
NAMES = ("summary.json", "report.html", "scores.parquet")

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["tests.reliability.scoring"])


class _Slowly(Provider):
    """The tiny reference at the pace of a larger one."""

    def __init__(self, pause: float) -> None:
        super().__init__()
        self.pause = pause

    @contextmanager
    def open(self):
        with super().open() as reference:
            hook = reference.decoder.register_forward_hook(lambda *_: time.sleep(self.pause))
            yield reference
            hook.remove()


class _Told(ScoreStore):
    """A store that tells on a file, before it does anything else, which documents were scored."""

    log: Path

    def add(self, records: Records) -> None:
        with self.log.open("ab") as file:
            file.write(records.keys.tobytes())
        super().add(records)


def documents(seed: int = 0) -> DocumentSet:
    return collect(rows(DOCUMENTS, seed))


def run(folder: str, cache: str, options: dict[str, Any]) -> None:
    """Score, select, and write all that a run writes; then, and only then, `done.json`."""
    torch.set_num_threads(1)
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    _Told.log = place / "scored.log"
    pipeline.ScoreStore = partial(_Told, shard_tokens=SHARD_TOKENS)
    block = {**ATTRIBUTES_ON, "cache_dir": cache, "batch_tokens": BATCH_TOKENS, **options.get("block", {})}
    data = documents()
    pause = options.get("pause", 0.0)
    if options.get("alone"):
        pipeline.stored_scores.__globals__["Neighbours"] = _Nobody
    plan = pipeline.make_plan(XTFConfig.parse(block), data, _Slowly(pause), tiny.tokenizer(), progress=False)
    (place / "xtf").mkdir(exist_ok=True)
    output.write(plan, tiny.tokenizer(), place / "xtf")
    masks = plan.masks()
    facts = {
        "scored": plan.stats.documents,
        "reused": plan.reused,
        "masks": hashlib.sha256(masks.bits.tobytes() + masks.keys.tobytes() + masks.best.tobytes()).hexdigest(),
        "table": table_hash(place / "xtf" / "scores.parquet"),
    }
    (place / "done.json").write_text(json.dumps(facts))


def table_hash(path: Path) -> str:
    """Of every byte of a score table's columns; its metadata tells how long the run took and what it found stored."""
    table = pq.read_table(path).replace_schema_metadata(None).combine_chunks()
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return hashlib.sha256(sink.getvalue()).hexdigest()


class _Nobody(Neighbours):
    """A process that does not look at what others do, as all were before they did."""

    def stored(self, documents):
        return np.zeros(len(documents), dtype=bool)


def start(folder: Path, cache: Path, **options: Any) -> BaseProcess:
    process = _processes.Process(target=run, args=(str(folder), str(cache), options))
    process.start()
    return process


def finish(process: BaseProcess, folder: Path) -> dict[str, Any]:
    process.join(120)
    assert process.exitcode == 0, process.exitcode
    return json.loads((folder / "done.json").read_text())


def scored(folder: Path) -> list[bytes]:
    """Keys of the documents that were scored in the runs of a folder, in order, with repetitions."""
    log = folder / "scored.log"
    data = log.read_bytes() if log.exists() else b""
    return [data[at : at + 16] for at in range(0, len(data) - 15, 16)]


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
