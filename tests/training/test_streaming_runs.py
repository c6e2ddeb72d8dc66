"""A streamed run is the run that it would have been: same random numbers, same model; or it is refused."""

from __future__ import annotations

import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import IterableDataset
from peft import LoraConfig

from tests import tiny
from tests.made_scores import DEFAULT, odd_sentences, read_prompts
from tests.streams import LORA, ROWS, attached, labels_by_document, rows, stream_of, trained, trainer, watched
from xtf_plugin import XTFConfig, XTFDryRun, XTFError, XTFUserError, attach
from xtf_plugin.scorers import Scorer, registry
from xtf_plugin.scoring import engine
from xtf_plugin.training.streaming import Stream

LOOSE = odd_sentences()
NOTHING = {"preset": "none", "selectors": {"odd": {"scorer": "typicality", "drop": {"below": -1000}}}, "calibration": 8}
BLOCK = {**LOOSE, "calibration": 8}


def losses(made):
    return [(entry["loss"], entry["grad_norm"]) for entry in made.state.log_history if "loss" in entry]


def state_of(model):
    modes = [module.training for module in model.modules()]
    gradients = [(p.requires_grad, None if p.grad is None else p.grad.tolist()) for p in model.parameters()]
    numbers = torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()
    return modes, gradients, numbers, torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")


def test_a_stream_that_drops_nothing_trains_to_the_same_bits(tmp_path):
    """Two epochs, dropout on, accumulation and a shuffled stream; documents are scored between the steps."""
    options = {"gradient_accumulation_steps": 2, "max_steps": 10, "gradient_checkpointing": True}
    stream = rows().to_iterable_dataset(num_shards=4).shuffle(seed=1, buffer_size=8)
    plain = trainer(tmp_path, stream, **options)
    plain.train()
    made = attached(tmp_path, trainer(tmp_path, stream, **options), {**NOTHING, "batch_tokens": 64})
    made.train()
    assert losses(made) == losses(plain) and len(losses(plain)) == 10
    assert stream_of(made)._documents > ROWS, "the second epoch came through here too"


def test_scoring_leaves_model_and_random_state_as_they_were(tmp_path, monkeypatch):
    """With all that scoring can do: the default, a selector, and attention."""
    read_prompts(monkeypatch)
    selectors = {**LOOSE["selectors"], "looked_at": {"scorer": "attention_received", "drop": {"quantile": 0.2}}}
    block = {**DEFAULT, "selectors": selectors, "calibration": 8, "batch_tokens": 64}
    made = attached(tmp_path, trainer(tmp_path), block)
    stream, compared = stream_of(made), []
    decide = stream._score_and_select

    def watch(documents):
        before = state_of(made.model)
        decide(documents)
        compared.append(before == state_of(made.model))

    stream._score_and_select = watch
    made.train()
    assert len(compared) > 3 and all(compared)


def test_reading_the_sample_takes_no_random_number_from_training(tmp_path):
    def draw():
        for row in rows():
            random.random(), np.random.rand(), torch.rand(1)
            yield row

    made = attached(tmp_path, trainer(tmp_path, IterableDataset.from_generator(draw)), BLOCK)
    callback, before = made._xtf_hooks, state_of(made.model)
    callback.on_train_begin(made.args, made.state, None)
    assert before == state_of(made.model) and len(callback.plan.documents) == 8


@pytest.mark.parametrize("shuffled", [False, True])
def test_a_resumed_run_trains_on_the_same_labels(tmp_path, shuffled, caplog):
    stream = rows().to_iterable_dataset(num_shards=2)
    stream = stream.shuffle(seed=3, buffer_size=8) if shuffled else stream
    options = {"save_strategy": "steps", "save_steps": 5, "num_train_epochs": 1}
    whole = trained(tmp_path / "a", trainer(tmp_path / "a", stream, **options), BLOCK)
    made = attached(tmp_path / "b", trainer(tmp_path / "b", stream, **options), BLOCK)
    seen = watched(made)
    made.train(resume_from_checkpoint=str(tmp_path / "a/out/checkpoint-5"))
    assert LOST not in caplog.text, "neither the first run nor one that begins after the sample"
    assert made.state.global_step == 10 and len(seen) == 5
    second = labels_by_document(seen)
    assert len(second) == ROWS // 2 and second.items() <= whole.items()


class Once(torch.utils.data.IterableDataset):
    """Rows out of one iterator that all iterations share."""

    def __init__(self, made):
        self.source = iter(list(made))

    def __iter__(self):
        yield from self.source


class Itself(Once):
    def __iter__(self):
        return self

    def __next__(self):
        return next(self.source)


