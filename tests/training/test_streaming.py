"""Streamed data trains on the same labels as a dataset would, in bounded memory, and leaves training as it was."""

from __future__ import annotations

import gc
import json
import random
import tracemalloc

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import Trainer, TrainingArguments

from tests import tiny
from tests.made_scores import DEFAULT, odd_sentences, read_prompts
from tests.streams import ROWS, attached, rows, stream_of, trained, trainer
from xtf_plugin import XTFConfig, XTFUserError
from xtf_plugin.training.streaming import Stream

PAPER = {"preset": "paper", "reasoning_importance": {"drop": {"quantile": 0.2}, "scope": "dataset"}}
OFFICIAL = {"preset": "official", "reasoning_importance": {"drop": {"fence": 0.0}}}
LOOSE = odd_sentences()
MANY_ROWS = {
    "document scope": {
        "preset": "none",
        "reasoning_importance": {"drop": {"quantile": 0.2}},
        "knowledge_novelty": {"drop": {"unknown_below": 0.001}, "window": 3, "max_fraction": 0.3},
        "selectors": {
            **LOOSE["selectors"],
            "odd": {"scorer": "typicality", "drop": {"quantile": 0.1}, "scope": "document", "unit": "sentence"},
        },
        "protect": {"patterns": ["apples"], "formats": None},
        "force_drop": ["happy to"],
        "min_kept": 2,
    },
    "control": {**LOOSE, "control": "random", "seed": 3},
}


def dropped(labels):
    return sum(label == -100 for values in labels.values() for label in values)


@pytest.fixture(scope="module")
def of_a_dataset(tmp_path_factory):
    """The labels that a block gives the same rows as a dataset; trained once for each block."""
    known = {}

    def labels(block):
        key = json.dumps(block, sort_keys=True)
        if key not in known:
            folder = tmp_path_factory.mktemp("map")
            known[key] = trained(folder, trainer(folder, rows()), block)
        return known[key]

    return labels


@pytest.mark.parametrize("calibration", [ROWS, 1000])
@pytest.mark.parametrize(
    "block",
    [DEFAULT, LOOSE, PAPER, OFFICIAL, {**LOOSE, "control": "random"}],
    ids=["default", "odd sentences", "paper", "official", "control"],
)
def test_a_stream_within_the_sample_gets_the_masks_of_a_dataset(
    tmp_path, monkeypatch, of_a_dataset, block, calibration
):
    read_prompts(monkeypatch)
    plain, expected = of_a_dataset({"preset": "none", "force_drop": ["no such text"]}), of_a_dataset(block)
    made = trainer(tmp_path)
    assert trained(tmp_path / "stream", made, {**block, "calibration": calibration}) == expected
    assert dropped(expected) > dropped(plain)
    facts = json.loads((tmp_path / "out/xtf/summary.json").read_text())
    assert facts["streaming"]["documents"] == ROWS and facts["streaming"]["whole_stream"] is (calibration > ROWS)
    assert "0 of them ahead of training" in stream_of(made).summary(), "the sample's decisions are used again"


@pytest.mark.parametrize("block", MANY_ROWS.values(), ids=MANY_ROWS)
def test_rules_of_a_document_alone_do_not_depend_on_the_sample(tmp_path, of_a_dataset, block):
    expected = of_a_dataset(block)
    assert trained(tmp_path / "stream", trainer(tmp_path), {**block, "calibration": 8}) == expected
    reasons = set(pq.read_table(tmp_path / "out/xtf/scores.parquet").column("reason").to_pylist())
    assert len(reasons) > 2


