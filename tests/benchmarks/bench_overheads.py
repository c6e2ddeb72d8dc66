"""What XTF costs outside the scoring pass: cached second start, boot hook, collator.

    python -m tests.benchmarks.bench_overheads

Prints a table with the reach of each figure. Ratios are taken within one run; times are medians.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from tests.benchmarks.bench_scoring import machine, make_model
from xtf_plugin.collator import XTFDataCollator
from xtf_plugin.config import XTFConfig
from xtf_plugin.documents import DocumentSet, collect
from xtf_plugin.fingerprint import digest, model_facts
from xtf_plugin.pipeline import make_plan
from xtf_plugin.reference import Reference


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


# what a plan asks of a tokenizer where no rule looks at text
NO_TEXT = SimpleNamespace(all_special_ids=[], added_tokens_decoder={})


def make_rows(count: int, low: int = 50, high: int = 300, vocabulary: int = 32_000):
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


def import_torch(bytecode: bool) -> tuple[float, float]:
    """Milliseconds of the boot hook (its own import and `install`), and of `import torch`: medians of fresh processes.

    It is timed where PyTorch calls it: at the end of the import. `bytecode`: compiled beforehand, as pip does when it
    installs a package; without, every process compiles the hook's source again.
    """
    code = (
        "import time; a = time.perf_counter(); import torch; b = time.perf_counter();"
        "from xtf_plugin.hosts import autoload; autoload.install(); print(time.perf_counter() - b, b - a)"
    )
    environment = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}  # else the hook has run within the import
    command = [sys.executable, "-c", code]
    pairs = []
    with tempfile.TemporaryDirectory() as cache:
        environment["PYTHONPYCACHEPREFIX"] = cache  # not what other runs may have left beside the sources
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        if bytecode:
            subprocess.run(command, check=True, capture_output=True, env=environment)
        else:
            environment["PYTHONDONTWRITEBYTECODE"] = "1"
        for _ in range(5):
            result = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
            pairs.append([float(seconds) * 1e3 for seconds in result.stdout.split()])
    return statistics.median(p[0] for p in pairs), statistics.median(p[1] for p in pairs)


def collator_share(rows, masks, model) -> tuple[float, float, float]:
    """Milliseconds per batch of 8: what our collator adds to TRL's, and a training step of the model."""
    inner = DataCollatorForLanguageModeling(pad_token_id=0)
    ours = XTFDataCollator(inner, masks)
    batches = [rows[i : i + 8] for i in range(0, 160, 8)]
    plain, masked = [], []
    for batch in batches:
        plain.append(clock(inner, batch)[0])
        masked.append(clock(ours, batch)[0])
    model.train()
    steps = []
    for batch in batches[:4]:
        inputs = ours(batch)
        steps.append(clock(lambda inputs=inputs: model(**inputs).loss.backward())[0])
        model.zero_grad()
    return (statistics.median(masked) - statistics.median(plain)) * 1e3, statistics.median(steps) * 1e3, plain[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=400)
    options = parser.parse_args()
    print(f"{machine()}\n\n| what | measured | reach |\n|---|---:|---:|")
    model, rows = make_model("30M", "fp32"), make_rows(options.documents)
    first, second, masks = cached_start(collect(rows), model)
    print(f"| second start, {len(rows)} stored documents | {second:.2f} s, {second / first:.1%} of the first | < 2 % |")
    (hook, _), (slow, _) = import_torch(bytecode=True), import_torch(bytecode=False)
    print(f"| boot hook, bytecode compiled as pip does (without bytecode) | {hook:.2f} ms ({slow:.2f} ms) | < 1 ms |")
    added, step, _ = collator_share(rows, masks, model)
    print(f"| collator, added per batch of 8 | {added:.2f} ms, {added / step:.2%} of a step | < 1 % |")


if __name__ == "__main__":
    main()
