"""What scoring a stream while it is trained on costs: step time and memory against the same streamed run without XTF.

    python -m tests.benchmarks.bench_streaming [--steps 36] [--repeats 3]

A random Llama of about 30M parameters with LoRA on all linear layers, batches of four rows of 50 to 300 tokens that are
scored once each. Every run has a process of its own, in turn. A stretch of rows is scored at once, before its first
step: so the mean step, which the wait is spread over, is what a run takes longer by; the median step is one without a
wait. `batch_tokens` is small, so that stretches are short, and the first 12 steps (the sample, the first two stretches)
are left out: about four stretches are scored in the steps that are timed. Peak memory is that of the whole process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
from datasets import IterableDataset
from peft import LoraConfig
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from tests import tiny
from tests.benchmarks.bench_scoring import machine, make_model
from xtf_plugin import attach

BATCH = 4
WARM_UP = 12  # steps
TOKENS = 1_024  # of a scoring batch; a stretch is four of them, about 23 rows
REFERENCE = {"reference": {"quantization": "none", "dtype": "float32"}}  # its `model` is written for the run
ATTRIBUTES = {"reasoning_importance": True, "knowledge_novelty": True, "task_relevance": True}
VARIANTS = {
    "streamed, without XTF": None,
    "streamed, XTF `default`": {},
    "streamed, XTF `default` and the three attributes": ATTRIBUTES,
    "streamed, XTF `default`, a separate reference of the same size": REFERENCE,
}


def rows(count: int):
    """Rows of random tokens of the tiny vocabulary; the second half of each is the completion."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        ids = rng.integers(4, 490, rng.integers(50, 301)).tolist()
        yield {"input_ids": ids, "labels": [-100] * (len(ids) // 2) + ids[len(ids) // 2 :]}


class Clock(TrainerCallback):
    """Times from the end of one step to the end of the next, the warm-up left out; and what scoring took in them."""

    def __init__(self, scoring) -> None:
        self.scoring = scoring
        self.ends: list[float] = []
        self.scored: list[float] = []

    def on_step_end(self, args, state, control, **_) -> None:
        if state.global_step >= WARM_UP:
            self.ends.append(time.perf_counter())
            self.scored.append(self.scoring())


def peak() -> float:
    """The most memory that this process has had resident, in MB (Linux)."""
    with open("/proc/self/status") as handle:
        return next(int(line.split()[1]) / 1024 for line in handle if line.startswith("VmHWM"))


def block_of(variant: str, folder: str):
    """The variant's block; a separate reference is written first."""
    block = VARIANTS[variant]
    if block is None:
        return None
    if "reference" in block:
        make_model("30M", "fp32").save_pretrained(f"{folder}/reference")
        tiny.tokenizer().save_pretrained(f"{folder}/reference")
        block = {**block, "reference": {**block["reference"], "model": f"{folder}/reference"}}
    where = {"cache_dir": f"{folder}/cache", "report": False}
    return {**block, **where, "calibration": 8, "batch_tokens": TOKENS}


def run(variant: str, steps: int) -> dict[str, float]:
    """One training run in this process."""
    with tempfile.TemporaryDirectory() as folder:
        block = block_of(variant, folder)
        options = {"max_steps": steps, "per_device_train_batch_size": BATCH, "max_length": None, "save_strategy": "no"}
        args = SFTConfig(f"{folder}/out", report_to="none", use_cpu=True, bf16=False, disable_tqdm=True, **options)
        trainer = SFTTrainer(
            make_model("30M", "fp32"),
            args=args,
            train_dataset=IterableDataset.from_generator(rows, gen_kwargs={"count": steps * BATCH}),
            processing_class=tiny.tokenizer(),
            peft_config=LoraConfig(r=8, target_modules="all-linear"),
        )
        if block is not None:
            attach(trainer, block)
        stream = None if block is None else trainer._xtf_hooks.on_batch.__self__._stream
        clock = Clock(lambda: 0.0 if stream is None else stream.seconds)
        trainer.add_callback(clock)
        trainer.train()
    times = np.diff(clock.ends)
    return {
        "median": float(np.median(times)),
        "mean": float(times.mean()),
        "share": (clock.scored[-1] - clock.scored[0]) / float(times.sum()),
        "peak": peak(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=36)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--run", choices=VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        print(json.dumps(run(options.run, options.steps)))
        return
    found: dict[str, list[dict[str, float]]] = {variant: [] for variant in VARIANTS}
    for _ in range(options.repeats):
        for variant in VARIANTS:
            words = [sys.executable, "-m", "tests.benchmarks.bench_streaming", "--run", variant]
            words += ["--steps", str(options.steps)]
            output = subprocess.run(words, capture_output=True, text=True, check=True).stdout
            found[variant].append(json.loads(output.splitlines()[-1]))
    print(f"{machine()}; steps {WARM_UP + 1} to {options.steps}, medians of {options.repeats}\n")
    print("| run | median step, ms | mean step, ms | x | scoring, share of the time | peak MB |")
    print("|---|---:|---:|---:|---:|---:|")
    floor = None
    for variant, results in found.items():
        median, mean, share, peak = (
            statistics.median(r[name] for r in results) for name in ("median", "mean", "share", "peak")
        )
        floor = floor or mean
        print(f"| {variant} | {median * 1e3:.0f} | {mean * 1e3:.0f} | {mean / floor:.2f} | {share:.0%} | {peak:.0f} |")


if __name__ == "__main__":
    main()
