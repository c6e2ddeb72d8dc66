"""Collators that XTF does not know: the labels that reach the model are the planned ones, or the run is refused."""

from __future__ import annotations

import pytest
import torch
from transformers import BatchEncoding

from tests.hosts.test_other_hosts import BLOCK, expected, made, seq2seq  # noqa: F401 (a fixture)
from xtf_plugin import XTFUserError, attach

KEPT = ("input_ids", "labels", "attention_mask")


def changed(change):
    """The usual collator, of which `change` alters the batch."""

    def collate(features):
        batch = seq2seq()(features)
        return change(batch, features) or batch

    return collate


def padded_left(features):
    longest = max(len(row["input_ids"]) for row in features)
    fill = {"input_ids": 1, "labels": -100, "attention_mask": 0}
    return {
        name: torch.tensor([[fill[name]] * (longest - len(row[name])) + list(row[name]) for row in features])
        for name in KEPT
    }


def joined(features, **more):
    """All rows in one."""
    flat = {name: torch.tensor([[value for row in features for value in row[name]]]) for name in KEPT[:2]}
    return {**flat, **{name: make([len(row["input_ids"]) for row in features]) for name, make in more.items()}}


def positions(lengths):
    return torch.tensor([[place for length in lengths for place in range(length)]])


def segments(lengths):
    return torch.tensor([[number for number, length in enumerate(lengths, 1) for _ in range(length)]])


def alone(lengths, *, heads=1, additive=False):
    own = torch.block_diag(*(torch.ones(n, n).tril() for n in lengths)).bool().expand(1, heads, -1, -1)
    return torch.where(own, 0.0, torch.finfo(torch.float32).min) if additive else own


def sees_all(lengths):
    return torch.ones(1, 1, sum(lengths), sum(lengths)).tril().bool()


def drop_last(batch, _):
    batch["labels"][:, -1] = -100


def train_all(batch, _):
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)


def shift(batch, _):
    batch["labels"] = torch.cat([batch["labels"][:, 1:], torch.full_like(batch["labels"][:, :1], -100)], 1)


def swap(batch, _):
    """As many labels as planned, but of other tokens."""
    batch["labels"] = batch["input_ids"].masked_fill(batch["labels"].flip(1) == -100, -100)


def corrupt(batch, _):
    batch["input_ids"][:, 3] = 77


def begin(batch, _):
    front = torch.zeros_like(batch["input_ids"][:, :1])
    new = {"input_ids": front, "labels": front - 100, "attention_mask": front + 1}
    return {name: torch.cat([new[name], batch[name]], 1) for name in KEPT}


SAME = {
    "padded left": padded_left,
    "in another order": lambda features: seq2seq()(features[::-1]),
    "an encoding": lambda features: BatchEncoding(dict(seq2seq()(features))),
    "joined, with positions": lambda features: joined(features, position_ids=positions),
    "joined, with a mask": lambda features: joined(features, attention_mask=alone),
    "joined, with a mask of all heads": lambda f: joined(f, attention_mask=lambda n: alone(n, heads=4)),
    "joined, with what is added": lambda f: joined(f, attention_mask=lambda n: alone(n, additive=True)),
}
REFUSED = {
    "cut": lambda features: {name: part[:, :30] for name, part in seq2seq()(features).items()},
    "with a first token": changed(begin),
    "with other tokens": changed(corrupt),
    "labels of all tokens": changed(train_all),
    "labels without the last": changed(drop_last),
    "labels shifted": changed(shift),
    "labels of other tokens": changed(swap),
    "joined": joined,
    "joined, seeing each other": lambda features: joined(features, attention_mask=sees_all),
    "joined, with numbers of segments": lambda features: joined(features, attention_mask=segments),
    "without labels": lambda features: {name: seq2seq()(features)[name] for name in ("input_ids", "attention_mask")},
    "a list": lambda features: list(seq2seq()(features).values()),
}


def seen(trainer, tmp_path, known):
    """Positions with a label of each of the `known` documents, cut out of the rows of the steps by its token ids."""
    attach(trainer, {"cache_dir": str(tmp_path / "cache"), **BLOCK})
    found, step = {}, trainer.training_step

    def spy(model, inputs, *args, **kwargs):
        for ids, labels in zip(inputs["input_ids"].tolist(), inputs["labels"].tolist(), strict=True):
            for document in known:
                for start in range(len(ids) - len(document) + 1):
                    if tuple(ids[start : start + len(document)]) == document:
                        part = labels[start : start + len(document)]
                        found[document] = tuple(place for place, label in enumerate(part) if place and label != -100)
        return step(model, inputs, *args, **kwargs)

    trainer.training_step = spy
    trainer.train()
    return found


@pytest.mark.parametrize("kind", SAME)
def test_that_hand_rows_on_get_the_planned_labels(tmp_path, expected, kind):  # noqa: F811
    assert seen(made(tmp_path, collator=SAME[kind]), tmp_path, list(expected)) == expected


@pytest.mark.parametrize("kind", REFUSED)
def test_that_change_rows_are_refused_before_scoring(tmp_path, kind):
    trainer = made(tmp_path, collator=REFUSED[kind])
    attach(trainer, {"preset": "none", "knowledge_novelty": True, "cache_dir": str(tmp_path / "cache")})
    with pytest.raises(XTFUserError):
        trainer.train()
    assert not (tmp_path / "cache").exists(), "it was scored first"
