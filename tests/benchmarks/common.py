"""What the benchmarks share: procedures timed in turn, tables with the reach in a column, and pages they are put into.

A ratio is trusted only within one run: procedures take turns, so that a slow minute hits all of them, and the medians
of their times are compared.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.bench_scoring import machine as host
from tests.benchmarks.proof.tables import table, write_into

NOT_MEASURED = "not measured yet"


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark takes."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="also put the table into this page, between this program's marks")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: shows that it runs, and nothing else")
    return parser


def device() -> torch.device:
    """Where a benchmark runs: on the GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def machine() -> str:
    """Hardware, versions and commit."""
    if not torch.cuda.is_available():
        return host()
    return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}; {host()}"


def settled() -> float:
    """The time, once the device has done all that it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(procedure: Callable[[], Any]) -> float:
    """How long a procedure takes."""
    begin = settled()
    procedure()
    return settled() - begin


def in_turn(
    procedures: Mapping[str, Callable[[], Any]], repeats: int, until: float = float("inf"), warm_up: int = 1
) -> dict[str, float]:
    """Median seconds of procedures that run one after the other, `repeats` times over.

    Args:
        until: no new round begins after this time of `time.perf_counter`, once there has been one.
        warm_up: rounds before the ones that count.
    """
    for _ in range(warm_up):
        for procedure in procedures.values():
            procedure()
    found: dict[str, list[float]] = {name: [] for name in procedures}
    for done in range(repeats):
        if done and time.perf_counter() > until:
            break
        for name, procedure in procedures.items():
            found[name].append(seconds(procedure))
    return {name: statistics.median(times) for name, times in found.items()}


def publish(name: str, caption: str, head: Sequence[str], rows: Sequence[Sequence[str]], page: Path | None) -> str:
    """Print a table under its machine and caption; with a page, put it between `<!-- name -->` and `<!-- /name -->`."""
    text = f"{machine()}{'; ' if caption else ''}{caption}.\n\n{table(head, rows)}"
    print(text, flush=True)
    if page is not None:
        write_into(page, text, f"<!-- {name} -->", f"<!-- /{name} -->")
    return text


def against(value: float, reach: float, at_most: bool = True, unit: str = "") -> str:
    """The reach, and whether a value keeps to it."""
    kept = value <= reach if at_most else value >= reach
    return f"{'≤' if at_most else '≥'} {reach:g}{unit}: {'kept' if kept else 'missed'}"
