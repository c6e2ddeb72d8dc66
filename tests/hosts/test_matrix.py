"""One dataset, every shape that TRL can give it: the labels that reach the model are the same, token by token.

The row for TRL of docs/compatibility.md. What counts is what a training step is given, read by a recorder that knows
nothing of the package, against a plain run: one process, one document per row, no workers. Two ranks are in
test_launchers.py, streams in test_streaming.py, Axolotl in tests/axolotl.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from tests import tiny
from tests.made_scores import DEFAULT, read_prompts
from tests.training.test_callback import trainer
from tests.watch import watched
from xtf_plugin import attach

ROWS = 18
DATA = {
    "plain": (lambda: tiny.problems(ROWS), {}),
    "prompts too": (lambda: tiny.problems(ROWS), {"completion_only_loss": False}),
    "chat": (lambda: tiny.conversations(ROWS, turns=1), {"assistant_only_loss": True}),
    "multi-turn": (lambda: tiny.conversations(ROWS, turns=3), {"assistant_only_loss": True}),
}
PACKING = {
    "rows": {},
    "bfd": {"packing": True, "packing_strategy": "bfd"},
    "bfd_split": {"packing": True, "packing_strategy": "bfd_split"},
    "padding-free": {"padding_free": True, "max_length": None},
}
BATCHES = {
    "as they come": {},
    "accumulated": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3},
    "grouped by length": {"train_sampling_strategy": "group_by_length"},
}
BLOCKS = {
    "default": DEFAULT,
    "attributes": {
        "preset": "paper",
        "reasoning_importance": {"layers": "all", "drop": {"quantile": 0.2}, "scope": "dataset"},
        "knowledge_novelty": {"drop": {"quantile": 0.1}},
    },
    "control": {"preset": "paper", "control": "random"},
}


# Every pair of two settings is in some run, as the first test holds: most faults need one or two of them.
RUNS = [
    ("plain", "rows", "default", "accumulated", 0),
    ("plain", "bfd", "attributes", "as they come", 2),
    ("plain", "bfd_split", "control", "as they come", 2),
    ("plain", "padding-free", "default", "grouped by length", 0),
    ("prompts too", "rows", "attributes", "grouped by length", 2),
    ("prompts too", "bfd", "default", "as they come", 0),
    ("prompts too", "bfd_split", "default", "as they come", 0),
    ("prompts too", "padding-free", "control", "accumulated", 2),
    ("chat", "rows", "control", "as they come", 2),
    ("chat", "bfd", "default", "accumulated", 2),
    ("chat", "bfd_split", "default", "grouped by length", 2),
    ("chat", "padding-free", "attributes", "as they come", 0),
    ("multi-turn", "rows", "default", "as they come", 2),
    ("multi-turn", "bfd", "control", "grouped by length", 0),
    ("multi-turn", "bfd_split", "attributes", "accumulated", 0),
    ("multi-turn", "padding-free", "default", "as they come", 2),
]


def test_every_pair_of_settings_is_in_some_run():
    values = [DATA, PACKING, BLOCKS, BATCHES, (0, 2)]
    for (one, firsts), (two, seconds) in itertools.combinations(enumerate(values), 2):
        assert set(itertools.product(firsts, seconds)) == {(run[one], run[two]) for run in RUNS}


def seen(folder: Path, data: str, block: str, resume=False, report=False, **changes) -> dict[tuple, tuple]:
    """Positions with a label of every document that one epoch of training steps was given, by its token ids."""
    rows, settings = DATA[data]
    options = {"max_length": 512, "num_train_epochs": 1, "max_steps": -1, "save_strategy": "no"}
    made = trainer(folder, rows=rows(), **{**options, **settings, **changes})
    attach(made, {"cache_dir": str(folder / "cache"), "report": report, **BLOCKS[block]})
    found = watched(made)
    made.train(resume_from_checkpoint=resume)
    assert len(found) == len(dict(found)), "a document was trained on twice, or two differ"
    return dict(found)


@pytest.fixture(autouse=True, scope="module")
def reading():
    with pytest.MonkeyPatch.context() as patch:
        read_prompts(patch)
        yield


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The labels of the plain run, for each kind of data and each block, worked out once."""
    known = {}

    def find(data: str, block: str) -> tuple[Path, dict]:
        if (data, block) not in known:
            folder = tmp_path_factory.mktemp("plain")
            known[data, block] = folder, seen(folder, data, block, report=True)
            assert len(known[data, block][1]) == ROWS
        return known[data, block]

    return find


def check_dropped(folder: Path, labels: dict) -> None:
    """The plain run itself drops some tokens and keeps others, or nothing is compared."""
    import pyarrow.parquet as pq

    kept = pq.read_table(folder / "out/xtf/scores.parquet").column("kept").to_pylist()
    assert 0 < sum(kept) < len(kept)
    assert 0.5 < sum(map(len, labels.values())) / sum(kept) <= 1  # a document's first token is never predicted


@pytest.mark.parametrize("data, packing, block, batches, workers", RUNS)
def test_labels_are_those_of_the_plain_run(tmp_path, plain, data, packing, block, batches, workers):
    folder, expected = plain(data, block)
    check_dropped(folder, expected)
    changes = {**PACKING[packing], **BATCHES[batches], "dataloader_num_workers": workers}
    assert seen(tmp_path, data, block, **changes) == expected


@pytest.mark.parametrize("data, packing", zip(DATA, (False, True, False, True), strict=True))
def test_a_resumed_run_trains_on_the_rest_with_the_same_labels(tmp_path, plain, data, packing):
    """Ended in the middle and started again: what both parts were given is the plain run's epoch."""
    _, expected = plain(data, "attributes")
    shape = {"packing": packing, "per_device_train_batch_size": 1 if packing else 4}
    changes = {**shape, "save_strategy": "steps", "save_steps": 1}
    first = seen(tmp_path, data, "attributes", **{**changes, "max_steps": 1})
    second = seen(tmp_path, data, "attributes", resume=True, **changes)
    assert first and second and not first.keys() & second.keys()
    assert first | second == expected


@pytest.mark.parametrize("data, packing", zip(DATA, (True, False, True, False), strict=True))
def test_evaluation_sees_its_own_labels(tmp_path, data, packing):
    """The eval split's labels reach the model as the host made them, although some of its documents are dropped from
    in training."""
    rows, settings = DATA[data]
    options = {**settings, "packing": packing, "eval_packing": packing, "max_steps": 2, "max_length": 512}
    made = trainer(tmp_path, rows=rows(), eval_rows=rows()[:6], eval_strategy="steps", eval_steps=1, **options)
    attach(made, {"cache_dir": str(tmp_path / "cache"), "report": False, **BLOCKS["attributes"]})
    found = watched(made, "prediction_step")
    made.train()
    own = {}
    for row in made.eval_dataset:
        lengths = row.get("seq_lengths") or [len(row["input_ids"])]
        at = 0
        for length in lengths:
            labels = row["labels"][at : at + length]
            kept = tuple(i for i, label in enumerate(labels) if label != -100 and i > 0)
            own[tuple(row["input_ids"][at : at + length])] = kept
            at += length
    assert len(own) == 6 and len(found) == 12
    assert dict(found) == own
