"""How well each score and each rule finds planted noise, through the product's own scoring and selection."""

from __future__ import annotations

import multiprocessing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.benchmarks.bench_overheads import Provider
from xtf_plugin import XTFConfig
from xtf_plugin.data.documents import collect
from xtf_plugin.plan import Plan, make_plan

from .candidates import RULES, SCORES, digest, selector
from .data import Encoder, Row, flat_kinds, make_rows
from .finetune import dataset, load, quiet
from .models import device
from .noise import FORMS, KINDS, is_noise
from .stats import auc
from .worlds import GOOD_KINDS


@dataclass(frozen=True)
class Setting:
    """Where detection is measured: rows with noise, and the base model that scores them."""

    world: str
    base: str = "all"
    rate: float = 0.25
    rows: int = 300
    seed: int = 77
    kinds: tuple[str, ...] = KINDS
    forms: tuple[str, ...] = FORMS


class Bench:
    """Rows of a setting with their kinds, and plans for any block on them."""

    def __init__(self, setting: Setting, folder: Path, quantization: str | None = None) -> None:
        base = folder / f"base-{setting.base}"
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        self.rows: Sequence[Row] = make_rows(
            setting.world,
            setting.rows,
            setting.rate,
            setting.seed,
            Encoder(self.tokenizer),
            kinds=setting.kinds,
            forms=setting.forms,
        )
        self.kinds = flat_kinds(self.rows)
        self.noise = np.asarray([is_noise(kind) for kind in self.kinds])
        self.documents = collect(dataset(self.rows))
        model = load(base, "qlora" if quantization else "full")
        self.provider = Provider(model if quantization else model.to(device()))
        self.cache = str(folder / "cache")

    def plan(self, block: Mapping[str, Any]) -> Plan:
        """What the product decides."""
        config = XTFConfig.parse({**block, "cache_dir": self.cache})
        assert config is not None
        return make_plan(config, self.documents, self.provider, self.tokenizer, progress=False)

    def in_rows(self, plan: Plan, values: NDArray[Any]) -> NDArray[Any]:
        """Values of distinct documents in the order of the rows' completion tokens."""
        offsets = plan.scores.offsets
        return np.concatenate([values[offsets[d] : offsets[d + 1]] for d in self.documents.row_documents])

    def scores(self, block: Mapping[str, Any]) -> NDArray[np.float32]:
        """The block's one score as its rule sees it, (M,); low means drop."""
        plan = self.plan(block)
        (seen,) = plan.selection.seen.values()
        return self.in_rows(plan, seen)

    def aucs(self, scores: NDArray[np.float32]) -> dict[str, float]:
        """AUC against all good tokens, for each kind and form of spans and of single tokens, and for all of each."""
        found = {}
        for shape in ("span", "single"):
            for kind in (*KINDS, "all"):
                for form in (*FORMS, "all"):
                    wanted = [
                        is_noise(k)
                        and k.endswith(shape)
                        and kind in (k.split("/")[0], "all")
                        and form in (k.split("/")[1], "all")
                        for k in self.kinds
                    ]
                    chosen = np.asarray(wanted) | ~self.noise
                    found[f"{kind}/{form}/{shape}"] = auc(scores[chosen], self.noise[chosen])
        return found

    def outcome(self, block: Mapping[str, Any]) -> dict[str, Any]:
        """What a rule drops: share, precision, noise found by kind, good tokens lost by kind."""
        plan = self.plan(block)
        dropped = ~self.in_rows(plan, plan.selection.keep)
        return outcome(dropped, self.noise, self.kinds)


def outcome(dropped: NDArray[np.bool_], noise: NDArray[np.bool_], kinds: NDArray[Any]) -> dict[str, Any]:
    """Share dropped, precision, noise found (spans, single tokens, by kind), good tokens lost (all, by kind)."""
    span, single = (np.char.endswith(kinds, shape) & noise for shape in ("/span", "/single"))
    first = np.asarray([kind.split("/")[0] for kind in kinds])

    def share(mask: NDArray[np.bool_]) -> float:
        return float(dropped[mask].mean()) if mask.any() else float("nan")

    return {
        "dropped": float(dropped.mean()),
        "precision": float(noise[dropped].mean()) if dropped.any() else float("nan"),
        "spans": share(span),
        "singles": share(single),
        "found": {kind: share((first == kind) & span) for kind in KINDS},
        "found_single": {kind: share((first == kind) & single) for kind in KINDS},
        "good_lost": share(~noise),
        "lost": {kind: share(kinds == kind) for kind in GOOD_KINDS},
    }


