"""Reads columns of a dataset whose rows hold text, tokens and labels: marks, and what drops are counted by.

Hosts drop columns when they tokenise or pack rows. A host's patch that sees the rows before leaves what it reads at the
trainer (`ATTRIBUTE`); otherwise the trainer's own dataset is read.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from datasets import Dataset

from ..config.block import XTFConfig
from ..data.column_marks import AllMarks, Marks, Misfit, Speller, texts_of, token_flags
from ..data.column_values import Values
from ..data.documents import split_row
from ..errors import XTFUserError
from ..scorers.column import column_parts
from .trainer import READ_COLUMNS, arrays, text_tokenizer

ATTRIBUTE = "_xtf_columns"
TEXTS = ("completion", "messages", "conversations", "text")  # what is trained on, in the order in which TRL looks
BATCH = 1_000  # rows

Pieces = Callable[[int], Iterable[slice]]  # from the number of a row's tokens to what the host makes of them
Cut = Callable[[int], bool]  # whether a row of that many tokens may be cut off


class Columns(NamedTuple):
    """What the columns of a dataset say of its documents: marks for scores, and values for `report_by`, by column."""

    marks: AllMarks
    values: Mapping[str, Values]

    def join(self, other: Columns) -> None:
        """Add the documents of another dataset, of which the same columns were read."""
        for key, marks in self.marks.items():
            marks.join(other.marks[key])
        for column, values in self.values.items():
            values.join(other.values[column])


def reads_columns(config: XTFConfig) -> bool:
    """Whether a block reads columns."""
    return bool(column_parts(config.scores) or config.report_columns)


def columns_of(trainer: Any, config: XTFConfig) -> Columns:
    """What a block reads of the columns, from the rows of a trainer.

    Raises:
        XTFUserError: see `read`.
    """
    if not reads_columns(config):
        return Columns({}, {})
    found: Columns | None = getattr(trainer, ATTRIBUTE, None)
    if found is not None:
        return found
    longest = getattr(trainer.args, "max_length", None)
    return read(
        trainer.train_dataset,
        config,
        text_tokenizer(trainer),
        cut=lambda length: longest is not None and length >= longest,
        texts=texts_in(trainer.args),
    )


def texts_in(settings: Any) -> list[str]:
    """`TEXTS`, with the name that a trainer's settings give the column of plain text."""
    return [*TEXTS[:-1], getattr(settings, "dataset_text_field", None) or TEXTS[-1]]


def read(
    dataset: Any,
    config: XTFConfig,
    tokenizer: Any,
    *,
    pieces: Pieces = lambda length: [slice(0, length)],
    cut: Cut = lambda length: False,
    where: str = "the training data",
    texts: Sequence[str] = TEXTS,
) -> Columns:
    """Read the columns that a block names, and match them with the rows' tokens.

    Args:
        dataset: map-style, with the columns, `input_ids` and `labels`, and the columns of the text; one document in
            each row.
        config: the block.
        tokenizer: of the training.
        pieces, cut: see `Pieces` and `Cut`.
        where: name of the dataset, for messages.
        texts: columns of the text, for a score that names none.

    Raises:
        XTFUserError: a column is missing, rows are packed, or a mark does not fit its row; names the row.
    """
    parts = column_parts(config.scores).values()
    found = Columns(
        {(part.column, part.format, part.text): Marks(part.column) for part in parts},
        {name: Values(name) for name in config.report_columns},
    )
    speller = Speller(tokenizer) if parts else None
    for number, row in enumerate(_rows(dataset, config, texts, where)):
        documents = split_row(row)
        if len(documents) != 1:
            raise XTFUserError(_packed(_named(config)[0]))
        _, ids, completion = documents[0]
        kept = list(pieces(len(ids)))
        for name, values in found.values.items():
            for piece in kept:
                values.add(ids[piece], completion[piece], row.get(name))
        spelled = None
        for (column, form, text), table in found.marks.items():
            assert speller is not None
            flags, value = None, row.get(column)
            if value is not None and not (hasattr(value, "__len__") and len(value) == 0):
                spelled = spelled or speller.spelled(ids, completion)
                try:
                    own = texts_of(row, [text] if text else texts, speller.eos)
                    flags = token_flags(value, own, spelled, form, cut=cut(len(ids)))
                except Misfit as problem:
                    raise XTFUserError(f"xtf: row {number} of {where}, column {column}: {problem}.") from None
            table.idle += flags is not None and not flags.any()
            for piece in kept:
                table.add(ids[piece], completion[piece], None if flags is None else flags[piece])
    return found


def _named(config: XTFConfig) -> list[str]:
    """The columns that a block names."""
    parts = column_parts(config.scores).values()
    return [*(name for part in parts for name in (part.column, part.text) if name), *config.report_columns]


def _rows(dataset: Any, config: XTFConfig, texts: Sequence[str], where: str) -> Iterator[Mapping[str, Any]]:
    """The rows with the columns that are read; tokens as arrays where the dataset is backed by Arrow."""
    names, known = _named(config), getattr(dataset, "column_names", None)
    if known is None or not isinstance(dataset, Dataset) or dataset.format["type"] == "custom":
        for index in range(len(dataset)):
            row = dataset[index]
            _check(names, list(row), where)
            yield row
        return
    _check(names, known, where)
    tokens = [name for name in READ_COLUMNS if name in known]
    others = {"prompt", *texts, *names} & set(known)
    for batch in dataset.select_columns([*tokens, *others]).with_format("arrow").iter(batch_size=BATCH):
        columns = {name: arrays(name, batch.column(name)) for name in tokens}
        columns |= {name: batch.column(name).to_pylist() for name in others}
        for index in range(len(batch)):
            yield {name: values[index] for name, values in columns.items() if values[index] is not None}


def check(known: Sequence[str], config: XTFConfig, where: str = "the training data") -> None:
    """Refuse columns of marks and of `report_by` that a dataset does not have.

    Raises:
        XTFUserError: names the first of them, and the columns that there are.
    """
    parts = column_parts(config.scores).values()
    _check([*(part.column for part in parts), *config.report_columns], known, where)


def _check(names: Sequence[str], known: Sequence[str], where: str) -> None:
    for name in names:
        if name in known:
            continue
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        packed = f" {_packed(name)}" if "seq_lengths" in known else ""
        raise XTFUserError(f"xtf: {where} has no column {name!r} (it has {list(known)}).{hint}{packed}")


def _packed(column: str) -> str:
    return (
        f"These rows are packed, and packing drops the column {column}. In a recipe of TRL it is read before that; "
        "elsewhere attach xtf to a trainer whose rows are not packed."
    )
