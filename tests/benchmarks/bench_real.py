"""Real pretrained models: the scoring pass against the floor, and its scores against the definitions.

    python -m tests.benchmarks.bench_real [--models NAME ...] [--rows 24] [--write docs/benchmarks]

On a GPU if there is one, otherwise on the CPU. Text: the demo's question and answer pairs in each model's own chat
template. Two tables:

- Cost. The floor is one no-grad decoder forward plus the LM head on completion positions, in the same batches. The
  procedures run in turn, and only ratios within a round are compared. On a GPU also the peak of allocated memory.
- Agreement. How far log-probability (nats) and attention received (1.0 = uniform) lie from transformers' eager
  attention maps and full logits in float32, for the scoring pass and for the same eager computation in the model's own
  precision ("naive"). The truth of a 4-bit model is the same 4-bit weights, computed in float32.

`make models` creates the models; the row of a missing one says so. Exit code 1: the pass is further from the truth
than the eager computation.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from tests import real, tiny
from tests.benchmarks import reach
from tests.benchmarks.bench_scoring import floor, xtf
from tests.benchmarks.common import NOT_MEASURED, arguments, device, peak_allocated, publish, rounds
from xtf_plugin.data.documents import DocumentSet, collect

COST = ["model, precision", "procedure", "tokens/s", "ms", "x floor", "single rounds", "peak MB", "reach"]
AGREEMENT = ["model, precision", "score", "xtf: mean", "99 %", "largest", "naive: mean", "99 %", "largest", "verdict"]
FLOOR, ONE, ALL = "**floor** (decoder + LM head on completion)", "xtf, RI on the last layer", "xtf, RI on all layers"
UNITS = {"logprobs": "log-probability, nats", "received": "attention received, 1 = uniform"}
EXACT = 2e-4  # what float32 may differ by from the definitions
SMOKE = "a tiny Llama"


def budget() -> int:
    """Padded tokens of a batch: as for random models, or enough to fill a GPU."""
    return 4_096 if device().type == "cpu" else 16_384


def given(name: str, precision: str, count: int) -> tuple[Callable[..., Any], DocumentSet]:
    """How to load a model, and its documents."""
    if name == SMOKE:
        return lambda compute=None: tiny.model().to(device(), compute or real.DTYPES[precision]), smoke_documents(count)
    return partial(real.load, name, precision, device()), real.documents(name, count)


def smoke_documents(count: int) -> DocumentSet:
    """Documents for the tiny model."""
    fast = tiny.tokenizer()
    return collect([real.row_of(fast, row["prompt"], row["completion"]) for row in tiny.problems(count)])


def cost(name: str, precision: str, model: Any, documents: DocumentSet, repeats: int, until: float) -> list[list[str]]:
    """Rows of the first table for one model in one precision."""
    layers = tuple(range(model.config.num_hidden_layers))
    procedures = {
        FLOOR: partial(floor, model, documents, budget()),
        ONE: partial(xtf, model, documents, layers[-1:], budget()),
        ALL: partial(xtf, model, documents, layers, budget()),
    }
    found = rounds(procedures, repeats, until)
    memory = {procedure: peak_allocated(run) for procedure, run in procedures.items()}
    base, tokens, rows = statistics.median(found[FLOOR]), int(documents.lengths.sum()), []
    for procedure, took in found.items():
        median, ratio = statistics.median(took), statistics.median(took) / base
        single = [one / other for one, other in zip(took, found[FLOOR], strict=True)]
        spread = "–" if procedure == FLOOR else f"{min(single):.2f}-{max(single):.2f}"
        case = f"{device().type} {precision}"
        held = procedure != FLOOR and case in reach.ONE_LAYER
        goal = reach.scoring(procedure == ALL, case).judge(ratio) if held else "–"
        used = "–" if memory[FLOOR] != memory[FLOOR] else f"{memory[procedure]:,.0f}"
        cells = [f"{tokens / median:,.0f}", f"{median * 1e3:,.0f}", f"{ratio:.3f}", spread, used, goal]
        rows.append([f"{name}, {precision}", procedure, *cells])
    return rows


def agreement(
    name: str, precision: str, model: Any, load: Callable[..., Any], documents: DocumentSet
) -> list[list[str]]:
    """Rows of the second table for one model in one precision."""
    layers = tuple(range(model.config.num_hidden_layers))
    ours = real.ours(model, documents, layers)
    naive = real.definition(model, documents, layers)
    truth = real.definition(load(compute=torch.float32), documents, layers) if precision != "fp32" else naive
    found, theirs = real.errors(truth, ours), real.errors(truth, naive)
    rows = []
    for score, unit in UNITS.items():
        verdict = real.verdict(found[score], theirs[score], EXACT)
        cells = [f"{value:.1e}" for part in (found, theirs) for value in real.spread(part[score])]
        rows.append([f"{name}, {precision}", unit, *cells, verdict])
    return rows


def measure(
    names: Sequence[str],
    precisions: Sequence[str],
    count: int,
    repeats: int,
    end: float,
    costs: list[list[str]],
    agreements: list[list[str]],
) -> None:
    """Add the rows of both tables to `costs` and `agreements` as they are measured.

    A row that cannot begin before `end`, a time of `time.perf_counter`, is marked as not measured.
    """
    here = [name for name in names if name == SMOKE or real.is_made(name)]

    def unmeasured(name: str, precision: str, why: str) -> None:
        costs.append([f"{name}, {precision}", f"{NOT_MEASURED}: {why}", *["–"] * (len(COST) - 2)])

    for number, (name, precision) in enumerate(pairs := [(n, p) for n in here for p in precisions]):
        left = (end - time.perf_counter()) / (len(pairs) - number)
        if left <= 0:
            unmeasured(name, precision, "out of time")
            continue
        load, documents = given(name, precision, count)
        model = load()
        costs += cost(name, precision, model, documents, repeats, time.perf_counter() + 0.6 * left)
        print(*costs[-3:], sep="\n", flush=True)
        agreements += agreement(name, precision, model, load, collect_first(documents, max(2, count // 2)))
        print(*agreements[-2:], sep="\n", flush=True)
        del model, load
        gc.collect()
    for name in [name for name in names if name not in here]:
        for precision in precisions:
            unmeasured(name, precision, "no such model here: make models")


def collect_first(documents: DocumentSet, count: int) -> DocumentSet:
    """The first documents: eager maps of all of them would take too long."""
    rows = []
    for index in range(min(count, len(documents))):
        ids, completion = documents.document(index)
        rows.append(
            {"input_ids": ids, "labels": [i if kept else -100 for i, kept in zip(ids, completion, strict=True)]}
        )
    return collect(rows)


def main(words: Sequence[str] | None = None) -> int:
    parser = arguments(__doc__)
    parser.add_argument("--models", nargs="+", choices=real.NAMES, default=list(real.NAMES))
    parser.add_argument("--precisions", nargs="+", choices=list(real.DTYPES))
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--minutes", type=float, default=60.0)
    options = parser.parse_args(words)
    names = [SMOKE] if options.smoke else options.models
    precisions = options.precisions or (["fp32"] if options.smoke else ["bf16", "nf4"])
    count, end = 4 if options.smoke else options.rows, time.perf_counter() + 60 * options.minutes
    costs: list[list[str]] = []
    agreements: list[list[str]] = []
    try:
        measure(names, precisions, count, options.repeats, end, costs, agreements)
    finally:  # also when it is interrupted
        mark = "real models" if device().type == "cpu" else "real models, gpu"
        caption = f"{count} rows of the demo, medians of {options.repeats}, batches of {budget():,} tokens"
        publish(mark, caption, COST, costs, options.write)
        publish(f"{mark}, agreement", "half of the rows", AGREEMENT, agreements, options.write)
    return int(any(row[-1] != "kept" for row in agreements))


if __name__ == "__main__":
    sys.exit(main())
