"""`make proof`: base models, detection tables, fine-tuning runs, and the tables of docs/evidence.md, from nothing.

Everything goes to one folder and is picked up again after a stop. `--only` does a part; `--scale gpu` is larger.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import plan, plots, tables
from .candidates import digest
from .finetune import quiet
from .folders import claim
from .models import BaseSettings, make_bases
from .runs import Scale, run_all

SCALES = {
    "cpu": (BaseSettings(), Scale()),
    "gpu": (
        BaseSettings(hidden=256, intermediate=768, layers=6, documents=24_000, batch_tokens=16_384),
        Scale(rows=1_500, held_out=1_000, seeds=8, workers=4),
    ),
    # a few minutes: shows that every stage works, and nothing else
    "smoke": (
        BaseSettings(hidden=64, intermediate=128, layers=2, documents=300, steps=8),
        Scale(rows=24, held_out=8, seeds=2, epochs=2, clean_reference_rows=16, workers=1),
    ),
}


def detection(folder: Path, workers: int) -> list[dict[str, Any]]:
    """Detection results, from `detection.json` if it is there and about the same scores and rules."""
    path = folder / "detection.json"
    found: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    if not found or any(setting.get("candidates") != digest() for setting in found):
        from .detect import measure_all

        found = measure_all(plan.SETTINGS, folder, workers)
        path.write_text(json.dumps(found))
    return found


def costs(folder: Path) -> None:
    """Write `costs.json` unless it is there."""
    path = folder / "costs.json"
    if not path.exists():
        from .costs import measure_all

        path.write_text(json.dumps(measure_all((plan.MAIN, *plan.OTHERS), folder)))


STAGES = ("bases", "detection", "costs", "runs", "tables")


def main(arguments: Sequence[str] | None = None) -> None:
    """Do the stages that are asked for, and print every table whose numbers are there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(".proof"))
    parser.add_argument("--scale", choices=SCALES, default="cpu")
    parser.add_argument("--only", nargs="+", choices=STAGES, default=None)
    parser.add_argument("--groups", nargs="+", choices=plan.GROUPS, default=plan.GROUPS)
    parser.add_argument("--seeds", type=int, help="fewer or more seeds than the scale's")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop the runs after so many")
    parser.add_argument("--write", type=Path, help="also put the tables into this page, and pictures beside")
    options = parser.parse_args(arguments)
    quiet()
    settings, scale = SCALES[options.scale]
    if options.seeds:
        scale = replace(scale, seeds=options.seeds)
    try:
        claim(options.folder, scale, settings)
    except ValueError as error:
        parser.error(str(error))
    stages = options.only or STAGES
    start = time.time()
    if "bases" in stages:
        make_bases(options.folder, settings, scale.workers)
        print(f"base models: {(time.time() - start) / 60:.1f} min")
    if "detection" in stages:
        detection(options.folder, scale.workers)
        print(f"detection: {(time.time() - start) / 60:.1f} min")
    if "costs" in stages:
        costs(options.folder)
    if "runs" in stages:
        run_all(plan.jobs(options.groups, scale.seeds), options.folder, scale, until=start + 60 * options.minutes)
        print(f"runs: {(time.time() - start) / 60:.1f} min")
    if "tables" in stages:
        text = tables.everything(options.folder, options.groups, scale)
        print(text)
        if options.write is not None:
            tables.write_into(options.write, text)
            plots.write(options.folder, options.write.parent / options.write.stem, scale)


if __name__ == "__main__":
    main()
