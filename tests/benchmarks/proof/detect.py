"""How well each score and each rule finds planted noise, through the product's own scoring and selection."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.benchmarks.bench_overheads import Provider
from xtf_plugin import XTFConfig
from xtf_plugin.documents import collect
from xtf_plugin.pipeline import Plan, make_plan, text_segments
from xtf_plugin.segments import Layout, segment_means, windowed

from .arms import OFF
from .data import Encoder, Row, flat_kinds, make_rows
from .finetune import dataset, load
from .models import device
from .noise import FORMS, KINDS, is_noise
from .stats import auc
from .worlds import GOOD_KINDS

RI, KN, TR = tuple(OFF)
ANY = {"quantile": 0.5}  # a rule is needed, the score alone is looked at


def attribute(name: str, **keys: Any) -> dict[str, Any]:
    """A block with one attribute."""
    return {"preset": "paper", **OFF, name: keys or True}


def selector(**keys: Any) -> dict[str, Any]:
    """A block with one selector, called `score`."""
    return {"preset": "paper", **OFF, "selectors": {"score": {"drop": ANY, **keys}}}


def _scores() -> dict[str, dict[str, Any]]:
    """Every score of the comparison, as a block with one voter; low scores count as noise."""
    found: dict[str, dict[str, Any]] = {}
    for layers in ("first", "middle", "last", "all"):
        found[f"attention received, {layers}"] = attribute(RI, layers=layers)
    for window in (5, 9, 15, "sentence", "line"):
        found[f"attention received, all, {window}"] = attribute(RI, layers="all", window=window)
    found["relevance to the dataset"] = attribute(TR)
    found["relevance to the dataset, output"] = attribute(TR, embedding="output")
    for window in (9, "sentence", "line"):
        found[f"relevance to the dataset, {window}"] = attribute(TR, window=window)
    for window in (1, 5, 9, 15, "sentence", "line"):
        found[f"log-probability, {window}"] = selector(scorer="log_probability", window=window)
    for window in (1, 9, "sentence", "line"):
        found[f"typicality, {window}"] = selector(scorer="typicality", window=window)
    for unit in ("sentence", "line"):
        for clip in (2.0, 4.0, 8.0, 16.0):
            found[f"opening, {unit}, clip {clip:g}"] = selector(scorer="opening", unit=unit, clip=clip)
    return found


SCORES = _scores()


def _rules() -> dict[str, dict[str, Any]]:
    """Rules to compare, each a whole block; special tokens are protected in all of them."""
    paper = {"preset": "paper", "protect": {"special_tokens": True}, "min_kept": 1}
    none = {**paper, **OFF}
    found: dict[str, dict[str, Any]] = {
        "paper, Eq. (1)": paper,
        "official": {"preset": "official", "protect": {"special_tokens": True}, "min_kept": 1},
        "default": {"preset": "default"},
    }
    for layers in ("first", "middle", "last", "all"):
        found[f"RI, Eq. (5), {layers}"] = {**none, RI: {"layers": layers, "drop": {"fence": 1.0}}}
    found["RI, Eq. (5), all, log scale"] = {**none, RI: {"layers": "all", "scale": "log", "drop": {"fence": 1.0}}}
    for share in (0.05, 0.2):
        found[f"RI, lowest {share:.0%}, all"] = {**none, RI: {"layers": "all", "drop": {"quantile": share}}}
    found["KN, Eq. (6), P > 0.95"] = {**none, KN: {"drop": {"known_above": 0.95}}}
    for bound in (0.05, 0.01):
        found[f"KN, P < {bound}"] = {**none, KN: {"drop": {"unknown_below": bound}}}
    for of in (3, 5):
        for cluster in (1, 2):
            found[f"TR, class {cluster} of {of}"] = {**none, TR: {"drop": {"cluster": cluster, "of": of}}}
    found["TR, lowest 20%, line"] = {**none, TR: {"drop": {"quantile": 0.2}, "window": "line"}}

    def one(**keys: Any) -> dict[str, Any]:
        return {**none, "selectors": {"score": keys}}

    for window in ("sentence", "line"):
        found[f"log-probability, lowest 20%, {window}"] = one(
            scorer="log_probability", window=window, drop={"quantile": 0.2}
        )
    for limit in (-4.0, -6.0, -8.0, -10.0, -12.0):
        found[f"typicality below {limit:g}"] = one(scorer="typicality", drop={"below": limit})
    for unit in ("sentence", "line"):
        for limit in (-3.0, -3.5, -4.0, -4.5, -5.0):
            found[f"opening, {unit}, below {limit:g}"] = one(scorer="opening", unit=unit, drop={"below": limit})
    return found


RULES = _rules()


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
        """The scores of the block's one voter after its window, (M,); low means drop."""
        plan = self.plan(block)
        (voter,) = plan.config.voters
        values, window = plan.scores.of(voter), plan.config.part(voter).window
        assert values is not None
        layout = Layout(plan.scores.offsets, plan.scores.counts)
        if isinstance(window, str):
            segments = text_segments(plan.config, self.documents, self.tokenizer)
            values = segment_means(values, layout, segments[window])
        else:
            values = windowed(values, layout, window)
        return self.in_rows(plan, values)

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
    import torch

    model = AutoModelForCausalLM.from_pretrained(bench.provider.reference.model.config._name_or_path)
    model.set_attn_implementation("eager")
    parts = []
    with torch.no_grad():
        for row in bench.rows:
            ids = torch.tensor([row.prompt + row.completion])
            first = model(input_ids=ids, output_attentions=True).attentions[0]  # (1, H, T, T)
            parts.append(first[0].mean(0).mean(-1)[len(row.prompt) :].numpy())
    return np.concatenate(parts)


def measure(world: str, base: str, rate: float, folder: Path, quantization: str | None = None) -> dict[str, Any]:
    """Everything about one setting: AUC of every score (with noise), and what every rule does."""
    bench = Bench(Setting(world, base, rate), folder, quantization)
    found: dict[str, Any] = {"world": world, "base": base, "rate": rate, "quantization": quantization}
    found["tokens"], found["noise"] = len(bench.noise), float(bench.noise.mean())
    if rate:
        found["auc"] = {name: bench.aucs(bench.scores(block)) for name, block in SCORES.items()}
        found["auc"]["attention, as in the published script"] = bench.aucs(script_attention(bench))
    found["rules"] = {name: bench.outcome(block) for name, block in RULES.items()}
    return found


def measure_all(settings: Sequence[tuple[str, str, float]], folder: Path) -> list[dict[str, Any]]:
    """`measure` for every setting, and once more with a 4-bit reference."""
    found = []
    for world, base, rate in settings:
        print(f"detection: {world}, base {base}, rate {rate}", flush=True)
        found.append(measure(world, base, rate, folder))
    world, base, rate = settings[0]
    found.append(measure(world, base, rate, folder, quantization="nf4"))
    return found
