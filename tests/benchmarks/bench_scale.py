"""A start with all scores stored for many short documents: seconds and memory from a trainer's rows to masks.

    python -m tests.benchmarks.bench_scale [--documents 1000000] [--write docs/benchmarks]

The rows have 40 to 120 tokens: a prompt and sentences of the demo, one token in ten replaced by another one, so that
hardly a sentence stands twice. They lie in an Arrow file, as a trainer has them. Their scores are drawn, and are stored
in the order and in shards of the size in which a GPU writes them. Each row of the table is a start in a process of its
own. Seconds are those of the processor, so that other work on the machine does not count; the clock counts it. Memory
is the peak of what the whole process holds, torch and transformers too, the mapped file of rows apart.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
from datasets import Dataset

from tests import real, tiny
from tests.benchmarks.bench_overheads import Provider
from tests.benchmarks.common import arguments, publish, resident
from xtf_plugin import plan
from xtf_plugin.config.block import XTFConfig
from xtf_plugin.data.documents import DocumentSet, collect
from xtf_plugin.data.ragged import offsets_of, stretches
from xtf_plugin.scoring import cached_scores
from xtf_plugin.scoring.batching import ScoringStats
from xtf_plugin.store.records import Records
from xtf_plugin.training.boundaries import Boundaries
from xtf_plugin.training.trainer import rows as rows_of

HEAD = [
    "block",
    "documents, s",
    "text, s",
    "scores, s",
    "rules, s",
    "masks, s",
    "all, s",
    "by the clock, s",
    "memory, GB",
]
SHORTEST, LONGEST = 40, 120
CHANGED = 0.1  # of the tokens
WRITTEN = 1 << 16  # rows, or documents with scores, that are written at a time


def tokenizer_of(smoke: bool) -> Any:
    """The tokenizer of the demo's model; for a smoke test one that needs no files."""
    return tiny.tokenizer() if smoke else real.tokenizer(real.SMOLLM2)


def pieces(tokenizer: Any) -> tuple[list[Any], list[Any]]:
    """Token ids of the demo's prompts, with the marks of a chat around them, and of the sentences of its answers."""
    pairs = [json.loads(line) for line in real.PAIRS.read_text(encoding="utf-8").splitlines()]

    def encoded(text: str) -> Any:
        return np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int32)

    asked = [f"<|im_start|>user\n{pair['prompt']}<|im_end|>\n<|im_start|>assistant\n" for pair in pairs]
    answers = [sentence for pair in pairs for sentence in re.split(r"(?<=[.!?\n])(?= )|(?<=\n\n)", pair["completion"])]
    return [encoded(text) for text in asked], [encoded(text) for text in answers if text.strip()]


