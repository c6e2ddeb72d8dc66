"""What `xtf check` says of the data of an Axolotl recipe is what Axolotl's own loading says."""

from __future__ import annotations

import json

import pytest
import yaml
from axolotl.utils.data import sft
from axolotl.utils.dict import DictDefault
from datasets import Dataset, DatasetDict
from transformers import AutoTokenizer

from tests import tiny
from tests.axolotl import stock
from xtf_plugin.hosts.preflight import notes, problems
from xtf_plugin.hosts.recipes import load_recipe, parse_block

ASKED = [{"question": "What is 2 + 3?", "answer": "It is 5."}] * 4
ALPACA = stock.instructions()[:4]
CHATS = tiny.conversations(4)
TEXTS = [{"text": "One. Two three."}] * 4
TOKENS = [{"input_ids": [5, 6], "attention_mask": [1, 1], "labels": [-100, 6]}] * 4
OWN = {
    "field_instruction": "question",
    "field_output": "answer",
    "format": "{instruction}",
    "no_input_format": "{instruction}",
}
CASES = {  # rows; the source; what is wrong with it
    "chats": (CHATS, {"type": "chat_template"}, ""),
    "chats elsewhere": ([{"talk": row["messages"]} for row in CHATS], {"type": "chat_template"}, "column `messages`"),
    "chats named": ([{"talk": r["messages"]} for r in CHATS], {"type": "chat_template", "field_messages": "talk"}, ""),
    "alpaca": (ALPACA, {"type": "alpaca"}, ""),
    "alpaca of questions": (ASKED, {"type": "alpaca"}, "column `instruction`, and the data has question, answer"),
    "alpaca with a style": (ASKED, {"type": "alpaca:chat"}, "column `instruction`"),
    "alpaca without answers": ([{"instruction": "a"}] * 4, {"type": "alpaca"}, "column `output`"),
    "questions": (ASKED, {"type": "alpaca_chat.load_qa"}, ""),
    "questions of alpaca": (ALPACA, {"type": "alpaca_chat.load_qa"}, "column `question`"),
    "text": (TEXTS, {"type": "completion"}, ""),
    "text elsewhere": ([{"body": "One."}] * 4, {"type": "completion"}, "column `text`"),
    "text named": ([{"body": "One."}] * 4, {"type": "completion", "field": "body"}, ""),
    "segments": (TEXTS, {"type": "input_output"}, "column `segments`"),
    "a teacher": (ALPACA, {"type": "gpteacher"}, "column `response`"),
    "a type of one's own": (ASKED, {"type": OWN}, ""),
    "a type of one's own for other columns": (ALPACA, {"type": OWN}, "type of your own needs the column `question`"),
    "tokens": (TOKENS, {"type": "alpaca"}, ""),
    "another split": (ALPACA, {"type": "alpaca", "split": "sft"}, "no split 'sft', only train"),
    "a part of a split": (ALPACA, {"type": "alpaca", "split": "train[:2]"}, ""),
    "a folder": (ALPACA, {"type": "alpaca", "folder": "plain"}, ""),
    "a folder with other columns": (ASKED, {"type": "alpaca", "folder": "plain"}, "column `instruction`"),
    "a folder without the split": (ALPACA, {"type": "alpaca", "folder": "test.jsonl"}, "no split 'train', only test"),
    "another configuration": (ALPACA, {"type": "alpaca", "folder": "plain", "name": "main"}, "only default"),
    "a file of a folder": (ALPACA, {"type": "alpaca", "folder": "plain", "data_files": ["data/train.jsonl"]}, ""),
    "no such file": (ALPACA, {"type": "alpaca", "folder": "plain", "data_files": ["train.jsonl"]}, "no file"),
    "saved": (ALPACA, {"type": "alpaca", "folder": "one"}, ""),
    "saved, whatever the split": (ALPACA, {"type": "alpaca", "folder": "one", "split": "sft"}, ""),
    "saved splits": (ALPACA, {"type": "alpaca", "folder": "several"}, ""),
    "saved splits, another one": (ALPACA, {"type": "alpaca", "folder": "several", "split": "sft"}, ""),
    "saved with other columns": (ASKED, {"type": "alpaca", "folder": "several"}, "column `instruction`"),
    "saved without the split": (ALPACA, {"type": "alpaca", "folder": "others"}, "no split 'train', only sft"),
    "at home": (ALPACA, {"type": "alpaca", "path": "~/train.jsonl"}, "`~` stands for no folder here"),
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny.save_base(folder)
    return folder


def source_of(folder, rows, entry):
    """Write rows as a source says, and return it with its path."""
    entry = {**entry}
    kind, folder = entry.pop("folder", None), folder / "data"
    if kind in (None, "plain", "test.jsonl"):
        folder.mkdir()
        file = folder / ("train.jsonl" if kind != "test.jsonl" else kind)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return {"path": str(folder if kind else file), **entry}
    made = Dataset.from_list(rows)
    splits = {"one": made, "several": DatasetDict({"train": made}), "others": DatasetDict({"sft": made})}
    splits[kind].save_to_disk(str(folder))
    return {"path": str(folder), **entry}


def axolotl_row(source, model, **settings):
    """The first row of tokens that Axolotl makes of a source; None: it fails."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens(settings.get("special_tokens", {}))
    cfg = DictDefault({"sequence_len": 512, "train_on_inputs": False, "dataset_num_proc": 1, "seed": 7, **settings})
    entry = DictDefault({"chat_template": "tokenizer_default", **source})
    try:
        made, _ = sft._load_and_process_single_dataset(
            dataset_config=entry, cfg=cfg, tokenizer=tokenizer, split="train", seed=7
        )
        return next(iter(made))
    except Exception:
        return None


@pytest.mark.parametrize("case", CASES)
def test_check_and_axolotl_agree_about_data(model, tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    rows, entry, message = CASES[case]
    source = source_of(tmp_path, rows, entry)
    path = tmp_path / "recipe.yaml"
    recipe = {"base_model": str(model), "datasets": [source], "plugins": [stock.PLUGIN], "xtf": True}
    path.write_text(yaml.safe_dump(recipe))
    loaded = load_recipe(path)
    found = problems(loaded, parse_block(loaded))
    assert len(found) == bool(message) and all(message in problem for problem in found), found
    assert (axolotl_row(source, model) is None) is bool(message)


USER = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
ENDS = {  # a template, keys of the source and of the recipe; what is noted, or whether the end is trained
    "the eos token": (USER + "{{ eos_token }}\n{% endfor %}", {}, {}, ""),
    "another one": (
        USER + "<|im_end|>\n{% endfor %}",
        {},
        {},
        "writes '<|im_end|>', and Axolotl trains '<|endoftext|>'",
    ),
    "that is named": (USER + "<|im_end|>\n{% endfor %}", {}, {"eot_tokens": ["<|im_end|>"]}, ""),
    "that is the eos token now": (
        USER + "<|im_end|>\n{% endfor %}",
        {},
        {"special_tokens": {"eos_token": "<|im_end|>"}},
        "",
    ),
    "that is not trained": (USER + "{{ eos_token }}\n{% endfor %}", {"train_on_eos": "none"}, {}, "train_on_eos: none"),
}


@pytest.mark.parametrize("kind", ENDS)
def test_ends_of_turns_that_axolotl_does_not_train_are_noted(model, tmp_path, kind):
    template, keys, settings, message = ENDS[kind]
    file = tmp_path / "t.jinja"
    file.write_text(template)
    source = source_of(tmp_path, CHATS, {"type": "chat_template", **keys})
    source |= {"chat_template": "jinja", "chat_template_jinja": str(file)}
    path = tmp_path / "recipe.yaml"
    recipe = {"base_model": str(model), "datasets": [source], "plugins": [stock.PLUGIN], "xtf": True, **settings}
    path.write_text(yaml.safe_dump(recipe))
    found = notes(load_recipe(path))
    assert len(found) == bool(message) and all(message in note for note in found), found
    row = axolotl_row(source, model, **settings)
    trained = {token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100}
    tokenizer = AutoTokenizer.from_pretrained(model)
    ends = set(tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"]))
    assert bool(trained & ends) is not bool(message)


def test_templates_that_axolotl_brings_are_read(model, tmp_path):
    source = source_of(tmp_path, CHATS, {"type": "chat_template", "chat_template": "gemma3"})
    path = tmp_path / "recipe.yaml"
    recipe = {"base_model": str(model), "datasets": [source], "plugins": [stock.PLUGIN], "xtf": True}
    path.write_text(yaml.safe_dump(recipe))
    (note,) = notes(load_recipe(path))
    assert "writes '<end_of_turn>'" in note and "Set eot_tokens: ['<end_of_turn>']" in note