def script_attention(bench: Bench) -> NDArray[np.float32]:
    """The published script's reasoning importance, restated: first layer, each softmax row averaged over its keys.

    Every row sums to 1, so that the score is 1/T but for rounding; in the order of the rows' completion tokens, (M,).
    """
    model = AutoModelForCausalLM.from_pretrained(bench.provider.reference.model.config._name_or_path)
    model.set_attn_implementation("eager")
    parts = []
    with torch.no_grad():
        for row in bench.rows:
            ids = torch.tensor([row.prompt + row.completion])
            first = model(input_ids=ids, output_attentions=True).attentions[0]  # (1, H, T, T)
            parts.append(first[0].mean(0).mean(-1)[len(row.prompt) :].numpy())
    return np.concatenate(parts)


def change_points(bench: Bench, penalty: float) -> NDArray[np.float32]:
    """Log-probabilities averaged between change points of each document, (M,) in the order of the rows.

    The segments are those of least squared error plus `penalty` for each (optimal partitioning, arXiv 1101.1438),
    found exactly; values below -8 count as -8, so that one token is no segment.
    """
    plan = bench.plan(selector(scorer="log_probability"))
    values = bench.in_rows(plan, np.maximum(plan.scores.values["score"], -8.0)).astype(np.float64)
    parts, at = [], 0
    for row in bench.rows:
        parts.append(_segment_means(values[at : at + len(row.completion)], penalty))
        at += len(row.completion)
    return np.concatenate(parts).astype(np.float32)


def _segment_means(values: NDArray[np.float64], penalty: float) -> NDArray[np.float64]:
    """Each value replaced by the mean of its segment."""
    size = len(values)
    total, square = (np.concatenate([[0.0], np.cumsum(v)]) for v in (values, values**2))
    best, last = np.zeros(size + 1), np.zeros(size + 1, dtype=np.int64)
    for end in range(1, size + 1):
        length = end - np.arange(end)
        error = square[end] - square[:end] - (total[end] - total[:end]) ** 2 / length
        cost = best[:end] + error + penalty
        last[end] = int(cost.argmin())
        best[end] = cost[last[end]]
    means, end = np.empty(size), size
    while end:
        means[last[end] : end] = values[last[end] : end].mean()
        end = int(last[end])
    return means


def measure(world: str, base: str, rate: float, folder: Path, quantization: str | None = None) -> dict[str, Any]:
    """Everything about one setting: AUC of every score (with noise), and what every rule does."""
    bench = Bench(Setting(world, base, rate), folder, quantization)
    found: dict[str, Any] = {"world": world, "base": base, "rate": rate, "quantization": quantization}
    found["candidates"] = digest()
    found["tokens"], found["noise"] = len(bench.noise), float(bench.noise.mean())
    if rate:
        found["auc"] = {name: bench.aucs(bench.scores(block)) for name, block in SCORES.items()}
        found["auc"]["attention, as in the published script"] = bench.aucs(script_attention(bench))
        for penalty in (5.0, 20.0):
            found["auc"][f"log-probability, change points, {penalty:g}"] = bench.aucs(change_points(bench, penalty))
    found["rules"] = {name: bench.outcome(block) for name, block in RULES.items()}
    return found


def _measure(arguments: tuple[str, str, float, Path, str | None]) -> dict[str, Any]:
    quiet()
    torch.set_num_threads(1)
    world, base, rate, folder, quantization = arguments
    found = measure(world, base, rate, folder, quantization)
    print(f"detection: {world}, base {base}, rate {rate}, {quantization or 'fp32'}", flush=True)
    return found


def measure_all(settings: Sequence[tuple[str, str, float]], folder: Path, workers: int) -> list[dict[str, Any]]:
    """`measure` for every setting, and for the first once more with a 4-bit reference; some processes at a time."""
    wanted = [(*setting, folder, None) for setting in settings] + [(*settings[0], folder, "nf4")]
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        return pool.map(_measure, wanted, chunksize=1)