LOST = "none of the first"


def test_a_stream_that_can_be_read_only_once_is_warned_of(tmp_path, caplog):
    made = attached(tmp_path, trainer(tmp_path, max_steps=3), BLOCK)
    made.train_dataset = Once(made.train_dataset)
    made.train()
    assert LOST in caplog.text and "8 rows of the calibration sample" in caplog.text


def test_a_stream_that_is_its_own_iterator_is_refused(tmp_path):
    made = attached(tmp_path, trainer(tmp_path), BLOCK)
    made.train_dataset = Itself(made.train_dataset)
    with pytest.raises(XTFUserError, match="Itself.* is its own iterator"):
        made.train()


def test_metrics_are_a_running_figure(tmp_path):
    made = attached(tmp_path, trainer(tmp_path), {**BLOCK, "batch_tokens": 64})
    seen = watched(made)
    made.train()
    logs = [entry for entry in made.state.log_history if "xtf/kept_fraction" in entry]
    labelled = sum(label != -100 for row in made.train_dataset for label in row["labels"])
    kept = sum(int((batch["labels"] != -100).sum()) for batch in seen)
    assert logs[-1]["xtf/kept_fraction"] == pytest.approx(kept / labelled)
    assert logs[-1]["xtf/dropped_by/odd"] == pytest.approx(1 - kept / labelled)
    assert logs[0]["xtf/kept_fraction"] != logs[-1]["xtf/kept_fraction"]


def test_the_end_of_training_prints_what_was_done(tmp_path, capsys):
    attached(tmp_path, trainer(tmp_path), BLOCK).train()
    printed = capsys.readouterr().err
    assert f"streamed {ROWS} documents in {ROWS} rows and scored {ROWS - 8} of them" in printed
    assert "calibration sample: the first 8 documents of the stream, not the whole stream" in printed


def test_a_separate_reference_stays_and_is_freed(tmp_path, capsys):
    folder = tiny.save_base(tmp_path / "reference", seed=3)
    block = {**BLOCK, "reference": {"model": str(folder), "quantization": "none", "dtype": "float32"}}
    expected = trained(tmp_path / "map", trainer(tmp_path, rows()), {**block, "calibration": 1000})
    made = trainer(tmp_path, peft_config=None)  # full fine-tuning
    assert trained(tmp_path / "stream", made, block) == expected
    assert "stays loaded while the stream is trained on: 0 MiB" in capsys.readouterr().err
    with pytest.raises(XTFError, match="scored nothing"):
        print(stream_of(made).batch_tokens)


def test_a_shuffled_stream_is_verified_against_what_was_scored_ahead(tmp_path):
    stream = rows().to_iterable_dataset().shuffle(seed=1, buffer_size=ROWS)
    expected = trained(tmp_path / "map", trainer(tmp_path, rows()), LOOSE)
    assert trained(tmp_path / "stream", trainer(tmp_path, stream), BLOCK) == expected


def test_labels_rebuilt_after_the_collator_stop_the_run(tmp_path):
    """The dataloader is built without our hook: the first batch carries other labels, in the sample or after it."""
    made = attached(tmp_path, trainer(tmp_path, save_steps=5), BLOCK)
    made.train()
    for checkpoint, message in ((None, "does not carry the planned labels"), (5, "xtf did not plan")):
        made = attached(tmp_path, trainer(tmp_path), {**LOOSE, "calibration": 16})
        del made.get_train_dataloader
        with pytest.raises(XTFError, match=message):
            made.train(resume_from_checkpoint=checkpoint and str(tmp_path / f"out/checkpoint-{checkpoint}"))


def test_a_loader_that_holds_rows_back_for_too_long_stops_the_run(tmp_path):
    stream = rows(400).to_iterable_dataset()
    made = attached(tmp_path, trainer(tmp_path, stream), {**BLOCK, "batch_tokens": 64})
    loader = made.get_train_dataloader

    def buffering():
        built = loader()
        held = list(built.base_dataloader.dataset)  # all rows are pulled before the first is collated
        return torch.utils.data.DataLoader(held, batch_size=4, collate_fn=built.base_dataloader.collate_fn)

    made.get_train_dataloader = buffering
    callback = made._xtf_hooks
    made.callback_handler.on_train_begin = lambda *args: args[-1]
    callback.on_train_begin(made.args, made.state, None)
    with pytest.raises(XTFError, match="did not read from the stream, or read more than 76 rows earlier"):
        made.train()


class WholeDataset(Scorer):
    name = "rank"

    def score(self, context):
        return np.argsort(context.logprobs).astype(np.float32)


