"""The sizes and seeds of the demo.

Apart from the code that uses them, so that an unchanged demo is recognised without importing PyTorch.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class BaseSettings:
    """The base model: its shape and its training. Everything that changes its weights."""

    vocabulary: int = 2048
    hidden: int = 192
    intermediate: int = 512
    layers: int = 4
    heads: int = 4
    context: int = 512
    length: int = 256
    batch: int = 8
    steps: int = 300
    learning_rate: float = 4e-3
    warmup: int = 40
    seed: int = 0


@dataclass(frozen=True)
class DemoSettings:
    """The data sets and the base model; the defaults are what `recipes/demo.yaml` is tuned for."""

    seed: int = 0
    train_rows: int = 4000
    test_rows: int = 200
    corpus_documents: int = 6000
    held_out: int = 100
    base: BaseSettings = field(default_factory=BaseSettings)
