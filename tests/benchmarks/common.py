"""What the benchmarks share: procedures timed in turn, peaks of memory, and tables that are put into a page.

A ratio is trusted only within one run: procedures take turns, so that a slow minute hits all of them, and the medians
of their times are compared.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.tables import table, write_into

ROOT = Path(__file__).parents[2]
NOT_MEASURED = "not measured yet"


def arguments(doc: str | None, repeats: int = 5) -> argparse.ArgumentParser:
    """The options that every benchmark takes."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--write", type=Path, help="also put the table into this page or folder, between this program's marks"
    )
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: shows that it runs, and nothing else")
    return parser


def device() -> torch.device:
    """Where a benchmark runs: on the GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def commit() -> str:
    """The short name of the commit, and a hash of what is changed since, docs left out, which tables are written into.

    Where there is no repository, in an unpacked kit (tests/gpu), $XTF_COMMIT says it.
    """
    if "XTF_COMMIT" in os.environ:
        return os.environ["XTF_COMMIT"]

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    try:
        name, changes = git("rev-parse", "--short", "HEAD"), git("diff", "HEAD", "--", ".", ":!docs")
    except OSError:  # no git
        return "unknown"
    changed = f" with changes {hashlib.sha256(changes.encode()).hexdigest()[:7]}" if changes else ""
    return f"{name}{changed}" if name else "unknown"


def machine() -> str:
    """Hardware, versions and commit."""
    cpu = "unknown"
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as handle:
            cpu = next((line.split(":", 1)[1].strip() for line in handle if line.startswith("model name")), cpu)
    gpu = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}; " if torch.cuda.is_available() else ""
    return (
        f"{gpu}{torch.get_num_threads()} threads of {cpu}; Python {platform.python_version()}, "
        f"torch {torch.__version__}, transformers {version('transformers')}; commit {commit()}"
    )


def peak_allocated(procedure: Callable[[], Any]) -> float:
    """MB that a procedure allocates on the GPU at its peak over what was there before; NaN without a GPU."""
    if not torch.cuda.is_available():
        return float("nan")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    procedure()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


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


def rounds(
    procedures: Mapping[str, Callable[[], Any]], repeats: int, until: float = float("inf"), warm_up: int = 1
) -> dict[str, list[float]]:
    """Seconds of procedures that run one after the other, `repeats` times over.

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
    return found


def in_turn(
    procedures: Mapping[str, Callable[[], Any]], repeats: int, until: float = float("inf"), warm_up: int = 1
) -> dict[str, float]:
    """Medians of `rounds`."""
    return {name: statistics.median(times) for name, times in rounds(procedures, repeats, until, warm_up).items()}


def peaks(procedure: Callable[[], Any], repeats: int) -> list[float]:
    """MB that a procedure takes at its peak over what the process had before the first of several runs (Linux).

    Memory that a run freed goes back to the system before the next one; what it keeps counts. Code of libraries that is
    read in meanwhile does not.
    """
    give_back = getattr(ctypes.CDLL(None), "malloc_trim", lambda _: 0)  # glibc's
    give_back(0)
    before, mapped, found = resident("VmRSS"), resident("RssFile"), []
    for _ in range(repeats):
        give_back(0)
        with open("/proc/self/clear_refs", "w") as handle:
            handle.write("5")  # the peak is what is resident now
        procedure()
        found.append(resident("VmHWM") - before - (resident("RssFile") - mapped))
    return found


def resident(field: str) -> float:
    """MB of this process that are resident (Linux): `VmRSS` now, `VmHWM` at the peak, `RssFile` of files."""
    with open("/proc/self/status") as handle:
        return next(int(line.split()[1]) * 1024 / 1e6 for line in handle if line.startswith(field))


def publish(name: str, caption: str, head: Sequence[str], rows: Sequence[Sequence[str]], page: Path | None) -> str:
    """Print a table under its machine and caption; with a page, put it between `<!-- name -->` and `<!-- /name -->`."""
    text = f"{machine()}{'; ' if caption else ''}{caption}.\n\n{table(head, rows)}"
    print(text, flush=True)
    if page is not None:
        write_into(page, text, f"<!-- {name} -->", f"<!-- /{name} -->")
    return text
