"""What XTF adds to a QLoRA run of three epochs, and which of its parts take the time.

    python -m tests.benchmarks.bench_run [--rows 32] [--quick] [--write docs/benchmarks]

SmolLM2-135M-Instruct (`make models`), its layers in 4 bits, with LoRA on all of them, under TRL's own trainer; the
first rows of the demo's training data, some of them with noise. A real model on real text: how much the default reads
depends on what it finds doubtful, and to random weights prompts say nothing. Every run is a separate process; its time
is that of `trainer.train()`, from reading the documents to the last step. Every epoch reads each document forward twice
(checkpointing) and backward, scoring reads it and parts of it forward. Their ratio hardly depends on the size of the
model, but the share of the small parts does, and this model is small.
"""

from __future__ import annotations

import argparse
import importlib
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

from tests import real, tiny
from tests.benchmarks import reach
from tests.benchmarks.common import NOT_MEASURED, arguments, device, publish
from xtf_plugin import XTFCallback, attach, plan
from xtf_plugin.scoring import providers
from xtf_plugin.training import callback
from xtf_plugin.training.collator import XTFDataCollator

SMOKE = LlamaConfig(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
)
EPOCHS, BATCH = 3, 8
PLAIN, DEFAULT, STORED = "without XTF", "XTF `default`", "XTF `default`, scores stored"
VARIANTS: dict[str, dict[str, Any] | None] = {
    PLAIN: None,
    DEFAULT: {},
    STORED: {},
    "XTF `paper`": {"preset": "paper", "min_kept": 1},
}
PARTS = {
    "documents": [(callback, "collect")],
    "fingerprint": [(providers.BorrowedReference, "fingerprint")],
    "scoring": [(plan, "run_scorers")],
    "selection": [(plan, "select"), (plan.Plan, "masks")],
    "report": [(XTFCallback, "_report")],
    "collator": [(XTFDataCollator, "_masked"), (XTFDataCollator, "_verify")],
    "checks": [(XTFCallback, "on_batch")],
}
HEAD = ["run", "train(), s", "x without", "in parts, s: all before step 1", *PARTS, "reach"]


def demo_rows(tokenizer: Any, count: int) -> list[dict[str, list[int]]]:
    """The first rows of the demo's training data, as TRL's prepared columns."""
    rows = prepare().make_rows(0)[0][:count]
    return [real.row_of(tokenizer, row.prompt, row.completion) for row in rows]


def prepare() -> Any:
    """The demo's program that makes its data."""
    with mock.patch.object(sys, "path", [str(real.PAIRS.parent), *sys.path]):
        return importlib.import_module("prepare")


def make_rows(count: int) -> list[dict[str, list[int]]]:
    """Word problems, two to six in a row, for models with random weights."""
    rng, tokenizer, rows = random.Random(0), tiny.tokenizer(), []
    for _ in range(count):
        pairs = [tiny.problem(rng) for _ in range(rng.randint(2, 6))]
        prompt = tokenizer(" ".join(question for question, _ in pairs))["input_ids"]
        completion = tokenizer("\n".join(answer for _, answer in pairs))["input_ids"] + [tokenizer.eos_token_id]
        rows.append({"input_ids": prompt + completion, "labels": [-100] * len(prompt) + completion})
    return rows


def save_model(folder: Path, config: LlamaConfig | None = None) -> None:
    """Put a model with random weights there, or without a config the real one."""
    if config is None:
        (folder / "model").symlink_to((real.MODELS / real.SMOLLM2).resolve(), target_is_directory=True)
        return
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder / "model")


def make_trainer(folder: Path, count: int, steps: int) -> SFTTrainer:
    """A trainer of the model in a folder on this many rows."""
    cpu, whole = device().type == "cpu", (folder / "model/tokenizer.json").exists()
    tokenizer = AutoTokenizer.from_pretrained(folder / "model") if whole else tiny.tokenizer()
    rows = demo_rows(tokenizer, count) if whole else make_rows(count)
    dtype = torch.bfloat16 if whole or not cpu else torch.float32
    bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(folder / "model", quantization_config=bits, dtype=dtype)
    quiet = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "max_length": None}
    options = {"num_train_epochs": EPOCHS, "max_steps": steps, "per_device_train_batch_size": BATCH}
    return SFTTrainer(
        model,
        args=SFTConfig(str(folder / "out"), use_cpu=cpu, bf16=not cpu, **options, **quiet),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, target_modules="all-linear"),
    )


