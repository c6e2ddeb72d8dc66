"""What hooks take for a block, and for a command that trains: no host is needed for that."""

from __future__ import annotations

import subprocess
import sys

import pytest

import xtf_plugin_boot as boot
from xtf_plugin.hosts import axolotl_checks, fail_closed


@pytest.mark.parametrize(
    "key", ["XTF", " xtf ", "xtf.control", "xtf__preset", "xtf-plugin", "xtf_plugin", "Xtf.preset", "xft", "xtff"]
)
def test_keys_that_were_meant_as_a_block(key):
    assert fail_closed.meant_as_block(key)


@pytest.mark.parametrize("key", ["xtf", "xtfoo", "text", "max_steps", "x", "tf", "", "_xtf", "tf32", "fft", "context"])
def test_keys_that_were_not(key):
    assert not fail_closed.meant_as_block(key)


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
    assert boot.brings_block(["--config=" + str(path)]) and boot.brings_block(["train", str(path)])


@pytest.mark.parametrize("text", ["", "a: 1", "# xtf is not here\nb: xtf", "name: 'x t f: 1'\n", "maxtf: 1"])
def test_recipes_that_do_not(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    assert not boot.brings_block(["--config", str(path)])


ENDING = """
import atexit, sys
from xtf_plugin import XTFError, XTFUserError
from xtf_plugin.hosts.fail_closed import exit_on_error
atexit.register(print, "handlers have run")
@exit_on_error
def train():
    raise {error}
train()
print("trained")
"""
IN_A_WORKER = "Caught XTFError in DataLoader worker process 0.\\nOriginal Traceback (most recent call last):\\n  File x"


@pytest.mark.parametrize(
    "error",
    [
        "XTFUserError('xtf: no such thing')",
        "XTFError('no such thing')",
        f"XTFError('{IN_A_WORKER}\\nxtf_plugin.errors.XTFError: no such thing\\n')",
    ],
)
def test_a_refused_run_ends_with_2_one_message_and_its_exit_handlers(error):
    code = ENDING.replace("{error}", error)
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (2, "handlers have run\n")
    assert ended.stderr == "xtf: error: no such thing\n"


LAUNCHING = """
import atexit, subprocess
from types import SimpleNamespace
from xtf_plugin import XTFConfig
from xtf_plugin.hosts.trl import _record
_record(SimpleNamespace(), XTFConfig())
atexit.register(print, "handlers have run")
raise subprocess.CalledProcessError(2, "python sft.py")
"""


def test_a_process_whose_training_was_refused_runs_its_exit_handlers():
    ended = subprocess.run([sys.executable, "-c", LAUNCHING], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (1, "handlers have run\n")


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
    assert axolotl_checks.running_command(words) == command
    assert axolotl_checks.trains(words) == trains


@pytest.mark.parametrize("word", ["--xtf", "--xtf=true", "--xtf.preset", "--xtf_preset=paper", "--xtf-plugin", "--xft"])
def test_options_that_bring_a_block(word):
    with pytest.raises(ValueError, match="write the `xtf:` block into the recipe"):
        axolotl_checks.check_words(["axolotl", "train", word])


def test_other_options_do_not():
    axolotl_checks.check_words(["axolotl", "train", "--xtfoo", "xtf", "--context"])
