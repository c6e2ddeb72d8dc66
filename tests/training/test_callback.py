"""XTF inside a real SFTTrainer: the same masks for all kinds of batches, and no training without masks."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from tests import tiny
from tests.made_scores import DROPS
from tests.scorers.test_selectors import OFF, logprobs
from xtf_plugin import XTFDryRun, XTFError, attach


def trainer(tmp_path, rows=None, model=None, peft_config=None, eval_rows=None, **options):
    settings = {"max_steps": 2, "per_device_train_batch_size": 4, "max_length": 256, "bf16": False, **options}
    args = SFTConfig(
        output_dir=str(tmp_path / "out"), report_to="none", use_cpu=True, logging_steps=1, disable_tqdm=True, **settings
    )
    return SFTTrainer(
        model or tiny.model(),
        args=args,
        train_dataset=Dataset.from_list(rows or tiny.problems(24)),
        eval_dataset=eval_rows and Dataset.from_list(eval_rows),
        processing_class=tiny.tokenizer(),
        peft_config=peft_config,
    )


def run(tmp_path, block=DROPS, **options):
    made = attach(trainer(tmp_path, **options), {"cache_dir": str(tmp_path / "cache"), **block})
    seen = []
    step = made.training_step

    def spy(model, inputs, *args, **kwargs):
        seen.append({k: v.clone() for k, v in inputs.items() if k in ("input_ids", "labels")})
        return step(model, inputs, *args, **kwargs)

    made.training_step = spy
    made.evaluated, predict = [], made.prediction_step

    def watch(model, inputs, *args, **kwargs):
        for labels, mask in zip(inputs["labels"], inputs.get("attention_mask", []), strict=False):
            made.evaluated.append(labels[mask.bool()].tolist())
        return predict(model, inputs, *args, **kwargs)

    made.prediction_step = watch
    made.train()
    return made, seen


def masks(made):
    """Kept token positions of every document, by content."""
    plan = made._xtf_hooks.plan
    result = {}
    for index, key in enumerate(plan.documents.keys):
        where = slice(plan.scores.offsets[index], plan.scores.offsets[index + 1])
        result[key.tobytes()] = plan.selection.keep[where].tolist()
    return result


def test_labels_that_reach_the_model_are_the_planned_ones(tmp_path):
    made, seen = run(tmp_path)
    facts = json.loads((tmp_path / "out/xtf/summary.json").read_text())["totals"]
    assert 0 < facts["dropped_tokens"] < facts["completion_tokens"]
    table = pq.read_table(tmp_path / "out/xtf/scores.parquet").to_pydict()
    assert len(table["kept"]) == facts["completion_tokens"] and sum(table["kept"]) == facts["kept_tokens"]
    kept = {}
    for row, position, token, flag in zip(*(table[c] for c in ("row", "position", "token_id", "kept")), strict=True):
        kept.setdefault(row, {})[position] = token if flag else -100
    by_ids = {tuple(r["input_ids"]): kept[i] for i, r in enumerate(made.train_dataset)}
    for batch in seen:
        for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
            expected = next(v for k, v in by_ids.items() if list(k) == ids[: len(k)])
            assert labels == [expected.get(i, -100) for i in range(len(labels))]


def test_packing_workers_and_accumulation_give_the_same_masks(tmp_path):
    plain, _ = run(tmp_path)
    expected = masks(plain)
    variants = [
        {"packing": True, "packing_strategy": "bfd", "max_length": 200},
        {"packing": True, "packing_strategy": "bfd_split", "max_length": 200},
        {"padding_free": True, "max_length": None},
        {"dataloader_num_workers": 2, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 3},
    ]
    for options in variants:
        made, seen = run(tmp_path / "other", {**DROPS, "cache_dir": str(tmp_path / "cache")}, **options)
        assert masks(made) == expected, options
        assert any((batch["labels"] != -100).any() for batch in seen)
        facts = json.loads((tmp_path / "other/out/xtf/summary.json").read_text())["scoring"]
        assert facts["scored_documents"] == 0 and facts["stored_documents"] == 24, options


def test_wrapped_packing_scores_rows_as_they_are_trained_on(tmp_path):
    made, _ = run(tmp_path, packing=True, packing_strategy="wrapped", max_length=64)
    assert len(masks(made)) == len(made.train_dataset)


def test_multi_turn_assistant_only(tmp_path):
    made, seen = run(tmp_path, rows=tiny.conversations(12), assistant_only_loss=True, max_length=400)
    end = tiny.tokenizer().convert_tokens_to_ids("<|im_end|>")
    labels = torch.cat([batch["labels"].flatten() for batch in seen])
    ids = torch.cat([batch["input_ids"].flatten() for batch in seen])
    assert (labels == end).sum() > 0, "end-of-turn tokens are protected"
    assert not (labels[labels != -100] != ids[labels != -100]).any()


def test_eval_is_never_masked(tmp_path):
    made, _ = run(tmp_path, eval_rows=tiny.problems(8, seed=5), eval_strategy="steps", eval_steps=1)
    own = {tuple(row["labels"]) for row in made.eval_dataset}
    assert made.evaluated and all(tuple(labels) in own for labels in made.evaluated)


def test_dropped_labels_do_not_change_any_gradient(tmp_path):
    """Whatever value a dropped token's label had before, the gradients are the same; a kept token's label changes
    them.
    """
    made, seen = run(tmp_path, rows=tiny.problems(4), per_device_train_batch_size=4, max_steps=1)
    model, batch = tiny.model(), seen[0]
    plan = masks(made)
    assert not all(all(flags) for flags in plan.values())

    def gradient(labels):
        model.zero_grad()
        model(input_ids=batch["input_ids"], labels=labels).loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    masked = gradient(batch["labels"])
    swapped = torch.where(batch["labels"] == -100, -100, (batch["labels"] + 1) % 400)
    assert torch.equal(masked, gradient(batch["labels"].clone()))
    assert not torch.equal(masked, gradient(swapped))
    own = torch.stack(
        [
            torch.tensor(r["labels"] + [-100] * (batch["labels"].shape[1] - len(r["labels"])))
            for r in [_row_of(made, ids) for ids in batch["input_ids"].tolist()]
        ]
    )
    assert not torch.equal(masked, gradient(own)), "without the mask the gradient is another one"


def _row_of(made, ids):
    return next(r for r in made.train_dataset if r["input_ids"] == ids[: len(r["input_ids"])])


def test_metrics_reach_the_log(tmp_path):
    made, seen = run(tmp_path)
    entry = made.state.log_history[0]
    kept = json.loads((tmp_path / "out/xtf/summary.json").read_text())["totals"]["kept_fraction"]
    assert entry["xtf/kept_fraction"] == pytest.approx(kept)
    assert entry["xtf/kept_tokens_per_batch"] == int((seen[0]["labels"][:, 1:] != -100).sum())
    assert entry["xtf/dropped_by/reasoning_importance"] > 0


def test_resume_gives_the_same_masks(tmp_path):
    first, _ = run(tmp_path, save_strategy="steps", save_steps=1, max_steps=1)
    made = attach(
        trainer(tmp_path, save_strategy="steps", save_steps=1, max_steps=2),
        {"cache_dir": str(tmp_path / "cache"), **DROPS},
    )
    made.train(resume_from_checkpoint=True)
    assert made.state.global_step == 2
    assert masks(made) == masks(first)


def test_resumed_full_fine_tuning_without_its_scores_is_refused(tmp_path):
    run(tmp_path, save_strategy="steps", save_steps=1, max_steps=1, learning_rate=0.1)
    made = attach(
        trainer(tmp_path, save_strategy="steps", save_steps=1), {"cache_dir": str(tmp_path / "elsewhere"), **DROPS}
    )
    with pytest.raises(XTFError, match="no longer those of the base model"):
        made.train(resume_from_checkpoint=True)


def test_a_second_training_of_a_sharded_model_without_its_scores_is_refused(tmp_path):
    """No rank of a model that is split holds weights to look at, and each training counts its steps from 0."""
    made, _ = run(tmp_path, max_steps=1, learning_rate=0.1)
    callback = made._xtf_hooks
    callback._borrowed.sharded = True
    callback.config = callback.config.model_copy(update={"cache_dir": str(tmp_path / "elsewhere")})
    with pytest.raises(XTFError, match="no longer those of the base model"):
        made.train()


def test_dry_run_ends_before_the_first_step(tmp_path):
    made = attach(trainer(tmp_path), {"cache_dir": str(tmp_path / "cache"), "dry_run": True})
    with pytest.raises(XTFDryRun) as ended:
        made.train()
    assert ended.value.code == 0 and made.state.global_step == 0
    assert (tmp_path / "out/xtf/summary.json").is_file()


def test_absent_or_false_attaches_nothing(tmp_path):
    made = trainer(tmp_path)
    assert attach(made, None) is made and attach(made, False) is made
    assert not hasattr(made, "_xtf_hooks")


@pytest.mark.parametrize(
    "block",
    [
        {"preset": "paper", "reasoning_importance": False},
        {"preset": "paper", "knowledge_novelty": False},
        {"preset": "paper", "task_relevance": False},
        {"preset": "none", "force_drop": ["happy to help"]},
    ],
)
def test_every_attribute_can_be_switched_off(tmp_path, block, capsys):
    made, seen = run(tmp_path, block, max_steps=1, rows=[*tiny.problems(8), {"prompt": "Who?", "completion": "x"}])
    facts = json.loads((tmp_path / "out/xtf/summary.json").read_text())["totals"]
    assert 0 < facts["dropped_tokens"] < facts["completion_tokens"]
    assert set(facts["scores"]).isdisjoint(name for name, value in block.items() if value is False)
    assert "not comparable" in capsys.readouterr().err and seen


def test_a_batch_without_labels_is_counted_and_logged(tmp_path, caplog):
    """Almost everything is dropped: most batches lose all labels, and one is restored in each."""
    block = {
        "preset": "none",
        "knowledge_novelty": {"drop": {"unknown_below": 0.999}},
        "protect": {"special_tokens": False, "patterns": ["Zoe"], "formats": None},
        "min_kept": 0,
    }
    rows = [*tiny.problems(23), {"prompt": "Who?", "completion": " Zoe"}]
    made, seen = run(tmp_path, block, rows=rows, per_device_train_batch_size=2, max_steps=6)
    assert all((batch["labels"] != -100).any() for batch in seen)
    assert int(made._xtf_hooks.collator.counters[:, 1].sum()) >= 4
    assert "had no label left, and one was restored" in caplog.text


def test_excess_loss_against_a_reference_of_its_own(tmp_path):
    tiny.model(seed=7).save_pretrained(tmp_path / "other")
    tiny.tokenizer().save_pretrained(tmp_path / "other")
    reference = {"model": str(tmp_path / "other"), "quantization": "none"}
    part = {"scorer": "excess_loss", "reference": reference, "drop": {"quantile": 0.4}}
    options = {"rows": tiny.problems(12), "max_steps": 3, "learning_rate": 0.02}
    made, seen = run(tmp_path, {**OFF, "min_kept": 0, "selectors": {"rho": part}}, **options)
    plan = made._xtf_hooks.plan
    excess = logprobs(tiny.model(seed=7), plan.documents) - logprobs(tiny.model(), plan.documents)
    np.testing.assert_allclose(plan.scores.values["rho"], excess, atol=2e-4)
    facts = json.loads((tmp_path / "out/xtf/summary.json").read_text())
    assert 0.3 < facts["totals"]["scores"]["rho"]["fired_fraction"] < 0.5
    assert [entry["name"] for entry in facts["scorers"]["references"]] == [str(tmp_path / "other")]
    assert made.state.log_history[0]["xtf/dropped_by/rho"] > 0
    table = pq.read_table(tmp_path / "out/xtf/scores.parquet").to_pydict()
    np.testing.assert_allclose(table["rho"], plan.scores.values["rho"])
    assert sum(table["kept"]) == sum(int((batch["labels"] != -100).sum()) for batch in seen)