def timed(parts: Counter, name: str, owner: Any, attribute: str) -> Any:
    """A patch under which calls of a function are timed."""
    function = getattr(owner, attribute)

    def call(*given: Any, **options: Any) -> Any:
        begin = time.perf_counter()
        try:
            return function(*given, **options)
        finally:
            parts[name] += time.perf_counter() - begin

    return mock.patch.object(owner, attribute, call)


def run(variant: str, folder: Path, rows: int, steps: int = -1) -> dict[str, float]:
    """One training run in this process: its time, and that of XTF's parts."""
    block, parts = VARIANTS[variant], Counter[str]()
    trainer = make_trainer(folder, rows, steps)
    if block is not None:
        cache = folder / ("cache-default" if block == {} else "cache-paper")
        attach(trainer, {**block, "cache_dir": str(cache)})
    with ExitStack() as stack:
        for name, places in PARTS.items():
            for owner, attribute in places:
                stack.enter_context(timed(parts, name, owner, attribute))
        stack.enter_context(timed(parts, "before", XTFCallback, "on_train_begin"))
        begin = time.perf_counter()
        trainer.train()
        parts["train"] = time.perf_counter() - begin
    return dict(parts)


def in_own_process(variant: str, folder: Path, rows: int) -> dict[str, float]:
    words = [sys.executable, "-m", "tests.benchmarks.bench_run", "--run", variant, str(folder), "--rows", str(rows)]
    output = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    return json.loads(output.splitlines()[-1])


def measure(
    one: Callable[[str, Path], dict[str, float]],
    save: Callable[[Path], None],
    variants: Sequence[str],
    repeats: int,
    until: float = float("inf"),
) -> tuple[dict[str, dict[str, float]], int]:
    """Medians over runs of every variant, in turn, and the number of runs of each.

    Args:
        one: runs a variant in a folder; save: puts the model there. Every round has a folder, and no scores stored.
        until: after this time of `time.perf_counter`, no second or later round begins.
    """
    found: dict[str, list[dict[str, float]]] = {variant: [] for variant in variants}
    for done in range(repeats):
        if done and time.perf_counter() > until:
            break
        with tempfile.TemporaryDirectory() as name:
            save(Path(name))
            for variant, results in found.items():
                results.append(one(variant, Path(name)))
    keys, rounds = ("train", "before", *PARTS), len(found[PLAIN])
    medians = {v: {k: statistics.median(r.get(k, 0.0) for r in runs) for k in keys} for v, runs in found.items()}
    return medians, rounds


def rows_of(found: dict[str, dict[str, float]]) -> list[list[str]]:
    rows = []
    for variant, parts in found.items():
        ratio, plain = parts["train"] / found[PLAIN]["train"], variant == PLAIN
        times = ["–"] * (1 + len(PARTS)) if plain else [f"{parts[name]:.2f}" for name in ("before", *PARTS)]
        goal = "–" if plain else reach.RUN.judge(ratio)
        rows.append([variant, f"{parts['train']:.1f}", f"{ratio:.3f}", *times, goal])
    return rows


def main(given: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--quick", action="store_true", help="without XTF and with `default` only")
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(given)
    if options.run:
        print(json.dumps(run(options.run[0], Path(options.run[1]), options.rows)))
        return

    def one(variant: str, folder: Path) -> dict[str, float]:
        return run(variant, folder, 8, 1) if options.smoke else in_own_process(variant, folder, options.rows)

    if not options.smoke and not real.is_made(real.SMOLLM2):
        sys.exit(f"no {real.MODELS / real.SMOLLM2} here: make models")
    variants = (PLAIN, DEFAULT) if options.quick else tuple(VARIANTS)
    save = partial(save_model, config=SMOKE) if options.smoke else save_model
    rows = rows_of(measure(one, save, variants, options.repeats)[0])
    if device().type == "cpu":
        rows.append(["a large model on a GPU", *[NOT_MEASURED] * 2, *["–"] * (1 + len(PARTS)), str(reach.RUN)])
    model = "a tiny Llama" if options.smoke else f"{real.SMOLLM2} in 4 bits"
    caption = f"{model}, {options.rows} rows, {EPOCHS} epochs, batches of {BATCH}, medians of {options.repeats}"
    publish("bench_run", caption, HEAD, rows, options.write)


if __name__ == "__main__":
    main()
