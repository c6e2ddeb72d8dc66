"""The cost of rescoring: tokens and time relative to the scoring pass, by world and noise rate."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xtf_plugin import XTFConfig
from xtf_plugin.plan import make_plan

from .detect import Bench, Setting

ONCE = {"selectors": {"out_of_place": {"context": "document"}}}
RATES = (0.0, 0.1, 0.25, 0.4)


def _plan(bench: Bench, block: dict[str, Any]) -> tuple[Any, float]:
    """The plan and its seconds, with nothing in the store."""
    with tempfile.TemporaryDirectory() as cache:
        config = XTFConfig.parse({**block, "cache_dir": cache})
        assert config is not None
        start = time.perf_counter()
        plan = make_plan(config, bench.documents, bench.provider, bench.tokenizer, progress=False)
        return plan, time.perf_counter() - start


def measure(world: str, rate: float, folder: Path) -> dict[str, Any]:
    """Tokens of the excerpts over tokens of the pass, and seconds of the whole plan with and without rescoring."""
    bench = Bench(Setting(world, world, rate), folder)
    _plan(bench, ONCE)  # the first pass of a process also pays for starting up
    _, once = _plan(bench, ONCE)
    plan, both = _plan(bench, {"preset": "default"})
    looks = plan.scorers.get("excerpts", {"tokens": 0, "documents": 0})
    return {
        "world": world,
        "rate": rate,
        "sentences": looks["documents"],
        "tokens": looks["tokens"] / plan.stats.tokens,
        "seconds": both / once,
    }


def measure_all(worlds: Sequence[str], folder: Path) -> list[dict[str, Any]]:
    """`measure` for every world and rate, one after the other: times are compared."""
    return [measure(world, rate, folder) for world in worlds for rate in RATES]
