"""A start with all scores stored: from the trainer's rows to masks, part by part.

    python -m tests.benchmarks.bench_start [--documents 100000] [--write docs/benchmarks]

The scores in the store are drawn; the rows are a `datasets.Dataset` of 50 to 300 tokens each as a trainer has them, the
model one of 30M weights in memory, whose fingerprint is part of a start. What scoring them would take is measured on
as many times 40 of the documents as the start is repeated. Task relevance is stored by the first of the starts.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from datasets import Dataset

from tests.benchmarks import reach
from tests.benchmarks.bench_overheads import NO_TEXT, Provider, make_rows
from tests.benchmarks.bench_scoring import make_model
from tests.benchmarks.common import arguments, publish
from xtf_plugin.config.block import XTFConfig
from xtf_plugin.data.documents import DocumentSet, collect
from xtf_plugin.plan import make_plan
from xtf_plugin.scoring.reference import resolve_layers
from xtf_plugin.store.records import Records
from xtf_plugin.store.store import ScoreStore
from xtf_plugin.training.boundaries import Boundaries
from xtf_plugin.training.trainer import rows as rows_of

SCORED = 40  # documents, for the speed of scoring
HEAD = ["part of a start", "s", "of scoring", "reach"]
ATTRIBUTES = dict.fromkeys(("reasoning_importance", "knowledge_novelty", "task_relevance"), True)


def fill(store: ScoreStore, documents: DocumentSet) -> None:
    """Drawn scores for every document, in the shards that a run would have written."""
    rng = np.random.default_rng(0)
    ends = documents.completion_offsets
    for low in range(0, len(documents), 64):
        high = min(low + 64, len(documents))
        size = int(ends[high] - ends[low])
        columns = {name: rng.random(size, dtype=np.float32) for name in ("entropy", "deviation", "attention")}
        columns["logprobs"] = -rng.random(size, dtype=np.float32) * 10
        store.add(Records(keys=documents.keys[low:high], offsets=ends[low : high + 1] - ends[low], **columns))


def scoring_speed(config: XTFConfig, provider: Provider, rows: list[Any], repeats: int) -> float:
    """Seconds a token of a start that scores everything, the median over sets of a few documents."""
    found = []
    for number in range(repeats):
        some = collect(rows[SCORED * number : SCORED * (number + 1)])
        begin = time.perf_counter()
        make_plan(config, some, provider, NO_TEXT, progress=False)
        found.append((time.perf_counter() - begin) / int(some.lengths.sum()))
    return statistics.median(found)


def start(config: XTFConfig, provider: Provider, dataset: Dataset) -> dict[str, float]:
    """Seconds of each part of a start with all scores stored."""
    trainer = SimpleNamespace(train_dataset=dataset, args=SimpleNamespace(remove_unused_columns=False))
    begin = time.perf_counter()
    documents = collect(rows_of(trainer, Boundaries(lambda rows: None)))
    middle = time.perf_counter()
    plan = make_plan(config, documents, provider, NO_TEXT, progress=False)
    end = time.perf_counter()
    plan.masks()
    masks = time.perf_counter() - end
    parts = {"documents from rows": middle - begin, "scores and selection": end - middle, "mask table": masks}
    return {**parts, "all": sum(parts.values())}


def measure(count: int, size: str, repeats: int) -> dict[str, float]:
    """Median seconds of each part; `scoring`: what the first start would take."""
    rows = make_rows(max(count, SCORED * repeats))
    provider = Provider(make_model(size, "fp32"))
    with tempfile.TemporaryDirectory() as folder:
        block = {"preset": "none", **ATTRIBUTES, "cache_dir": folder, "protect": {"special_tokens": False}}
        config = XTFConfig.parse(block)
        assert config is not None
        speed = scoring_speed(config, provider, rows, repeats)
        documents, dataset = collect(rows[:count]), Dataset.from_list(rows[:count])
        layers = ",".join(map(str, resolve_layers(config.reasoning_importance.layers, provider.text_config())))
        with ScoreStore(Path(folder), provider.fingerprint(), layers) as store:
            fill(store, documents)
            lost = ~store.lookup(documents.keys, np.diff(documents.completion_offsets)).found
            assert not lost.any(), f"{lost.sum()} documents would be scored: the store was not filled as a run fills it"
        starts = [start(config, provider, dataset) for _ in range(repeats)]
    parts = {name: statistics.median(one[name] for one in starts) for name in starts[0]}
    return {**parts, "scoring": speed * int(documents.lengths.sum())}


def main(given: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--documents", type=int, default=100_000)
    options = parser.parse_args(given)
    count, size = (60, "tiny") if options.smoke else (options.documents, "30M")
    found = measure(count, size, options.repeats)
    rows = [[name, f"{took:.2f}", f"{took / found['scoring']:.2%}", ""] for name, took in found.items()]
    share = found["all"] / found["scoring"]
    rows[-2][-1] = f"{reach.START.judge(found['all'])}, {reach.START_SHARE.judge(share)}"
    publish("start", f"{count:,} stored documents, medians of {options.repeats}", HEAD, rows, options.write)


if __name__ == "__main__":
    main()