def make_rows(count: int, tokenizer: Any) -> Iterator[pa.RecordBatch]:
    """Batches of rows with `input_ids` and `labels`, as a trainer has them: a prompt, sentences, and an end of turn."""
    rng, (prompts, sentences) = np.random.default_rng(0), pieces(tokenizer)
    order = rng.integers(0, len(sentences), 20_000)
    answers, asked = (np.concatenate(parts) for parts in ([sentences[at] for at in order], prompts))
    words = np.concatenate([answers, asked, [tokenizer.convert_tokens_to_ids("<|im_end|>")]]).astype(np.int32)
    starts = offsets_of(np.asarray([len(sentences[at]) for at in order]))
    starts = starts[: np.searchsorted(starts, len(answers) - LONGEST)]
    bounds = len(answers) + offsets_of(np.asarray([len(prompt) for prompt in prompts]))
    for low in range(0, count, WRITTEN):
        lengths = rng.integers(SHORTEST, LONGEST + 1, min(WRITTEN, count - low))
        which = rng.integers(0, len(prompts), len(lengths))
        own = np.minimum(np.diff(bounds)[which], lengths // 2)
        begins = np.stack([bounds[which], rng.choice(starts, len(lengths)), np.full(len(lengths), len(words) - 1)], 1)
        sizes = np.stack([own, lengths - own - 1, np.ones_like(own)], 1).reshape(-1)
        ids = words[stretches(begins.reshape(-1), sizes)]
        kind = np.repeat(np.tile([0, 1, 2], len(lengths)), sizes)
        changed = (kind == 1) & (rng.random(len(ids)) < CHANGED)
        ids[changed] = rng.choice(answers, int(changed.sum()))
        offsets, labels = pa.array(offsets_of(lengths), pa.int32()), np.where(kind == 0, -100, ids).astype(np.int64)
        lists = {
            name: pa.ListArray.from_arrays(offsets, each) for name, each in (("input_ids", ids), ("labels", labels))
        }
        yield pa.record_batch(lists)


def save_rows(path: Path, count: int, tokenizer: Any) -> None:
    """Write the rows as an Arrow file."""
    with pa.OSFile(str(path), "wb") as file:
        writer = None
        for batch in make_rows(count, tokenizer):
            writer = writer or pa.ipc.new_stream(file, batch.schema)
            writer.write_batch(batch)
        assert writer is not None
        writer.close()


def drawn(documents: DocumentSet, wanted: Any, reference: Any, layers: Any, sink: Any, **_: Any) -> ScoringStats:
    """Instead of `engine.score`: numbers drawn, longest documents first; without its prompt a text is less probable."""
    rng, sizes = np.random.default_rng(0), np.diff(documents.completion_offsets)
    alone = np.zeros(len(documents), dtype=bool) if documents.branches is None else documents.branches.groups < 0
    wanted = wanted[np.argsort(-documents.lengths[wanted], kind="stable")]
    for low in range(0, len(wanted), WRITTEN // 8):
        some = wanted[low : low + WRITTEN // 8]
        size = int(sizes[some].sum())
        names = ("entropy", "deviation", "attention")[: 3 if layers else 2]
        columns = {name: rng.random(size, dtype=np.float32) for name in names}
        columns["logprobs"] = -rng.random(size, dtype=np.float32) * np.repeat(np.where(alone[some], 8, 4), sizes[some])
        sink(Records(keys=documents.keys[some], offsets=offsets_of(sizes[some]), **columns))
    return ScoringStats(documents=len(wanted))


def start(block: str, folder: Path, tokenizer: Any, parts: dict[str, float]) -> plan.Plan:
    """From rows to masks; `parts` gets the seconds of each part."""
    config = XTFConfig.parse({"preset": block, "cache_dir": str(folder / "cache")})
    assert config is not None
    args = SimpleNamespace(remove_unused_columns=False)
    trainer = SimpleNamespace(train_dataset=Dataset.from_file(str(folder / "rows.arrow")), args=args)
    provider = Provider(tiny.model(vocab_size=len(tokenizer)))

    def timed(name: str, procedure: Any) -> Any:
        def run(*args: Any, **options: Any) -> Any:
            begin = time.process_time()
            try:
                return procedure(*args, **options)
            finally:
                parts[name] = parts.get(name, 0.0) + time.process_time() - begin

        return run

    with (
        mock.patch.object(plan.TextRules, "find", timed("text", plan.TextRules.find)),
        mock.patch.object(plan, "run_scorers", timed("scores", plan.run_scorers)),
        mock.patch.object(plan, "select", timed("rules", plan.select)),
        mock.patch.object(plan, "recurring", timed("rules", plan.recurring)),
    ):
        begin, clock = time.process_time(), time.perf_counter()
        documents = timed("documents", collect)(rows_of(trainer, Boundaries(lambda rows: None)))
        found = plan.make_plan(config, documents, provider, tokenizer, progress=False)
        timed("masks", found.masks)()
        parts["all"], parts["clock"] = time.process_time() - begin, time.perf_counter() - clock
    return found


class Peak(threading.Thread):
    """The peak of what this process holds in GB, without mapped files, looked at every ten milliseconds (Linux)."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.highest, self.done = 0.0, threading.Event()

    def run(self) -> None:
        """Look until `done` is set."""
        while not self.done.wait(0.01):
            self.highest = max(self.highest, resident("RssAnon") / 1e3)

    def __enter__(self) -> Peak:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.join()


def measure(block: str, folder: Path, smoke: bool) -> dict[str, float]:
    """Seconds of the parts of a start, and the peak of memory."""
    parts: dict[str, float] = {}
    with Peak() as peak:
        found = start(block, folder, tokenizer_of(smoke), parts)
    assert not found.stats.documents, f"{found.stats.documents} documents were scored: the store lacks them"
    return {**parts, "memory": peak.highest}


def fill(block: str, folder: Path, smoke: bool) -> None:
    """Store drawn scores of all that a start asks for."""
    with mock.patch.object(cached_scores, "score", drawn):
        start(block, folder, tokenizer_of(smoke), {})


def row(block: str, found: dict[str, float]) -> list[str]:
    """One row of the table."""
    cells = [f"{found.get(name, 0):.1f}" for name in ("documents", "text", "scores", "rules", "masks", "all", "clock")]
    return [block, *cells, f"{found['memory']:.2f}"]


def apart(step: str, block: str, folder: Path) -> Any:
    """`fill` or `measure` in a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.bench_scale", "--step", step, block, str(folder)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def main(given: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__, repeats=1)
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--blocks", nargs="+", default=["default", "paper", "official"], help="presets")
    parser.add_argument("--folder", type=Path, help="where rows and scores stay; made if it is missing")
    parser.add_argument("--step", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(given)
    if options.step:
        step, block, folder = options.step
        print(json.dumps({"fill": fill, "measure": measure}[step](block, Path(folder), False)))
        return
    count, rows = 60 if options.smoke else options.documents, []
    with tempfile.TemporaryDirectory() as made:
        folder = options.folder or Path(made)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "rows.arrow").exists():
            save_rows(folder / "rows.arrow", count, tokenizer_of(options.smoke))
        for block in options.blocks:
            if options.smoke:
                fill(block, folder, True)
                found = [measure(block, folder, True)]
            else:
                apart("fill", block, folder)  # and the scores of the whole dataset, as a first start stores them
                found = [apart("measure", block, folder) for _ in range(options.repeats)]
            rows.append(row(block, sorted(found, key=lambda one: one["all"])[len(found) // 2]))
    publish("scale", f"{count:,} stored documents of {SHORTEST} to {LONGEST} tokens", HEAD, rows, options.write)


if __name__ == "__main__":
    main()
