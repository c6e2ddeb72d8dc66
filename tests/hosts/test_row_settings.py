"""The settings of a recipe that decide which rows are trained: what counts, and what differs."""

from __future__ import annotations

import pytest

from xtf_plugin.hosts.row_settings import differing, row_settings

ROWS = {
    "trl": {
        "model_name_or_path": "m",
        "dataset_name": "d",
        "dataset_train_split": "train[:5]",
        "datasets": [{"path": "d"}],
        "max_length": 512,
        "assistant_only_loss": True,
        "chat_template_path": "t",
        "packing": True,
        "eos_token": "</s>",
    },
    "axolotl": {
        "base_model": "m",
        "datasets": [{"path": "d", "type": "chat_template", "roles_to_train": ["assistant"]}],
        "sequence_len": 512,
        "chat_template": "chatml",
        "train_on_inputs": False,
        "sample_packing": True,
        "special_tokens": {"pad_token": "x"},
    },
}
OTHERS = {"learning_rate": 1e-4, "output_dir": "out", "num_train_epochs": 1, "xtf": True, "dataloader_num_workers": 2}


@pytest.mark.parametrize("host", ROWS)
def test_what_decides_the_rows_is_kept_and_nothing_else(host):
    assert row_settings({**ROWS[host], **OTHERS, "max_steps": None}) == ROWS[host]


@pytest.mark.parametrize(("host", "name"), [(host, name) for host, rows in ROWS.items() for name in rows])
def test_another_value_or_none_differs(host, name):
    made_with = row_settings(ROWS[host])
    assert differing(made_with, row_settings({**ROWS[host], **OTHERS})) == []
    assert differing(made_with, row_settings({**ROWS[host], name: "other"})) == [name]
    assert differing(made_with, row_settings({**ROWS[host], name: None})) == [name]
    assert differing(row_settings({**ROWS[host], name: None}), made_with) == [name]


def test_options_of_the_command_line_count():
    """Also those that a recipe does not have; a table of such a run is not the recipe's."""
    words = ["sft.py", "--config", "recipe.yaml", "--dataset_name", "other", "--max_length=9", "--learning_rate", "1"]
    found = row_settings(ROWS["trl"], words)
    assert {name: found[name] for name in found if name.startswith("--")} == {
        "--dataset_name": "other",
        "--max_length": "9",
    }
    assert differing(found, row_settings(ROWS["trl"])) == ["--dataset_name", "--max_length"]


def test_nothing_is_said_of_a_table_without_settings():
    assert differing(None, row_settings(ROWS["trl"])) == [] == differing("text", {})
