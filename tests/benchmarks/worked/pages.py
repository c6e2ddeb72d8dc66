"""Examples as Markdown: per line what the rules see, and the completion as `xtf show` prints it."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from tests.benchmarks.proof.tables import table
from tests.benchmarks.real_text.audit import RealBench
from tests.benchmarks.real_text.base import Parts
from tests.benchmarks.real_text.encode import encode_all
from tests.benchmarks.real_text.examples import escaped
from tests.benchmarks.real_text.pages import caption
from tests.benchmarks.real_text.stages import Scale
from xtf_plugin.plan import Plan
from xtf_plugin.report import terminal
from xtf_plugin.selection.select import reason_text, rule_bits

from .texts import EXAMPLES, Example

AMONG = 300  # rows of the data set that the examples are scored among
BLOCKS: dict[str, dict[str, Any]] = {
    "default": {"preset": "default", "selectors": {"out_of_place": {"drop": {"below": -2}}}},
    "paper": {"preset": "paper"},
}
FIRST_LOOK = {"preset": "default", "selectors": {"out_of_place": {"drop": {"below": -2}, "context": "document"}}}
LONGEST = 60  # characters of a line in the table


def marks(name: str) -> tuple[str, str]:
    """The lines of a page between which the part called `name` stands."""
    return f"<!-- {name} -->", f"<!-- /{name} -->"


def everything(parts: Parts, folder: Path, scale: Scale) -> dict[str, str]:
    """Markdown of every example by name, `made` (how it was), and `shares`: of what each block drops of the data."""
    found: dict[str, str] = {"made": caption()}
    shares = []
    for dataset, examples in EXAMPLES.items():
        bench, plans, places = scored(parts, dataset, folder, scale)
        for name, plan in plans.items():
            dropped = ~bench.in_rows(plan, plan.selection.keep)
            cells = [f"{dropped[where].sum()} of {where.stop - where.start}" for where in places]
            others = dropped[places[-1].stop :]
            shares.append([dataset, name, f"{others.mean():.1%}", *cells, *[""] * (4 - len(cells))])
        for example, row, where in zip(examples, bench.rows, places, strict=False):
            found[example.name] = worked(example, row.completion, bench, plans, where)
    head = ["data set", "block", "of the data set's own rows", "first", "second", "third", "fourth"]
    return {**found, "shares": table(head, shares)}


def scored(parts: Parts, dataset: str, folder: Path, scale: Scale) -> tuple[RealBench, dict[str, Plan], list[slice]]:
    """Plans by block for a data set's examples among its own rows, and where the examples' completion tokens are."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    records = [example.record for example in EXAMPLES[dataset]]
    rows = encode_all([*records, *parts[dataset]["train"][:AMONG]], tokenizer, scale.context)
    bench = RealBench(rows, folder)
    ends = np.cumsum([0] + [len(row.completion) for row in rows[: len(records)]])
    places = [slice(int(a), int(b)) for a, b in zip(ends, ends[1:], strict=False)]
    return bench, {name: bench.plan(block) for name, block in BLOCKS.items()}, places


def worked(example: Example, ids: list[int], bench: RealBench, plans: Mapping[str, Plan], where: slice) -> str:
    """One example: a table of its lines, and what each block makes of its completion tokens `ids`."""
    parts = [line_table(example, ids, bench, plans, where)]
    for name, plan in plans.items():
        keep, reasons = (bench.in_rows(plan, v)[where] for v in (plan.selection.keep, plan.selection.reasons))
        bits = rule_bits(plan.config)
        tokens = [
            terminal.Token(bench.tokenizer.decode([token]), bool(kept), reason_text(int(reason), bits))
            for token, kept, reason in zip(ids, keep, reasons, strict=True)
        ]
        parts.append(f"`{name}`:\n\n```text\n{plain(tokens)}\n```\n")
    return "\n".join(parts)


def plain(tokens: list[terminal.Token]) -> str:
    """As `xtf show` prints them where there is no colour."""
    console = Console(file=io.StringIO(), no_color=True, width=10_000)
    console.print(terminal.render_tokens(tokens), soft_wrap=True)
    printed: str = console.file.getvalue()  # type: ignore[attr-defined]
    return printed.rstrip("\n")


def line_table(example: Example, ids: list[int], bench: RealBench, plans: Mapping[str, Plan], where: slice) -> str:
    """Per line of the completion: its opening's score, its tokens' mean log-probability, what is dropped of it."""
    judged = (bench.plan(FIRST_LOOK).scores, plans["default"].scores)
    found = [scores.values["out_of_place"] for scores in judged] + [plans["paper"].scores.logprobs]
    first, second, logprob = (bench.in_rows(plans["paper"], values)[where] for values in found)
    gone = {name: ~bench.in_rows(plan, plan.selection.keep)[where] for name, plan in plans.items()}
    rows = []
    for text, begin, end, places in lines(example, bench.tokenizer, ids):
        foreign = any(begin < high and end > low for low, high in example.foreign)
        cells = [f"{np.nanmin(opening[places]):.1f}" for opening in (first, second)]
        cells.append(f"{np.nanmean(logprob[places]):.1f}")
        cells += [f"{flags[places].sum()} of {len(flags[places])}" for flags in gone.values()]
        rows.append([escaped(text), "planted" if foreign else "", *cells])
    names = [f"dropped by `{name}`" for name in gone]
    return table(
        ["line", "", "its opening, first look", "and where it was decided", "mean log-probability", *names], rows
    )


def lines(example: Example, tokenizer: Any, ids: list[int]) -> Iterator[tuple[str, int, int, slice]]:
    """Each line: its text, cut to LONGEST, where it is in the completion, and which tokens begin in it."""
    text = example.record.completion
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    if len(offsets) + 1 != len(ids):  # the end of text is the one more
        raise ValueError(f"{example.name} has {len(offsets)} tokens, more than the base's context holds")
    begins = np.asarray([low for low, _ in offsets])
    at = 0
    for line in text.splitlines(keepends=True):
        places = np.flatnonzero((begins >= at) & (begins < at + len(line)))
        shown = line.strip("\n")
        yield (
            shown if len(shown) <= LONGEST else shown[: LONGEST - 1] + "…",
            at,
            at + len(line),
            slice(int(places[0]), int(places[-1]) + 1),
        )
        at += len(line)
