"""How large the benchmark is, and stages that are done once: a stop costs only the stage it stopped.

A stage's result lies beside the settings it was got with; other settings, other data or other rules do it again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.benchmarks.proof.models import BaseSettings


@dataclass(frozen=True)
class Scale:
    """Sizes; the defaults fit one CPU core and three quarters of an hour.

    Args:
        rows: of a data set that one fine-tuning run trains on, drawn again for each seed.
        held_out: rows of a data set that a run is measured on, the first ones.
        prompt: longest prompt in fine-tuning, in tokens; None: as long as the context allows. Abstracts make up nine
            tenths of PubMedQA's tokens, and a model this small cannot read them.
    """

    base: BaseSettings = field(default_factory=lambda: BaseSettings(steps=1_250))
    vocabulary: int = 4_096
    context: int = 512
    rows: int = 96
    held_out: int = 200
    prompt: int | None = 160
    seeds: int = 3
    epochs: float = 2
    batch: int = 16
    # by data set: the base model has read much like GSM8K's train part already, and forgets at a higher rate
    learning_rates: Mapping[str, float] = field(default_factory=lambda: {"GSM8K": 1e-4, "PubMedQA": 3e-4})


SCALES = {
    "cpu": Scale(),
    "gpu": Scale(
        base=BaseSettings(hidden=384, intermediate=1_024, layers=8, heads=6, batch_tokens=16_384, steps=1_500),
        rows=600,
        held_out=600,
        prompt=None,
        seeds=5,
    ),
    # some seconds: shows that every stage works, and nothing else
    "smoke": Scale(
        base=BaseSettings(hidden=64, intermediate=64, layers=2, heads=2, batch_tokens=1_024, steps=6, warmup=2),
        vocabulary=512,
        context=192,
        rows=6,
        held_out=6,
        seeds=2,
        epochs=1,
        batch=4,
    ),
}


def stored(path: Path, settings: Mapping[str, Any]) -> Any:
    """The result in `path` if it was got with the same settings, else None."""
    if not path.exists():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    return found["result"] if found["settings"] == json.loads(json.dumps(settings)) else None


def stage(path: Path, settings: Mapping[str, Any], make: Callable[[], Any]) -> Any:
    """The stored result if there is one for the settings, else `make()`, stored in `path`."""
    result = stored(path, settings)
    if result is None:
        result = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".part")  # a stop while writing leaves no half result
        unfinished.write_text(json.dumps({"settings": settings, "result": result}), encoding="utf-8")
        unfinished.replace(path)
    return result


def base_facts(scale: Scale, data: str) -> dict[str, Any]:
    """What makes the base model what it is."""
    return {"data": data, "base": asdict(scale.base), "vocabulary": scale.vocabulary, "context": scale.context}


def definition(block: Mapping[str, Any] | None) -> Any:
    """A block with every default written out: presets change, and results are those of the rules of their day."""
    from xtf_plugin import XTFConfig

    config = None if block is None else XTFConfig.parse(block)
    return None if config is None else config.to_dict()
