"""Looking into a score table from the command line: which documents to print, and its report made again."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from . import page, table, view
from .errors import XTFUserError
from .files import for_arrow, write_whole

REQUIRED = ("row", "document", "position", "kept")  # what every row has


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
        names = {short: name for name, short in view.ATTRIBUTES.items()}  # as documents are marked
        return cls(row, None if document is None else document.lower(), pattern, names.get(reason or "", reason))

    def described(self) -> str:
        """For the message that there is none: "row 3 with task_relevance"; empty if any document would do."""
        parts = [
            None if self.row is None else f"row {self.row}",
            None if self.document is None else f"document {self.document}",
            None if self.grep is None else f"text that matches {self.grep.pattern!r}",
            None if self.reason is None else f"reason {self.reason}",
        ]
        return ", ".join(part for part in parts if part)

    def takes(self, document: view.Document) -> bool:
        """Whether a document is one of them."""
        if self.row is not None and document.row != self.row:
            return False
        if self.document is not None and not document.key.startswith(self.document):
            return False
        if self.grep is not None and not self.grep.search(document.text):
            return False
        return self.reason is None or any(self.reason in token.reason.split(",") for token in document.tokens)


def open_table(path: Path) -> Any:
    """Open a score table. Raises XTFUserError if the file is missing, is no Parquet file, or is another table."""
    try:
        file = pq.ParquetFile(for_arrow(path), page_checksum_verification=True)
    except (OSError, pa.ArrowInvalid) as error:
        raise XTFUserError(f"cannot read the score table {path}: {error}") from error
    if why := _problem(file.schema_arrow):
        raise XTFUserError(f"{path} is no score table of XTF: {why}.")
    return file


def _problem(schema: Any) -> str:
    """Why a Parquet file of this schema is no score table: what it lacks; "" if it is one."""
    missing = [name for name in table.SCHEMA.names if name not in schema.names]
    if missing:
        return f"it has no column {', '.join(missing)}"
    wrong = [field for field in table.SCHEMA if not _alike(schema.field(field.name).type, field.type)]
    told = (f"{field.name} holds {schema.field(field.name).type} instead of {field.type}" for field in wrong)
    return ", ".join(told)


def _alike(found: Any, wanted: Any) -> bool:
    """Whether a column can be read as another: other tools write texts and numbers back in other widths."""
    found = found.value_type if pa.types.is_dictionary(found) else found
    texts, numbers = (pa.types.is_string, pa.types.is_large_string), (pa.types.is_integer, pa.types.is_floating)
    if pa.types.is_string(wanted):
        return any(kind(found) for kind in texts)
    return bool(found == wanted or any(kind(found) and kind(wanted) for kind in numbers))


def batches(file: Any, columns: Sequence[str], name: str = "the score table") -> Iterator[Any]:
    """A score table piece by piece, as pyarrow.Table.

    Raises:
        XTFUserError: it cannot be read to the end, or rows lack what every row has.
    """
    pieces = file.iter_batches(columns=list(columns))
    while True:
        try:
            piece = next(pieces, None)
        except (OSError, pa.ArrowException) as error:
            raise XTFUserError(f"{name} cannot be read to its end: {error}. Make it again: xtf score") from error
        if piece is None:
            return
        empty = [name for name in REQUIRED if name in columns and piece.column(name).null_count]
        if empty:
            raise XTFUserError(f"{name} has rows without {', '.join(empty)}. Make it again: xtf score RECIPE")
        yield pa.Table.from_batches([piece])


def find(file: Any, wanted: Wanted, n: int, name: str = "the score table") -> Iterator[view.Document]:
    """The first `n` documents of a score table that are wanted, all of them if a row or a document is named.

    Reads no more of the table than it must. Raises XTFUserError for a reason that no rule of the table has.
    """
    _check_reason(file, wanted)
    left = n if wanted.row is None and wanted.document is None else -1
    for document in _documents(file, wanted, name):
        if left == 0:
            return
        if wanted.takes(document):
            left -= 1
            yield document


def _documents(file: Any, wanted: Wanted, name: str) -> Iterator[view.Document]:
    """Documents in order; one may begin in one batch and end in the next, so a batch's last waits for the next."""
    rest, pieces = None, _pieces(file)
    for piece in batches(file, view.COLUMNS, name):
        if wanted.row is not None:
            piece = piece.filter(pc.equal(piece["row"], wanted.row))
        if rest is not None:
            piece = pa.concat_tables([rest, piece])
        parts = list(table.iter_documents(piece))
        for row, key, part in parts[:-1]:
            yield view.Document.read(row, key, part, pieces)
        rest = parts[-1][2] if parts else None
    if rest is not None:
        yield from view.documents(rest, pieces)


def _pieces(file: Any) -> dict[int, bytes]:
    """Bytes of the tokens that are no text by themselves; tables of other hands may not tell them."""
    try:
        told = json.loads((file.schema_arrow.metadata or {})[table.METADATA])["bytes"]
        return {int(token): bytes.fromhex(digits) for token, digits in told.items()}
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        return {}


def _check_reason(file: Any, wanted: Wanted) -> None:
    if wanted.reason is None:
        return
    legal = [*view.ATTRIBUTES, *table.selector_columns(file.schema_arrow.names), *view.DECISIONS]
    if wanted.reason not in legal:
        raise XTFUserError(f"--reason {wanted.reason!r} is no rule of this table. Legal: {', '.join(legal)}.")


def write_report(path: Path, output: Path | None) -> str:
    """Make report.html of a score table again, beside it or at `output`; return what to say of it.

    Raises XTFUserError if what the table holds is no report of this version, or the page cannot be written.
    """
    data = table.read_page(path)
    if data is None:
        return "no report: this table holds none (it was written by an older xtf-plugin, or by other hands)"
    if why := page.problem(data):
        raise XTFUserError(f"the report that {path} holds {why}. Make table and report again: xtf score RECIPE")
    target = output or path.parent / "report.html"
    try:
        shown = page.render(data, page.title(target)).encode()
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise XTFUserError(
            f"the report that {path} holds is not what this xtf-plugin writes ({type(error).__name__}: {error}). Make "
            "table and report again: xtf score RECIPE"
        ) from error
    try:
        write_whole(target, shown)
    except OSError as error:
        raise XTFUserError(f"the report cannot be written to {target}: {error}. Name a file: --output PATH") from error
    return f"report: {target}"
