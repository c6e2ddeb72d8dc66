"""Writes the demo's data: instruction pairs with noise in some of the answers.

    python recipes/demo/prepare.py --output .demo

The pairs are those of clean.jsonl; noise.py plants the noise. Written are

    data/train.jsonl, data/test.jsonl          `prompt` and `completion` as lists of messages, which TRL reads
    messages/train.jsonl                       the train rows again as one list of `messages`, which Axolotl reads
    noise.train.jsonl, noise.test.jsonl        where the noise is, a line per row; training does not read them

The same seed gives the same bytes on every machine. A second run does nothing until a file of this folder, the seed or
a product changes. The model is not made here: see recipes/models.py.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from noise import Mixer, Row

HERE = Path(__file__).parent
STAMP = "stamp.json"
TEST_ROWS = 12


def make_rows(seed: int) -> tuple[list[Row], list[Row]]:
    """The train and the test rows. Every pair of clean.jsonl is in one of them, once."""
    with (HERE / "clean.jsonl").open(encoding="utf-8") as handle:
        pairs = [json.loads(line) for line in handle]
    random.Random(f"rows {seed}").shuffle(pairs)
    mixer = Mixer(seed)
    return mixer.mix(pairs[TEST_ROWS:]), mixer.mix(pairs[:TEST_ROWS])


def products(seed: int) -> dict[str, str]:
    """The text of every file that is written, by its path in the output folder."""
    train, test = make_rows(seed)
    return {
        "data/train.jsonl": lines(prompt_and_completion(row) for row in train),
        "data/test.jsonl": lines(prompt_and_completion(row) for row in test),
        "messages/train.jsonl": lines({"messages": sum(prompt_and_completion(row).values(), [])} for row in train),
        "noise.train.jsonl": lines({"kind": row.kind, "noise": row.noise} for row in train),
        "noise.test.jsonl": lines({"kind": row.kind, "noise": row.noise} for row in test),
    }


def prompt_and_completion(row: Row) -> dict[str, list[dict[str, str]]]:
    """A row as TRL takes conversations: both columns are lists of messages, and the chat template is applied."""
    return {
        "prompt": [{"role": "user", "content": row.prompt}],
        "completion": [{"role": "assistant", "content": row.completion}],
    }


def lines(records: Iterable[dict[str, Any]]) -> str:
    """Records as JSON Lines."""
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def sources() -> str:
    """A hash of the files that decide what is written."""
    digest = hashlib.sha256()
    for name in ("clean.jsonl", "noise.py", "phrases.py", "prepare.py"):
        digest.update(name.encode() + b"\0" + (HERE / name).read_bytes())
    return digest.hexdigest()


def hashes(output: Path, names: Iterable[str]) -> dict[str, str | None]:
    """The hash of each file in `output`; None where it is missing."""
    paths = {name: output / name for name in names}
    return {n: hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else None for n, p in paths.items()}


def is_current(output: Path, seed: int) -> bool:
    """Whether `output` holds what this seed and these sources give, unchanged."""
    try:
        stamp = json.loads((output / STAMP).read_text(encoding="utf-8"))
        found = hashes(output, stamp["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return bool(stamp == {"seed": seed, "sources": sources(), "files": found} and None not in found.values())


def prepare(output: Path, seed: int = 0) -> bool:
    """Write all products into `output`; returns False, without touching them, when they are current.

    The stamp is removed first and written last, so a run that was stopped is not taken for a finished one.
    """
    if is_current(output, seed):
        return False
    (output / STAMP).unlink(missing_ok=True)
    texts = products(seed)
    for name, text in texts.items():
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).write_bytes(text.encode())
    stamp = {"seed": seed, "sources": sources(), "files": hashes(output, texts)}
    (output / STAMP).write_text(json.dumps(stamp, indent=1) + "\n", encoding="utf-8")
    return True


def main() -> None:
    """Parse the command line and write the demo's data."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, default=Path(".demo"), help="folder for the data (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise and of the split (%(default)s)")
    args = parser.parse_args()
    if not prepare(args.output, args.seed):
        print(f"{args.output}: up to date, nothing to do")
        return
    train, test = make_rows(args.seed)
    noisy = sum(bool(row.noise) for row in train + test)
    print(f"{args.output}: {len(train)} train rows and {len(test)} test rows, {noisy} of them with noise")


if __name__ == "__main__":
    main()
