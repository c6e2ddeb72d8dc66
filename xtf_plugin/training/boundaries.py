"""Tries the trainer's collator before anything is scored: what it makes of rows must be what XTF plans for them.

It also finds out which columns of a row matter. Rows may have `attention_mask`, `position_ids` or `seq_lengths` that
the collator ignores (TRL's reads neither of the first two). If XTF read them, it would plan other documents than the
model gets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from itertools import combinations
from typing import Any

import numpy as np
import torch

from ..data.documents import IGNORE_INDEX, collect, split_row
from ..errors import XTFError, XTFUserError
from .verification import PlannedDocuments, documents_of, verify_batch

TRIED = 2  # rows that the collator is given: alone, and together
BOUNDARIES = ("seq_lengths", "position_ids", "attention_mask")

_CANNOT = (TypeError, ValueError, LookupError, AttributeError, RuntimeError, ArithmeticError)

Shape = list[list[int]]  # token ids of each document that trains a label


class Boundaries:
    """Leaves out of rows the columns that a collator ignores; refuses a collator that changes rows.

    Equals comparing, for every row, its documents with those of the batch that the collator makes of it. The collator
    is asked once for each column, about the first row where the column makes a difference.

    Args:
        collator: of the trainer.

    Attributes:
        ignored: names of the columns that the collator was found to ignore; grows while rows are read.
    """

    def __init__(self, collator: Callable[[list[Any]], Any]) -> None:
        self.collator = collator
        self.ignored: set[str] = set()
        self._settled: set[str] = set()
        self._first: list[tuple[dict[str, Any], Mapping[str, Any]]] = []

    def visible(self, row: dict[str, Any], complete: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """`row` without the columns that are ignored.

        Args:
            row: the columns that are read.
            complete: returns the row as the collator gets it.

        Raises:
            XTFUserError: the collator makes documents of the row that none of its columns explains; or it changes
                tokens or labels of the first rows.
        """
        open_ = [name for name in BOUNDARIES if name not in self._settled and _says_something(name, row)]
        if open_ and _documents(row) != _documents(_without(row, {*open_, *self.ignored})):
            self._settle(row, complete(), open_)
        visible = _without(row, self.ignored)
        if len(self._first) < TRIED and "labels" in row:
            self._first.append((visible, complete()))
            self._try()
        return visible

    def _try(self) -> None:
        """Refuse a collator that changes tokens or labels of the first rows."""
        try:
            documents = collect([visible for visible, _ in self._first])
        except XTFUserError:
            return  # of rows that train nothing; what is wrong with a row is said when all are collected
        batch = self._collated([row for _, row in self._first])
        if batch is None:
            return
        name = type(self.collator).__name__
        if not hasattr(batch, "keys") or "labels" not in batch or "input_ids" not in batch:
            raise XTFUserError(f"xtf: {name} returns no `labels` and `input_ids`, so no label can be masked.")
        try:
            verify_batch(PlannedDocuments(documents, np.ones(int(documents.completion.sum()), dtype=bool)), batch)
        except XTFError as error:
            raise XTFUserError(f"xtf: {name}, tried on rows of the dataset: {error}") from None
        except _CANNOT:
            return  # no tensors of two dimensions: the first training batch will tell

    def _collated(self, rows: list[Mapping[str, Any]]) -> Any:
        """The batch that the collator makes of rows; None if it does not take them."""
        for nested in (False, True):  # a multipack sampler gives lists of lists
            given = [dict(deepcopy(row)) for row in rows]
            try:
                with torch.random.fork_rng(devices=[]):
                    return self.collator([given] if nested else given)
            except _CANNOT:
                continue
        return None

    def _settle(self, row: Mapping[str, Any], complete: Mapping[str, Any], doubtful: list[str]) -> None:
        batch = self._batch(complete)
        self._settled |= set(doubtful)
        if batch is None:
            return
        for number in range(len(doubtful) + 1):
            for names in combinations(doubtful, number):
                if _documents(_without(row, {*self.ignored, *names})) == batch:
                    self.ignored |= set(names)
                    return
        split_row(row)  # its own error says more
        raise XTFUserError(
            f"xtf: {type(self.collator).__name__} makes {len(batch)} documents of {[len(ids) for ids in batch][:8]} "
            f"tokens of a training row in which xtf finds {[len(ids) for ids in _documents(row)][:8]}. Remove the "
            f"columns {', '.join(doubtful)} from the dataset if they are not needed, or use the trainer's own collator."
        )

    def _batch(self, row: Mapping[str, Any]) -> Shape | None:
        """The documents with a trained label that the collator makes of a row; None if it does not take one alone."""
        batch = self._collated([row])
        try:
            bounded = any(batch.get(name) is not None for name in ("attention_mask", "position_ids"))
            size = batch["input_ids"].shape[1] if bounded else len(row["input_ids"])
            made = {name: batch[name][:, :size] for name in ("input_ids", "labels")}
            return _shape([*documents_of({**batch, **made})])
        except _CANNOT:
            return None


def _says_something(name: str, row: Mapping[str, Any]) -> bool:
    """Whether a column may cut a row; fast, since most rows have an attention mask of ones."""
    if row.get(name) is None:
        return False
    value = np.asarray(row[name])
    plain = {
        "seq_lengths": value.size == 1,
        "position_ids": value.shape == (len(row["input_ids"]),) and bool((value[1:] != 0).all()),
        "attention_mask": value.shape == (len(row["input_ids"]),) and bool(value.all()),
    }
    return not plain[name]


def _documents(row: Mapping[str, Any]) -> Shape | str:
    """The documents of a row with a trained label; the text of the error if there are none."""
    try:
        labels = np.asarray(row["labels"])
        return _shape([(ids, labels[where]) for where, ids, _ in split_row(row)])
    except XTFUserError as error:
        return str(error)


def _shape(documents: list[tuple[Any, Any]]) -> Shape:
    """Documents without those that train nothing; nothing predicts a first token."""
    return [np.asarray(ids).tolist() for ids, labels in documents if (np.asarray(labels)[1:] != IGNORE_INDEX).any()]


def _without(row: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in names}
