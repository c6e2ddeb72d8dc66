"""The demo's data sets: noisy prompt-completion rows for fine-tuning, and a mostly clean corpus for the base model.

The rows imitate what supervised fine-tuning sets look like when they come from chat logs: the solution is right, and
wrapped in greetings, asides, disclaimers and sign-offs that have nothing to do with it. A share of the rows is clean.
Where the noise sits is known to the character, so that a filter can be judged; training never sees those spans.

Everything follows from a seed: the same seed gives the same bytes on every machine and Python version we support.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from boilerplate import boilerplate
from general import general_text
from problems import Problem
from stories import random_problem

CLEAN_SHARE = 0.25
CORPUS_NOISE = 0.06
GENERAL_SHARE = 0.25
SLOT_CHANCE = {"greeting": 0.6, "between": 0.3, "signoff": 0.5, "disclaimer": 0.35}


@dataclass(frozen=True)
class Row:
    """One training example. `noise` lists (start, end, kind): half-open character ranges of the completion."""

    problem: Problem
    completion: str
    noise: tuple[tuple[int, int, str], ...]

    @property
    def noise_characters(self) -> int:
        """How many characters of the completion are noise."""
        return sum(end - start for start, end, _ in self.noise)


def wrap(problem: Problem, kinds: dict[str, float], rng: random.Random) -> Row:
    """Put noise around and between the steps of `problem`: each slot of `kinds` is filled with its chance."""
    text, noise = "", []

    def add(part: str, kind: str | None = None) -> None:
        nonlocal text
        if kind is not None:
            noise.append((len(text), len(text) + len(part), kind))
        text += part

    if rng.random() < kinds.get("greeting", 0.0):
        add(" " + boilerplate("greeting", rng), "greeting")
    for index, step in enumerate(problem.steps):
        if index and rng.random() < kinds.get("between", 0.0):
            kind = rng.choice(("filler", "filler", "aside"))
            add(" " + boilerplate(kind, rng), kind)
        add(" " + step)
    add(problem.answer_line)
    for kind in ("signoff", "disclaimer"):
        if rng.random() < kinds.get(kind, 0.0):
            add("\n" + boilerplate(kind, rng), kind)
    return Row(problem, text, tuple(noise))


def make_rows(seed: int, count: int) -> list[Row]:
    """`count` rows with different prompts, about `CLEAN_SHARE` of them without noise."""
    rng, rows, seen = random.Random(f"rows {seed}"), [], set()
    while len(rows) < count:
        problem = random_problem(rng)
        kinds = {} if rng.random() < CLEAN_SHARE else SLOT_CHANCE
        if problem.prompt not in seen:
            seen.add(problem.prompt)
            rows.append(wrap(problem, kinds, rng))
    return rows


def make_corpus(seed: int, documents: int, exclude: Iterable[str] = ()) -> list[str]:
    """Texts for the base model: worked problems and plain English, in random order.

    A small share of the problems comes with noise, for base models have met such phrases too. No problem whose prompt
    is in `exclude` appears, so that the base has not learnt the fine-tuning set by heart.
    """
    rng, texts, excluded = random.Random(f"corpus {seed}"), [], set(exclude)
    while len(texts) < documents:
        if rng.random() < GENERAL_SHARE:
            texts.append(general_text(rng))
        elif (problem := random_problem(rng)).prompt not in excluded:
            kinds = SLOT_CHANCE if rng.random() < CORPUS_NOISE else {}
            texts.append(problem.prompt + wrap(problem, kinds, rng).completion)
    return texts


def write_rows(rows: Iterable[Row], path: Path) -> None:
    """Write the `prompt` and `completion` of each row as JSON Lines, the format `trl sft` loads."""
    lines = ({"prompt": row.problem.prompt, "completion": row.completion} for row in rows)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def write_noise(rows: Iterable[Row], path: Path) -> None:
    """Write where the planted noise is, a line per row: kept apart from the data, for judging a filter only."""
    lines = ({"answer": row.problem.answer, "kind": row.problem.kind, "noise": row.noise} for row in rows)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
