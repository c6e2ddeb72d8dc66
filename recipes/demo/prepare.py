"""Makes everything the demo needs: a tiny base model and a noisy fine-tuning set, without a download.

    python recipes/demo/prepare.py --output .demo

writes .demo/base (model and tokenizer), .demo/data/train.jsonl and test.jsonl (prompt and completion), and
.demo/noise.train.jsonl and noise.test.jsonl (where the planted noise is, a line per row; training never reads it). A
second run finds the stamp of the first and does nothing, until a source file of this folder or a setting changes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import time
from dataclasses import asdict
from pathlib import Path

from demo_data import make_corpus, make_rows, write_noise, write_rows
from settings import BaseSettings, DemoSettings
from stories import random_problem

STAMP = "stamp.json"
PRODUCTS = (
    "base/config.json",
    "base/model.safetensors",
    "base/tokenizer.json",
    "data/train.jsonl",
    "data/test.jsonl",
    "noise.train.jsonl",
    "noise.test.jsonl",
)


def stamp(settings: DemoSettings) -> str:
    """A hash of all that decides the products: the settings and every Python source of this folder."""
    digest = hashlib.sha256(json.dumps(asdict(settings), sort_keys=True).encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()


def is_current(output: Path, settings: DemoSettings) -> bool:
    """True when `output` holds every product and the stamp of exactly these settings and sources."""
    path = output / STAMP
    if not path.is_file() or not all((output / product).is_file() for product in PRODUCTS):
        return False
    return path.read_text(encoding="utf-8").strip() == json.dumps({"stamp": stamp(settings)})


def prepare(output: Path, settings: DemoSettings) -> bool:
    """Make all products under `output`; returns False, without touching them, when they are current.

    The stamp is removed first and written last, so that an interrupted run is never taken for a finished one.
    """
    if is_current(output, settings):
        return False
    from base_model import make_base  # here, because importing PyTorch takes longer than finding the demo up to date

    (output / STAMP).unlink(missing_ok=True)
    for folder in ("base", "data"):
        shutil.rmtree(output / folder, ignore_errors=True)
    (output / "data").mkdir(parents=True)

    rows = make_rows(settings.seed, settings.train_rows + settings.test_rows)
    prompts = {row.problem.prompt for row in rows}
    for name, part in (("train", rows[: settings.train_rows]), ("test", rows[settings.train_rows :])):
        write_rows(part, output / "data" / f"{name}.jsonl")
        write_noise(part, output / f"noise.{name}.jsonl")

    held_out_rng = random.Random(f"held out {settings.seed}")
    held_out = [random_problem(held_out_rng) for _ in range(settings.held_out)]
    corpus = make_corpus(settings.seed, settings.corpus_documents, prompts | {problem.prompt for problem in held_out})
    make_base(corpus, [problem.text for problem in held_out], output / "base", settings.base)
    (output / STAMP).write_text(json.dumps({"stamp": stamp(settings)}) + "\n", encoding="utf-8")
    return True


def main() -> None:
    """Parse the command line and make the demo's files."""
    defaults = DemoSettings()
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--output", type=Path, default=Path(".demo"), help="folder for the model and the data (%(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=defaults.seed, help="seed of the data and of the model (%(default)s)"
    )
    args = parser.parse_args()
    settings = DemoSettings(seed=args.seed, base=BaseSettings(seed=args.seed))
    start = time.perf_counter()
    if prepare(args.output, settings):
        seconds = time.perf_counter() - start
        print(f"{args.output}: {settings.train_rows} + {settings.test_rows} rows and the base model in {seconds:.0f} s")
    else:
        print(f"{args.output}: up to date, nothing to do")


if __name__ == "__main__":
    main()
