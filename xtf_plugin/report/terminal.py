"""The score table for human eyes: documents with their dropped tokens marked, and the table of shares.

What was dropped must be legible without colour, in a pipe or a log, so every mark is text first: `[-text|KN-]` was
dropped by knowledge novelty, `{+text|KN protected+}` was kept although a rule fired. Token text is data from strangers:
nothing in it may act on the terminal, so control, bidirectional and invisible characters are shown as escapes. Text
that looks like our marks prints as it is: whether it is one shows the report, and the table's `kept`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..errors import XTFUserError, escaped
from ..data.token_text import characters
from ..report import score_table

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


def visible(text: str) -> str:
    """Return `text` with whitespace shown and everything that is not a printable character escaped."""
    return "".join(_WHITESPACE.get(char) or escaped(char) for char in text)


def text_of(piece: bytes) -> str:
    """A token as it is shown: `visible`, bytes that are no text in hexadecimal, and of very long ones the beginning
    and the length.
    """
    try:
        return visible(_shortened(piece.decode()))
    except UnicodeDecodeError:
        more = f"… {len(piece):,} bytes" if len(piece) > LONGEST_TEXT else ""
        return "⟨" + piece[:LONGEST_TEXT].hex(" ") + more + "⟩"


def _shortened(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]}…⟨{len(text):,} characters⟩"


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
    def read(cls, row: int, key: str, part: pa.Table, pieces: Mapping[int, bytes]) -> Document:
        """From the rows of a score table that are its own.

        A character that is spread over tokens is shown with the first of them, and `◌` for those of another fate.

        Args:
            pieces: bytes of the tokens that are no text by themselves, by id.
        """
        ids, texts, kept, reasons = (part[name].to_pylist() for name in ("token_id", "token", "kept", "reason"))
        own = [pieces.get(i, (text or "").encode()) for i, text in zip(ids, texts, strict=True)]
        fates = [(flag, reason or "") for flag, reason in zip(kept, reasons, strict=True)]
        tokens = []
        for first, number, joined in characters(own):
            shown = [_shortened(joined.decode(errors="replace"))]
            shown += ["" if fates[at] == fates[at - 1] else "◌" for at in range(first + 1, first + number)]
            tokens += [Token(text, *fate) for text, fate in zip(shown, fates[first : first + number], strict=True)]
        return cls(row, key, tokens, b"".join(own).decode(errors="replace"))


@dataclass(frozen=True)
class Wanted:
    """Which documents are asked for; None: any.

    Args:
        row: of the dataset.
        document: how the key begins, in hex.
        grep: matches somewhere in the completion.
        reason: a rule that fired in it, or what decided (`protected`, `floor`, `forced`, `control`).
    """

    row: int | None = None
    document: str | None = None
    grep: re.Pattern[str] | None = None
    reason: str | None = None

    @classmethod
    def parse(cls, row: int | None, document: str | None, grep: str | None, reason: str | None) -> Wanted:
        """From the command line. Raises XTFUserError for a key that is no hex, and a pattern that is no regex."""
        if document is not None and not re.fullmatch(r"[0-9a-fA-F]{1,32}", document):
            raise XTFUserError(f"--document {document!r} is no document key: give its first hex digits, as shown.")
        try:
            pattern = None if grep is None else re.compile(grep)
        except re.error as error:
            raise XTFUserError(f"--grep {grep!r} is no regular expression: {error}.") from error
        names = {short: name for name, short in ATTRIBUTES.items()}  # as documents are marked
        return cls(row, None if document is None else document.lower(), pattern, names.get(reason or "", reason))

    def described(self) -> str:
        """For the message that there is none: "row 3, reason task_relevance"; empty if any document would do."""
        parts = [
            None if self.row is None else f"row {self.row}",
            None if self.document is None else f"document {self.document}",
            None if self.grep is None else f"text that matches {self.grep.pattern!r}",
            None if self.reason is None else f"reason {self.reason}",
        ]
        return ", ".join(part for part in parts if part)

    def takes(self, document: Document) -> bool:
        """Whether a document is one of them."""
        if self.row is not None and document.row != self.row:
            return False
        if self.document is not None and not document.key.startswith(self.document):
            return False
        if self.grep is not None and not self.grep.search(document.text):
            return False
        return self.reason is None or any(self.reason in token.reason.split(",") for token in document.tokens)


def find(file: Any, wanted: Wanted, n: int, path: Path) -> Iterator[Document]:
    """The first `n` documents of an open score table that are wanted, all of them if a row or a document is named.

    Reads no more of the table than it must. Raises XTFUserError for a reason that no rule of the table has, and as
    `score_table.batches`.
    """
    selectors = [name for name in file.schema_arrow.names if name not in score_table.SCHEMA.names]
    legal = [*ATTRIBUTES, *selectors, *DECISIONS]
    if wanted.reason not in (None, *legal):
        raise XTFUserError(f"--reason {wanted.reason!r} is no rule of this table. Legal: {', '.join(legal)}.")
    left = n if wanted.row is None and wanted.document is None else -1
    for document in _documents(file, wanted, path):
        if left == 0:
            return
        if wanted.takes(document):
            left -= 1
            yield document


def _documents(file: Any, wanted: Wanted, path: Path) -> Iterator[Document]:
    """Documents in order; one may begin in one batch and end in the next, so a batch's last waits for the next."""
    rest, pieces = None, _pieces(file, path)
    for piece in score_table.batches(file, COLUMNS, path):
        if wanted.row is not None:
            piece = piece.filter(pc.equal(piece["row"], wanted.row))
        if rest is not None:
            piece = pa.concat_tables([rest, piece])
        parts = list(score_table.iter_documents(piece))
        for row, key, part in parts[:-1]:
            yield Document.read(row, key, part, pieces)
        rest = parts[-1][2] if parts else None
    if rest is not None:
        for row, key, part in score_table.iter_documents(rest):
            yield Document.read(row, key, part, pieces)


