"""The score table in a terminal: documents with their dropped tokens marked, and the table of shares.

Dropped tokens are legible without colour, in a pipe or a log: `[-text|KN-]` was dropped by knowledge novelty,
`{+text|KN protected+}` was kept although a rule fired. Token text is untrusted, so control, bidirectional and invisible
characters are printed as escapes. Text that contains such marks itself is printed unchanged; the report and the table's
column `kept` distinguish it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import heappush, heappushpop
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..config.scores import FULL_NAMES, SHORT_NAMES
from ..data.token_text import characters
from ..errors import XTFUserError, escaped, harmless
from . import score_table

SCHEMA = pa.schema(
    [
        score_table.SCHEMA.field(name)
        for name in ("row", "document", "position", "token_id", "token", "prompt", "kept", "reason")
    ]
)
LONGEST_TEXT = 400  # characters of one token
DECISIONS = {
    "protected": "kept by protection",
    "floor": "kept by min_kept",
    "forced": "dropped by force_drop",
    "control": "decided by the control",
}
LEGEND = "[-dropped|why-]  {+kept although a rule fired|why+}  · space  ↵ line break  ⇥ tab"
MEASURES = {  # by scorer
    "attention_received": "how much attention later tokens pay to it",
    "column": "whether a column of the dataset marks it",
    "embedding_similarity": "how close its embedding is to the domain's words",
    "excess_loss": "how much harder it is for the run's own reference than for another model",
    "explained": "how much its prompt and the text before it explain of it",
    "influence": "how much it helps to predict the text after it",
    "log_probability": "how probable the reference finds it",
    "new_text": "how much of it does not repeat earlier text",
    "novelty": "how improbable the reference finds it",
    "running_text": "how much running text it and the lines around it have",
    "token_cleaning": "how much more probable a better model finds it",
    "typicality": "how probable it is, compared with what the reference expects there",
}

_COLOURS = {"RI": "magenta", "KN": "cyan", "TR": "yellow", "forced": "red", "control": "blue"}
_WHITESPACE = {" ": "·", "\n": "↵\n", "\t": "⇥"}


def visible(text: str) -> str:
    """`text` with symbols for whitespace and escapes for everything else that is not a printable character."""
    return "".join(_WHITESPACE.get(char) or escaped(char) for char in text)


def on_one_line(text: str) -> str:
    """A text without whitespace at its ends, safe to print."""
    return harmless(text.strip()).replace("\n", "↵")


def text_of(piece: bytes) -> str:
    """A token as it is shown: `visible`; hexadecimal if it is not UTF-8; cut after `LONGEST_TEXT`, with its length."""
    try:
        return visible(_shortened(piece.decode()))
    except UnicodeDecodeError:
        more = f"… {len(piece):,} bytes" if len(piece) > LONGEST_TEXT else ""
        return "⟨" + piece[:LONGEST_TEXT].hex(" ") + more + "⟩"


def _shortened(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]}…⟨{len(text):,} characters⟩"


def measure(scorer: str) -> str:
    """What a scorer measures, in a few words; one of another package by its name."""
    return MEASURES.get(scorer, f"by the scorer {visible(scorer)}")


class Token(NamedTuple):
    """One completion token as shown: its text, whether it is kept, the table's `reason`, and the prompt before it."""

    text: str
    kept: bool
    reason: str
    prompt: str = ""


