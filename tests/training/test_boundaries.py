"""Rows are cut as the trainer's collator cuts them, whatever other columns they have."""

from __future__ import annotations

import json

import pytest
import torch

from tests.made_scores import DROPS
from tests.pages import ROOT
from tests.training.test_callback import trainer
from xtf_plugin import XTFUserError, attach
from xtf_plugin.training.boundaries import TRIED, Boundaries

IDS = [5, 6, 7, 8, 9, 10]
LABELS = [-100, 6, 7, -100, 9, 10]


def row(**more):
    return {"input_ids": IDS, "labels": LABELS, **more}


def stacked(features):
    """TRL's collator without its padding: `input_ids` and `labels` alone are read."""
    return {name: torch.tensor([each[name] for each in features]) for name in ("input_ids", "labels")}


def with_columns(*names):
    """A collator that hands these columns of the rows on."""
    return lambda features: {
        **stacked(features),
        **{name: torch.tensor([each[name] for each in features]) for name in names if name in features[0]},
    }


def blocks(lengths, additive=False, heads=True):
    """A mask of more than two dimensions: documents of these lengths that see themselves alone."""

    def collate(features):
        seen = torch.block_diag(*(torch.ones(n, n).tril() for n in lengths)).bool()
        mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min) if additive else seen
        return {**stacked(features), "attention_mask": mask[None, None] if heads else mask[None]}

    return collate


def padding_free(features):
    ends = torch.tensor([[*range(len(each["input_ids"]))] for each in features])
    return {**stacked(features), "position_ids": ends}


PADDED = {"attention_mask": [1, 1, 1, 1, 0, 0]}
HALVES = {"position_ids": [0, 1, 2, 0, 1, 2]}
LENGTHS = {"seq_lengths": [3, 3]}


@pytest.mark.parametrize(
    ("columns", "collator", "ignored"),
    [
        (PADDED, stacked, {"attention_mask"}),
        (HALVES, stacked, {"position_ids"}),
        (LENGTHS, stacked, {"seq_lengths"}),
        (HALVES | LENGTHS, stacked, {"position_ids", "seq_lengths"}),
        ({"position_ids": [0, 1]}, stacked, {"position_ids"}),  # shorter than the row
        ({"position_ids": [0, 1]}, padding_free, {"position_ids"}),
        (HALVES, with_columns("position_ids"), set()),
        (HALVES | PADDED, with_columns("position_ids"), {"attention_mask"}),
        (HALVES, padding_free, {"position_ids"}),
        (LENGTHS, blocks([3, 3]), set()),
        (LENGTHS, blocks([3, 3], additive=True), set()),
        (LENGTHS, blocks([6], heads=False), {"seq_lengths"}),
        ({"attention_mask": [1] * 6, "position_ids": [*range(6)]}, lambda _: 1 / 0, set()),  # nothing to ask
    ],
)
def test_columns_that_a_collator_ignores_are_left_out(columns, collator, ignored):
    found = Boundaries(collator)
    visible = found.visible(row(**columns), lambda: row(**columns))
    assert found.ignored == ignored
    assert set(visible) == {"input_ids", "labels", *columns} - ignored


def test_a_mask_that_is_read_still_refuses_labels_on_padding():
    found = Boundaries(with_columns("attention_mask"))
    with pytest.raises(XTFUserError, match="labels on 2 of its 2 padding tokens"):
        found.visible(row(**PADDED), lambda: row(**PADDED))


def test_a_collator_that_cuts_rows_by_itself_is_refused_before_scoring():
    with pytest.raises(XTFUserError, match=r"makes 2 documents of \[2, 4\] tokens.*xtf finds \[3, 3\]"):
        Boundaries(blocks([2, 4])).visible(row(**LENGTHS), lambda: row(**LENGTHS))


def test_the_collator_is_asked_once_a_column():
    asked = []
    found = Boundaries(lambda features: asked.append(1) or stacked(features))
    for _ in range(TRIED):  # whether it changes rows
        found.visible(row(), row)
    assert len(asked) == TRIED
    asked.clear()
    for columns in (PADDED, PADDED, HALVES, HALVES | PADDED):
        found.visible(row(**columns), lambda columns=columns: row(**columns))
    assert len(asked) == 2


def field(name):
    """Rows of a file with token ids that the tiny model has."""
    rows = [json.loads(line) for line in (ROOT / "tests/data/field" / name).read_text().splitlines()]
    for each in rows:
        for column in ("input_ids", "labels"):
            each[column] = [token % 400 if token >= 0 else token for token in each[column]]
    return rows


@pytest.mark.parametrize("name", ["padded-rows.jsonl", "offline-packed-rows.jsonl"])
def test_rows_with_columns_that_trl_ignores_train_as_in_stock(tmp_path, name):
    rows = field(name)
    made = trainer(tmp_path, rows=rows, remove_unused_columns=False, dataset_kwargs={"skip_prepare_dataset": True})
    block = {**DROPS, "protect": {"special_tokens": False, "formats": None}}
    attach(made, {"cache_dir": str(tmp_path / "cache"), **block})
    made.train()
    assert made._xtf_hooks.plan.documents.lengths.tolist() == [len(each["input_ids"]) for each in rows]
    assert made._xtf_hooks._verifier.proven


class Changing(torch.utils.data.Dataset):
    """A dataset that makes its rows anew, with another token in the answer."""

    reads = 0

    def __len__(self):
        return 24

    def __getitem__(self, index):
        self.reads += 1
        return row(input_ids=[*IDS[:4], self.reads % 50, 10])


def test_rows_that_change_whenever_they_are_read_are_refused_before_scoring(tmp_path):
    made = trainer(tmp_path)
    made.train_dataset = Changing()
    attach(made, {"cache_dir": str(tmp_path / "cache"), **DROPS})
    with pytest.raises(XTFUserError, match=r"row 0 .* changes whenever it is read.*to_iterable_dataset"):
        made.train()
    made.train_dataset = trainer(tmp_path).train_dataset.with_transform(
        lambda batch: {**batch, "input_ids": [torch.randint(4, 60, (len(ids),)) for ids in batch["input_ids"]]}
    )
    with pytest.raises(XTFUserError, match="changes whenever it is read"):
        made.train()
    assert not (tmp_path / "cache").exists()