def test_thresholds_over_the_dataset_are_those_of_the_sample(tmp_path):
    """Against NumPy on the scores of all documents: a quantile over the first sixteen decides for all."""
    block = {"preset": "none", "selectors": {"odd": {"scorer": "typicality", "drop": {"quantile": 0.2}}}, "min_kept": 0}
    selector = {**block["selectors"]["odd"], "scope": "dataset"}
    block = {**block, "selectors": {"odd": selector}, "protect": {"special_tokens": False, "formats": None}}
    attached(tmp_path, mapped := trainer(tmp_path / "map", rows()), block)
    mapped.train()
    table = pq.read_table(tmp_path / "map/out/xtf/scores.parquet").to_pandas()
    limit = np.nanquantile(table.odd[table.row < 16].astype(np.float64), 0.2)
    labels = trained(tmp_path, trainer(tmp_path), {**block, "calibration": 16})
    for row, document in table.groupby("row"):
        ids = tuple(mapped.train_dataset[row]["input_ids"])
        kept = {int(p) for p, odd in zip(document.position, document.odd, strict=True) if not odd < limit}
        assert labels[ids] == [token if place in kept else -100 for place, token in enumerate(ids)][1:]
    whole = np.nanquantile(table.odd.astype(np.float64), 0.2)
    assert ((table.odd < whole) != (table.odd < limit)).any(), "the dataset's own threshold would drop other tokens"


def test_relevance_of_tokens_that_the_sample_never_held(tmp_path):
    """Against the definition: domain and scale of the first sixteen documents, for every token of the rest."""
    block = {"preset": "none", "task_relevance": {"drop": {"below": 0.4}}, "min_kept": 0, "calibration": 16}
    made = trainer(tmp_path, model=tiny.model(seed=2))
    labels = trained(tmp_path, made, {**block, "protect": {"special_tokens": False, "formats": None}})
    sample = [row for row, _ in zip(made.train_dataset, range(16), strict=False)]
    vectors = tiny.model(seed=2).get_input_embeddings().weight.detach().double()
    domain = vectors[[token for row in sample for token in row["input_ids"]]].mean(0)
    distance = 1 - torch.cosine_similarity(vectors, domain[None])
    scored = {token for row in sample for token in row["labels"] if token != -100}
    low, high = min(distance[list(scored)]), max(distance[list(scored)])
    relevance = 1 - (distance - low) / (high - low)
    new = set()
    for row in made.train_dataset:
        ids, own = row["input_ids"], row["labels"]
        expected = [-100 if label == -100 or relevance[label] < 0.4 else label for label in own]
        assert labels[tuple(ids)] == expected[1:]
        new |= {label for label in own if label != -100} - scored
    assert new and any(relevance[token] < 0.4 for token in new) and any(relevance[token] >= 0.4 for token in new)


@pytest.mark.parametrize(
    "options",
    [
        {"packing": True, "packing_strategy": "bfd", "max_length": 200, "max_steps": 2},
        {"packing": True, "packing_strategy": "bfd_split", "max_length": 200, "max_steps": 2},
        {"padding_free": True, "max_length": None},
        {"gradient_accumulation_steps": 5, "max_steps": 2},
    ],
    ids=["bfd", "bfd_split", "padding_free", "accumulation"],
)
def test_packed_streams(tmp_path, of_a_dataset, options):
    expected = of_a_dataset(MANY_ROWS["document scope"])
    found = trained(
        tmp_path / "stream", trainer(tmp_path, **options), {**MANY_ROWS["document scope"], "calibration": 8}
    )
    assert found.items() <= expected.items() and len(found) > 24


def test_wrapped_packing_is_scored_as_it_is_trained_on(tmp_path):
    options = {"packing": True, "packing_strategy": "wrapped", "max_length": 64, "max_steps": 14}
    expected = trained(tmp_path / "map", trainer(tmp_path, rows(), **options), LOOSE)
    found = trained(tmp_path / "stream", trainer(tmp_path, **options), {**LOOSE, "calibration": 8})
    assert found == expected and len(found) > 30


class Endless(torch.utils.data.IterableDataset):
    """Rows without end, none like another."""

    def __iter__(self):
        rng = random.Random(5)
        while True:
            ids = [rng.randrange(4, 400) for _ in range(rng.randrange(20, 60))]
            yield {"input_ids": ids, "labels": [-100] * 5 + ids[5:]}


class Changing(Endless):
    """Rows as `Endless` gives them until the fortieth; from there on something is the matter with them."""

    def __init__(self, change):
        self.change = change

    def __iter__(self):
        for index, row in enumerate(super().__iter__()):
            yield row if index < 40 else self.change(row)


