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
DATA = Path(os.environ.get("XTF_TEST_DATA", "."))
TO_WRITE = 30.0  # seconds of a part's limit for imports and for writing its tables


@dataclass(frozen=True)
class Settings:
    """How the parts run.

    Args:
        output: folder for logs and results.
        scratch: folder for everything else, deleted at the end.
        page: the page that tables go into, or None.
        smoke: tiny sizes on any device.
    """

    output: Path
    scratch: Path
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

    @property
    def smoked(self) -> list[str]:
        """The word for tiny sizes."""
        return ["--smoke"] if self.smoke else []


Words = Callable[[Settings, float], list[str]]  # what follows `python`, by settings and the seconds there are


@dataclass(frozen=True)
class Part:
    """One process.

    Args:
        description: what it checks or measures, for people.
        limit: seconds it may take.
        modules: what it needs to import; a missing one is named, and the part not run.
        model: a real model it needs, not in the smoke form.
        data: a public file it needs, not in the smoke form, in the folder $XTF_TEST_DATA.
    """

    name: str
    description: str
    limit: float
    words: Words
    modules: tuple[str, ...] = ()
    model: str | None = None
    data: str | None = None

    def command(self, settings: Settings, seconds: float) -> list[str]:
        """What runs."""
        return [sys.executable, *self.words(settings, seconds)]

    def missing(self, settings: Settings) -> str:
        """What keeps the part from running here, or nothing."""
        for name in self.modules:
            if importlib.util.find_spec(name) is None:
                return f"no package {name} here"
        if self.model and not settings.smoke and not real.is_made(self.model):
            return f"no {real.MODELS / self.model} here: make models"
        if self.data and not settings.smoke and not (DATA / self.data).is_file():
            return f"no {self.data} in the folder $XTF_TEST_DATA"
        return ""


def checks(file: str) -> Words:
    """The tests of a file that are marked `gpu`."""
    return lambda settings, _: ["-m", "tests.gpu.checks", str(ROOT / file), *settings.smoked]


def timed(program: str, *words: str) -> Words:
    """A benchmark that ends by itself, with its tables, before its time is over."""

    def command(settings: Settings, seconds: float) -> list[str]:
        repeats = ["--repeats", "1"] if settings.smoke else []  # the last one counts
        minutes = f"{max(10.0, seconds - TO_WRITE) / 60:.2f}"
        return [
            "-m",
            f"tests.benchmarks.{program}",
            "--minutes",
            minutes,
            *words,
            *settings.smoked,
            *repeats,
            *settings.write,
        ]

    return command


def profile(settings: Settings, _: float) -> list[str]:
    """PyTorch's profiler over a scoring pass."""
    repeats = ["--repeats", "1"] if settings.smoke else []
    return ["-m", "tests.benchmarks.bench_profile", "--device", "cuda", *settings.smoked, *repeats, *settings.write]


def sft(settings: Settings, _: float) -> list[str]:
    """The stock command."""
    return ["-m", "tests.gpu.sft", "--output", str(settings.scratch / "sft"), *settings.smoked, *settings.write]


def training(settings: Settings, seconds: float) -> list[str]:
    """The training comparison; a GPU has room for three small models at a time."""
    scale = ["smoke", "--only", "train"] if settings.smoke else ["gpu", "--workers", "3"]
    minutes = f"{max(10.0, seconds - 2 * TO_WRITE) / 60:.2f}"
    words = [
        "-m",
        "tests.benchmarks.proof",
        "--data",
        str(DATA),
        "--folder",
        str(ROOT / ".proof"),
        "--minutes",
        minutes,
    ]
    return [*words, "--results", str(settings.output / "training.jsonl"), "--scale", *scale]


PARTS = (
    Part(
        "kernels",
        "Triton's and PyTorch's kernels against their definitions",
        150,
        checks("tests/gpu/test_gpu.py"),
    ),
    Part(
        "sft",
        "a stock `trl sft` run, 4-bit QLoRA of SmolLM2 with an xtf: block",
        100,
        sft,
        modules=("trl", "bitsandbytes"),
        model=real.SMOLLM2,
    ),
    Part(
        "bench",
        "Triton against PyTorch, scoring, a training step and a run, on a billion random weights",
        170,
        timed("bench_gpu", "--repeats", "3"),
        modules=("trl", "bitsandbytes"),
    ),
    Part(
        "real",
        "scoring of real models in bf16 and nf4: agreement with float32, time and memory over the floor",
        110,
        timed("bench_real", "--rows", "64"),
        modules=("bitsandbytes",),
        model=real.SMOLLM2,
    ),
    Part(
        "lora-kernels",
        "scores through Axolotl's LoRA kernels, adapters off",
        90,
        checks("tests/gpu/test_gpu_lora_kernels.py"),
        modules=("axolotl", "bitsandbytes"),
    ),
    Part("profile", "the time of a scoring pass by kind of kernel", 50, profile),
    Part(
        "training",
        "what the filter does to Qwen2.5-Coder-0.5B on noisy word problems; alone with `--only training`",
        510,
        training,
        model=real.QWEN,
        data="gsm8k_train.jsonl",
    ),
)
