"""Every fine-tuning run of the evidence: which there are, how one is carried out, and a record that survives a stop.

A run is a line of JSON in `results.jsonl`, written when it is done. Started again, the laboratory does what is missing.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .noise import FORMS, KINDS

if TYPE_CHECKING:
    from .arms import Arm
    from .data import Encoder, Row
    from .finetune import TuneSettings
    from .worlds import Problem


@dataclass(frozen=True)
class Job:
    """One run: a world, a base model, noise, an arm and a seed."""

    group: str
    world: str
    arm: str
    seed: int
    rate: float = 0.25
    base: str = "all"
    method: str = "full"
    kinds: tuple[str, ...] = KINDS
    forms: tuple[str, ...] = FORMS

    @property
    def key(self) -> str:
        """What makes the run what it is; equal keys, equal runs, whatever table they are for."""
        from .arms import definition

        facts = {name: value for name, value in asdict(self).items() if name != "group"}
        return json.dumps({**facts, "definition": definition(self.arm)}, sort_keys=True)


@dataclass(frozen=True)
class Scale:
    """How large the laboratory is; the defaults fit two CPU cores and an hour."""

    rows: int = 400
    held_out: int = 200
    epochs: float = 2
    batch: int = 16
    # By world, set after a few single runs of plain SFT; QLoRA takes three times as much.
    learning_rates: Mapping[str, float] = field(default_factory=lambda: {"sums": 3e-4, "programs": 3e-4, "facts": 1e-3})
    clean_reference_rows: int = 200
    seeds: int = 5
    workers: int = field(default_factory=lambda: max(1, os.cpu_count() or 1))


def held_out(job: Job, rows: Sequence[Row], scale: Scale, encoder: Encoder) -> list[Problem]:
    """The problems of a job's seed: unknown to its training rows and to the clean reference, so all arms share them."""
    from .data import make_problems
    from .references import clean_rows

    exclude = [*rows, *clean_rows(job.world, scale, encoder)]
    return make_problems(job.world, scale.held_out, job.seed, exclude, encoder)


def carry_out(job: Job, folder: Path, scale: Scale) -> dict[str, Any]:
    """Train one run and measure it; needs the base models in `folder`."""
    from transformers import AutoTokenizer

    from . import arms, finetune
    from .data import Encoder, make_rows
    from .references import reference_path

    base = folder / f"base-{job.base}"
    encoder = Encoder(AutoTokenizer.from_pretrained(base))
    rows = make_rows(job.world, scale.rows, job.rate, job.seed, encoder, kinds=job.kinds, forms=job.forms)
    problems = held_out(job, rows, scale, encoder)
    arm = arms.ARMS[job.arm]
    if arm.reference:
        arm = arms.with_reference(arm, str(reference_path(arm.reference, job, folder, scale, encoder)))
    qlora = job.method == "qlora"
    settings = finetune.TuneSettings(
        epochs=scale.epochs,
        batch=scale.batch,
        learning_rate=scale.learning_rates[job.world] * (3 if qlora else 1),
        method=job.method,
        loss=arm.loss,
    )
    keep, max_steps = labels_and_steps(arm, rows, job, settings, folder)
    block = None if arm.block is None else {**arm.block, "cache_dir": str(folder / "cache"), "report": False}
    trainer, model, seconds = finetune.tune(base, rows, job.seed, settings, block=block, keep=keep, max_steps=max_steps)
    result = {
        **finetune.measure(model, problems, encoder, job.seed),
        "seconds": seconds,
        "steps": trainer.state.global_step,
    }
    mask = finetune.kept_tokens(trainer, rows) if block is not None else keep
    return {**result, **shares(rows, mask)}


