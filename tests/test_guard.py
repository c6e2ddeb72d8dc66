"""What hooks take for a block, and for a command that trains: no host is needed for that."""

from __future__ import annotations

import pytest

import xtf_plugin_boot as boot
from xtf_plugin.hosts import axolotl_recipe, guard


@pytest.mark.parametrize(
    "key", ["XTF", " xtf ", "xft", "xttf", "xtf.control", "xtf__preset", "xtf-plugin", "xtf_plugin", "Xtf.preset"]
)
def test_keys_that_were_meant_as_a_block(key):
    assert guard.meant_as_block(key, True) and guard.meant_as_block(key, {"preset": "paper"})


@pytest.mark.parametrize("key", ["xtf", "xtfoo", "text", "max_steps", "x", "context"])
def test_keys_that_were_not(key):
    assert not guard.meant_as_block(key, True)


@pytest.mark.parametrize(
    "text",
    [
        "xtf: true",
        "a: 1\nxtf:\n  preset: paper\n",
        '{"base_model": "m", "xtf": {}}',
        "  'xtf': true",
        "{a: 1, xtf: true}",
        "XTF: true",
        "\ufeffxtf: true",
    ],
)
def test_recipes_that_mention_one(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    assert guard.mentions_block(str(path))
    assert boot.names_block(str(path)) and boot.brings_block(["--config=" + str(path)], guard.mentions_block)


@pytest.mark.parametrize("text", ["", "a: 1", "# xtf is not here\nb: xtf", "name: 'x t f: 1'\n", "maxtf: 1"])
def test_recipes_that_do_not(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    assert not guard.mentions_block(str(path))
    assert not boot.names_block(str(path)) and not boot.brings_block(["--config", str(path)], guard.mentions_block)


def test_a_folder_of_recipes_may(tmp_path):
    assert guard.mentions_block(str(tmp_path))
    with pytest.raises(OSError):
        guard.mentions_block(str(tmp_path / "absent.yaml"))


@pytest.mark.parametrize(
    ("words", "command", "trains"),
    [
        (["/env/bin/axolotl", "train", "r.yaml"], "train", True),
        (["axolotl", "merge-lora", "r.yaml"], "merge-lora", False),
        (["/site-packages/axolotl/cli/train.py", "r.yaml"], "train", True),
        (["/site-packages/axolotl/cli/merge_lora.py", "r.yaml"], "merge-lora", False),
        (["/site-packages/axolotl/cli/evaluate.py"], "evaluate", False),
        (["axolotl"], "", True),
        (["my_script.py", "--xtf"], None, True),
        ([], None, True),
    ],
)
def test_commands_of_axolotl(words, command, trains):
    assert axolotl_recipe.running_command(words) == command
    assert axolotl_recipe.trains(words) == trains


@pytest.mark.parametrize("word", ["--xtf", "--xtf=true", "--xtf.preset", "--xtf_preset=paper", "--xtf-plugin"])
def test_options_that_bring_a_block(word):
    with pytest.raises(ValueError, match="write the `xtf:` block into the recipe"):
        axolotl_recipe.check_words(["axolotl", "train", word])


def test_other_options_do_not():
    axolotl_recipe.check_words(["axolotl", "train", "--xtfoo", "xtf", "--context"])
