"""A start with all scores stored: from the trainer's rows to masks, part by part.

    python -m tests.benchmarks.bench_start [--documents 100000] [--write docs/benchmarks.md]

The scores in the store are drawn; the rows are a `datasets.Dataset` of 50 to 300 tokens each as a trainer has them, the
model one of 30M weights in memory, whose fingerprint is part of a start. What scoring them would take is measured on
200 of the documents.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from datasets import Dataset

from tests.benchmarks.bench_overheads import NO_TEXT, Provider, make_rows
from tests.benchmarks.bench_scoring import make_model
from tests.benchmarks.common import against, arguments, publish
from xtf_plugin.config import XTFConfig
from xtf_plugin.documents import DocumentSet, collect
from xtf_plugin.hosts.trainer import rows as as_a_trainer_has_them
from xtf_plugin.pipeline import attention_layers, make_plan
from xtf_plugin.records import Records
from xtf_plugin.store import ScoreStore

SECONDS, SHARE = 5, 2  # reach, for 100,000 documents
ATTRIBUTES = dict.fromkeys(("reasoning_importance", "knowledge_novelty", "task_relevance"), True)


def fill(store: ScoreStore, documents: DocumentSet) -> None:
    """Drawn scores for every document, in the shards that a run would have written."""
    rng = np.random.default_rng(0)
    ends = documents.completion_offsets
    for low in range(0, len(documents), 64):
        high = min(low + 64, len(documents))
        size = int(ends[high] - ends[low])
        columns = {name: rng.random(size, dtype=np.float32) for name in ("entropy", "deviation", "attention")}
        logprobs = -rng.random(size, dtype=np.float32) * 10
        store.add(Records(documents.keys[low:high], ends[low : high + 1] - ends[low], logprobs, **columns))


def measure(count: int) -> dict[str, float]:
    """Seconds of each part; `scoring`: what the first start would take, from the speed on 200 documents."""
    model, rows = make_model("30M", "fp32"), make_rows(count)
    dataset, provider = Dataset.from_list(rows), Provider(model)
    with tempfile.TemporaryDirectory() as folder:
        block = {"preset": "none", **ATTRIBUTES, "cache_dir": folder, "protect": {"special_tokens": False}}
        config = XTFConfig.parse(block)
        assert config is not None
        some = collect(rows[: min(200, count // 10)])
        begin = time.perf_counter()
        make_plan(config, some, provider, NO_TEXT, progress=False)
        scoring = (time.perf_counter() - begin) / int(some.lengths.sum())
        documents = collect(rows)
        layers = ",".join(map(str, attention_layers(config, provider.text_config())))
        with ScoreStore(Path(folder), provider.fingerprint(), layers) as store:
            fill(store, documents)
            lost = ~store.load(documents.keys, np.diff(documents.completion_offsets)).found
            assert not lost.any(), f"{lost.sum()} documents would be scored: the store was not filled as a run fills it"
        begin = time.perf_counter()
        documents = collect(as_a_trainer_has_them(dataset, ("input_ids", "labels")))
        middle = time.perf_counter()
        plan = make_plan(config, documents, provider, NO_TEXT, progress=False)
        end = time.perf_counter()
        plan.masks()
        masks = time.perf_counter() - end
    parts = {"documents from rows": middle - begin, "scores and selection": end - middle, "mask table": masks}
    return {**parts, "all": sum(parts.values()), "scoring": scoring * int(documents.lengths.sum())}


def main(given: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--documents", type=int, default=100_000)
    options = parser.parse_args(given)
    count = 300 if options.smoke else options.documents
    found = measure(count)
    rows = [[name, f"{seconds:.2f}", f"{seconds / found['scoring']:.2%}", ""] for name, seconds in found.items()]
    share = found["all"] / found["scoring"]
    rows[-2][-1] = f"{against(found['all'], SECONDS, unit=' s')}, {against(100 * share, SHARE, unit=' %')}"
    publish(
        "start", f"{count:,} stored documents", ["part of a start", "s", "of scoring", "reach"], rows, options.write
    )


if __name__ == "__main__":
    main()
