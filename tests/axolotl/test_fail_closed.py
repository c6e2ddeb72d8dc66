"""A block that stock Axolotl would not apply stops the run with the next step; without a block nothing changes.

Axolotl 0.19 ignores keys that no plugin declares and continues without a plugin that it cannot import: either would
train on every token without a message. Each case is a real `axolotl` command; no training data may be recorded.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import tiny
from tests.axolotl import stock

BROKEN = """
import sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "xtf_plugin.hosts.axolotl":
            raise ImportError("a part of it is missing")
sys.meta_path.insert(0, Finder())
"""
NOTHING = {"preset": "none", "selectors": {"typical": {"scorer": "typicality", "drop": {"below": -1e6}}}}
EVERYTHING = {"preset": "none", "force_drop": ["(?s).*"], "min_kept": 0, "protect": {"special_tokens": False}}
LINE = f"Add this line to the recipe: plugins: [{stock.PLUGIN}]"
REFUSED = {
    "no plugins line": ({"plugins": ...}, 2, LINE),
    "another plugin": (
        {"plugins": ["axolotl.integrations.spectrum.SpectrumPlugin"]},
        2,
        f"plugins: [axolotl.integrations.spectrum.SpectrumPlugin, {stock.PLUGIN}]",
    ),
    "the plugin's name misspelt": ({"plugins": ["xtf_plugins.XTFPlugin"]}, 2, LINE),
    "a setting beside the block": ({"xtf.control": "random"}, 2, "Its settings belong into its mapping"),
    "text that is nothing": ({"xtf": "null"}, 2, "the recipe's `xtf:` block is empty"),
    "diffusion": ({"plugins": ["diffusion.DiffusionPlugin", stock.PLUGIN]}, 1, "also noises its input by the labels"),
    "empty": ({"xtf": None}, 2, "the recipe's `xtf:` block is empty"),
    "in another case": ({"xtf": ..., "Xtf": True}, 2, "Did you mean `xtf:`?"),
    "mistyped, without the plugin": ({"xtf": ..., "xft": True, "plugins": ...}, 2, "Did you mean `xtf:`?"),
    "preference data": ({"rl": "dpo"}, 1, "`rl: dpo` and `xtf:` do not go together"),
    "streamed": ({"streaming": True, "max_steps": 2}, 1, "set streaming: false"),
    "wrong key": ({"xtf": {"min_kpet": 1}}, 1, "min_kept"),
    "wrong value": ({"xtf": {"min_kept": -1}}, 1, "min_kept"),
    "everything dropped": ({"xtf": EVERYTHING}, 2, "the rules drop every one of"),
}


def refused(base, tmp_path, *words, code=2, text, command="train", environment=None, real=False, **changes) -> None:
    """A command ends with `code` and says `text`, before anything was trained on."""
    out = tmp_path / "out"
    path = stock.write(base, out, **changes)
    if command == "train":
        result = stock.train(path, out, tmp_path / "cache", *words, ok=False, real=real, **(environment or {}))
    else:
        result = stock.command(stock.BIN / "axolotl", command, path, cache=tmp_path / "cache")
    said = result.stdout + result.stderr
    assert result.returncode == code, said[-6000:]
    assert text in said.replace("\n", " ").replace("  ", " ") or text in said
    assert not list(tmp_path.glob("out.seen*"))
    if code == 2:
        assert any(line.startswith("xtf: error: ") for line in result.stderr.splitlines())
        assert "Traceback" not in said or "Failed to load plugin" in said  # Axolotl logs that one's own


@pytest.mark.parametrize("case", REFUSED)
def test_a_block_that_would_not_be_applied_stops_the_run(base, tmp_path, case):
    changes, code, text = REFUSED[case]
    refused(base, tmp_path, code=code, text=text, **changes)


def test_a_plugin_that_cannot_be_imported_stops_the_run(base, tmp_path):
    """Axolotl itself logs the error and trains on. In a real process: its imports come in their own order."""
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(BROKEN)
    path = str(folder), str(Path(__file__).parents[2])
    environment = {"PYTHONPATH": ":".join(path)}
    text = "cannot be imported here (ImportError: a part of it is missing)"
    refused(base, tmp_path, text=text, environment=environment, real=True)


@pytest.mark.parametrize("words", [("--launcher", "accelerate"), ("--launcher", "torchrun")])
def test_a_run_behind_a_launcher_is_refused_too(base, tmp_path, words):
    refused(base, tmp_path, *words, code=1, text=LINE, plugins=...)


def test_a_trainer_whose_loss_makes_labels_of_its_own_is_refused(base, tmp_path):
    """Axolotl trains Mamba by a loss that takes its labels from the input."""
    from transformers import MambaConfig, MambaForCausalLM

    fast = tiny.tokenizer()
    config = MambaConfig(vocab_size=len(fast), hidden_size=32, num_hidden_layers=2, state_size=4)
    MambaForCausalLM(config).save_pretrained(tmp_path / "mamba")
    fast.save_pretrained(tmp_path / "mamba")
    changes = {"load_in_4bit": False, "adapter": ..., "lora_target_modules": ..., "model_config_type": "mamba"}
    changes |= {"lora_r": ..., "lora_alpha": ..., **dict.fromkeys(stock.NO_KERNELS, ...)}
    text = "the loss of Axolotl's AxolotlMambaTrainer may not use them"
    refused(base, tmp_path, text=text, base_model=str(tmp_path / "mamba"), **changes)


def test_a_command_that_trains_nothing_is_let_alone(base, tmp_path):
    """`axolotl merge-lora` needs neither the plugin's line nor an environment that may apply a block."""
    out = tmp_path / "out"
    stock.train(stock.write(base, out, xtf=..., plugins=..., max_steps=1), out, tmp_path / "cache")
    path = stock.write(base, out, plugins=...)
    words = stock.BIN / "axolotl", "merge-lora", path
    result = stock.command(*words, cache=tmp_path / "cache", XTF_DISABLE="1")
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    assert list((out / "merged").glob("*.safetensors"))


