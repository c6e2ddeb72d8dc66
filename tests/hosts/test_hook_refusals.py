"""Ways in which a block would pass unnoticed: scripts that ignore unknown keys, trainers of another kind."""

from __future__ import annotations

import types

import pytest

from tests.hosts.test_hook_trl import hooked, parse  # noqa: F401 a fixture
from xtf_plugin.errors import XTFUserError
from xtf_plugin.hosts import boot
from xtf_plugin.hosts import trl as hook


@pytest.mark.parametrize(
    "text, message",
    [
        ("xtf:\n", "block is empty"),
        ("xtf:\n  # preset: paper\n", "block is empty"),
        ("XTF:\n  preset: paper\n", "Did you mean"),
        ("'xtf ': true\n", "Did you mean"),
        ("xtf.preset: paper\n", "Did you mean"),
        ("xft:\n  preset: paper\n", "Did you mean"),
    ],
)
def test_empty_or_mistyped_block_is_refused_where_unknown_keys_are_ignored(tmp_path, capsys, text, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"output_dir: {tmp_path}\n{text}")
    with pytest.raises(SystemExit) as ended:
        parse(["--config", str(path)], fail_with_unknown_args=False)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_block_in_the_args_of_a_trainer_that_nothing_attached_is_refused():
    class Trainer:
        def __init__(self, args):
            self.args = args

        def train(self):
            return "trained"

    module = types.ModuleType("some.trainer")
    module.Trainer = Trainer
    hook.patch_base_trainer(module)
    assert Trainer(types.SimpleNamespace()).train() == "trained"
    with pytest.raises(XTFUserError, match="attach"):
        Trainer(types.SimpleNamespace(xtf={"preset": "paper"})).train()


@pytest.mark.parametrize(
    "argv, stops",
    [
        (["--config", "{recipe}"], True),
        (["--xtf", "true"], True),
        (["--config", "{plain}"], False),
        (["--config", "missing.yaml"], False),
        ([], False),
    ],
)
def test_hook_that_does_not_fit_trl_ends_only_runs_with_a_block(tmp_path, monkeypatch, caplog, capsys, argv, stops):
    """A TRL that moved its parser: nothing would apply the block, and scripts that ignore unknown keys would go on."""
    recipe, plain = tmp_path / "recipe.yaml", tmp_path / "plain.yaml"
    recipe.write_text("output_dir: out\nxtf: true\n")
    plain.write_text("output_dir: out\n")
    monkeypatch.setattr("sys.argv", ["sft.py", *(word.format(recipe=recipe, plain=plain) for word in argv)])

    def misfit():
        raise AttributeError("TrlParser has no such method")

    if stops:
        with pytest.raises(SystemExit) as ended:
            boot._report_failure("TRL", "pip install trl", misfit)
        assert ended.value.code == 2 and "does not fit the installed TRL" in capsys.readouterr().err
    else:
        boot._report_failure("TRL", "pip install trl", misfit)
    assert "NOT applied" in caplog.text
