"""Public reports about masks, templates and truncation, rebuilt on a tiny model as their authors had them.

Each is named by its place on GitHub. With a block the steps train what they train without it, but for what the rules
drop; what the report is about is said by `xtf check` or by the run.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import trl
from datasets import Dataset
from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig
from transformers import Trainer
from trl import SFTConfig, SFTTrainer

from tests import tiny
from tests.hosts.test_other_hosts import made as plain_trainer
from tests.hosts.test_preflight import checked, in_stock, made, recipe_of  # noqa: F401 (a fixture)
from tests.recorder.sitecustomize import documents
from xtf_plugin import XTFUserError, attach
from xtf_plugin.hosts import trl as trl_host
from xtf_plugin.hosts.preflight import notes
from xtf_plugin.hosts.recipes import load_recipe

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
DROPS = {"preset": "none", "knowledge_novelty": {"drop": {"quantile": 0.3}, "scope": "dataset"}}
CHATS = tiny.conversations(12)
PAIRS = [{"prompt": row["messages"][:1], "completion": row["messages"][1:2]} for row in CHATS]
INTENTS = ["<rag>();", "<command>(zoom=3);", "<followup>();", "<unknown>();"]
GLM = (  # the end of an answer is the beginning of the next turn, outside the mask
    "[gMASK]<sop>{% for m in messages %}{% if m.role == 'user' %}<|user|>\n{{ m.content }}{% else %}<|assistant|>\n"
    "{% generation %}{{ m.content }}{% endgeneration %}{% endif %}{% endfor %}"
)
AT_ONCE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ '<|user|>' + m.content }}{% endif %}{% endfor %}"
)


def intents():
    """Short answers in a form of their own; the conversations have one to three turns."""
    rows = []
    for row, turns in zip(tiny.conversations(15, turns=3), 5 * [1, 2, 3], strict=True):
        messages = [{"role": "system", "content": "Classify."}, *row["messages"][: 2 * turns]]
        for place in range(2, len(messages), 2):
            messages[place] = {"role": "assistant", "content": INTENTS[(len(rows) + place) % 4]}
        rows.append({"messages": messages})
    return rows


def tool_calls(as_text):
    """Calls of a tool; its arguments are not the same in all rows, so `datasets` fills in what is missing."""
    city = {"type": "object", "properties": {"city": {"type": "string"}}}
    tools = [{"type": "function", "function": {"name": "weather", "description": "Of a city.", "parameters": city}}]
    rows = []
    for number, name in enumerate(2 * tiny.NAMES):
        given = {"city": name, **({"unit": "C"} if number % 2 else {})}
        call = {"type": "function", "function": {"name": "weather", "arguments": given}}
        turns = [
            {"role": "user", "content": f"The weather in {name}?"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "name": "weather", "content": "12"},
            {"role": "assistant", "content": f"It is {number} degrees in {name}."},
        ]
        rows.append({"messages": turns, "tools": json.dumps(tools) if as_text else tools})
    return rows


LONG = [{**row, "prompt": "far too long " * 40 + row["prompt"]} for row in tiny.problems(6)]
REPORTS = {  # rows; keys of the recipe; what `xtf check` says
    "huggingface/trl#5988": (CHATS, {"template": GLM, "assistant_only_loss": True}, "no end of turn is trained"),
    "huggingface/trl#5213": (PAIRS, {"chat_template_path": str(TEMPLATES / "qwen3.jinja")}, "inserts '<think>"),
    "huggingface/trl#4922": (
        intents(),
        {"chat_template_path": str(TEMPLATES / "phi3_5_training.jinja"), "assistant_only_loss": True},
        "",
    ),
    "huggingface/trl#5324": (tiny.problems(8), {"completion_only_loss": True, "max_length": 64}, ""),
    "huggingface/trl#6668": ([*LONG[:4], *tiny.problems(8)], {"max_length": 64}, ""),
    "huggingface/trl#1282": (
        [{"prompt": row["messages"][:3], "completion": row["messages"][3:]} for row in CHATS],
        {},
        "",
    ),
    "huggingface/trl#3597, as text": (
        tool_calls(as_text=True),
        {"chat_template_path": str(TEMPLATES / "qwen2_5_training.jinja"), "assistant_only_loss": True},
        "",
    ),
    "huggingface/trl#3597, as lists": (
        tool_calls(as_text=False),
        {"chat_template_path": str(TEMPLATES / "llama3_1.jinja")},
        "",
    ),
    "huggingface/alignment-handbook#127": (
        [{"text": "<|endoftext|>" + row["prompt"] + row["completion"]} for row in tiny.problems(8)],
        {"pad_token": "<|endoftext|>"},
        "",
    ),
    "huggingface/open-r1#492": (
        CHATS,
        {"pad_token": "<|im_end|>", "eos_token": "<|im_end|>", "assistant_only_loss": True},
        "",
    ),
    "huggingface/trl#3067": (
        CHATS,
        {"packing": True, "packing_strategy": "wrapped", "max_length": 96, "assistant_only_loss": True},
        "",
    ),
}


@pytest.fixture
def seen(monkeypatch):
    """Token ids and trained positions of every document of the steps."""
    found, step = [], Trainer.training_step

    def spy(self, model, inputs, *args, **kwargs):
        found.extend((tuple(each["ids"]), tuple(each["kept"])) for each in documents(inputs))
        return step(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", spy)
    return found


def recipe_with(made, tmp_path, rows, changes, **more):  # noqa: F811
    changes = dict(changes)
    if template := changes.pop("template", None):
        (tmp_path / "t.jinja").write_text(template)
        changes["chat_template_path"] = str(tmp_path / "t.jinja")
    whole = {"num_train_epochs": 1, "max_steps": -1, "save_strategy": "no"}
    return recipe_of(made, tmp_path, rows=rows, **{**whole, **changes, **more})


@pytest.mark.parametrize("report", REPORTS)
def test_steps_train_what_they_train_without_a_block_but_for_what_is_dropped(
    made,  # noqa: F811
    tmp_path,
    monkeypatch,
    seen,
    report,
):
    rows, changes, note = REPORTS[report]
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setattr(trl_host, "_block_parsed", True)  # by another test: `xtf: false` then has to say so
    assert in_stock(recipe_with(made, tmp_path, rows, changes, xtf=False), monkeypatch)
    stock = {ids: set(kept) for ids, kept in seen}
    seen.clear()
    block = {**DROPS, "cache_dir": str(tmp_path / "cache")}
    path = recipe_with(made, tmp_path, rows, changes, xtf=block)
    assert checked(path) == []
    found = notes(load_recipe(path))
    assert bool(found) is bool(note) and all(note in each for each in found), found
    assert in_stock(path, monkeypatch)
    assert len(seen) >= len(stock) and all(ids in stock and set(kept) <= stock[ids] for ids, kept in seen)
    dropped = sum(len(stock[ids]) - len(kept) for ids, kept in dict(seen).items())
    assert dropped
    ends = set(tiny.tokenizer().convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"]))
    for ids, kept in seen:
        assert not {place for place in stock[ids] - set(kept) if ids[place] in ends}, "an end of turn is dropped"


def test_an_old_key_is_named(made, tmp_path, monkeypatch):  # noqa: F811
    """huggingface/trl#5324 has the key of older versions."""
    path = recipe_with(made, tmp_path, tiny.problems(8), {"max_seq_length": 64})
    assert any("Did you mean max_length?" in problem for problem in checked(path))
    assert not in_stock(path, monkeypatch)