@dataclass(frozen=True)
class Document:
    """One document's completion tokens in order, and its completion; a packed dataset row holds several documents."""

    row: int
    key: str
    tokens: list[Token]
    text: str

    @property
    def dropped(self) -> int:
        """Number of tokens that are not kept."""
        return sum(not token.kept for token in self.tokens)

    @classmethod
    def read(cls, row: int, key: str, part: pa.Table, pieces: Mapping[int, bytes]) -> Document:
        """From its rows of a score table; `pieces` are the bytes of tokens that are not UTF-8 by themselves.

        A character spread over several tokens is shown with the first of them. A later one with another decision or
        reason is shown as `◌`.
        """
        names = ("token_id", "token", "kept", "reason", "prompt")
        ids, texts, kept, reasons, prompts = (part[name].to_pylist() for name in names)
        own = [pieces.get(i, (text or "").encode()) for i, text in zip(ids, texts, strict=True)]
        verdicts = [(flag, reason or "") for flag, reason in zip(kept, reasons, strict=True)]
        tokens = []
        for first, number, joined in characters(own):
            shown = [_shortened(joined.decode(errors="replace"))]
            shown += ["" if verdicts[at] == verdicts[at - 1] else "◌" for at in range(first + 1, first + number)]
            tokens += [Token(text, *verdicts[first + at], prompts[first + at] or "") for at, text in enumerate(shown)]
        return cls(row, key, tokens, b"".join(own).decode(errors="replace"))


@dataclass(frozen=True)
class Wanted:
    """Which documents to show; None: any.

    Args:
        row: of the dataset.
        document: the first hex digits of the key.
        grep: a regular expression that matches somewhere in the completion.
        reason: a score whose rule dropped something in it (`RI`, `KN`, `TR` are names too), or what decided (see
            `DECISIONS`).
        dropped: only documents in which something is dropped.

    Raises:
        XTFUserError: a key that is not hexadecimal, or a pattern that is not a regular expression.
    """

    row: int | None = None
    document: str | None = None
    grep: str | None = None
    reason: str | None = None
    dropped: bool = False

    def __post_init__(self) -> None:
        if self.document is not None and not re.fullmatch(r"[0-9a-fA-F]{1,32}", self.document):
            raise XTFUserError(
                f"--document {self.document!r} is not a document key: give its first hex digits, as shown."
            )
        try:
            re.compile(self.grep or "")
        except re.error as error:
            raise XTFUserError(f"--grep {self.grep!r} is not a regular expression: {error}.") from error

    @property
    def named(self) -> str:
        """The reason by its full name; the three short ones in letters of any case."""
        return FULL_NAMES.get(str(self.reason).upper(), str(self.reason))

    def described(self) -> str:
        """For messages: "row 3, reason task_relevance"; empty if any document matches."""
        pattern = None if self.grep is None else repr(self.grep)
        parts = {"row": self.row, "document": self.document, "text that matches": pattern, "reason": self.reason}
        words = [f"{name} {value}" for name, value in parts.items() if value is not None]
        return ", ".join([*words, *["a dropped token"] * self.dropped])

    def matches(self, document: Document) -> bool:
        """Whether to show a document."""
        return (
            (self.row is None or document.row == self.row)
            and (self.document is None or document.key.startswith(self.document.lower()))
            and (self.grep is None or re.search(self.grep, document.text) is not None)
            and (self.reason is None or any(self._decided(token) for token in document.tokens))
            and (not self.dropped or document.dropped > 0)
        )

    def _decided(self, token: Token) -> bool:
        """Whether the wanted reason dropped a token; `protected` and `floor` keep one."""
        return self.named in token.reason.split(",") and (not token.kept or self.named in ("protected", "floor"))


def check_row(row: int | None, about: Mapping[str, Any]) -> None:
    """Refuse a dataset row beyond the last one of a table with the metadata `about`.

    Raises:
        XTFUserError: names the number of rows.
    """
    totals = about.get("totals")
    rows = totals.get("rows") if isinstance(totals, Mapping) else None
    if row is not None and isinstance(rows, int) and row >= rows:
        legal = f"0 to {rows - 1:,} are legal" if rows else "none is legal"
        raise XTFUserError(f"--row {row}: the score table is of {rows:,} rows, so {legal}. Packed rows count as one.")


def find(file: Any, wanted: Wanted, n: int, path: Path) -> list[Document]:
    """The `n` matching documents of an open score table that lose most; see `matching`.

    Raises:
        XTFUserError: no rule of the table has the wanted reason; and as `score_table.batches`.
    """
    return matching(_parts(file, wanted, path), file.schema_arrow.names, wanted, n)


