"""What a quantised or a smaller reference saves, and how much its masks agree with those of the full one.

    python -m tests.benchmarks.bench_reference [--real FOLDER --data FOLDER] [--write docs/benchmarks.md]

Generated sums with planted noise, scored by a base model trained on such sums in float32, bfloat16 and 4 bits, and by
one of about a fifth of its size. With `--real` (a folder of `tests.benchmarks.real_text`) and `--data`, also GSM8K,
scored by a base model trained on real text. Missing base models are trained, which takes some minutes. Agreement is the
Jaccard index of the dropped tokens, by the rules' own thresholds and of the lowest tenth of the scores, where random
choice has an index of 0.05.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoTokenizer

from tests.benchmarks.bench_overheads import Provider
from tests.benchmarks.bench_scoring import xtf
from tests.benchmarks.common import NOT_MEASURED, arguments, device, in_turn, publish
from tests.benchmarks.proof.candidates import KN, RI, TR, attribute
from tests.benchmarks.proof.data import SMALL, Encoder, make_rows, train_tokenizer
from tests.benchmarks.proof.detect import Bench
from tests.benchmarks.proof.finetune import dataset, load
from tests.benchmarks.proof.models import BaseSettings, make_base
from tests.benchmarks.real_text import encode, records
from xtf_plugin.data.documents import collect

WORLD, RATE, SHARE = "sums", 0.25, 0.1
BLOCKS = {
    "default": {"preset": "default"},
    "reasoning importance": attribute(RI, layers="last"),
    "knowledge novelty": attribute(KN),
    "task relevance": attribute(TR),
}
FULL = "fp32"
FOLDER = Path(".bench-reference")
HEAD = ["data, reference", "weights", "rule", "dropped by it", "by the full one", "Jaccard", "Jaccard, lowest 10 %"]


class Referenced(Bench):
    """Plans on given rows by a given reference."""

    def __init__(self, rows: Sequence[Any], tokenizer: Any, model: Any, cache: str) -> None:
        self.rows, self.tokenizer, self.cache = rows, tokenizer, cache
        self.documents = collect(dataset(rows))
        self.model = model
        self.provider = Provider(model)


def references(base: Path, small: Path | None) -> dict[str, Callable[[], Any]]:
    """How to load each reference."""
    found = {
        FULL: lambda: load(base, "full").to(device()),
        "bf16": lambda: load(base, "full").to(device(), torch.bfloat16),
        "nf4": lambda: load(base, "qlora"),
    }
    return found if small is None else {**found, "smaller, fp32": lambda: load(small, "full").to(device())}


def jaccard(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> float:
    """Tokens in both over tokens in either; NaN if there are none."""
    either = int((one | other).sum())
    return int((one & other).sum()) / either if either else float("nan")


def lowest(scores: NDArray[np.float32]) -> NDArray[np.bool_]:
    """The tokens with the lowest tenth of the scores; undefined ones are never among them."""
    order = np.argsort(np.where(np.isnan(scores), np.inf, scores), kind="stable")
    chosen = np.zeros(len(scores), dtype=bool)
    chosen[order[: round(SHARE * len(scores))]] = True
    return chosen


def drops(bench: Referenced) -> dict[str, tuple[NDArray[np.bool_], NDArray[np.bool_]]]:
    """By rule: the tokens it drops, and the lowest tenth of its scores."""
    found = {}
    for name, block in BLOCKS.items():
        plan = bench.plan(block)
        found[name] = ~bench.in_rows(plan, plan.selection.keep), lowest(bench.scores(block))
    return found


def compare(
    what: str, rows: Sequence[Any], base: Path, small: Path | None, repeats: int
) -> tuple[list[list[str]], list[str]]:
    """Rows of the table, and the time each reference takes to score."""
    table, tokenizer = [], AutoTokenizer.from_pretrained(base)
    with tempfile.TemporaryDirectory() as cache:
        benches = {
            n: Referenced(rows, tokenizer, make(), f"{cache}/{n}") for n, make in references(base, small).items()
        }
        found = {name: drops(bench) for name, bench in benches.items()}
    for name, by_rule in found.items():
        count = sum(p.numel() for p in benches[FULL if name in ("bf16", "nf4") else name].model.parameters())
        for rule, (own, low) in by_rule.items() if name != FULL else ():
            full, full_low = found[FULL][rule]
            same, agreement = jaccard(own, full), jaccard(low, full_low)
            cells = [f"{own.mean():.1%}", f"{full.mean():.1%}", "–" if same != same else f"{same:.2f}"]
            table.append([f"{what}, {name}", f"{count / 1e6:.2f} M", rule, *cells, f"{agreement:.2f}"])
    last = {name: bench.model.config.num_hidden_layers - 1 for name, bench in benches.items()}
    times = in_turn({n: partial(xtf, b.model, b.documents, (last[n],)) for n, b in benches.items()}, repeats)
    return table, [f"{what}, {name}: {took / times[FULL]:.2f} x" for name, took in times.items() if name != FULL]


def bases(folder: Path, smoke: bool) -> tuple[Any, Path, Path]:
    """The tokenizer of the generated data and two base models, the second smaller; trained if missing."""
    settings = BaseSettings(hidden=64, intermediate=128, layers=2, documents=40, steps=2) if smoke else BaseSettings()
    tokenizer = train_tokenizer()
    base, small = (make_base(name, folder, tokenizer, settings) for name in (WORLD, SMALL))
    return tokenizer, base, small


def made_up(tokenizer: Any, count: int) -> list[Any]:
    """Rows with planted noise of the world that the base model was trained on."""
    return make_rows(WORLD, count, RATE, 77, Encoder(tokenizer))


def gsm8k(folder: Path, base: Path, count: int) -> list[Any]:
    """Rows of problems outside the training data of the base."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    held_out = records.read(folder)["GSM8K"]["held-out"][:count]
    return encode.encode_all(held_out, tokenizer, tokenizer.model_max_length)


def main(given: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where base models are kept")
    parser.add_argument("--real", type=Path, help="folder of the benchmark on real text, with its base model")
    parser.add_argument("--data", type=Path, help="folder with the real data sets")
    options = parser.parse_args(given)
    tokenizer, base, small = bases(options.folder, options.smoke)
    rows = made_up(tokenizer, 8 if options.smoke else 300)
    table, times = compare("sums", rows, base, small, options.repeats)
    if options.real is not None and options.data is not None:
        real = options.real / "base"
        more, took = compare("GSM8K", gsm8k(options.data, real, 200), real, None, options.repeats)
        table, times = table + more, times + took
    if device().type == "cpu":
        table.append(["any of 1B or more, on a GPU", *[NOT_MEASURED] * 6])
    caption = f"time of the scoring pass against the full reference in fp32, medians of {options.repeats}: "
    publish("bench_reference", caption + "; ".join(times), HEAD, table, options.write)


if __name__ == "__main__":
    main()
