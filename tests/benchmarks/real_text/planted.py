"""Foreign lines planted into real solutions: does what finds noise in made-up worlds find it in real text?

Public sets are clean, so a rule that finds noise has nothing to find in them. Here a quarter of the tokens of GSM8K's
train part are lines that do not belong: fixed boilerplate, a sentence of a medical conclusion, a sentence of the
question, symbols, and lines of other solutions, which are as fluent and as much on the topic as the solution itself.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.benchmarks.proof.data import Row
from tests.benchmarks.proof.finetune import TuneSettings, kept_tokens, tune
from tests.benchmarks.proof.stats import auc

from .audit import RealBench
from .base import Parts, load
from .encode import encode, encode_all
from .records import Record
from .runs import measure
from .stages import Scale, base_facts, definition, stage, stored

Flags = NDArray[np.bool_]
VERSION = 1  # of what is planted; raised when the lines or their places change
GOOD = "good"
BOILERPLATE = (
    "I hope this helps! Let me know if you have any questions.",
    "As an assistant I am always happy to help you with your homework.",
    "Great question! Let us think about this step by step.",
    "Please remember to like and share this answer with your friends.",
)
SYMBOLS = ("=====", "-----", "{{content}}", "[*] [*] [*]", "&nbsp;&nbsp;", "|||", "<br/><br/>")
KINDS = ("boilerplate", "medicine", "question", "symbols", "other solution")
RATE = 0.25
ROWS = 400  # for detection
LIMITS = (-1.0, -1.5, -2.0, -2.5, -3.0, -4.0)
TUNED_AT = -2.0
SCORES: dict[str, dict[str, Any]] = {
    "log-probability of the token": {"scorer": "log_probability"},
    "log-probability, mean of 9": {"scorer": "log_probability", "window": 9},
    "log-probability, mean of the line": {"scorer": "log_probability", "unit": "line"},
    "opening of the line": {"scorer": "opening", "unit": "line"},
    "opening, both": {"scorer": "opening", "unit": "both"},
}


def sentences(text: str) -> list[str]:
    """Sentences of some length."""
    return [part.strip() for part in re.split(r"(?<=[.!?])\s+", text) if len(part) > 20]


def foreign(kind: str, record: Record, solutions: Sequence[Record], medicine: Sequence[str], rng: random.Random) -> str:
    """A line of one kind."""
    if kind == "boilerplate":
        return rng.choice(BOILERPLATE)
    if kind == "medicine":
        return rng.choice(medicine)
    if kind == "symbols":
        return rng.choice(SYMBOLS)
    if kind == "question":
        return rng.choice(sentences(record.head.partition(": ")[2]) or [record.head])
    return rng.choice(rng.choice(solutions).completion.split("\n")[:-1] or [""])


def plant(
    record: Record, solutions: Sequence[Record], medicine: Sequence[str], rng: random.Random, rate: float = RATE
) -> tuple[Record, list[tuple[int, int, str]]]:
    """The record with foreign lines before some of its own, and where they are: (begin, end, kind) in characters.

    Lines go in until they hold about `rate` of the text; the answer stays the last line and true.
    """
    lines = [(line, GOOD) for line in record.completion.split("\n")]
    left = len(record.completion) * rate / (1 - rate)
    while left > 0:
        kind = rng.choice(KINDS)
        line = foreign(kind, record, solutions, medicine, rng)
        if line and rng.random() < left / len(line):  # the last one may overshoot; on average the rate is met
            lines.insert(rng.randrange(len(lines)), (line, kind))
        left -= max(1, len(line))
    places, at = [], 0
    for line, kind in lines:
        if kind != GOOD:
            places.append((at, at + len(line) + 1, kind))
        at += len(line) + 1
    text = "\n".join(line for line, _ in lines)
    added = len(text) - len(record.completion)
    return replace(record, completion=text, line=record.line + added, answer=record.answer + added), places


def noisy_row(record: Record, places: Sequence[tuple[int, int, str]], tokenizer: Any, scale: Scale) -> Row:
    """The row, each token with the kind of the line it begins in."""
    row = encode(record, tokenizer, scale.context, scale.prompt)
    offsets = tokenizer(record.completion, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    kinds = [next((kind for low, high, kind in places if low <= begin < high), GOOD) for begin, _ in offsets]
    return replace(row, kinds=[*kinds[: len(row.completion) - 1], GOOD])


def noisy_rows(parts: Parts, tokenizer: Any, scale: Scale, number: int, seed: int) -> list[Row]:
    """Rows of GSM8K's train part with foreign lines."""
    rng = random.Random(f"planted {seed}")
    train = list(parts["GSM8K"]["train"])
    medicine = [one for record in parts["PubMedQA"]["train"] for one in sentences(record.completion[: record.line])]
    chosen = rng.sample(train, min(number, len(train)))
    return [noisy_row(*plant(record, train, medicine, rng), tokenizer, scale) for record in chosen]