def matching(parts: Iterable[Part], columns: Sequence[str], wanted: Wanted, n: int) -> list[Document]:
    """The `n` matching documents that lose the largest share of their tokens, each once, the largest share first.

    Of equal shares the longer document comes first, then the one that the dataset has first. If a row or a document is
    wanted: all that match, in the order of the dataset.

    Args:
        columns: of the score table.

    Raises:
        XTFUserError: no rule of the table has the wanted reason.
    """
    selectors = [
        name for name in columns if name not in score_table.SCHEMA.names and not name.startswith(score_table.BY)
    ]
    legal = [*(f"{short} ({name})" for name, short in SHORT_NAMES.items()), *selectors, *DECISIONS]
    names = [*SHORT_NAMES, *FULL_NAMES, *selectors, *DECISIONS]
    if wanted.reason is not None and wanted.named not in names:
        near = difflib.get_close_matches(wanted.named, names, n=1)
        hint = f"Did you mean {near[0]}? " if near else ""
        raise XTFUserError(f"--reason {wanted.reason!r} is not a rule of this table. {hint}Legal: {', '.join(legal)}.")
    if wanted.row is not None or wanted.document is not None:
        return [document for part in parts if wanted.matches(document := part.read())]
    best: list[tuple[tuple[float, int, int], Document]] = []  # a heap, the document that loses least first
    held = set[str]()
    for place, part in enumerate(parts):
        rank = (part.dropped / part.tokens, part.tokens, -place)
        if (len(best) == n and rank < best[0][0]) or part.key in held:
            continue
        if wanted.matches(document := part.read()):
            held.add(part.key)
            if len(best) < n:
                heappush(best, (rank, document))
            else:
                held.remove(heappushpop(best, (rank, document))[1].key)
    return [document for _, document in sorted(best, key=lambda each: each[0], reverse=True)]


class Part(NamedTuple):
    """A document of a table that has not been read yet: its key, its completion tokens, and how many are dropped."""

    key: str
    tokens: int
    dropped: int
    read: Callable[[], Document]


def _parts(file: Any, wanted: Wanted, path: Path) -> Iterator[Part]:
    """Documents in order. The last one of a batch may continue in the next batch, so it is read with that."""
    rest, pieces = list[tuple[int, str, Any]](), _pieces(file, path)

    def of(row: int, key: str, held: Any) -> Part:
        kept = pc.sum(held["kept"]).as_py()
        return Part(key, len(held), len(held) - kept, lambda: Document.read(row, key, held, pieces))

    for batch in score_table.batches(file, SCHEMA, path):
        if wanted.row is not None:
            batch = batch.filter(pc.equal(batch["row"], wanted.row))
        parts = list(score_table.iter_documents(pa.concat_tables([*(part for *_, part in rest), batch])))
        rest = parts[-1:]
        yield from (of(*part) for part in parts[:-1])
    yield from (of(*part) for part in rest)


def _pieces(file: Any, path: Path) -> dict[int, bytes]:
    """Bytes of the tokens that are not UTF-8 by themselves; empty for tables that other tools wrote without them."""
    about = score_table.metadata(file)
    try:
        return {int(token): bytes.fromhex(digits) for token, digits in about["bytes"].items()}
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}


def legend(about: Mapping[str, Any]) -> str:
    """What the marks mean, and what each score of a table measures, from the table's metadata."""
    lines, scorers = [LEGEND], about.get("scorers")
    scores = scorers.get("scores") if isinstance(scorers, Mapping) else None
    for name, facts in scores.items() if isinstance(scores, Mapping) else ():
        short = SHORT_NAMES.get(name)
        named = visible(name) if short is None else f"{short} {name.replace('_', ' ')}"
        lines.append(f"{named}: {measure(str(facts.get('scorer')))}")
    return "\n".join(lines)


