"""The score table for human eyes: documents with their dropped tokens marked, and the summary of shares.

Pure functions of the exported table (one row per completion token, in dataset order). What was dropped must be legible
without colour, in a pipe or a log, so every mark is text first: `[-text|KN-]` was dropped by knowledge novelty,
`{+text|KN protected+}` was kept although a rule fired. Token text is data from strangers: nothing in it may act on the
terminal, so control, bidirectional and invisible characters are shown as escapes. Text that looks like our marks prints
as it is: whether it is one shows the report, and the table's `kept`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .errors import XTFUserError, escaped
from .data.token_text import characters
from .table import iter_documents

COLUMNS = ("row", "document", "position", "token_id", "token", "kept", "reason")
LONGEST_TEXT = 400  # characters of one token
ATTRIBUTES = {"reasoning_importance": "RI", "knowledge_novelty": "KN", "task_relevance": "TR"}
DECISIONS = {
    "protected": "kept by protection",
    "floor": "kept by min_kept",
    "forced": "dropped by force_drop",
    "control": "decided by the control",
}
LEGEND = (
    "[-dropped|why-]  {+kept although a rule fired|why+}  why: RI reasoning importance, KN knowledge novelty, "
    "TR task relevance, or a selector's name  · space  ↵ line break  ⇥ tab"
)

_COLOURS = {"RI": "magenta", "KN": "cyan", "TR": "yellow", "forced": "red", "control": "blue"}
_WHITESPACE = {" ": "·", "\n": "↵\n", "\t": "⇥"}


class Token(NamedTuple):
    """One completion token as shown: its text, what became of it, and the table's `reason`."""

    text: str
    kept: bool
    reason: str


@dataclass(frozen=True)
class Document:
    """One document's completion tokens, in order; a packed dataset row holds several documents."""

    row: int
    key: str
    tokens: list[Token]
    text: str = ""

    @classmethod
    def read(cls, row: int, key: str, part: pa.Table, pieces: Mapping[int, bytes] | None = None) -> Document:
        """From the rows of a score table that are its own.

        A character that is spread over tokens is shown with the first of them, and `◌` for those of another fate.

        Args:
            pieces: bytes of the tokens that are no text by themselves, by id.
        """
        texts, kept, reasons = (part[name].to_pylist() for name in ("token", "kept", "reason"))
        known = pieces or {}
        ids = part["token_id"].to_pylist() if known else texts  # without bytes no id is looked up
        own = [known.get(i, (text or "").encode()) for i, text in zip(ids, texts, strict=True)]
        fates = [(flag, reason or "") for flag, reason in zip(kept, reasons, strict=True)]
        tokens = []
        for first, number, joined in characters(own):
            shown = [_shortened(joined.decode(errors="replace"))]
            shown += ["" if fates[at] == fates[at - 1] else "◌" for at in range(first + 1, first + number)]
            tokens += [Token(text, *fate) for text, fate in zip(shown, fates[first : first + number], strict=True)]
        return cls(row, key, tokens, b"".join(own).decode(errors="replace"))


@dataclass(frozen=True)
class Summary:
    """Counts over a score table: `fired`, `dropped`, `alone` per attribute and selector, `decided` per decision."""

    documents: int
    tokens: int
    kept: int
    fired: dict[str, int]  # the rule fired
    dropped: dict[str, int]  # ... and the token was dropped
    alone: dict[str, int]  # ... and no other rule fired
    decided: dict[str, int]


def visible(text: str) -> str:
    """Return `text` with whitespace shown and everything that is not a printable character escaped."""
    return "".join(_WHITESPACE.get(char) or escaped(char) for char in text)


def _shortened(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]}…⟨{len(text):,} characters⟩"


def documents(table: pa.Table, pieces: Mapping[int, bytes] | None = None) -> Iterator[Document]:
    """Cut a score table into documents; see `table.iter_documents` and `Document.read`."""
    for row, key, part in iter_documents(table):
        yield Document.read(row, key, part, pieces)


def render_documents(found: Iterable[Document], wanted: str, console: Console) -> int:
    """Print documents; return how many.

    Raises XTFUserError if there is none although something was `wanted`: what, in words.
    """
    shown = 0
    for document in found:
        if shown == 0:
            console.print(Text(LEGEND, style="dim"), soft_wrap=True)
        console.print()
        console.print(_heading(document), soft_wrap=True)
        console.print(render_tokens(document.tokens), soft_wrap=True)
        shown += 1
    if wanted and not shown:
        raise XTFUserError(f"no document of the score table has {wanted}; rows count from 0.")
    return shown