def kinds_of(rows: Sequence[Row]) -> NDArray[Any]:
    """Kinds of all completion tokens, (M,)."""
    return np.asarray([kind for row in rows for kind in row.kinds])


def found_by(dropped: Flags, kinds: NDArray[Any]) -> dict[str, float]:
    """Share dropped of each kind of foreign line and of all of them, and the share of what is dropped that is noise."""
    noise = kinds != GOOD
    shares = {kind: float(dropped[kinds == kind].mean()) for kind in (*KINDS, GOOD) if (kinds == kind).any()}
    precision = float(noise[dropped].mean()) if dropped.any() else float("nan")
    return {"all": float(dropped[noise].mean()), "precision": precision, **shares}


def block_below(limit: float) -> dict[str, Any]:
    """The default with another threshold."""
    return {"selectors": {"out_of_place": {"drop": {"below": limit}}}}


def detect(parts: Parts, folder: Path, scale: Scale, tokenizer: Any) -> dict[str, Any]:
    """AUC of scores and what the default's rule finds at each threshold, on noisy rows and on the same rows clean."""
    rows = noisy_rows(parts, tokenizer, scale, min(ROWS, 4 * scale.rows), seed=1_000)
    bench, kinds = RealBench(rows, folder), kinds_of(rows)
    noise, aucs, rules = kinds != GOOD, {}, {}
    for name, keys in SCORES.items():
        score = bench.scores({"preset": "none", "selectors": {"score": {"drop": {"quantile": 0.5}, **keys}}})
        aucs[name] = {"all": auc(score, noise)} | {
            kind: auc(score[(kinds == kind) | ~noise], noise[(kinds == kind) | ~noise]) for kind in KINDS
        }
    for limit in LIMITS:
        plan = bench.plan(block_below(limit))
        rules[f"{limit:g}"] = found_by(~bench.in_rows(plan, plan.selection.keep), kinds)
    paper = bench.plan({"preset": "paper"})
    rules["paper"] = found_by(~bench.in_rows(paper, paper.selection.keep), kinds)
    return {"tokens": len(kinds), "noise": float(noise.mean()), "auc": aucs, "rules": rules}


ARMS = ("plain", "oracle", "out_of_place", "random control", "paper")


def run(
    arm: str, seed: int, parts: Parts, held_out: Sequence[Row], folder: Path, scale: Scale, tokenizer: Any
) -> Mapping[str, float]:
    """Fine-tune on noisy rows, and measure the loss on clean held-out ones."""
    rows = noisy_rows(parts, tokenizer, scale, scale.rows, seed)
    blocks = {
        "out_of_place": block_below(TUNED_AT),
        "random control": {**block_below(TUNED_AT), "control": "random", "seed": seed},
        "paper": {"preset": "paper"},
    }
    block = blocks.get(arm)
    if block is not None:
        block = {**block, "cache_dir": str(folder / "cache"), "report": False}
    keep = kinds_of(rows) == GOOD if arm == "oracle" else None
    settings = TuneSettings(epochs=scale.epochs, batch=scale.batch, learning_rate=scale.learning_rates["GSM8K"])
    trainer, model, _ = tune(folder / "base", rows, seed, settings, block=block, keep=keep)
    if block is not None:
        keep = kept_tokens(trainer, rows)
    kept = 1.0 if keep is None else float(keep.mean())
    return {**measure(model, held_out, tokenizer, "GSM8K"), "kept": kept}


def everything(parts: Parts, folder: Path, scale: Scale, data: str, until: float = float("inf")) -> dict[str, Any]:
    """Detection, and held-out results by `arm/seed`; no new run begins after `until`."""
    _, tokenizer = load(folder / "base")
    facts = {**base_facts(scale, data), "rows": scale.rows, "version": VERSION}
    settings = {**facts, "blocks": [definition(block_below(limit)) for limit in LIMITS]}
    found = {"detection": stage(folder / "planted.json", settings, partial(detect, parts, folder, scale, tokenizer))}
    held_out = encode_all(parts["GSM8K"]["held-out"], tokenizer, scale.context, scale.prompt)[: scale.held_out]
    results: dict[str, Any] = {}
    for seed in range(scale.seeds):
        for arm in ARMS:
            path = folder / "planted" / f"{arm} {seed}.json"
            settings = {**facts, "block": definition(block_below(TUNED_AT)), "seed": seed, "held_out": len(held_out)}
            if time.time() > until and stored(path, settings) is None:
                continue
            make = partial(run, arm, seed, parts, held_out, folder, scale, tokenizer)
            results[f"{arm}/{seed}"] = one = stage(path, settings, make)
            print(f"planted: {arm}, seed {seed}: loss {one['all']:.4f}", flush=True)
    return {**found, "runs": results}
