"""attach() outside TRL's SFTTrainer: transformers' Trainer gets the same masks, and what cannot be masked is refused by
its name."""

from __future__ import annotations

import ast
import re
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    LlamaForSequenceClassification,
    Trainer,
    TrainingArguments,
)

from tests import tiny
from tests.pages import ROOT
from tests.recorder.sitecustomize import documents
from tests.test_plan import rows
from tests.training.test_callback import trainer as sft_trainer
from tests.watch import watched
from xtf_plugin import XTFCallback, XTFConfig, XTFDryRun, XTFError, XTFUserError, attach

BLOCK = {"preset": "paper", "reasoning_importance": {"layers": "all", "drop": {"quantile": 0.2}}}
ROWS = 12


class Plain(torch.utils.data.Dataset):
    """A dataset that is none of the datasets library's."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        return {name: torch.tensor(values) for name, values in self.data[index].items()}


def seq2seq():
    return DataCollatorForSeq2Seq(tiny.tokenizer(), padding=True)


def made(tmp_path, data=None, collator=None, cls=Trainer, model=None, **options):
    args = TrainingArguments(
        output_dir=str(tmp_path / "out"),
        per_device_train_batch_size=4,
        num_train_epochs=1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        **options,
    )
    data = Dataset.from_list(with_mask(rows(ROWS))) if data is None else data
    result = cls(
        model or tiny.model(),
        args=args,
        train_dataset=data,
        data_collator=collator or seq2seq(),
        processing_class=tiny.tokenizer(),
    )
    return result


def with_mask(data):
    return [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in data]


def padded(data, length=64):
    pads = [length - len(row["input_ids"]) for row in data]
    return [
        {
            "input_ids": row["input_ids"] + [1] * pad,
            "attention_mask": [1] * len(row["input_ids"]) + [0] * pad,
            "labels": row["labels"] + [-100] * pad,
        }
        for row, pad in zip(data, pads, strict=True)
    ]


def seen(trainer, tmp_path):
    """Positions with a label of every document that a step was given, by its token ids."""
    attach(trainer, {"cache_dir": str(tmp_path / "cache"), **BLOCK})
    found = watched(trainer)
    trainer.train()
    assert len(dict(found)) == len(found) == ROWS
    return dict(found)


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """What TRL's SFTTrainer is given of the same rows."""
    folder = tmp_path_factory.mktemp("sft")
    options = {"num_train_epochs": 1, "max_steps": -1, "save_strategy": "no"}
    labels = seen(sft_trainer(folder, rows=rows(ROWS), **options), folder)
    assert 0 < sum(map(len, labels.values())) < sum(label != -100 for row in rows(ROWS) for label in row["labels"])
    return labels