def _pieces(file: Any, path: Path) -> dict[int, bytes]:
    """Bytes of the tokens that are no text by themselves; tables of other hands may lack them."""
    about = score_table.metadata(file, path)
    try:
        return {int(token): bytes.fromhex(digits) for token, digits in about["bytes"].items()}
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}


def render_documents(found: Iterable[Document], wanted: str, console: Console) -> int:
    """Print documents; return how many.

    Raises XTFUserError if there is none although something was `wanted`: what, in words.
    """
    shown = 0
    for document in found:
        if shown == 0:
            console.print(Text(LEGEND, style="dim"), soft_wrap=True)
        kept, total = sum(token.kept for token in document.tokens), len(document.tokens)
        heading = f"row {document.row} · document {visible(document.key[:12])} · kept {kept} of {total}"
        console.print()
        console.print(Text(heading, style="bold"), soft_wrap=True)
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


def totals_table(totals: Mapping[str, Any]) -> Table:
    """`totals` of summary.json to print: kept and dropped shares, overall and per attribute and selector."""
    tokens = totals["completion_tokens"]
    table = Table(title=f"{totals['documents']:,} documents, {tokens:,} completion tokens", title_justify="left")
    table.add_column("")
    for heading in ("tokens", "share", "dropped", "alone"):
        table.add_column(heading, justify="right")

    def add(name: str, count: int, *more: int, last: bool = False) -> None:
        share = f"{100 * count / tokens:.2f} %" if tokens else "-"
        table.add_row(Text(name), f"{count:,}", share, *(f"{each:,}" for each in more), end_section=last)

    add("kept", totals["kept_tokens"])
    add("dropped", totals["dropped_tokens"], last=True)
    for name, counts in totals["attributes"].items():
        add(visible(name), counts["fired"], counts["dropped"], counts["dropped_alone"])
    for name, count in totals["decided_by"].items():
        if count:
            add(DECISIONS[name], count)
    table.caption = "a rule's row: it fired; of these, dropped; of these, by it alone"
    table.caption_justify = "left"
    return table