def render_tokens(tokens: Iterable[Token]) -> Text:
    """Return the tokens as one text; neighbours that met the same fate share one mark."""
    text = Text()
    for (kept, reason), run in groupby(tokens, key=lambda token: (token.kept, token.reason)):
        body = visible("".join(token.text for token in run))
        why = [ATTRIBUTES.get(name, visible(name)) for name in reason.split(",") if name]
        if kept and not why:
            text.append(body)
            continue
        colours = [_COLOURS[name] for name in why if name in _COLOURS]
        colour = colours[0] if len(colours) == 1 else "red"
        left, right, style = ("{+", "+}", f"{colour} underline") if kept else ("[-", "-]", f"{colour} strike")
        text.append(left, style="dim").append(body, style=style).append(f"|{' '.join(why)}{right}", style="dim")
    return text


def summarize(tables: Iterable[pa.Table], selectors: Iterable[str] = ()) -> Summary:
    """Count over consecutive pieces of one score table, so that a large file need not fit in memory.

    A selector whose rule fired nowhere is counted too if `selectors` names it.
    """
    verdicts: Counter[tuple[bool, str]] = Counter()
    starts, last = 0, None
    for table in tables:
        counted = table.select(["kept", "reason"]).group_by(["kept", "reason"]).aggregate([([], "count_all")])
        for verdict in counted.to_pylist():
            verdicts[verdict["kept"], verdict["reason"] or ""] += verdict["count_all"]
        places = table.select(["row", "document", "position"])
        starts += _count_starts(places if last is None else pa.concat_tables([last, places]))
        starts -= 0 if last is None else 1  # the token carried over was counted with its own piece
        last = places.slice(max(places.num_rows - 1, 0)) if places.num_rows else last
    return _summary(verdicts, starts, selectors)


def summary_table(source: pa.Table | Summary) -> Table:
    """Return kept and dropped shares, overall and per attribute and selector, as a printable table."""
    summary = source if isinstance(source, Summary) else summarize([source])
    table = Table(title=f"{summary.documents:,} documents, {summary.tokens:,} completion tokens", title_justify="left")
    table.add_column("")
    for heading in ("tokens", "share", "dropped", "alone"):
        table.add_column(heading, justify="right")

    def share(count: int) -> str:
        return f"{100 * count / summary.tokens:.2f} %" if summary.tokens else "-"

    dropped = summary.tokens - summary.kept
    table.add_row("kept", f"{summary.kept:,}", share(summary.kept), "", "")
    table.add_row("dropped", f"{dropped:,}", share(dropped), "", "", end_section=True)
    for name in [*(n for n in ATTRIBUTES if n in summary.fired), *(n for n in summary.fired if n not in ATTRIBUTES)]:
        fired, gone, alone = (counts.get(name, 0) for counts in (summary.fired, summary.dropped, summary.alone))
        table.add_row(Text(visible(name)), f"{fired:,}", share(fired), f"{gone:,}", f"{alone:,}")
    for name, count in summary.decided.items():
        if count:
            table.add_row(DECISIONS[name], f"{count:,}", share(count), "", "")
    table.caption = "a rule's row: it fired; of these, dropped; of these, by it alone"
    table.caption_justify = "left"
    return table


def _summary(verdicts: Counter[tuple[bool, str]], starts: int, selectors: Iterable[str]) -> Summary:
    fired, dropped, alone, decided = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
    for (kept, reason), count in verdicts.items():
        names = set(reason.split(","))
        rules = names - DECISIONS.keys() - {""}
        for name in rules:
            fired[name] += count
            dropped[name] += 0 if kept else count
            alone[name] += count if not kept and len(rules) == 1 else 0
        for name in names & DECISIONS.keys():
            decided[name] += count
    named = list(selectors)  # beside selectors an attribute that never fired is most likely off
    known = list(dict.fromkeys([*([] if named else ATTRIBUTES), *named, *sorted(fired)]))
    return Summary(
        documents=starts,
        tokens=verdicts.total(),
        kept=sum(count for (kept, _), count in verdicts.items() if kept),
        fired={name: fired[name] for name in known},
        dropped={name: dropped[name] for name in known},
        alone={name: alone[name] for name in known},
        decided={name: decided[name] for name in DECISIONS},
    )


def _count_starts(places: pa.Table) -> int:
    """Return how many documents `iter_documents` would yield, without cutting them: the first token begins one."""
    if not places.num_rows:
        return 0
    rows, positions = (places[name].to_numpy() for name in ("row", "position"))
    keys = places["document"].cast(pa.string())
    other_key = pc.not_equal(keys.slice(1), keys.slice(0, len(keys) - 1)).to_numpy()
    return 1 + int(np.count_nonzero((np.diff(rows) != 0) | other_key | (np.diff(positions) <= 0)))


def _heading(document: Document) -> Text:
    kept, total = sum(token.kept for token in document.tokens), len(document.tokens)
    return Text(f"row {document.row} · document {visible(document.key[:12])} · kept {kept} of {total}", style="bold")
