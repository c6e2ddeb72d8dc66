"""The cost of scoring on a GPU, in one command of less than ten minutes.

    python -m tests.benchmarks.bench_gpu [--minutes 8] [--write docs/benchmarks]

Triton's kernels against those of torch, the scoring pass against the floor, the published procedure, a training
step, a whole run and weights in 4 bits (`gpu_parts`), the most important first. Each part has a
time limit. A part that exceeds it or fails is reported in its row, and the exit code is 1. Parts left when the time is
used up, and all parts without a GPU, are reported as not measured. `--smoke` runs tiny sizes on any device.
"""

from __future__ import annotations

import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from tests.benchmarks import gpu_parts, reach
from tests.benchmarks.common import NOT_MEASURED, arguments, publish
from tests.benchmarks.gpu_parts import SMOKE, Rows, Sizes

HEAD = ["section", "what", "ms", "ratio", "reach"]
SECTIONS: dict[str, tuple[Callable[[Sizes, int, float], Rows], float]] = {  # and what each may take of the time
    "attention received": (gpu_parts.attention, 0.15),
    "head and moments": (gpu_parts.moments, 0.1),
    "scoring, short": (partial(gpu_parts.scoring, "short"), 0.2),
    "scoring, long": (partial(gpu_parts.scoring, "long"), 0.15),
    "scoring, 8,192": (partial(gpu_parts.scoring, "8,192"), 0.2),
    "authors": (gpu_parts.authors, 0.2),
    "step": (gpu_parts.step, 0.2),
    "run": (gpu_parts.run, 0.5),
    "nf4": (gpu_parts.quantised, 0.15),
}
REACHES = {
    **{
        f"scoring, {name}": f"{reach.scoring(False, reach.CUDA)}; {reach.scoring(True, reach.CUDA, lengths[-1])}; "
        f"memory {reach.MEMORY}"
        for name, lengths in Sizes().documents.items()
    },
    "authors": str(reach.AUTHORS[reach.CUDA]),
    "step": f"{reach.STEP}; collator {reach.COLLATOR}",
    "run": str(reach.RUN),
    "attention received": str(reach.TRITON),
    "head and moments": str(reach.TRITON),
}
LEAST = 0.02  # share of the time; with less left, a part is not started


class OutOfTime(BaseException):
    """The time is over. No Exception, so that the handler of failed kernels does not catch it."""


@contextmanager
def limit(seconds: float) -> Iterator[None]:
    """OutOfTime in the body when its time is over."""

    def ring(*_: Any) -> None:
        raise OutOfTime(f"stopped after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def unmeasured(name: str, why: str) -> list[str]:
    """The row of a section without figures."""
    return [name, why, "–", "–", REACHES.get(name, "–")]


def measure(sizes: Sizes, repeats: int, total: float, rows: list[list[str]] | None = None) -> list[list[str]]:
    """All sections, each within its part of the time, and all within `total` seconds.

    Args:
        rows: a list that rows are added to as they come.
    """
    rows = [] if rows is None else rows
    end = time.perf_counter() + total
    for name, (section, part) in SECTIONS.items():
        now = time.perf_counter()
        seconds = min(total * part, end - now)
        if seconds < LEAST * total:
            rows.append(unmeasured(name, "not measured: out of time"))
            continue
        try:
            with limit(seconds):
                for row in section(sizes, repeats, now + 0.6 * seconds):
                    rows.append(row)
                    print(*row, sep=" | ", file=sys.stderr, flush=True)  # in case the process is killed
        except (OutOfTime, Exception) as error:
            traceback.print_exc()
            what = (str(error).splitlines() or [type(error).__name__])[0]
            rows.append(unmeasured(name, f"failed: {what[:100]}"))
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return rows


def main(given: Sequence[str] | None = None) -> int:
    parser = arguments(__doc__)
    parser.add_argument("--minutes", type=float, default=8)
    options = parser.parse_args(given)
    sizes = SMOKE if options.smoke else Sizes()
    rows: list[list[str]] = []
    model = f"bf16, {sizes.layers} layers of {sizes.hidden}, vocabulary {sizes.V:,}, batches of {sizes.tokens:,} tokens"
    try:
        if torch.cuda.is_available() or options.smoke:
            measure(sizes, options.repeats, 60 * options.minutes, rows)
        else:
            rows += [unmeasured(name, f"{NOT_MEASURED}: no CUDA device") for name in SECTIONS]
    finally:  # also when it is interrupted
        publish("bench_gpu", f"{model}, medians of {options.repeats}", HEAD, rows, options.write)
    return int(any(row[1].startswith("failed") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
