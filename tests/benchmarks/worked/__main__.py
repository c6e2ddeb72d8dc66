"""Which tokens are dropped and why, on texts of our own: the examples of docs/which-tokens.md.

    python -m tests.benchmarks.worked --data FOLDER --write docs/which-tokens.md

The base model is that of `tests.benchmarks.real_text`, trained from scratch on the data sets in FOLDER (a quarter of an
hour on one core, or nothing if it is there). Each example is scored among rows of the data set that it looks like,
because the paper's thresholds depend on the rest of the data; only our own texts are shown.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from tests.benchmarks.proof.finetune import quiet
from tests.benchmarks.real_text.stages import SCALES, base_facts, stage


def main(arguments: Sequence[str] | None = None) -> None:
    """Print every example; with --write put each between its marks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="where the three data sets lie")
    parser.add_argument("--folder", type=Path, default=Path(".real-text"))
    parser.add_argument("--scale", choices=SCALES, default="cpu")
    parser.add_argument("--write", type=Path, help="also put the examples into this page, each between its marks")
    options = parser.parse_args(arguments)
    quiet()

    import torch

    from tests.benchmarks.proof.tables import write_into
    from tests.benchmarks.real_text import base, records

    from . import pages

    torch.set_num_threads(1)  # what is printed is of one thread, wherever it is made
    options.folder.mkdir(parents=True, exist_ok=True)
    (options.folder / ".gitignore").write_text("*\n")  # what is derived from others' data stays out of a repository
    scale, parts = SCALES[options.scale], records.read(options.data)
    facts = base_facts(scale, records.digest(parts))
    stage(options.folder / "base.json", facts, lambda: base.make_base(parts, options.folder / "base", scale))
    for name, text in pages.everything(parts, options.folder, scale).items():
        print(f"\n{name}\n\n{text}")
        if options.write is not None:
            write_into(options.write, text, *pages.marks(name))


if __name__ == "__main__":
    main()
