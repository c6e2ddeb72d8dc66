"""What XTF costs outside the scoring pass: cached second start, boot hook, collator.

    python -m tests.benchmarks.bench_overheads [--documents 200] [--write docs/benchmarks]

Ratios are taken within one run; times are medians.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from tests.benchmarks import reach
from tests.benchmarks.bench_scoring import VOCABULARY, make_model
from tests.benchmarks.common import arguments, publish
from xtf_plugin.config.block import XTFConfig
from xtf_plugin.data.documents import DocumentSet, collect
from xtf_plugin.files import digest
from xtf_plugin.plan import make_plan
from xtf_plugin.scoring.fingerprint import model_facts
from xtf_plugin.scoring.reference import Reference
from xtf_plugin.training.collator import XTFDataCollator


class Provider:
    """A reference that is in memory, as the model being trained is; its fingerprint hashes all weights."""

    def __init__(self, model) -> None:
        self.reference = Reference(model, "bench")

    def fingerprint(self) -> str:
        return digest(model_facts(self.reference.model))

    def description(self):
        return {"name": "bench"}

    def text_config(self):
        return self.reference.text_config

    @contextmanager
    def open(self):
        yield self.reference


HEAD = ["what", "measured", "reach"]
# what a plan needs of a tokenizer if no rule reads text
NO_TEXT = SimpleNamespace(all_special_ids=[], added_tokens_decoder={}, decode=lambda ids, **_: f" {ids}")


def make_rows(count: int, low: int = 50, high: int = 300, vocabulary: int = VOCABULARY):
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(count):
        ids = rng.integers(0, vocabulary, rng.integers(low, high + 1))
        labels = np.where(np.arange(len(ids)) >= len(ids) // 2, ids, -100)
        rows.append({"input_ids": ids.tolist(), "labels": labels.tolist()})
    return rows


def clock(function, *args) -> tuple[float, object]:
    begin = time.perf_counter()
    result = function(*args)
    return time.perf_counter() - begin, result


def cached_start(documents: DocumentSet, model) -> tuple[float, float, object]:
    """Seconds from documents to masks: first start (scores everything) and second (all stored)."""
    with tempfile.TemporaryDirectory() as folder:
        attributes = dict.fromkeys(("reasoning_importance", "knowledge_novelty", "task_relevance"), True)
        block = {"preset": "none", **attributes, "cache_dir": folder, "protect": {"special_tokens": False}}
        config = XTFConfig.parse(block)

        def start():
            plan = make_plan(config, documents, Provider(model), NO_TEXT, progress=False)
            return plan.masks()

        first, _ = clock(start)
        second, masks = clock(start)
    return first, second, masks


def boot_hook(bytecode: bool, repeats: int, after: str = "torch") -> float:
    """Milliseconds of the boot hook (its own import and `install`): the median of fresh processes.

    It is timed where PyTorch calls it, at the end of the import.

    Args:
        bytecode: the hook is compiled beforehand, as by pip; otherwise every process compiles its source.
        after: the module that is imported before.
    """
    code = (
        f"import {after}, time; begin = time.perf_counter();"
        "from xtf_plugin.hosts import boot; boot.install(); print(time.perf_counter() - begin)"
    )
    environment = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}  # otherwise the hook runs within the import
    command = [sys.executable, "-c", code]
    found = []
    with tempfile.TemporaryDirectory() as cache:
        environment["PYTHONPYCACHEPREFIX"] = cache  # no bytecode of other runs
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        if bytecode:
            subprocess.run(command, check=True, capture_output=True, env=environment)
        else:
            environment["PYTHONDONTWRITEBYTECODE"] = "1"
        for _ in range(repeats):
            result = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
            found.append(float(result.stdout))
    return statistics.median(found) * 1e3


def collator_share(rows, masks, model, repeats: int) -> tuple[float, float]:
    """Seconds per batch of 8 that our collator adds to TRL's, and seconds of a training step."""
    inner = DataCollatorForLanguageModeling(pad_token_id=0)
    ours = XTFDataCollator(inner, masks)
    batches = [rows[i : i + 8] for i in range(0, len(rows), 8)]
    collating = {"plain": [], "masked": []}
    for _ in range(repeats):
        for batch in batches:
            collating["plain"].append(clock(inner, batch)[0])
            collating["masked"].append(clock(ours, batch)[0])
    model.train()
    steps = []
    for number in range(repeats):
        inputs = ours(batches[number % len(batches)])
        steps.append(clock(lambda inputs=inputs: model(**inputs).loss.backward())[0])
        model.zero_grad()
    return statistics.median(collating["masked"]) - statistics.median(collating["plain"]), statistics.median(steps)


def main(given: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--documents", type=int, default=200)
    options = parser.parse_args(given)
    size, count, after = ("tiny", 16, "json") if options.smoke else ("30M", options.documents, "torch")
    vocabulary = 512 if options.smoke else VOCABULARY
    model, rows = make_model(size, "fp32", vocabulary), make_rows(count, vocabulary=vocabulary)
    starts = [cached_start(collect(rows), model) for _ in range(options.repeats)]
    first, second = (statistics.median(times) for times in list(zip(*starts, strict=True))[:2])
    compiled, source = (boot_hook(bytecode, options.repeats, after) for bytecode in (True, False))
    added, step = collator_share(rows, starts[0][2], model, options.repeats)
    share, hook = second / first, f"{compiled:.2f} ms ({source:.2f} ms)"
    table = [
        [f"second start, {count} stored documents", f"{second:.2f} s, {share:.1%} of the first"],
        ["boot hook, bytecode compiled as pip does (without bytecode)", hook],
        ["collator, added per batch of 8", f"{added * 1e3:.2f} ms, {added / step:.2%} of a step"],
    ]
    goals = [reach.START_SHARE.judge(share), reach.BOOT_HOOK.judge(compiled), reach.COLLATOR.judge(added / step)]
    rows = [[*cells, goal] for cells, goal in zip(table, goals, strict=True)]
    publish("overheads", f"{size} model, medians of {options.repeats}", HEAD, rows, options.write)


if __name__ == "__main__":
    main()