SHAPES = {
    "Trainer": {},
    "all columns": {"remove_unused_columns": False},
    "workers": {"dataloader_num_workers": 2},
    "padded before": {"data": lambda: Dataset.from_list(padded(rows(ROWS)))},
    "tensors": {"data": lambda: Dataset.from_list(with_mask(rows(ROWS))).with_format("torch")},
    "torch dataset": {"data": lambda: Plain(with_mask(rows(ROWS)))},
    "label smoothing": {"label_smoothing_factor": 0.1},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_trainer_of_transformers_gets_the_masks_of_trl(tmp_path, expected, shape):
    options = dict(SHAPES[shape])
    data = options.pop("data", lambda: None)()
    assert seen(made(tmp_path, data, **options), tmp_path) == expected


def test_a_loop_of_ones_own_gets_them_from_the_collator(tmp_path, expected):
    """As docs/other-hosts.md shows it: a Trainer plans, its callback's collator applies the plan."""
    data = Dataset.from_list(with_mask(rows(ROWS)))
    planner = made(tmp_path, data)
    plan = XTFCallback(planner, XTFConfig.parse({"cache_dir": str(tmp_path / "cache"), "dry_run": True, **BLOCK}))
    planner.add_callback(plan)
    with pytest.raises(XTFDryRun):
        planner.train()
    loader = torch.utils.data.DataLoader(data, batch_size=4, shuffle=True, collate_fn=plan.collator, num_workers=1)
    given = [document for batch in loader for document in documents(batch)]
    assert len(given) == ROWS and {tuple(d["ids"]): tuple(d["kept"]) for d in given} == expected
    stranger = {**data[0], "input_ids": [7, *data[0]["input_ids"][1:]]}
    with pytest.raises(XTFError, match="was not scored"):
        plan.collator([stranger])


def messages():
    """Every text of the package with a blank for what is filled in, adjacent pieces joined as Python joins them."""
    for path in (ROOT / "xtf_plugin").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_the_list_of_what_is_refused_quotes_its_messages():
    page = (ROOT / "docs/other-hosts.md").read_text(encoding="utf-8").partition("## What is refused")[2]
    quoted = [text for row in page.splitlines()[4:] for text in re.findall(r"`([^`]+)`", row.split("|")[2])]
    texts = list(messages())
    assert len(quoted) > 15
    assert [text for text in quoted if not any(text.strip("… ") in message for message in texts)] == []


class TestRefusals:
    @pytest.mark.parametrize("host", [SimpleNamespace(fit=print), torch.nn.Linear(1, 1), None])
    def test_a_host_that_is_not_known(self, host):
        with pytest.raises(XTFUserError, match=type(host).__name__):
            attach(host, True)

    def test_a_classifier(self, tmp_path):
        config = tiny.model().config
        with pytest.raises(XTFUserError, match="LlamaForSequenceClassification"):
            attach(made(tmp_path, model=LlamaForSequenceClassification(config)), True)

    def test_a_label_for_a_whole_row(self, tmp_path):
        data = Dataset.from_list([{**row, "labels": 1} for row in rows(4)])
        with pytest.raises(XTFUserError, match="labels"):
            attach(made(tmp_path, data), BLOCK).train()

    def test_a_collator_that_makes_its_own_labels(self, tmp_path):
        collator = DataCollatorForLanguageModeling(tiny.tokenizer(), mlm=False)
        with pytest.raises(XTFError, match="DataCollatorForLanguageModeling"):
            attach(made(tmp_path, collator=collator), {"cache_dir": str(tmp_path / "cache"), **BLOCK}).train()

    def test_labels_on_padding(self, tmp_path):
        data = padded(rows(4))
        data[0]["labels"][-1] = 1
        with pytest.raises(XTFUserError, match="padding"):
            attach(made(tmp_path, Dataset.from_list(data)), BLOCK).train()

    def test_another_trainer_of_trl(self, tmp_path):
        from trl import DPOConfig, DPOTrainer

        pairs = [{"prompt": "How many?", "chosen": " Two.", "rejected": " None."}] * 4
        args = DPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none")
        data = Dataset.from_list(pairs)
        host = DPOTrainer(tiny.model(), tiny.model(), args=args, train_dataset=data, processing_class=tiny.tokenizer())
        with pytest.raises(XTFUserError, match="DPOTrainer is not supported"):
            attach(host, True)

    def test_no_tokenizer(self, tmp_path):
        host = made(tmp_path, collator=lambda rows: seq2seq()(rows))
        host.processing_class = None
        with pytest.raises(XTFUserError, match="processing_class=tokenizer"):
            attach(host, BLOCK).train()

    def test_a_training_step_that_bypasses_the_hook(self, tmp_path):
        """The run stops after its first step: its masks cannot be checked."""
        host = attach(made(tmp_path), {"cache_dir": str(tmp_path / "cache"), **BLOCK})
        host.training_step = type(host).training_step.__get__(host)
        with pytest.raises(XTFError, match="a batch that xtf has not seen"):
            host.train()
        assert host.state.global_step <= 1
