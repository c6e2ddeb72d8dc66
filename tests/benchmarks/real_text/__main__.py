"""What the filter does to real text: split, base model, audit of the drops, fine-tuning, tables.

    python -m tests.benchmarks.real_text --data FOLDER

FOLDER holds gsm8k_train.jsonl, pubmedqa.jsonl and humaneval.jsonl as published (see records.py for the fields). Nothing
of them is stored but token ids in the score cache and the examples. The base model is trained from scratch and tiny.
Everything goes to one folder and is picked up again after a stop.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from tests.benchmarks.proof.finetune import quiet

from .stages import SCALES, base_facts, stage


def main(arguments: Sequence[str] | None = None) -> None:
    """Do what is missing, and print the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="where the three data sets lie")
    parser.add_argument("--folder", type=Path, default=Path(".real-text"))
    parser.add_argument("--scale", choices=SCALES, default="cpu")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="no new run begins after so many")
    parser.add_argument("--write", type=Path, help="also put the tables into this page, between its marks")
    options = parser.parse_args(arguments)
    start, scale, folder = time.time(), SCALES[options.scale], options.folder
    quiet()

    import torch

    from . import audit, base, pages, planted, records, runs

    if options.scale != "gpu":
        torch.set_num_threads(1)  # the tables are of one thread, wherever they are made
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".gitignore").write_text("*\n")  # what is derived from others' data stays out of a repository
    parts = records.read(options.data)
    data = records.digest(parts)
    facts = base_facts(scale, data)
    learned = stage(folder / "base.json", facts, lambda: base.make_base(parts, folder / "base", scale))
    print(f"base model: {(time.time() - start) / 60:.1f} min", flush=True)
    drops = audit.audit(parts, folder, scale, data)
    print(f"audit: {(time.time() - start) / 60:.1f} min", flush=True)
    results = runs.run_all(parts, folder, scale, data, start + 60 * options.minutes)
    noisy = planted.everything(parts, folder, scale, data, start + 60 * options.minutes)
    print(f"runs: {(time.time() - start) / 60:.1f} min", flush=True)
    text = pages.everything(parts, learned, drops, results) + "\n" + pages.planted_tables(noisy)
    print(text)
    print(pages.examples_list(drops))  # quotes the data: to be read, and to stay out of the page
    if options.write is not None:
        pages.write_into(options.write, text)


if __name__ == "__main__":
    main()
