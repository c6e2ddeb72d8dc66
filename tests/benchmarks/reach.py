"""What scoring may cost: the figures that benchmarks are held against, each stated here and nowhere else.

    python -m tests.benchmarks.reach [--write docs/benchmarks]

A value is compared as it was measured, not as it is printed: 1.004 misses 1.00.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks.tables import table, write_into


@dataclass(frozen=True)
class Reach:
    """A figure that a measured value should not pass.

    Args:
        figure: as it is written, so that 1.00 does not become 1.
        unit: written behind it. With " %" a value is a share: 0.02 is 2 %.
        at_most: whether values above it miss it; else those below it do.
    """

    figure: str
    unit: str = ""
    at_most: bool = True

    @property
    def limit(self) -> float:
        """The figure in the unit of values."""
        return float(self.figure) / (100 if self.unit == " %" else 1)

    def __str__(self) -> str:
        return f"{'≤' if self.at_most else '≥'} {self.figure}{self.unit}"

    def judge(self, value: float) -> str:
        """The figure, and whether a value keeps to it."""
        kept = value <= self.limit if self.at_most else value >= self.limit
        return f"{self}: {'kept' if kept else 'missed'}"


FP32, BF16, CUDA = "cpu fp32", "cpu bf16", "cuda bf16"
ONE_LAYER = {FP32: Reach("1.00"), BF16: Reach("1.05"), CUDA: Reach("1.05")}
ALL_LAYERS = {FP32: Reach("1.05"), BF16: Reach("1.15"), CUDA: Reach("1.15")}
ALL_LAYERS_BEYOND = Reach("1.30")  # on a GPU, documents of more than BEYOND tokens
BEYOND = 2_048
MEMORY = Reach("1.05")
AUTHORS = {FP32: Reach("20", at_most=False), BF16: Reach("60", at_most=False), CUDA: Reach("200", at_most=False)}
PADDING = Reach("3", " %")
START, START_SHARE = Reach("5", " s"), Reach("2", " %")
SELECTION, SELECTION_MEMORY = Reach("30", " s"), Reach("2", " GB")
VERIFIED = Reach("1", " ms")
COLLATOR, STEP = Reach("0.5", " %"), Reach("1.00")
RUN = Reach("1.10")
BOOT_HOOK = Reach("1", " ms")
EXACT = Reach("2e-4")
TRITON = Reach("1.00")  # x the time of what torch alone takes


def scoring(every_layer: bool, case: str, longest: int = 0) -> Reach:
    """What the pass may take of the floor's time, for documents of up to `longest` tokens; `case`: "cpu fp32"."""
    if every_layer and case == CUDA and longest > BEYOND:
        return ALL_LAYERS_BEYOND
    return (ALL_LAYERS if every_layer else ONE_LAYER)[case]


def everything() -> list[list[str]]:
    """The figures as rows of a table, without those that are no cost."""
    beyond = f"; {ALL_LAYERS_BEYOND} beyond {BEYOND:,} tokens"
    return [
        ["scoring, RI on one layer, x floor", *map(str, ONE_LAYER.values())],
        ["scoring, RI on all layers, x floor", *map(str, list(ALL_LAYERS.values())[:2]), f"{ALL_LAYERS[CUDA]}{beyond}"],
        ["peak memory, x floor", *[str(MEMORY)] * 3],
        ["the authors' procedure, x ours", *map(str, AUTHORS.values())],
        ["padding of the scoring batches", *[str(PADDING)] * 3],
        ["start with stored scores, 100,000 documents", *[f"{START}, {START_SHARE} of scoring"] * 2, "–"],
        ["selection and mask table, 100 M tokens", *[f"{SELECTION}, {SELECTION_MEMORY}"] * 2, "–"],
        ["a batch of 8 checked, 1 M documents of one length", *[str(VERIFIED)] * 2, "–"],
        ["collator, of a training step", *[str(COLLATOR)] * 3],
        ["training step with masks, x without", *[str(STEP)] * 3],
        ["whole QLoRA run of three epochs, x without", *[str(RUN)] * 3],
        ["boot hook in `import torch`", *[str(BOOT_HOOK)] * 2, "–"],
    ]


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--write", type=Path, help="also put the table into this page or folder, between the marks `reach`"
    )
    options = parser.parse_args(given)
    text = table(["what", "CPU, fp32", "CPU, bf16", "GPU, bf16"], everything())
    print(text)
    if options.write is not None:
        write_into(options.write, text, "<!-- reach -->", "<!-- /reach -->")


if __name__ == "__main__":
    main()
