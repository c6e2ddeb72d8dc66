"""Rows of a dataset that lies in Arrow are read many at a time, and give the documents of rows read one by one."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from datasets import Dataset

from xtf_plugin.data.documents import PlainRows, collect
from xtf_plugin.errors import XTFUserError
from xtf_plugin.training import trainer
from xtf_plugin.training.boundaries import Boundaries

ROWS = 2_500  # in batches of a thousand, of which the first is read row by row
ODD = 1_700  # a row of the second batch


def made(**columns):
    """Rows; `columns`: from a row's number and length to what it has in that column."""
    rng, rows = np.random.default_rng(0), []
    for number in range(ROWS):
        ids = rng.integers(1, 60, rng.integers(2, 7)).tolist()
        row = {"input_ids": ids, "labels": [-100, *ids[1:]]}
        rows.append(row | {name: of(number, len(ids)) for name, of in columns.items()})
    return rows


def read(rows):
    """What is read of the rows as a dataset."""
    args = SimpleNamespace(remove_unused_columns=False)
    given = SimpleNamespace(train_dataset=Dataset.from_list(rows), args=args)
    return list(trainer.rows(given, Boundaries(lambda rows: None)))


ONES = {"attention_mask": lambda number, size: [1] * size}
PLACES = {"position_ids": lambda number, size: list(range(size))}
WHOLE = {"seq_lengths": lambda number, size: [size]}


@pytest.mark.parametrize("columns", [{}, ONES, PLACES, WHOLE, {**ONES, **PLACES}], ids=lambda given: "+".join(given))
def test_rows_that_no_column_cuts_are_read_together(columns):
    rows = made(**columns)
    found = read(rows)
    assert [len(each.lengths) for each in found if isinstance(each, PlainRows)] == [1_000, 500]
    assert_equal(collect(found), collect(rows))


def odd(usual, other):
    return lambda number, size: other(size) if number == ODD else usual(number, size)


@pytest.mark.parametrize(
    "columns",
    [
        {"attention_mask": odd(ONES["attention_mask"], lambda size: [0] + [1] * (size - 1))},
        {"position_ids": odd(PLACES["position_ids"], lambda size: [0, *range(size - 1)])},
        {"seq_lengths": odd(WHOLE["seq_lengths"], lambda size: [1, size - 1])},
        {"seq_lengths": odd(WHOLE["seq_lengths"], lambda size: None)},
        {"attention_mask": odd(ONES["attention_mask"], lambda size: None)},
    ],
    ids=["padding", "a restart", "two documents", "no lengths", "no mask"],
)
def test_a_batch_with_another_row_is_read_row_by_row(columns):
    rows = made(**columns)
    found = read(rows)
    assert [len(each.lengths) for each in found if isinstance(each, PlainRows)] == [500]
    assert_equal(collect(found), collect(rows))


@pytest.mark.parametrize("broken", [{"labels": [1]}, {"seq_lengths": [99]}, {"labels": None}, {"input_ids": [-1] * 9}])
def test_a_broken_row_is_named_as_it_is_among_few(broken):
    rows = made(**WHOLE)
    rows[ODD] = {**rows[ODD], **({"labels": [1] * 9, "seq_lengths": [9]} if "input_ids" in broken else {}), **broken}
    with pytest.raises(XTFUserError) as alone:
        collect([rows[ODD]])
    with pytest.raises(XTFUserError) as among:
        collect(read(rows))
    assert str(among.value) == str(alone.value)


def assert_equal(found, expected):
    for name in ("keys", "counts", "offsets", "input_ids", "completion", "row_offsets", "row_documents"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)