CHANGES = {
    "an image": (lambda row: {**row, "pixel_values": [0.0]}, "training rows have pixel_values"),
    "no tokens": (lambda row: {"labels": row["labels"]}, "no `input_ids` .it has labels"),
    "no labels": (lambda row: {"input_ids": row["input_ids"]}, "carry no `labels`"),
    "no mapping": (lambda row: row["input_ids"], "a row of the training data is a list"),
}


@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES)
def test_rows_that_cannot_be_scored_stop_the_run_also_late(tmp_path, base_reference, change, message):
    options = {"disable_tqdm": True, "remove_unused_columns": False}
    made = attached(tmp_path, plain_trainer(tmp_path, Changing(change), 60, **options), base_reference)
    with pytest.raises(XTFUserError, match=message):
        made.train()
    assert made.state.global_step > 0


def test_columns_that_do_not_reach_the_collator_may_be_anything(tmp_path, base_reference):
    stream = Changing(CHANGES["an image"][0])
    made = attached(tmp_path, plain_trainer(tmp_path, stream, 20, disable_tqdm=True), base_reference)
    assert made.train().global_step == 20


def test_workers_that_are_switched_on_after_attaching_are_refused(tmp_path, base_reference):
    made = attached(tmp_path, plain_trainer(tmp_path, Endless(), 5, disable_tqdm=True), base_reference)
    made.args.dataloader_num_workers = 1
    with pytest.raises(XTFUserError, match="dataloader_num_workers is 1"):
        made.train()


def test_a_stream_of_which_nothing_was_read_is_not_said_to_be_dropped():
    assert "; 0.0% of 0 completion tokens" in Stream(XTFConfig(), tiny.tokenizer()).summary()


def plain_trainer(folder, dataset, steps, **options):
    args = TrainingArguments(
        str(folder / "out"), max_steps=steps, per_device_train_batch_size=4, report_to="none", use_cpu=True, **options
    )

    def collate(features):
        longest = max(len(row["input_ids"]) for row in features)
        ids = [row["input_ids"] + [1] * (longest - len(row["input_ids"])) for row in features]
        labels = [row["labels"] + [-100] * (longest - len(row["labels"])) for row in features]
        return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}

    model = tiny.model()
    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)
    return Trainer(model, args, train_dataset=dataset, data_collator=collate, processing_class=tiny.tokenizer())


def test_an_endless_stream_takes_bounded_memory(tmp_path, base_reference):
    """All that Python and NumPy hold, at two moments between which hundreds of rows have come and gone."""
    options = {"disable_tqdm": True, "save_strategy": "no"}
    made = attached(tmp_path, plain_trainer(tmp_path, Endless(), 181, **options), base_reference)
    held, memory = [], {}
    step = made.training_step

    def watch(*args, **kwargs):
        held.append(len(stream_of(made).masks._entries))
        if made.state.global_step in (60, 180):
            gc.collect()
            memory[made.state.global_step] = tracemalloc.get_traced_memory()[0]
        return step(*args, **kwargs)

    made.training_step = watch
    tracemalloc.start()
    try:
        made.train()
    finally:
        tracemalloc.stop()
    chunk = 4 * 256 // 20 + 1  # tokens that are read ahead over the shortest row
    assert max(held) <= 4 * 3 + 64 + 2 * chunk
    assert max(held[90:]) <= max(held[:90]) * 1.1
    assert memory[180] - memory[60] < 38_000, "one small array for each of 480 rows would be twice that"
    assert made.state.log_history[-1]["train_loss"] > 0


@pytest.fixture
def base_reference(tmp_path):
    folder = tiny.save_base(tmp_path / "reference", seed=3)
    separate = {"model": str(folder), "quantization": "none", "dtype": "float32"}
    drop = {"scorer": "typicality", "drop": {"below": -2.0}}
    block = {"preset": "none", "selectors": {"odd": drop}, "reference": separate, "calibration": 16}
    return {**block, "batch_tokens": 256}