def test_preprocess_refuses_too(base, tmp_path):
    refused(base, tmp_path, text=LINE, command="preprocess", plugins=...)


def test_switched_off_and_command_line(base, tmp_path):
    refused(base, tmp_path, text="XTF_DISABLE=1", environment={"XTF_DISABLE": "1"})
    refused(base, tmp_path, *stock.ONE, "--xtf", "true", text="Axolotl's command has no `--xtf`", xtf=..., plugins=...)


@pytest.fixture(scope="module")
def stock_run(base, tmp_path_factory) -> Path:
    """A run that has neither block nor plugin; XTF is switched off, which changes nothing without a block."""
    out = tmp_path_factory.mktemp("stock") / "out"
    path = stock.write(base, out, xtf=..., plugins=..., save_strategy="epoch")
    stock.train(path, out, out.parent / "cache", real=True, XTF_DISABLE="1", SEED="7")
    return out


@pytest.mark.xdist_group("off")
@pytest.mark.parametrize("block", [..., False])
def test_without_a_block_everything_is_as_it_was(base, stock_run, tmp_path, block):
    out = tmp_path / "out"
    recipe = stock.write(base, out, xtf=block, save_strategy="epoch")
    result = stock.train(recipe, out, tmp_path / "cache", real=block is ..., SEED="7")
    assert ("the recipe has no `xtf:` key" in result.stdout + result.stderr) == (block is ...)
    assert stock.seen(out) == stock.seen(stock_run)
    assert stock.losses(out) == stock.losses(stock_run)
    adapter = "adapter_model.safetensors"
    assert (out / adapter).read_bytes() == (stock_run / adapter).read_bytes()
    assert not (out / "xtf").exists() and not any((tmp_path / "cache").rglob("*.parquet"))


@pytest.mark.xdist_group("off")
def test_a_block_that_drops_nothing_trains_as_stock(base, stock_run, tmp_path):
    out = tmp_path / "out"
    path = stock.write(base, out, xtf=NOTHING, save_strategy="epoch")
    result = stock.train(path, out, tmp_path / "cache", SEED="7")
    assert stock.seen(out) == stock.seen(stock_run) and stock.losses(out) == stock.losses(stock_run)
    assert "nothing at all is dropped" in result.stdout + result.stderr
    assert (out / "xtf/summary.json").exists()


@pytest.mark.xdist_group("off")
def test_a_block_that_drops_trains_otherwise(base, stock_run, tmp_path):
    """The comparison above can fail: the masks change the losses."""
    out = tmp_path / "out"
    stock.train(stock.write(base, out, save_strategy="epoch"), out, tmp_path / "cache", SEED="7")
    assert stock.losses(out) != stock.losses(stock_run)
