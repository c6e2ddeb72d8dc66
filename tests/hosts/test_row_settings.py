"""The settings of a recipe that decide which rows are trained: what counts, and what differs."""

from __future__ import annotations

import datetime
import math

import pytest

from xtf_plugin.hosts.row_settings import differing, row_settings

ROWS = {
    "trl": {
        "model_name_or_path": "m",
        "model_revision": "r",
        "dataset_name": "d",
        "dataset_train_split": "train[:5]",
        "datasets": [{"path": "d"}],
        "test_split_size": 0.1,
        "max_length": 512,
        "assistant_only_loss": True,
        "chat_template_path": "t",
        "packing": True,
        "eos_token": "</s>",
    },
    "axolotl": {
        "base_model": "m",
        "revision_of_model": "r",
        "tokenizer_config": "m",
        "datasets": [{"path": "d", "type": "chat_template", "roles_to_train": ["assistant"]}],
        "val_set_size": 0.1,
        "seed": 3,
        "sequence_len": 512,
        "min_sample_len": 3,
        "excess_length_strategy": "drop",
        "chat_template": "chatml",
        "default_system_message": "Be brief.",
        "train_on_inputs": False,
        "sample_packing": True,
        "special_tokens": {"pad_token": "x"},
    },
}
OTHERS = {
    "learning_rate": 1e-4,
    "output_dir": "out",
    "num_train_epochs": 1,
    "xtf": True,
    "dataloader_num_workers": 2,
    "dataset_num_proc": 2,
    "average_tokens_across_devices": True,
    "hub_token": "hf_secret",
    "hub_revision": "main",
    "hf_use_auth_token": True,
}
WORDS = ["sft.py", "--config", "recipe.yaml", "--learning_rate", "1"]


@pytest.mark.parametrize("host", ROWS)
def test_what_decides_the_rows_is_kept_and_nothing_else(host):
    found = row_settings({**ROWS[host], **OTHERS, "max_steps": None})
    assert found.keys() == ROWS[host].keys()
    assert not any(str(value) in found.values() for value in ROWS[host].values())


@pytest.mark.parametrize(("host", "name"), [(host, name) for host, rows in ROWS.items() for name in rows])
def test_another_value_or_none_differs(host, name):
    made_with = row_settings(ROWS[host])
    assert differing(made_with, row_settings({**ROWS[host], **OTHERS})) == []
    assert differing(made_with, row_settings({**ROWS[host], name: "other"})) == [name]
    assert differing(made_with, row_settings({**ROWS[host], name: None})) == [name]
    assert differing(row_settings({**ROWS[host], name: None}), made_with) == [name]


@pytest.mark.parametrize("words", [["--max_length", "9"], ["--max-length=9"], ["--max-length", "9", "--bf16"]])
def test_options_of_the_command_line_are_in_place_of_the_recipes(words):
    found = row_settings(ROWS["trl"], [*WORDS, *words])
    assert differing(found, row_settings(ROWS["trl"])) == ["max_length"]
    assert differing(found, row_settings({**ROWS["trl"], "max_length": 9})) == []
    assert differing(row_settings({}, words), row_settings({"max_length": 9})) == []


def test_an_option_without_a_value_is_true():
    for words in (["--packing"], ["--packing", "--max_length", "512"], ["--packing=true"], ["--packing", "true"]):
        assert differing(row_settings({**ROWS["trl"], "packing": False}, words), row_settings(ROWS["trl"])) == []


def test_values_that_json_cannot_hold():
    day, itself = datetime.date(2026, 11, 30), ["d"]
    itself.append(itself)
    for value in ({day: "a"}, {1: "a", "b": 2}, math.nan, math.inf, itself, "\ud800", {"a", "b"}):
        assert differing(row_settings({"datasets": value}), row_settings({"datasets": value})) == []


def test_nothing_is_said_of_a_table_without_settings():
    assert differing(None, row_settings(ROWS["trl"])) == [] == differing("text", {})
