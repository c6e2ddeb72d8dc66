"""Fine-tuning on the train part, arm by arm, and what each run knows of the held-out part.

Losses are taken over the plain labels of every arm: a run that was spared some tokens is asked about them all the same.
Each seed draws other rows from the train part and another order; every arm of a seed trains on the same rows.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.benchmarks.proof.data import Row
from tests.benchmarks.proof.finetune import TuneSettings, kept_tokens, tune

from .audit import RealBench
from .base import Losses, Parts, decision_accuracy, examine, load
from .encode import ANSWER, encode_all, numbers
from .stages import Scale, base_facts, definition, stage, stored

BASE = "base model, not fine-tuned"
ARMS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "default": {"preset": "default"},
    "paper": {"preset": "paper"},
    "official": {"preset": "official"},
    "random control of default": {"preset": "default", "control": "random"},
    "random control of paper": {"preset": "paper", "control": "random"},
}
TUNED = ("GSM8K", "PubMedQA")  # HumanEval has too few rows for a train part
METRICS = ("all", "numbers", "answer")


def answer_tokens(rows: Sequence[Row]) -> NDArray[np.bool_]:
    """Which completion tokens are the final answer itself, without its mark and without the end of text, (M,)."""
    return np.asarray([kind == ANSWER for row in rows for kind in row.kinds], dtype=bool)


def means(losses: Losses, masks: Mapping[str, NDArray[np.bool_]]) -> dict[str, float]:
    """Mean loss over all tokens, and over those of each mask; NaN for an empty one."""
    found = {"all": float(losses.mean())}
    return found | {name: float(losses[mask].mean()) if mask.any() else float("nan") for name, mask in masks.items()}


def measure(model: Any, rows: Sequence[Row], tokenizer: Any, dataset: str) -> dict[str, float]:
    """Held-out losses of a model; for PubMedQA, how often it decides right."""
    masks = {"numbers": numbers(rows, tokenizer), "answer": answer_tokens(rows)}
    found = means(examine(model, rows), masks)
    if dataset == "PubMedQA":
        found["accuracy"] = decision_accuracy(model, rows, tokenizer)
        said = [row.answer for row in rows]
        found["commonest"] = max(said.count(word) for word in said) / len(said)
    return found


def drawn(rows: Sequence[Row], number: int, seed: int) -> list[Row]:
    """The rows that a seed trains on."""
    return random.Random(f"rows {seed}").sample(list(rows), min(number, len(rows)))


def run(
    arm: str, seed: int, train: Sequence[Row], held_out: Sequence[Row], folder: Path, scale: Scale, dataset: str
) -> dict[str, Any]:
    """Fine-tune once and measure.

    An arm that drops nothing is plain SFT to the last bit, and is not run.
    """
    rows, block = drawn(train, scale.rows, seed), ARMS[arm]
    if block is not None:
        block = {**block, "seed": seed, "cache_dir": str(folder / "cache"), "report": False}
        if RealBench(rows, folder).plan(block).selection.keep.all():
            return {"same_as_plain": True}
    rate = scale.learning_rates[dataset]
    settings = TuneSettings(epochs=scale.epochs, batch=scale.batch, learning_rate=rate)
    trainer, model, seconds = tune(folder / "base", rows, seed, settings, block=block)
    kept = 1.0 if block is None else float(kept_tokens(trainer, rows).mean())
    return {**measure(model, held_out, trainer.processing_class, dataset), "kept": kept, "seconds": seconds}


def run_all(
    parts: Parts, folder: Path, scale: Scale, data: str, until: float = float("inf")
) -> dict[str, dict[str, dict[str, Any]]]:
    """Results by data set, then by arm and seed as `arm/seed`; no new run begins after `until`.

    Seeds go outermost, so that a stop leaves whole pairs.
    """
    model, tokenizer = load(folder / "base")
    facts = {**base_facts(scale, data), "scale": {k: v for k, v in asdict(scale).items() if k not in ("seeds", "base")}}
    found: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in TUNED}
    rows = {
        name: (
            encode_all(parts[name]["train"], tokenizer, scale.context, scale.prompt),
            encode_all(parts[name]["held-out"], tokenizer, scale.context, scale.prompt)[: scale.held_out],
        )
        for name in TUNED
    }
    for name, (_, held_out) in rows.items():
        path = folder / "runs" / f"{name} base.json"
        found[name][f"{BASE}/0"] = stage(path, facts, partial(measure, model, held_out, tokenizer, name))
    for seed in range(scale.seeds):
        for name, (train, held_out) in rows.items():
            for arm in ARMS:
                path = folder / "runs" / f"{name} {arm} {seed}.json"
                settings = {**facts, "block": definition(ARMS[arm]), "seed": seed}
                if time.time() > until and stored(path, settings) is None:
                    continue
                one = stage(path, settings, partial(run, arm, seed, train, held_out, folder, scale, name))
                if "same_as_plain" in one:
                    one = found[name][f"plain/{seed}"]
                found[name][f"{arm}/{seed}"] = one
                print(f"run: {name}, {arm}, seed {seed}: loss {one['all']:.4f}, kept {one['kept']:.1%}", flush=True)
    return found