OTHERS = {"scorer": "typicality", "reference": {"model": "some/model"}, "drop": {"below": -5}}


@pytest.mark.parametrize(
    ("block", "peft", "options", "message"),
    [
        ({}, LORA, {"dataloader_num_workers": 2}, "dataloader_num_workers is 2"),
        ({}, None, {}, r"base weights \(.* and \d+ more\).*reference.model"),
        ({}, LoraConfig(r=4, bias="lora_only", target_modules=["q_proj"]), {}, "base weights .*q_proj.*bias"),
        ({"selectors": {"mine": OTHERS}}, LORA, {}, "mine has a reference of its own .some/model"),
        ({"selectors": {"r": {"scorer": "rank", "drop": {"below": 1}}}}, LORA, {}, "rank.* needs the whole dataset"),
    ],
    ids=["workers", "full fine-tuning", "bias", "other reference", "whole dataset"],
)
def test_what_cannot_be_scored_while_it_streams_is_refused(tmp_path, monkeypatch, block, peft, options, message):
    monkeypatch.setitem(registry.BUILTIN, "rank", WholeDataset)
    model = tiny.model(attention_bias=True)
    made = trainer(tmp_path, peft_config=peft, model=model, **options)
    with pytest.raises(XTFUserError, match=message):
        attach(made, block or True)
    assert not hasattr(made, "_xtf_hooks"), "nothing of the trainer is changed"
    assert attach(trainer(tmp_path, rows(), peft_config=LORA), True), "a dataset is not refused"


def test_later_chunks_start_with_the_halved_batch_size(tmp_path, monkeypatch):
    """Training leaves less memory for scoring; only the first chunk runs out of it."""
    made = attached(tmp_path, trainer(tmp_path), {**BLOCK, "batch_tokens": 160})
    run, refused = engine._Pass._launch, []

    def tight(work, batch):
        if made.state.global_step and work.documents.lengths[batch].max() * len(batch) > 80:
            refused.append(len(batch))
            raise torch.OutOfMemoryError("out of memory")
        return run(work, batch)

    monkeypatch.setattr(engine._Pass, "_launch", tight)
    made.train()
    assert len(refused) == 1 and made.state.global_step == 10


@pytest.mark.parametrize(("halvings", "expected"), [(0, 4096), (3, 512), (4, 256), (40, 256)])
def test_batches_are_halved_a_few_times_at_most(halvings, expected):
    stream = Stream(XTFConfig.parse({"batch_tokens": 4096}), tiny.tokenizer())
    stream._reference, stream._halvings = lambda: SimpleNamespace(device=torch.device("cpu")), halvings
    assert stream.batch_tokens == expected


def test_several_processes_are_refused(tmp_path, monkeypatch):
    made = trainer(tmp_path)
    monkeypatch.setattr(type(made.accelerator), "num_processes", property(lambda self: 2))
    with pytest.raises(XTFUserError, match="supported in one process, and this run has 2"):
        attach(made, True)


def test_weights_that_begin_to_train_later_stop_the_run(tmp_path):
    made = attached(tmp_path, trainer(tmp_path), {**BLOCK, "batch_tokens": 16})
    step = made.training_step

    def unfreezing(*args, **kwargs):
        made.model.get_base_model().lm_head.weight.requires_grad_(True)
        return step(*args, **kwargs)

    made.training_step = unfreezing
    with pytest.raises(XTFUserError, match="base weights"):
        made.train()


def test_neither_a_length_nor_a_stream(tmp_path):
    made = trainer(tmp_path)
    made.train_dataset = SimpleNamespace()
    with pytest.raises(XTFUserError, match="SimpleNamespace, which has no length"):
        attach(made, True)


def test_rows_that_are_not_prepared(tmp_path):
    made = attached(tmp_path, trainer(tmp_path), BLOCK)
    made.train_dataset = rows().to_iterable_dataset()
    with pytest.raises(XTFUserError, match="no `input_ids` .it has prompt, completion"):
        made.train()


def test_calibration_beside_a_dataset_is_warned_of(tmp_path, caplog):
    attached(tmp_path, trainer(tmp_path, rows()), BLOCK)
    assert "calibration: 8 is for streamed data" in caplog.text


def test_a_dry_run_ends_with_the_sample(tmp_path):
    with pytest.raises(XTFDryRun):
        attached(tmp_path, trainer(tmp_path), {**BLOCK, "dry_run": True}).train()
    facts = json.loads((tmp_path / "out/xtf/summary.json").read_text())
    assert facts["streaming"] == {"calibration": 8, "documents": 8, "rows": 8, "whole_stream": False}
    assert facts["totals"]["documents"] == 8