def test_rows_of_which_no_answer_is_left(made, tmp_path, capsys, monkeypatch):  # noqa: F811
    """huggingface/trl#6668: every answer is cut off."""
    path = recipe_with(made, tmp_path, LONG, {"max_length": 32}, xtf={**DROPS, "cache_dir": str(tmp_path / "cache")})
    assert not in_stock(path, monkeypatch)
    error = capsys.readouterr().err
    assert "xtf: error: no row of the training data is left to train on" in error and "max_length" in error


def test_an_answer_of_one_token_at_the_very_beginning(made, tmp_path, capsys, monkeypatch):  # noqa: F811
    """huggingface/transformers#47325: nothing predicts a first token, so nothing is trained."""
    rows = [{"messages": [{"role": "assistant", "content": "A"}, row["messages"][0]]} for row in CHATS]
    block = {"xtf": {**DROPS, "cache_dir": str(tmp_path / "cache")}}
    path = recipe_with(made, tmp_path, rows, {"template": AT_ONCE, "assistant_only_loss": True}, **block)
    assert not in_stock(path, monkeypatch)
    assert "has a completion token that is predicted" in capsys.readouterr().err


def test_labels_that_are_all_ignored(tmp_path):
    """unslothai/unsloth#2900 and #11321: the marks of answers are not those of the template."""
    rows = [{"input_ids": [*range(10, 30)], "labels": [-100] * 20, "attention_mask": [1] * 20}] * 6
    trainer = attach(plain_trainer(tmp_path, Dataset.from_list(rows)), {**DROPS, "cache_dir": str(tmp_path / "cache")})
    with pytest.raises(XTFUserError, match="none of the 6 training rows has a completion token"):
        trainer.train()


PROMPTS = {
    "prefix": PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, prefix_projection=True, encoder_hidden_size=16
    ),
    "p-tuning": PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
}


@pytest.mark.parametrize("kind", PROMPTS)
def test_virtual_tokens_shift_no_mask(tmp_path, seen, kind):
    """huggingface/trl#4168 and #3812: rows of tokens with a completion mask, padded to a multiple."""
    rows = [
        {
            "input_ids": [*range(10 + n, 30 + n)],
            "attention_mask": [1] * 20,
            "completion_mask": [0] * 10 + [1] * 10,
        }
        for n in range(8)
    ]
    args = {"max_steps": 4, "per_device_train_batch_size": 2, "pad_to_multiple_of": 7}
    args |= {"gradient_checkpointing": False, "completion_only_loss": True}
    host = {"report_to": "none", "use_cpu": True, "bf16": False, "save_strategy": "no", "disable_tqdm": True}
    config = SFTConfig(output_dir=str(tmp_path), **args, **host)
    config.xtf = False  # the class is patched if another test has parsed a block
    trainer = SFTTrainer(
        model=tiny.model(),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny.tokenizer(),
        peft_config=PROMPTS[kind],
    )
    torch.manual_seed(0)
    attach(trainer, {**DROPS, "cache_dir": str(tmp_path / "cache")}).train()
    assert {ids for ids, _ in seen} == {tuple(row["input_ids"]) for row in rows}
    assert all(set(kept) <= set(range(10, 20)) for _, kept in seen)
    assert 0 < sum(len(kept) for _, kept in seen) < 80
