"""Runs all checks and measurements that need a GPU, the most important first, in less than nine minutes.

    python -m tests.gpu [--output .gpu] [--minutes 8.7] [--page docs/benchmarks]

Every part (see `parts.py`) is a process of its own with a time limit: one that crashes or hangs takes no other with it.
Its output goes to `<output>/<part>.log` while it runs, and its result to `<output>/results.jsonl` when it ends; tables
go into the page. Started again, parts that have passed with the same code on the same device are not run again.

Without a GPU it names each part as not measured, and exits with 0. `--smoke` runs every part with tiny sizes on
whatever device there is: it shows that the command works, and nothing else. Exit code 1: a part failed or ran out of
time; 2: there is a GPU that PyTorch cannot use.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from tests.benchmarks.common import commit, machine
from tests.gpu.parts import PARTS, Part, Settings

RESULTS = "results.jsonl"
LEAST = 10.0  # seconds: with less left a part is not begun
GRACE = 13.0  # seconds between asking a part to end, so that it can write what it has, and ending it
LAST_LINES = 15


@dataclass(frozen=True)
class Result:
    """How a part ended: a line of results.jsonl.

    Args:
        status: passed | failed | out of time | not measured.
        seconds: how long it ran.
        where: code and device it ran on; a part is not run again for the same.
        tail: the last lines of its output, or why it did not run.
    """

    part: str
    status: str
    seconds: float
    where: str
    machine: str
    tail: str


def device_name() -> str:
    """The GPU, or that there is none."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"


def earlier(output: Path) -> dict[str, Result]:
    """The last result of each part that an earlier run wrote; a line that was cut off is left out."""
    found: dict[str, Result] = {}
    path = output / RESULTS
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            result = Result(**json.loads(line))
        except (ValueError, TypeError):
            continue
        found[result.part] = result
    return found


def run(part: Part, settings: Settings, limit: float) -> tuple[str, float]:
    """Run a part's command for at most `limit` seconds; its status, and how long it took."""
    begin = time.perf_counter()
    with (settings.output / f"{part.name}.log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            part.command(settings, limit),
            stdout=log,
            stderr=subprocess.STDOUT,
            env=settings.environment,
            start_new_session=True,
        )
        try:
            code = process.wait(limit)
            status = "passed" if code == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "out of time"
        finally:
            end(process)
    return status, time.perf_counter() - begin


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process and those it started: first as Ctrl+C does, so that tables and tracebacks are written."""
    for number in (signal.SIGINT, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(GRACE)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def tail(path: Path) -> str:
    """The last lines of a log."""
    return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:])


def write(output: Path, result: Result) -> None:
    """Add a result to results.jsonl at once, and print it."""
    with (output / RESULTS).open("a", encoding="utf-8") as handle:
        handle.write(json.dumps(asdict(result)) + "\n")
    print(f"== {result.part}: {result.status}, {result.seconds:.0f} s\n{result.tail}\n", flush=True)


def run_all(settings: Settings, parts: Sequence[Part], minutes: float) -> list[Result]:
    """Run the parts in order, each within its limit and all within `minutes`; those that passed before are kept."""
    last = time.perf_counter() + 60 * minutes
    where = f"{commit()}, {device_name()}{', smoke' if settings.smoke else ''}"
    before, results = earlier(settings.output), []
    measures = torch.cuda.is_available() or settings.smoke
    for part in parts:
        kept = before.get(part.name)
        if kept is not None and kept.status == "passed" and kept.where == where:
            print(f"== {part.name}: passed before with {kept.where}", flush=True)
            results.append(kept)
            continue
        left = last - time.perf_counter()
        why = part.missing(settings) if measures else device_name()
        why = why or ("" if left >= LEAST else "no time left: start the command again")
        if why:
            status, took, text = "not measured", 0.0, f"{part.description}: not measured ({why})"
        else:
            print(f"== {part.name}: {part.description} (at most {min(part.limit, left):.0f} s)", flush=True)
            status, took = run(part, settings, min(part.limit, left))
            text = tail(settings.output / f"{part.name}.log")
        result = Result(part.name, status, round(took, 1), where, machine(), text)
        write(settings.output, result)
        results.append(result)
    return results


def has_an_unusable_gpu() -> bool:
    """Whether there is an NVIDIA GPU and a PyTorch that was built without CUDA."""
    return torch.version.cuda is None and Path("/dev/nvidia0").exists()


def main(given: Sequence[str] | None = None) -> int:
    """Parse the command line and run; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(".gpu"), help="logs and results")
    parser.add_argument("--page", type=Path, help="put the tables into this page or folder too")
    parser.add_argument("--minutes", type=float, default=8.7, help="for all parts together")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on any device: shows that it runs")
    parser.add_argument("--only", nargs="+", choices=[part.name for part in PARTS], help="these parts alone")
    options = parser.parse_args(given)
    if has_an_unusable_gpu():
        print(
            f"There is a GPU, but PyTorch {torch.__version__} is built without CUDA: install one with.", file=sys.stderr
        )
        return 2
    options.output.mkdir(parents=True, exist_ok=True)
    parts = [part for part in PARTS if not options.only or part.name in options.only]
    print(f"{machine()}\n", flush=True)
    with tempfile.TemporaryDirectory(prefix="xtf-gpu-") as scratch:
        page = options.page and options.page.resolve()
        settings = Settings(options.output.resolve(), Path(scratch), page, options.smoke)
        results = run_all(settings, parts, options.minutes)
    print(*(f"{result.part:12} {result.status:12} {result.seconds:6.0f} s" for result in results), sep="\n")
    print(f"logs and {RESULTS}: {options.output}")
    return int(any(result.status in ("failed", "out of time") for result in results))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the part that runs is ended too
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may ignore it, and parts would inherit that
    sys.exit(main())
