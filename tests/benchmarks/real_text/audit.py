"""What the product drops from real text: how much, by which rule, which kinds of tokens, which texts, and where.

Everything is read off the product's own plans: keep flags and, per token, the rules that fired. Rules are known by the
names that the block gives them, so that a preset may change its selectors without a change here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.benchmarks.bench_overheads import Provider
from tests.benchmarks.proof.arms import OFF
from tests.benchmarks.proof.data import Row
from tests.benchmarks.proof.detect import Bench
from tests.benchmarks.proof.finetune import dataset
from xtf_plugin.data.documents import collect
from xtf_plugin.plan import Plan
from xtf_plugin.selection.select import rule_bits

from .base import Parts, load
from .encode import KINDS, completion_ids, encode_all
from .examples import shown
from .records import Record
from .stages import Scale, base_facts, definition, stage

Flags = NDArray[np.bool_]
ATTRIBUTES = tuple(OFF)
BLOCKS: dict[str, dict[str, Any]] = {
    "default": {"preset": "default"},
    "paper": {"preset": "paper"},
    "official": {"preset": "official"},
    **{f"{name.replace('_', ' ')} alone": {"preset": "paper", **OFF, name: True} for name in ATTRIBUTES},
}
EXAMPLES = {"default": 3, "paper": 2}
TOP = 10


class RealBench(Bench):
    """Plans for any block on the rows of one data set."""

    def __init__(self, rows: Sequence[Row], folder: Path) -> None:
        model, self.tokenizer = load(folder / "base")
        self.rows = rows
        self.documents = collect(dataset(rows))
        self.provider = Provider(model)
        self.cache = str(folder / "cache")


def fired(bench: Bench, plan: Plan) -> dict[str, Flags]:
    """Where each rule fired, in the order of the rows' completion tokens, (M,) each."""
    reasons = bench.in_rows(plan, plan.selection.reasons)
    return {name: (reasons & bit) > 0 for name, bit in rule_bits(plan.config).items()}


def overlap(flags: Mapping[str, Flags]) -> dict[str, Any]:
    """How the sets of tokens that several rules drop lie to each other.

    `exactly`: of the tokens that any rule drops, the share that exactly 1, 2, … rules drop. For each pair, `shared`:
    the common tokens as a share of both together; `of_smaller`: as a share of the smaller set. NaN: nothing dropped.
    """
    votes = np.sum(list(flags.values()), axis=0)
    union = int((votes > 0).sum())
    pairs = {}
    for (one, a), (other, b) in combinations(flags.items(), 2):
        both = int((a & b).sum())
        pairs[f"{one} and {other}"] = {
            "shared": _share(both, int((a | b).sum())),
            "of_smaller": _share(both, min(int(a.sum()), int(b.sum()))),
        }
    exactly = {str(n): _share(int((votes == n).sum()), union) for n in range(1, len(flags) + 1)}
    return {"union": _share(union, len(votes)), "exactly": exactly, "pairs": pairs}


def _share(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")


def by_kind(dropped: Flags, kinds: NDArray[Any]) -> dict[str, dict[str, float]]:
    """For each kind: its share of all tokens, the share of it that is dropped, and its share of what is dropped."""
    found = {}
    for name in KINDS:
        own = kinds == name
        if own.any():
            hit = int((own & dropped).sum())
            found[name] = {
                "tokens": float(own.mean()),
                "dropped": _share(hit, int(own.sum())),
                "of_dropped": _share(hit, int(dropped.sum())),
            }
    return found


def top(dropped: Flags, ids: NDArray[np.int64], tokenizer: Any) -> list[tuple[str, int, float]]:
    """The tokens dropped most often: text, how often, and the share of that token's occurrences."""
    every, hit = Counter(ids.tolist()), Counter(ids[dropped].tolist())
    ranked = sorted(hit.items(), key=lambda item: (-item[1], item[0]))[:TOP]  # ties by id: the same every time
    return [(tokenizer.decode([token]), number, number / every[token]) for token, number in ranked]


def audit_block(bench: Bench, name: str) -> dict[str, Any]:
    """Everything about one block on one data set."""
    plan = bench.plan(BLOCKS[name])
    dropped = ~bench.in_rows(plan, plan.selection.keep)
    rules = fired(bench, plan)
    ids, kinds = completion_ids(bench.rows), np.asarray([kind for row in bench.rows for kind in row.kinds])
    own = {rule: flags & dropped for rule, flags in rules.items()}  # a rule may fire on a token that is protected
    found = {
        "tokens": len(ids),
        "dropped": float(dropped.mean()),
        "rows_touched": _rows_touched(dropped, bench.rows),
        "by_rule": {rule: float(flags.mean()) for rule, flags in own.items()},
        "kinds": by_kind(dropped, kinds),
        "top": {rule: top(flags, ids, bench.tokenizer) for rule, flags in own.items()},
        "examples": shown(bench.rows, dropped, own, bench.tokenizer, EXAMPLES.get(name, 0)),
        "warnings": plan.warnings,
    }
    if set(rules) >= set(ATTRIBUTES):
        found["overlap"] = overlap({rule: rules[rule] for rule in ATTRIBUTES})
    return found


def _rows_touched(dropped: Flags, rows: Sequence[Row]) -> float:
    sizes = [len(row.completion) for row in rows]
    return float(np.mean([part.any() for part in np.split(dropped, np.cumsum(sizes)[:-1])]))


def audit(parts: Parts, folder: Path, scale: Scale, data: str) -> dict[str, dict[str, Any]]:
    """`audit_block` for every data set's train part and every block."""
    facts = base_facts(scale, data)
    return {name: _audit_one(name, by_part["train"], folder, scale, facts) for name, by_part in parts.items()}


def _audited(bench: Callable[[], Bench], block: str) -> dict[str, Any]:
    return audit_block(bench(), block)


def _audit_one(
    name: str, records: Sequence[Record], folder: Path, scale: Scale, facts: Mapping[str, Any]
) -> dict[str, Any]:
    @cache
    def bench() -> RealBench:  # made only if something is missing
        _, tokenizer = load(folder / "base")
        return RealBench(encode_all(records, tokenizer, scale.context), folder)

    found = {}
    for block, keys in BLOCKS.items():
        settings = {**facts, "block": definition(keys), "examples": EXAMPLES.get(block, 0)}
        path = folder / "audit" / f"{name} {block}.json"
        found[block] = stage(path, settings, partial(_audited, bench, block))
        print(f"audit: {name}, {block}: {found[block]['dropped']:.1%} dropped", flush=True)
    return found
