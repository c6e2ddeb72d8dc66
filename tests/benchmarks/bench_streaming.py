"""What scoring a stream while it is trained on costs: step time and memory against the same streamed run without XTF.

    python -m tests.benchmarks.bench_streaming [--steps 36] [--repeats 3] [--write docs/benchmarks]

A random Llama of about 30M parameters with LoRA on all linear layers, batches of four rows of 50 to 300 tokens that are
scored once each. Every run has a process of its own, in turn. A chunk of rows is scored at once, before its first
step: so the mean step, which the wait is spread over, is what a run takes longer by; the median step is one without a
wait. `batch_tokens` is small, so that chunks are short, and the first 12 steps (the sample, the first two chunks)
are left out: about four chunks are scored in the steps that are timed. Peak memory is that of the whole process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from datasets import IterableDataset
from peft import LoraConfig
from transformers import LlamaForCausalLM, TrainerCallback
from trl import SFTConfig, SFTTrainer

from tests import tiny
from tests.benchmarks.bench_scoring import VOCABULARY, make_model
from tests.benchmarks.common import arguments, publish, resident
from xtf_plugin import attach

BATCH = 4
HEAD = ["run", "median step, ms", "mean step, ms", "x", "scoring, share of the time", "peak MB"]
TOKENS = 1_024  # of a scoring batch; a chunk is four of them, about 23 rows
REFERENCE = {"reference": {"quantization": "none", "dtype": "float32"}}  # its `model` is written for the run
ATTRIBUTES = {"reasoning_importance": True, "knowledge_novelty": True, "task_relevance": True}


@dataclass(frozen=True)
class Setting:
    """Size of a run; times of the first steps, `warm_up`, are left out."""

    steps: int = 36
    warm_up: int = 12
    model: str = "30M"
    longest: int = 300
    vocabulary: int = VOCABULARY

    def make_model(self) -> LlamaForCausalLM:
        return make_model(self.model, "fp32", self.vocabulary)


SMOKE = Setting(3, 1, "tiny", 60, 512)
VARIANTS = {
    "streamed, without XTF": None,
    "streamed, XTF `default`": {},
    "streamed, XTF `default` and the three attributes": ATTRIBUTES,
    "streamed, XTF `default`, a separate reference of the same size": REFERENCE,
}


def rows(count: int, longest: int):
    """Rows of random tokens of the tiny vocabulary; the second half of each is the completion."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        ids = rng.integers(4, 490, rng.integers(50, longest + 1)).tolist()
        yield {"input_ids": ids, "labels": [-100] * (len(ids) // 2) + ids[len(ids) // 2 :]}


class Clock(TrainerCallback):
    """Times from the end of one step to the end of the next, the warm-up left out; and what scoring took in them."""

    def __init__(self, scoring, warm_up: int) -> None:
        self.scoring, self.warm_up = scoring, warm_up
        self.ends: list[float] = []
        self.scored: list[float] = []

    def on_step_end(self, args, state, control, **_) -> None:
        if state.global_step >= self.warm_up:
            self.ends.append(time.perf_counter())
            self.scored.append(self.scoring())


def block_of(variant: str, folder: str, setting: Setting):
    """The variant's block; a separate reference is written first."""
    block = VARIANTS[variant]
    if block is None:
        return None
    if "reference" in block:
        setting.make_model().save_pretrained(f"{folder}/reference")
        tiny.tokenizer().save_pretrained(f"{folder}/reference")
        block = {**block, "reference": {**block["reference"], "model": f"{folder}/reference"}}
    where = {"cache_dir": f"{folder}/cache", "report": False}
    return {**block, **where, "calibration": 8, "batch_tokens": TOKENS}


def run(variant: str, setting: Setting) -> dict[str, float]:
    """One training run in this process."""
    with tempfile.TemporaryDirectory() as folder:
        block, steps = block_of(variant, folder, setting), setting.steps
        options = {"max_steps": steps, "per_device_train_batch_size": BATCH, "max_length": None, "save_strategy": "no"}
        args = SFTConfig(f"{folder}/out", report_to="none", use_cpu=True, bf16=False, disable_tqdm=True, **options)
        trainer = SFTTrainer(
            setting.make_model(),
            args=args,
            train_dataset=IterableDataset.from_generator(
                rows, gen_kwargs={"count": steps * BATCH, "longest": setting.longest}
            ),
            processing_class=tiny.tokenizer(),
            peft_config=LoraConfig(r=8, target_modules="all-linear"),
        )
        if block is not None:
            attach(trainer, block)
        stream = None if block is None else trainer._xtf_hooks._stream
        clock = Clock(lambda: 0.0 if stream is None else stream.seconds, setting.warm_up)
        trainer.add_callback(clock)
        trainer.train()
    times = np.diff(clock.ends)
    return {
        "median": float(np.median(times)),
        "mean": float(times.mean()),
        "share": (clock.scored[-1] - clock.scored[0]) / float(times.sum()),
        "peak": resident("VmHWM"),
    }


def apart(variant: str, steps: int) -> dict[str, float]:
    """`run` in a process of its own."""
    words = [sys.executable, "-m", "tests.benchmarks.bench_streaming", "--run", variant, "--steps", str(steps)]
    output = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    found: dict[str, float] = json.loads(output.splitlines()[-1])
    return found


def main(given: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__, repeats=3)
    parser.add_argument("--steps", type=int, default=Setting.steps)
    parser.add_argument("--run", choices=VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args(given)
    setting = SMOKE if options.smoke else replace(Setting(), steps=options.steps)
    if options.run:
        print(json.dumps(run(options.run, setting)))
        return
    found: dict[str, list[dict[str, float]]] = {variant: [] for variant in VARIANTS}
    for _ in range(options.repeats):
        for variant, results in found.items():
            results.append(run(variant, setting) if options.smoke else apart(variant, setting.steps))
    rows, base = [], statistics.median(one["mean"] for one in next(iter(found.values())))
    for variant, results in found.items():
        names = ("median", "mean", "share", "peak")
        median, mean, share, peak = (statistics.median(one[name] for one in results) for name in names)
        cells = [f"{median * 1e3:.0f}", f"{mean * 1e3:.0f}", f"{mean / base:.2f}", f"{share:.0%}", f"{peak:.0f}"]
        rows.append([variant, *cells])
    caption = f"steps {setting.warm_up + 1} to {setting.steps}, medians of {options.repeats} runs"
    publish("streaming", caption, HEAD, rows, options.write)


if __name__ == "__main__":
    main()
