"""Selectors inside a real SFTTrainer: against a reference of their own, and evolving from epoch to epoch."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from peft import LoraConfig
from transformers import TrainerCallback

from tests import tiny
from tests.test_callback import trainer
from tests.test_selectors import OFF, logprobs
from xtf_plugin import XTFError, XTFUserError, attach
from xtf_plugin.epochs import FILE, EpochSelection
from xtf_plugin.selection import rule_bits

EVOLVING = {"scorer": "token_cleaning", "mode": "self_evolving", "drop": {"quantile": 0.3}}
BLOCK = {**OFF, "selectors": {"tc": EVOLVING}}
STEPS = 3  # of an epoch: 12 rows in batches of 4
LORA = {"peft_config": LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"])}


class Watch(TrainerCallback):
    """What was true at the start of each epoch, and which labels each step saw."""

    def __init__(self, made) -> None:
        self.made, self.weights, self.plans, self.labels = made, [], {}, []
        self.callback = made._xtf_hooks.on_batch.__self__
        step = made.training_step

        def spy(model, inputs, *args, **kwargs):
            self.labels.append(inputs["labels"].clone())
            self.plans.setdefault(int(made.state.global_step) // STEPS, self.callback.plan)
            return step(model, inputs, *args, **kwargs)

        made.training_step = spy

    def on_epoch_begin(self, args, state, control, model=None, **_):
        merged = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        self.weights.append(merged)


def made(tmp_path, block=BLOCK, model=None, **options):
    settings = {
        "max_steps": -1,
        "num_train_epochs": 3,
        "learning_rate": 0.02,
        "save_strategy": "no",
        "shuffle_dataset": False,
        **options,
    }
    result = trainer(tmp_path, rows=tiny.problems(12), model=model, **settings)
    return attach(result, {"cache_dir": str(tmp_path / "cache"), "min_kept": 0, **block})


def run(tmp_path, resume=None, **options):
    result = made(tmp_path, **options)
    watch = Watch(result)
    result.callback_handler.callbacks.insert(0, watch)
    result.train(resume_from_checkpoint=resume)
    return watch


def keeps(watch):
    return {epoch: plan.selection.keep.tolist() for epoch, plan in watch.plans.items()}


def test_excess_loss_against_a_reference_of_its_own(tmp_path):
    tiny.model(seed=7).save_pretrained(tmp_path / "other")
    tiny.tokenizer().save_pretrained(tmp_path / "other")
    reference = {"model": str(tmp_path / "other"), "quantization": "none"}
    part = {"scorer": "excess_loss", "reference": reference, "drop": {"quantile": 0.4}}
    watch = run(tmp_path, block={**OFF, "selectors": {"rho": part}}, num_train_epochs=1)
    plan = watch.callback.plan
    excess = logprobs(tiny.model(seed=7), plan.documents) - logprobs(tiny.model(), plan.documents)
    np.testing.assert_allclose(plan.scores.selectors["rho"], excess, atol=2e-4)
    facts = json.loads((tmp_path / "out/xtf/summary.json").read_text())
    assert 0.3 < facts["totals"]["attributes"]["rho"]["fired_fraction"] < 0.5
    assert [entry["name"] for entry in facts["selectors"]["references"]] == [str(tmp_path / "other")]
    assert watch.made.state.log_history[0]["xtf/dropped_by/rho"] > 0
    table = pq.read_table(tmp_path / "out/xtf/scores.parquet").to_pydict()
    np.testing.assert_allclose(table["rho"], plan.scores.selectors["rho"])
    assert sum(table["kept"]) == sum(int((labels != -100).sum()) for labels in watch.labels)


def test_packed_rows_are_selected_anew_too(tmp_path):
    watch = run(tmp_path, packing=True, packing_strategy="bfd", max_length=64, per_device_train_batch_size=1)
    last = watch.callback.plan
    assert last.scores.selectors["tc"] is not None and 0.6 < last.selection.keep.mean() < 0.8
    steps = len(watch.labels) // 3
    seen = [sum(int((labels != -100).sum()) for labels in watch.labels[i : i + steps]) for i in (0, 2 * steps)]
    assert seen == [len(last.selection.keep), last.selection.keep.sum()]


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
def test_masks_follow_the_model_from_epoch_to_epoch(tmp_path, adapters):
    """Every epoch's scores are those of its first weights, computed independently; every batch carries its masks."""
    watch = run(tmp_path, **(LORA if adapters else {}))
    plans = watch.plans
    assert sorted(plans) == [0, 1, 2]
    assert plans[0].scores.selectors["tc"] is None and plans[0].selection.keep.all()
    base = logprobs(tiny.model(), plans[0].documents)
    for epoch in (1, 2):
        model = watch.made.model
        with torch.no_grad():
            model.load_state_dict(watch.weights[epoch])
        now = logprobs(model.eval(), plans[epoch].documents)
        np.testing.assert_allclose(plans[epoch].scores.selectors["tc"], now - base, atol=5e-4)
        fired = (plans[epoch].selection.reasons & rule_bits(watch.callback.config)["tc"]) > 0
        assert 0.2 < fired.mean() < 0.4
        labels = watch.labels[epoch * STEPS : (epoch + 1) * STEPS]
        assert sum(int((part != -100).sum()) for part in labels) == plans[epoch].selection.keep.sum()
        facts = json.loads((tmp_path / f"out/xtf/epoch-{epoch + 1}/summary.json").read_text())
        assert facts["totals"]["kept_tokens"] == plans[epoch].selection.keep.sum()
    assert keeps(watch)[1] != keeps(watch)[2]
    logged = [entry["xtf/dropped_by/tc"] for entry in watch.made.state.log_history if "xtf/dropped_by/tc" in entry]
    assert logged[:STEPS] == [0.0] * STEPS and all(share > 0 for share in logged[STEPS:])