def render_documents(found: Iterable[Document], wanted: str, console: Console, meaning: str = LEGEND) -> None:
    """Print documents below `meaning`, see `legend`; without `wanted` (in words) those that lose most come first.

    Raises:
        XTFUserError: there is none, and `wanted` is not empty.
    """
    shown = dropped = 0
    for document in found:
        if not shown:
            console.print(Text(meaning, style="dim"), soft_wrap=True)
        total = len(document.tokens)
        kept = f"kept {total - document.dropped} of {total}"
        heading = f"row {document.row} · document {visible(document.key[:12])} · {kept}"
        console.print()
        console.print(Text(heading, style="bold"), soft_wrap=True)
        console.print(render_tokens(document.tokens), soft_wrap=True)
        shown, dropped = shown + 1, dropped + document.dropped
    if shown and not dropped and not wanted:
        console.print(
            Text("Nothing is dropped, from any document. What other thresholds drop: xtf tune"), soft_wrap=True
        )
    if wanted and not shown:
        hint = " What other thresholds drop: xtf tune" if "reason" in wanted or "dropped" in wanted else ""
        counted = "; rows count from 0" if wanted.startswith("row ") else ""
        raise XTFUserError(f"no document of the score table has {wanted}{counted}.{hint}")


def render_tokens(tokens: Iterable[Token]) -> Text:
    """The tokens as one text below their prompts; adjacent tokens with the same decision and reason share one mark."""
    text, tokens = Text(), list(tokens)
    turns = accumulate(bool(token.prompt) for token in tokens)
    for (_, kept, reason), group in groupby(zip(turns, tokens, strict=True), key=lambda each: (each[0], *each[1][1:3])):
        run = [token for _, token in group]
        if run[0].prompt:
            line = f"prompt: {on_one_line(run[0].prompt)}\n"
            text.append("\n" * (len(text) > 0 and text.plain[-1] != "\n") + line, style="dim italic")
        body = visible("".join(token.text for token in run))
        why = [SHORT_NAMES.get(name, visible(name)) for name in reason.split(",") if name]
        if kept and not why:
            text.append(body)
            continue
        colours = [_COLOURS[name] for name in why if name in _COLOURS]
        colour = colours[0] if len(colours) == 1 else "red"
        left, right, style = ("{+", "+}", f"{colour} underline") if kept else ("[-", "-]", f"{colour} strike")
        text.append(left, style="dim").append(body, style=style).append(f"|{' '.join(why)}{right}", style="dim")
    return text


def totals_table(totals: Mapping[str, Any]) -> Table:
    """`totals` of summary.json to print: kept and dropped shares, overall and by score."""
    tokens = totals["completion_tokens"]
    table = Table(title=f"{totals['documents']:,} documents, {tokens:,} completion tokens", title_justify="left")
    table.add_column("")
    for heading in ("tokens", "share", "of these dropped", "by it alone"):
        table.add_column(heading, justify="right")

    def add(name: str, count: int, *more: int, last: bool = False) -> None:
        share = f"{100 * count / tokens:.2f} %" if tokens else "-"
        table.add_row(Text(name), f"{count:,}", share, *(f"{each:,}" for each in more), end_section=last)

    add("kept", totals["kept_tokens"])
    add("dropped", totals["dropped_tokens"], last=True)
    for name, counts in totals["scores"].items():
        add(visible(name), counts["fired"], counts["dropped"], counts["dropped_alone"])
    for name, count in totals["decided_by"].items():
        if count:
            add(DECISIONS[name], count)
    table.caption = "tokens of a score: those on which its rule fired"
    if totals["decided_by"].get("control"):
        table.caption += "\ndecided by the control: dropped by the draw, or kept although a rule fired"
    table.caption_justify = "left"
    return table


def by_table(column: str, values: Iterable[Mapping[str, Any]]) -> Table:
    """`by.<column>` of summary.json to print: what is dropped for each value of a column of the dataset."""
    table = Table(title=f"by {on_one_line(column)}", title_justify="left")
    table.add_column("")
    for heading in ("documents", "tokens", "dropped", "share"):
        table.add_column(heading, justify="right")
    for each in values:
        name = each["value"] if each["values"] == 1 else f"{each['values']:,} {each['value']}"
        counts = (f"{each[key]:,}" for key in ("documents", "tokens", "dropped_tokens"))
        table.add_row(Text(name), *counts, f"{100 * each['dropped_fraction']:.2f} %")
    return table
