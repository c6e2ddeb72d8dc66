"""The laboratory on real models: detection, then training; tables for docs/evidence.md.

    python -m tests.benchmarks.proof --data FOLDER --folder .proof --write docs/evidence.md

Each measurement is one JSON file in the folder; what is there is not measured again, so a run that was stopped goes on.
`make models` makes the models. DATA holds the public files that `texts.py` names.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import transformers

from tests import real
from tests.benchmarks import common

from . import tables, train
from .detect import Form, Setting, measure, measure_form
from .formats import FORMATS
from .texts import CLEAN, HALVES, LABELLED

# The default was chosen with SmolLM2 on all four texts and the known phrases; other models and phrases confirm it.
NUMBERS = {real.SMOLLM2: 60, real.GEMMA3: 30, real.QWEN: 30}


def settings(scale: str) -> list[Setting]:
    """All measurements of detection, most important first."""
    if scale == "gpu":
        return []
    if scale == "smoke":
        return [Setting(real.SMOLLM2, "chat", 0.25, 3)]
    small = real.SMOLLM2
    planted = [Setting(m, text, 0.25, n, compared=m == small) for m, n in NUMBERS.items() for text in CLEAN]
    clean = [Setting(m, text, 0.0, n) for m, n in NUMBERS.items() for text in CLEAN]
    labelled = [Setting(small, text, 0.0, 20 if text == "web pages" else 100) for text in LABELLED]
    labelled += [Setting(model, "stock sentences", 0.0, 50) for model in (real.GEMMA3, real.QWEN)]
    new = [Setting(small, text, 0.25, 60, phrases="new", seed=1) for text in CLEAN]
    tokens = [Setting(small, text, 0.05, 60, shape="tokens") for text in CLEAN]
    rates = [Setting(small, text, rate, 60) for rate in (0.1, 0.4) for text in CLEAN]
    return [*planted, *clean, *new, *labelled, *tokens, Setting(small, "GSM8K", 0.25, 60, "nf4"), *rates]


def forms(scale: str) -> list[Form]:
    """All measurements of `running_text`: on half of the pages each, and on text that has no menus."""
    return [] if scale == "gpu" else [*(Form(half, 41) for half in HALVES), *(Form(text, 60) for text in CLEAN)]


def jobs(scale: str) -> list[train.Job]:
    """All training runs, most important first."""
    if scale == "smoke":
        return [train.Job("default", 0, rows=8, text="chat")]
    if scale == "gpu":  # minutes on one: the arms that answer whether it helps
        arms = (*train.ARMS[:4], "paper", "P < 0.1")
        return [train.Job(arm, seed, rows=1_200, model=real.QWEN) for seed in range(5) for arm in arms]
    first, rest = train.ARMS[:6], train.ARMS[6:]
    noisy = [train.Job(arm, seed) for seed in range(3) for arm in first]
    clean = [train.Job(arm, seed, rate=0.0) for seed in range(3) for arm in ("plain", "default")]
    formats = [train.Job(arm, seed, text=text) for seed in range(2) for text in FORMATS for arm in ("plain", "default")]
    return [*noisy, *clean, *formats, *(train.Job(arm, seed) for seed in range(3) for arm in rest)]


def run(
    work: Sequence[Setting | Form | train.Job], folder: Path, data: Path, minutes: float, part: tuple[int, int] = (0, 1)
) -> list[dict[str, Any]]:
    """Measure what is missing, and return all that is there; `part` (i, n): only every n-th one is measured."""
    begun, found = time.monotonic(), []
    for place, setting in enumerate(work):
        path = folder / f"{setting.key}.json"
        if not path.exists():
            if place % part[1] != part[0]:
                continue
            if time.monotonic() - begun > 60 * minutes or not real.is_made(setting.model):
                print(f"not measured: {setting.key}", file=sys.stderr)
                continue
            if isinstance(setting, train.Job):  # arms of a seed share their scores
                result = run_job(setting, data, folder / "cache" / f"training {setting.seed} {setting.rate}")
            elif isinstance(setting, Form):
                result = measure_form(setting, data, folder / "cache" / setting.key)
            else:  # a cache of its own, so that the cost is that of a first run
                result = measure(setting, data, folder / "cache" / setting.key)
            made = path.with_suffix(".part")
            made.write_text(json.dumps({**result, "made": common.machine()}))
            made.replace(path)
            print(tables.train_line(result) if isinstance(setting, train.Job) else tables.line(result), flush=True)
        found.append(json.loads(path.read_text()))
    return found


def run_job(job: train.Job, data: Path, cache: Path) -> dict[str, Any]:
    """Train and measure one arm. On a CPU in a process of its own: after several arms one takes four times as long."""
    if common.device().type != "cpu":
        return train.run(job, data, cache)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(train.run, job, data, cache).result()


def record(result: dict[str, Any]) -> str:
    """A result as a line of JSON, without the text of public files."""
    rounded = json.loads(json.dumps(result), parse_float=lambda text: round(float(text), 5))
    return json.dumps({name: value for name, value in rounded.items() if name != "longest"}) + "\n"


def share(arguments: list[str], workers: int) -> None:
    """Measure in several processes."""
    words = [sys.executable, "-m", "tests.benchmarks.proof", *arguments, "--workers", "1"]
    parts = [subprocess.Popen([*words, "--part", f"{index}/{workers}"]) for index in range(workers)]
    for part in parts:
        part.wait()


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the public files")
    parser.add_argument("--folder", type=Path, default=Path(".proof"), help="where results are kept")
    parser.add_argument("--scale", choices=("cpu", "gpu", "smoke"), default="cpu")
    parser.add_argument("--only", choices=("detect", "train"), help="measure only one half")
    parser.add_argument("--workers", type=int, default=1, help="processes that share the measurements")
    parser.add_argument("--part", default="0/1", help="what a worker measures: 0/2 is every second one from the first")
    parser.add_argument("--minutes", type=float, default=80, help="begin no measurement after this time")
    parser.add_argument("--results", type=Path, help="also write all results into this file, a line each")
    parser.add_argument("--pictures", type=Path, help="also draw the pictures into this folder")
    parser.add_argument("--write", type=Path, help="also put the tables into this page")
    parser.add_argument("--further", type=Path, help="also put those of single scores and other rules into this page")
    given = parser.parse_args(arguments)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    given.folder.mkdir(parents=True, exist_ok=True)
    if given.workers > 1:
        share(sys.argv[1:] if arguments is None else arguments, given.workers)
        given.minutes = 0.0  # what is there is put into tables
    begun, found, trained = time.monotonic(), [], []
    first, number = map(int, given.part.split("/"))
    if given.only != "train":
        found = run(
            [*settings(given.scale), *forms(given.scale)], given.folder, given.data, given.minutes, (first, number)
        )
    if given.only != "detect":
        left = given.minutes - (time.monotonic() - begun) / 60
        trained = run(jobs(given.scale), given.folder, given.data, left, (first, number))
    if number > 1:
        return
    text = tables.everything(found, trained)
    print(text)
    if given.pictures:
        from . import pictures  # Matplotlib is not on every machine that measures

        pictures.draw(found, trained, given.pictures)
    if given.results:
        given.results.write_text("".join(record(one) for one in (*found, *trained)), encoding="utf-8")
    if given.write:
        tables.write(given.write, text)
    if given.further:
        tables.write(given.further, tables.further(found))


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