def labels_and_steps(
    arm: Arm, rows: Sequence[Row], job: Job, settings: TuneSettings, folder: Path
) -> tuple[np.ndarray | None, int]:
    """What the laboratory itself sets: keep flags, (M,) (None: the block's or all), and steps (-1: by epochs)."""
    from . import arms

    if arm.keep == "oracle":
        return arms.oracle(rows), -1
    if not arm.keep and not arm.steps:
        return None, -1
    timed = arm.steps == "wall_clock"
    plan, scoring, training = plan_of_default(folder / f"base-{job.base}", rows, job, settings, folder, timed)
    if arm.keep == "random_spans":
        return arms.random_spans(plan, rows, job.seed), -1
    steps = -(-len(rows) // settings.batch) * settings.epochs
    if arm.steps == "kept":
        return None, max(1, round(steps * float(plan.mean())))
    # rounded up: scoring is never free, and a part of a step is in favour of plain SFT
    return None, math.ceil(steps * (1 + scoring / training))


def plan_of_default(
    base: Path, rows: Sequence[Any], job: Job, settings: Any, folder: Path, timed: bool
) -> tuple[np.ndarray, float, float]:
    """What the default keeps on these rows, (M,), and how long its scoring and one training take, if that matters."""
    from . import arms, finetune

    cache = folder / "cache-timed" / f"{os.getpid()}-{time.time_ns()}"  # an empty store: scoring is to be paid for
    block = {**(arms.ARMS["default"].block or {}), "cache_dir": str(cache), "report": False}
    steps = -1 if timed else 1
    trainer, _, whole = finetune.tune(base, rows, job.seed, settings, block=block, max_steps=steps)
    scoring = finetune.seconds_before_training(trainer)
    return finetune.kept_tokens(trainer, rows), scoring, max(1e-3, whole - scoring)


def shares(rows: Sequence[Any], keep: np.ndarray | None) -> dict[str, Any]:
    """Share of noise dropped and of good tokens lost, by kind."""
    kinds = np.asarray([kind for row in rows for kind in row.kinds])
    kept = np.ones(len(kinds), dtype=bool) if keep is None else keep
    return {
        "kept": float(kept.mean()),
        "dropped_by_kind": {str(kind): float((~kept[kinds == kind]).mean()) for kind in np.unique(kinds)},
    }


def _work(arguments: tuple[Job, Path, Scale]) -> tuple[Job, dict[str, Any]]:
    import torch

    from .finetune import quiet

    job, folder, scale = arguments
    torch.set_num_threads(1)  # two processes of one thread each do three times the work of one with two
    quiet()
    return job, carry_out(job, folder, scale)


def done(folder: Path) -> dict[str, dict[str, Any]]:
    """Results so far, by key."""
    path = folder / "results.jsonl"
    if not path.exists():
        return {}
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    return {line["key"]: line["result"] for line in lines}


def run_all(
    jobs: Iterable[Job], folder: Path, scale: Scale, *, until: float = float("inf")
) -> dict[str, dict[str, Any]]:
    """Carry out what is missing, some processes at a time, until all is done or the clock strikes `until`."""
    results = done(folder)
    missing = {job.key: job for job in jobs if job.key not in results}
    start = time.time()
    context = multiprocessing.get_context("spawn")
    with context.Pool(scale.workers) as pool, (folder / "results.jsonl").open("a") as log:
        for number, (job, result) in enumerate(
            pool.imap_unordered(_work, [(job, folder, scale) for job in missing.values()]), start=1
        ):
            results[job.key] = result
            log.write(json.dumps({"key": job.key, "result": result}) + "\n")
            log.flush()
            left = (time.time() - start) / number * (len(missing) - number)
            print(
                f"{number}/{len(missing)} {job.world} {job.arm} rate {job.rate} seed {job.seed} {job.method}: "
                f"accuracy {result['accuracy']:.3f} kept {result['kept']:.2f}  ({left / 60:.0f} min left)",
                flush=True,
            )
            if time.time() > until:
                pool.terminate()
                break
    return results


def seeds(job: Job, number: int) -> list[Job]:
    """The same run at several seeds: other rows, other noise, other held-out problems, another order."""
    return [replace(job, seed=seed) for seed in range(number)]
