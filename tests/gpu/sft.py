"""The stock `trl sft` on a real model: 4-bit QLoRA with an `xtf:` block, as a user types it, and without one.

    python -m tests.gpu.sft --output FOLDER [--smoke] [--write docs/benchmarks]

The demo's recipe and data, in bfloat16 on a GPU. Three runs, each the stock command in a process of its own: the
default block; the paper's three scores with rules that drop something, so that attention is recorded and masks are not
empty; no block. A run fails this program if the command does, if its loss is no number, if not every document was
scored, or if the rules that drop something drop nothing. XTF itself holds every batch against its plan.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from tests import real, tiny
from tests.benchmarks.common import publish

STOCK = [sys.executable, "-c", "from trl.cli import main; main()", "sft", "--config"]  # what the command `trl` does
DROPPING = {
    "preset": "none",
    "reasoning_importance": {"layers": "all", "drop": {"quantile": 0.1}},
    "knowledge_novelty": {"drop": {"quantile": 0.1}},
    "task_relevance": {"drop": {"quantile": 0.1}},
}
RUNS: dict[str, dict[str, Any] | None] = {
    "xtf, default": {"preset": "default"},
    "xtf, all three attributes": DROPPING,
    "without xtf": None,
}
HEAD = [
    "run",
    "training, s",
    "GPU memory above the loaded model, MB",
    "loss, first and last",
    "kept",
    "scored documents",
]
STEPS = 12
LIMIT = 45 if torch.cuda.is_available() else 600  # seconds of a run


def prepare(output: Path, smoke: bool) -> dict[str, Any]:
    """Write model and data where they are missing; the recipe without its block."""
    data = output / "demo"
    words = [sys.executable, str(real.ROOT / "recipes/demo/prepare.py"), "--output", str(data)]
    subprocess.run(words, check=True)
    recipe = yaml.safe_load((real.ROOT / "recipes/demo.yaml").read_text(encoding="utf-8"))
    gpu = torch.cuda.is_available()
    recipe |= {
        "model_name_or_path": str(real.MODELS / real.SMOLLM2),
        "dataset_name": str(data / "data"),
        "dtype": "bfloat16" if gpu else "float32",
        "bf16": gpu,
        "use_cpu": not gpu,
        "lora_target_modules": "all-linear",
        "max_steps": STEPS,
        "eval_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "skip_memory_metrics": False,
        "logging_nan_inf_filter": False,  # else a loss that is no number is logged as the one before
    }
    if smoke:
        tiny.save_base(output / "base")
        train = data / "data/train.jsonl"
        few = train.read_text(encoding="utf-8").splitlines(keepends=True)[:8]
        train.write_text("".join(few), encoding="utf-8")
        recipe |= {"model_name_or_path": str(output / "base"), "max_steps": 1}
    return recipe


def run(name: str, recipe: dict[str, Any], output: Path) -> tuple[list[str], list[str]]:
    """One run of the stock command; its row of the table, and what is wrong with it."""
    block, folder = RUNS[name], output / re.sub(r"\W+", "-", name)
    recipe = {**recipe, "output_dir": str(folder)}
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was stopped: its scores would be found again
    if block is not None:
        recipe["xtf"] = {**block, "cache_dir": str(folder / "cache")}
    path = output / f"{folder.name}.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    code, printed = stock(path, folder.with_suffix(".log"))
    print(f"== {name}: exit code {code}\n{printed[-9_000:]}", flush=True)
    losses = numbers(printed, "loss")
    wrong = [] if code == 0 else [f"exit code {code}"]
    wrong += [] if losses and all(map(math.isfinite, losses)) else ["no finite loss"]
    kept, scored = "–", "–"
    if block is not None and not wrong:
        facts = json.loads((folder / "xtf/summary.json").read_text(encoding="utf-8"))
        kept, scored = f"{facts['totals']['kept_fraction']:.1%}", str(facts["scoring"]["scored_documents"])
        wrong += [] if facts["scoring"]["scored_documents"] == facts["totals"]["documents"] else ["not all was scored"]
        wrong += [] if facts["reference"]["quantization"] == "nf4/fp4" else ["the reference is not in 4 bits"]
        dropped = facts["totals"]["dropped_tokens"]
        wrong += ["nothing was dropped"] if block is DROPPING and not dropped else []
    took, memory = numbers(printed, "train_runtime"), numbers(printed, "train_mem_gpu_peaked_delta")
    held = numbers(printed, "train_mem_gpu_alloc_delta")
    peak = f"{(memory[-1] + held[-1]) / 1e6:,.0f}" if memory and held else "–"  # what stays, and what the peak adds
    loss = f"{losses[0]:.3f}, {losses[-1]:.3f}" if losses else "–"
    return [name, f"{took[-1]:.1f}" if took else "–", peak, loss, kept, scored], wrong


def stock(recipe: Path, log: Path) -> tuple[int, str]:
    """Run the stock command for at most `LIMIT` seconds; its exit code, and what it printed."""
    with log.open("w", encoding="utf-8") as handle:
        process = subprocess.Popen([*STOCK, str(recipe)], stdout=handle, stderr=handle, start_new_session=True)
        try:
            process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            print(f"stopped after {LIMIT} s", flush=True)
        finally:  # also when this program is interrupted: the training is a process of its own
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            code = process.wait()
            printed = log.read_text(encoding="utf-8", errors="replace")
            if code:
                print(printed[-9_000:], flush=True)
    return code, printed


def numbers(printed: str, key: str) -> list[float]:
    """The values of a key in the dictionaries that the trainer prints."""
    return [float(value) for value in re.findall(rf"'{key}': '?(-?[\d.e+-]+|nan|inf)'?", printed)]


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--write", type=Path, help="put the table into this page too")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, one step")
    options = parser.parse_args(given)
    options.output.mkdir(parents=True, exist_ok=True)
    recipe, rows, faults = prepare(options.output.resolve(), options.smoke), [], []
    model = "a tiny model" if options.smoke else real.SMOLLM2
    try:
        for name in list(RUNS)[: 2 if options.smoke else None]:
            row, wrong = run(name, recipe, options.output.resolve())
            rows.append(row)
            faults += [f"{name}: {what}" for what in wrong]
    finally:  # also when it is interrupted
        publish("gpu sft", f"{recipe['max_steps']} steps of the demo's recipe on {model}", HEAD, rows, options.write)
    print(*faults, sep="\n")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