def test_masks_reach_the_dataloaders_workers(tmp_path):
    plain, workers = run(tmp_path), run(tmp_path / "workers", dataloader_num_workers=2)
    assert keeps(plain) == keeps(workers)
    assert all(torch.equal(a, b) for a, b in zip(plain.labels, workers.labels, strict=True))


def test_other_rules_hold_in_the_first_epoch_and_beside_the_selector(tmp_path):
    block = {"reasoning_importance": False, "task_relevance": False, "selectors": {"tc": EVOLVING}}
    novelty = {"knowledge_novelty": {"drop": {"quantile": 0.2}}}
    watch = run(tmp_path, block={**block, **novelty}, num_train_epochs=2)
    first, second = (watch.plans[epoch].selection for epoch in (0, 1))
    assert 0 < (~first.keep).sum() < (~second.keep).sum()
    assert not (second.keep & ~first.keep).any()


def test_the_first_weights_are_the_base_also_without_attributes(tmp_path):
    plan = run(tmp_path, num_train_epochs=2).plans[0]
    np.testing.assert_allclose(plan.scores.logprobs, logprobs(tiny.model(), plan.documents), atol=1e-4)


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("at", [STEPS + 1, 2 * STEPS], ids=["inside", "end"])
def test_a_resumed_run_trains_on_the_same_tokens(tmp_path, at, adapters):
    options = LORA if adapters else {}
    whole = run(tmp_path, save_strategy="steps", save_steps=1, **options)
    rest = run(tmp_path, resume=str(tmp_path / f"out/checkpoint-{at}"), **options)
    assert rest.made.state.global_step == 3 * STEPS
    assert {epoch: keep for epoch, keep in keeps(whole).items() if epoch >= at // STEPS} == keeps(rest)
    assert all(torch.equal(a, b) for a, b in zip(whole.labels[at:], rest.labels, strict=True))


def test_a_checkpoint_that_is_not_there_is_not_made_up(tmp_path, caplog):
    watch = run(tmp_path, num_train_epochs=2)
    selection = next(c for c in watch.made.callback_handler.callbacks if isinstance(c, EpochSelection))
    selection.on_save(watch.made.args, watch.made.state, None)
    assert "no run can resume from checkpoint 6" in caplog.text
    assert not list((tmp_path / "out").glob("checkpoint-*"))


class TestResumeIsRefused:
    @pytest.fixture
    def checkpoint(self, tmp_path):
        run(tmp_path, save_strategy="steps", save_steps=1, num_train_epochs=2)
        folder = tmp_path / f"out/checkpoint-{STEPS + 1}"
        assert (folder / FILE).is_file() and not (tmp_path / f"out/checkpoint-{STEPS - 1}" / FILE).exists()
        return folder

    def refused(self, tmp_path, checkpoint, told, **options):
        with pytest.raises(XTFUserError, match=rf"{told}.*resumes in the middle of epoch 2.*end of an epoch"):
            run(tmp_path, resume=str(checkpoint), num_train_epochs=2, **options)

    def test_without_the_scores(self, tmp_path, checkpoint):
        (checkpoint / FILE).unlink()
        self.refused(tmp_path, checkpoint, "is not there")

    def test_with_damaged_scores(self, tmp_path, checkpoint):
        path = checkpoint / FILE
        path.write_bytes(path.read_bytes()[:200])
        self.refused(tmp_path, checkpoint, "cannot be read")

    def test_with_pickled_scores(self, tmp_path, checkpoint):
        np.savez(checkpoint / FILE, about=np.asarray([{"x": 1}], dtype=object))
        self.refused(tmp_path, checkpoint, "cannot be read")

    def test_with_another_selector(self, tmp_path, checkpoint):
        block = {**OFF, "selectors": {"tc": {**EVOLVING, "drop": {"quantile": 0.1}}}}
        self.refused(tmp_path, checkpoint, "belongs to another block", block=block)


class TestRefusals:
    def test_workers_that_outlive_an_epoch(self, tmp_path):
        result = trainer(tmp_path, dataloader_persistent_workers=True, dataloader_num_workers=2)
        with pytest.raises(XTFUserError, match=r"selector tc .*dataloader_persistent_workers: false"):
            attach(result, BLOCK)
        assert not hasattr(result, "_xtf_hooks")

    def test_a_single_epoch(self, tmp_path):
        with pytest.raises(XTFUserError, match=r"selector tc selects from the second epoch on, but this run has 1"):
            made(tmp_path, num_train_epochs=1).train()

    def test_training_that_diverged(self, tmp_path):
        result = made(tmp_path)

        class Break(TrainerCallback):
            def on_epoch_end(self, args, state, control, model=None, **_):
                with torch.no_grad():
                    model.lm_head.weight.fill_(float("nan"))

        result.add_callback(Break())
        with pytest.raises(XTFError, match="NaN"):
            result.train()
