"""What `python -m tests.gpu` runs, part by part, the most important first."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests import real

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Settings:
    """How the parts run.

    Args:
        output: folder for logs and results.
        page: the page that tables go into, or None.
        smoke: tiny sizes on any device.
    """

    output: Path
    page: Path | None
    smoke: bool

    @property
    def environment(self) -> dict[str, str]:
        """Of the processes: the repository can be imported, nothing asks a network, output comes as it is made."""
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        return {**os.environ, **offline, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}

    @property
    def write(self) -> list[str]:
        """The words that put a table into the page."""
        return ["--write", str(self.page)] if self.page else []


@dataclass(frozen=True)
class Part:
    """One process.

    Args:
        tells: what it tells, for people.
        limit: seconds it may take.
        words: what follows `python`, by settings.
        modules: what it needs to import; a missing one is named, and the part not run.
        model: a real model it needs, not in the smoke form.
    """

    name: str
    tells: str
    limit: float
    words: Callable[[Settings], list[str]]
    modules: tuple[str, ...] = ()
    model: str | None = None

    def command(self, settings: Settings) -> list[str]:
        """What runs."""
        return [sys.executable, *self.words(settings)]

    def missing(self, settings: Settings) -> str:
        """What keeps the part from running here, or nothing."""
        for name in self.modules:
            if importlib.util.find_spec(name) is None:
                return f"no package {name} here"
        if self.model and not settings.smoke and not real.is_made(self.model):
            return f"no {real.MODELS / self.model} here: make models"
        return ""


def pytest(*files: str) -> Callable[[Settings], list[str]]:
    """Tests that are marked `gpu`; in the smoke form they are collected, and skipped where there is no GPU."""
    return lambda settings: [
        "-m",
        "pytest",
        "-m",
        "gpu",
        "-v",
        "-p",
        "no:cacheprovider",
        *(str(ROOT / f) for f in files),
    ]


def program(
    name: str, *words: str, smoke: tuple[str, ...] = ("--smoke", "--repeats", "1")
) -> Callable[[Settings], list[str]]:
    """A benchmark, which writes its tables into the page."""
    return lambda settings: ["-m", f"tests.{name}", *(smoke if settings.smoke else words), *settings.write]


PARTS = (
    Part("kernels", "Triton's and PyTorch's kernels against their definitions", 170, pytest("tests/test_gpu.py")),
    Part(
        "sft",
        "a stock `trl sft` run, 4-bit QLoRA of SmolLM2 with an xtf: block",
        110,
        lambda settings: (
            ["-m", "tests.gpu.sft", "--output", str(settings.output / "sft")]
            + ["--smoke"] * settings.smoke
            + settings.write
        ),
        modules=("trl", "bitsandbytes"),
        model=real.SMOLLM2,
    ),
    Part(
        "real",
        "scoring of real models in bf16 and nf4: parity with fp32, time and memory over the floor",
        150,
        program("benchmarks.bench_real", "--minutes", "2.2", "--rows", "64"),
        modules=("bitsandbytes",),
        model=real.SMOLLM2,
    ),
    Part(
        "lora-kernels",
        "scores through Axolotl's LoRA kernels, adapters off",
        60,
        pytest("tests/test_gpu_lora_kernels.py"),
        modules=("axolotl", "bitsandbytes"),
    ),
    Part(
        "bench",
        "scoring, a training step, a run, Triton against torch, on a billion random weights",
        230,
        program("benchmarks.bench_gpu", "--minutes", "3.5"),
        modules=("trl", "bitsandbytes"),
    ),
    Part(
        "profile",
        "where the time of a scoring pass goes",
        60,
        program("benchmarks.bench_profile", "--device", "cuda"),
    ),
)
