"""`xtf tune`: what other settings of a block would drop, from the scores of a table alone.

Every setting changes one thing of the block: a threshold, milder or stronger, or the scores that are on. Each is
selected as a run selects, so its counts are those of a run, unless scores depend on what is dropped: these say "about".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..config.block import XTFConfig
from ..config.scores import SHORT_NAMES, SLOTS
from ..data.ragged import Bools, Floats, Ints, dataset_quantiles
from ..environment import docs
from ..errors import XTFUserError
from ..scorers import ScoreConfig, registry
from ..selection.rules import fires
from ..selection.select import FORCED, Selection
from .page.shortest_block import minimal
from .score_table import ScoreTable
from .summary import Verdicts
from .terminal import on_one_line, visible
from .whatif import reselect

EXAMPLES = 3  # of each setting
LOOKED_AT = 2_000  # pieces of text that examples are chosen from
MILDER, STRONGER = 0.5, 1.75  # times the share on which a rule fires now
FROM_NOTHING = (0.01, 0.05)  # shares for a rule that fires on nothing
_SHARES = (0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5)
_VALUES: dict[str, tuple[float, ...]] = {  # to choose from, by key of `drop`
    "quantile": _SHARES,
    "of_median": (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.75, 0.9),
    "fence": (4.0, 3.0, 2.5, 2.0, 1.5, 1.25, 1.0, 0.75, 0.5, 0.25, 0.0),
}
_BY_SHARE = ("below", "known_above", "unknown_below")  # whose values are chosen by the shares that they drop
ABOUT = (
    "about: an estimate, of numbers and of examples: these scores change with what is dropped, and one score may find "
    "what another lets go. `xtf score` with that block counts exactly. All other numbers are those of a run."
)
NOTHING = (
    "No threshold of these scores drops anything here. Other scores, or another model that scores (`reference: {model: "
    "...}`), may: change the block and run `xtf score`. What there is:"
)


@dataclass(frozen=True)
class Setting:
    """One block, and what it drops.

    Args:
        name: what differs from the block as it is: "TR milder".
        change: the key that differs, in YAML; empty where scores are off.
        exact: whether a run with this block drops exactly this.
        dropped: (M,); forced: (M,) those that no rule but `force_drop` drops.
        shares: of the dataset's completion tokens that each score's rule drops.
    """

    name: str
    change: str
    config: XTFConfig
    exact: bool
    dropped: Bools
    forced: Bools
    shares: Mapping[str, float]


def settings(table: ScoreTable, config: XTFConfig) -> list[Setting]:
    """The block as it is, then others; those that drop the same are left out.

    Raises:
        XTFUserError: the table does not hold the scores of the block; see `whatif.reselect`.
    """
    found = [_setting(table, "as it is", "", config)]
    for name, change, other in [*_thresholds(table, config), *_alone(config)]:
        made = _setting(table, name, change, other)
        if not any(np.array_equal(made.dropped, each.dropped) for each in found):
            found.append(made)
    return found


def _setting(table: ScoreTable, name: str, change: str, config: XTFConfig) -> Setting:
    selection: Selection = reselect(table, config.model_copy(update={"control": None}))
    totals = Verdicts(config, selection, table.weights).totals()
    shares = {score: counts["dropped_fraction"] for score, counts in totals["scores"].items()}
    forced = ~selection.keep & ((selection.reasons & FORCED) > 0)
    return Setting(name, change, config, _is_exact(table.config, config), ~selection.keep, forced, shares)


def _is_exact(held: XTFConfig, config: XTFConfig) -> bool:
    """Whether the scores of a table that was made with one block are those of a run with another one."""
    before, now = held.scores, config.scores
    changed = {name for name, part in before.items() if name not in now or now[name].drop != part.drop}
    for name, part in now.items():
        if part.scorer == "explained" and name in changed:
            return False
        among = getattr(part, "among", None)
        read = {among} if part.scorer == "influence" else set(before) - {name}
        if registry.find(part.scorer).reads_scores and read & changed:
            return False
    return True


def _thresholds(table: ScoreTable, config: XTFConfig) -> list[tuple[str, str, XTFConfig]]:
    """(name, change, block) of a milder and a stronger threshold for each number of each rule."""
    found = []
    for name, part in config.scores.items():
        for key in (key for key in part.drop.model_dump() if key != "of"):
            for word, value in _others(key, part, table.scores[name], table):
                drop = {**part.drop.model_dump(), key: value}
                with suppress(XTFUserError):  # the rule's other number may forbid this one
                    changed = _changed(config, name, {"drop": drop})
                    found.append((f"{_short(name)} {word}", f"{key}: {value:g}", changed))
    return found


def _others(key: str, part: ScoreConfig, scores: Floats, table: ScoreTable) -> Iterator[tuple[str, float]]:
    """("milder" or "stronger", value) of a key: where the rule fires about half, and nearly twice as often."""

    def fired(value: float) -> float:
        mask, _ = fires(part.model_copy(update={"drop": part.drop.model_copy(update={key: value})}), scores, layout)
        return layout.occurrences(mask) / total

    layout, own = table.layout, getattr(part.drop, key)
    total = max(1, int(layout.lengths @ layout.counts))
    if key in _BY_SHARE:
        at_shares = dataset_quantiles(
            scores, layout, [1 - share for share in _SHARES] if key == "unknown_below" else _SHARES
        )
        values = [value if key == "below" else 1 - value for value in at_shares if np.isfinite(value)]
        choices = {float(f"{value:.2g}") for value in values if key == "below" or 1e-9 < value < 0.995}
    else:
        choices = set(range(1, part.drop.of + 1)) if key == "cluster" else set(_VALUES[key])
    shares = {value: fired(value) for value in sorted(choices - {own})}
    now = fired(own)
    if now:
        wanted = [("milder", MILDER * now), ("stronger", STRONGER * now)]
    else:
        wanted = [("stronger", FROM_NOTHING[0]), ("much stronger", FROM_NOTHING[1])]
    for word, share in wanted:
        fitting = [value for value in shares if (shares[value] < now if word == "milder" else shares[value] > now)]
        if fitting:
            yield word, min(fitting, key=lambda value: abs(shares[value] - share))


def _alone(config: XTFConfig) -> Iterator[tuple[str, str, XTFConfig]]:
    """(name, change, block) with one score on, for each that can be on alone."""
    for name in config.scores if len(config.scores) > 1 else ():
        block = config.to_dict()
        for other in config.scores.keys() - {name}:
            if other in SLOTS:
                block[other] = False
            else:
                del block["selectors"][other]
        try:
            yield f"{_short(name)} alone", "", XTFConfig(**block)
        except XTFUserError:
            continue  # it reads another score, or `combine` needs more


def _changed(config: XTFConfig, name: str, keys: Mapping[str, Any]) -> XTFConfig:
    block = config.to_dict()
    part = block[name] if name in SLOTS else block["selectors"][name]
    part.update(keys)
    return XTFConfig(**block)


def _short(name: str) -> str:
    return SHORT_NAMES.get(name, name)


def block_text(config: XTFConfig) -> str:
    """The block as YAML, with what differs from its preset."""
    options: dict[str, Any] = {"sort_keys": False, "allow_unicode": True, "default_flow_style": None, "width": 10_000}
    return str(yaml.safe_dump({"xtf": minimal(config)}, **options))


def show(found: list[Setting], table: ScoreTable, source: str, console: Console) -> None:
    """Print the settings: a table of shares, then examples of each."""
    total, base = max(1, int(table.weights.sum())), found[0]
    names = [name for name in base.config.scores if len(base.config.scores) <= max(3, (console.width - 55) // 6)]
    rows = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    for heading in ("#", "setting", ""):
        rows.add_column(heading, justify="right" if heading == "#" else "left", overflow="fold")
    forced = ["forced"] * bool(base.config.force_drop)
    for heading in ("drops", *map(_short, names), *forced, "more", "less"):
        rows.add_column(heading, justify="right", no_wrap=True, overflow="fold")

    def share(flags: Bools) -> str:
        return f"{100 * int(table.weights[flags].sum()) / total:.1f}"

    for number, each in enumerate(found, start=1):
        by_score = [f"{100 * each.shares[name]:.1f}" if name in each.shares else "off" for name in names]
        by_score += [share(each.forced)] * len(forced)
        other = ["", ""] if each is base else [share(each.dropped & ~base.dropped), share(base.dropped & ~each.dropped)]
        label = Text(visible(each.name).replace("·", " ") + (f": {each.change}" if each.change else ""))
        rows.add_row(str(number), label, "" if each.exact else "about", share(each.dropped), *by_score, *other)
    heading = f"{source}: {int(table.counts.sum()):,} documents, {total:,} answer tokens; all numbers in % of these"
    console.print(Text(heading, style="bold"), soft_wrap=True)
    console.print(rows)
    words = [f"{short} {name}" for name, short in SHORT_NAMES.items() if name in base.config.scores]
    legend = "; ".join([*words, "more: what it drops and #1 keeps; less: what it keeps and #1 drops"])
    legend += f". Below: up to {EXAMPLES} examples of each"
    console.print(Text(legend, style="dim"))
    if not all(each.exact for each in found):
        console.print(Text(ABOUT, style="dim"))
    if base.config.control is not None:
        console.print(Text("The block draws its tokens at random; this is what its rules would drop.", style="dim"))
    if not any(each.dropped.any() for each in found):
        said = [str(text) for text in table.about.get("warnings", ()) if str(text).split(":")[0] in base.config.scores]
        for text in [*said, f"{NOTHING} {docs('selectors.md')}"]:
            console.print(Text(f"\n{on_one_line(text)}"))
        return
    for number, each in enumerate(found, start=1):
        _show_examples(number, each, base, table, console)


def _show_examples(number: int, each: Setting, base: Setting, table: ScoreTable, console: Console) -> None:
    gone, back = each.dropped & ~base.dropped, base.dropped & ~each.dropped
    if each is base or each.name.endswith("alone"):
        gone, back = each.dropped & ~table.forced, np.zeros(len(gone), dtype=bool)
    console.print(Text(f"\n{number} {each.name}" + (f": {each.change}" if each.change else ""), style="bold"))
    for what, flags in (("drops", gone), ("keeps again", back)):
        for text in examples(table, flags):
            room = max(20, console.width - len(what) - 6)
            shown = text if len(text) <= room else text[: room - 1] + "…"
            console.print(Text(f"  {what}  ", style="dim").append(shown, style=""), soft_wrap=True)
    if not gone.any() and not back.any():
        nothing = "no score drops anything; force_drop does" if each.dropped.any() else "drops nothing"
        console.print(Text(f"  {nothing}", style="dim"))


def examples(table: ScoreTable, flags: Bools) -> list[str]:
    """Some of the marked pieces of text: the most frequent one, and others from all over the dataset."""
    starts, ends = _pieces(table, flags)
    some = np.unique(np.linspace(0, len(starts) - 1, min(LOOKED_AT, len(starts))).astype(np.int64))
    documents = np.searchsorted(table.offsets, starts[some], side="right") - 1
    number: dict[str, int] = {}
    for start, end, document in zip(starts[some].tolist(), ends[some].tolist(), documents.tolist(), strict=True):
        pieces = [table.pieces[token] for token in table.token_ids[start:end].tolist()]
        text = on_one_line(b"".join(pieces).decode(errors="replace"))
        number[text] = number.get(text, 0) + int(table.counts[document])
    worded = [text for text in number if sum(char.isalnum() for char in text) > 2] or list(number)
    if len(worded) <= EXAMPLES:
        return worded
    first = max(worded, key=lambda text: number[text])
    rest = [text for text in worded if text != first]
    return [first, *(rest[(2 * at + 1) * len(rest) // (2 * EXAMPLES - 2)] for at in range(EXAMPLES - 1))]


def _pieces(table: ScoreTable, flags: Bools) -> tuple[Ints, Ints]:
    """First tokens of marked pieces of text, and those after their last; a piece is of one sentence or line."""
    opens = np.append(True, np.diff(table.positions) != 1)
    opens[table.offsets[:-1][table.layout.lengths > 0]] = True
    for name, part in table.config.scores.items():
        if part.unit != "token":  # all tokens of a unit have the same score
            scores = np.nan_to_num(table.scores[name], nan=np.inf)
            opens[1:] |= scores[1:] != scores[:-1]
    before, after = np.append(False, flags[:-1]), np.append(flags[1:], False)
    return np.flatnonzero(flags & (opens | ~before)), np.flatnonzero(flags & (np.append(opens[1:], True) | ~after)) + 1
