"""The patched TRL parser and trainer, in process: what stock code gets back, what is refused, what is attached.

Parsers are real TRL parsers over real dataclasses; trainers are dummies, since the wrapper only sees their constructor.
"""

from __future__ import annotations

import copy
import json
import pickle
import sys
import types
from dataclasses import dataclass, replace

import pytest
import yaml

from tests import hooks
from xtf_plugin import environment
from xtf_plugin.errors import XTFError, XTFUserError
from xtf_plugin.hosts import boot
from xtf_plugin.hosts import trl as hook

trl = pytest.importorskip("trl", reason="the hook patches TRL's own classes")
from trl import DPOConfig, ScriptArguments, SFTConfig, TrlParser  # noqa: E402


@dataclass
class OtherArguments:
    other: int = 1


@pytest.fixture(autouse=True)
def hooked(monkeypatch):
    """Patch this process's TRL afresh, as the boot hook would, and keep any real trainer out of it."""
    for name in ("XTF_DISABLE", "TORCH_DEVICE_BACKEND_AUTOLOAD"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(hook, "TRAINER_MODULE", "no.such.trainer")
    hooks.uninstall()
    boot.install()
    yield
    hooks.uninstall()
    boot.install()


@pytest.fixture
def recipe(tmp_path):
    """Write a recipe and return the arguments that name it."""

    def write(**data):
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({"output_dir": str(tmp_path), "bf16": False, "use_cpu": True, **data}))
        return ["--config", str(path)]

    return write


def parse(arguments, types=(ScriptArguments, SFTConfig), **options):
    return TrlParser(types, prog="trl sft").parse_args_and_config(arguments, **options)


def stock(arguments, types=(ScriptArguments, SFTConfig), **options):
    hooks.uninstall()
    try:
        return parse(arguments, types, **options)
    finally:
        boot.install()


def refusal(capsys, arguments, types=(ScriptArguments, SFTConfig)):
    """Return the one line that a refused parse prints."""
    with pytest.raises(SystemExit) as stopped:
        parse(arguments, types)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error and "usage" not in error and error.startswith("trl sft: error: ")
    return error


def trainer_module(**names):
    class SFTTrainer:
        def __init__(self, model, args=None, train_dataset=None):
            self.args = args

        def train(self):
            """Stock."""

    module = types.ModuleType("no.such.trainer")
    module.SFTTrainer = SFTTrainer
    return module


@pytest.fixture
def trainer(monkeypatch):
    """A trainer module that is imported already, and the list of what gets attached."""
    module, attached = trainer_module(), []
    monkeypatch.setitem(sys.modules, "no.such.trainer", module)
    callback = types.ModuleType("xtf_plugin.training.callback")
    callback.attach = lambda trainer, config: attached.append((trainer, config))
    monkeypatch.setitem(sys.modules, "xtf_plugin.training.callback", callback)
    return module, attached


@pytest.mark.parametrize("data", [{}, {"xtf": False}], ids=["absent", "false"])
def test_without_a_block_everything_is_stock(recipe, trainer, data):
    plain = recipe()
    expected = vars(stock(plain)[1])
    outputs = parse(recipe(**data))
    assert [type(output) for output in outputs] == [ScriptArguments, SFTConfig]
    assert vars(outputs[1]).keys() == expected.keys()
    module, attached = trainer
    assert not hasattr(module.SFTTrainer.__init__, "_xtf_patch")
    module.SFTTrainer("model", outputs[1])
    assert attached == []


@pytest.mark.parametrize("value", [True, {}, {"preset": "paper"}, {"min_kept": 3, "reasoning_importance": False}])
def test_block_in_the_recipe_arrives_as_plain_data(recipe, value):
    from xtf_plugin import XTFConfig

    script, args = parse(recipe(xtf=value))
    assert type(script) is ScriptArguments
    assert XTFConfig.parse(args.xtf) == XTFConfig.parse(value)
    assert json.loads(json.dumps(args.xtf)) == args.xtf
    assert b"xtf_plugin" not in pickle.dumps(args)
    assert "xtf" not in args.to_dict()


def test_command_line_wins_over_the_recipe(recipe):
    _, args = parse([*recipe(xtf={"min_kept": 2}), "--xtf", '{"min_kept": 7}'])
    assert args.xtf["min_kept"] == 7
    _, args = parse(["--xtf", "{min_kept: 5}", "--output_dir", "x", "--bf16", "false"])
    assert args.xtf["min_kept"] == 5
    _, args = parse(["--output_dir", "x", "--bf16", "false", "--xtf"])
    assert args.xtf["min_kept"] == 1
    _, args = parse([*recipe(xtf=True), "--xtf", "false"])
    assert not getattr(args, "xtf", None)


def test_launcher_shape_is_stock(recipe):
    options = {"return_remaining_strings": True, "separate_remaining_strings": True}
    with_block = parse([*recipe(xtf=True, num_processes=2), "--mixed_precision", "no"], **options)
    without = stock([*recipe(num_processes=2), "--mixed_precision", "no"], **options)
    assert with_block[2:] == without[2:] == (["--num_processes", "2"], ["--mixed_precision", "no"])


def test_a_users_own_extra_arguments_keep_their_namespace(recipe):
    parser = TrlParser((SFTConfig,))
    parser.add_argument("--mine", default=1)
    args, namespace = parser.parse_args_and_config(recipe(xtf=True))
    assert vars(namespace) == {"mine": 1} and args.xtf


def test_subparsers(recipe):
    def build():
        parser = TrlParser()
        subparsers = parser.add_subparsers(dest="command", parser_class=TrlParser)
        subparsers.add_parser("sft", dataclass_types=(ScriptArguments, SFTConfig))
        subparsers.add_parser("other", dataclass_types=(OtherArguments,))
        return parser

    (namespace,) = build().parse_args_and_config(["sft", *recipe(xtf={"min_kept": 4})])
    assert namespace.xtf["min_kept"] == 4 and namespace.command == "sft"
    (namespace,) = build().parse_args_and_config(["other", "--other", "2"])
    assert vars(namespace) == {"command": "other", "other": 2}


def test_help_names_the_argument(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    assert "--xtf [BLOCK]" in capsys.readouterr().out


def test_other_unknown_keys_still_fail(recipe):
    with pytest.raises(ValueError, match="extra"):
        parse(recipe(extra=True))


def test_wrong_block_is_one_message(recipe, capsys):
    assert "min_kpet" in refusal(capsys, recipe(xtf={"min_kpet": 1}))
    assert "presett" in refusal(capsys, [*recipe(), "--xtf", "{presett: paper}"])


@pytest.mark.parametrize("config", [DPOConfig, OtherArguments])
def test_block_outside_sft_is_refused(recipe, capsys, config):
    arguments = recipe(xtf=True)
    with pytest.raises(SystemExit) as stopped:
        parse(arguments, (config,), fail_with_unknown_args=False)
    assert stopped.value.code == 2
    assert "unrecognized arguments: --xtf" in capsys.readouterr().err


def test_switched_off_hook_refuses_a_block_and_nothing_else(recipe, capsys, monkeypatch):
    monkeypatch.setenv("XTF_DISABLE", "yes")
    message = refusal(capsys, recipe(xtf=True))
    assert "block present but XTF_DISABLE=yes: remove one of them" in message
    assert not hasattr(parse(recipe())[1], "xtf")


@pytest.mark.parametrize("name, value", [("XTF_DISABLE", 1), ("TORCH_DEVICE_BACKEND_AUTOLOAD", 0)])
def test_recipe_that_switches_the_hook_off_for_the_child_is_refused(recipe, capsys, monkeypatch, name, value):
    monkeypatch.setenv(name, "")  # so that what TRL sets is undone after the test
    monkeypatch.delenv(name)
    assert f"{name}={value}" in refusal(capsys, recipe(xtf=True, env={name: value}))


def test_version_check_needs_a_block(recipe, capsys, monkeypatch):
    monkeypatch.setattr(environment, "installed_version", lambda name: "1.4.0")
    parse(recipe())
    message = refusal(capsys, recipe(xtf=True))
    assert "1.4.0" in message and "pip install 'trl>=1.9'" in message


def test_versions(caplog, monkeypatch):
    def check(version):
        monkeypatch.setattr(environment, "installed_version", lambda name: version)
        environment.check_version("trl")

    for fine in ("1.9.0", "1.16.3", "1.10.0.dev0"):
        check(fine)
    assert not caplog.records
    check("2.0.0")
    assert "newer" in caplog.text
    with pytest.raises(XTFUserError, match="not installed"):
        check(None)


def test_trainer_imported_before_the_block_is_attached(recipe, trainer):
    module, attached = trainer
    _, args = parse(recipe(xtf={"min_kept": 2}))
    built = module.SFTTrainer(model="m", args=args, train_dataset=[])
    ((seen, config),) = attached
    assert seen is built and config.min_kept == 2


def test_trainer_imported_after_the_block_is_attached(recipe, trainer, tmp_path, monkeypatch):
    _, attached = trainer
    (tmp_path / "later_trainer.py").write_text(
        "class SFTTrainer:\n    def __init__(self, model, args=None): pass\n    def train(self): pass"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(hook, "TRAINER_MODULE", "later_trainer")
    _, args = parse(recipe(xtf=True))
    try:
        from later_trainer import SFTTrainer

        SFTTrainer("m", args)
        assert len(attached) == 1
    finally:
        sys.modules.pop("later_trainer", None)


def test_copied_args_are_attached_and_args_without_the_block_stop(recipe, trainer):
    module, attached = trainer
    _, args = parse(recipe(xtf=True))
    module.SFTTrainer("m", copy.deepcopy(args))
    assert len(attached) == 1
    for lost in (replace(args), None):
        with pytest.raises(XTFUserError, match="do not carry it"):
            module.SFTTrainer("m", lost)
    plain = replace(args)
    plain.xtf = False
    module.SFTTrainer("m", plain)
    assert len(attached) == 1


def test_second_parse_without_a_block_trains_plain(recipe, trainer):
    module, attached = trainer
    parse(recipe(xtf=True))
    _, plain = parse(recipe())
    module.SFTTrainer("m", plain)
    assert attached == []


def test_trainer_that_moved_stops_the_run(recipe, monkeypatch):
    monkeypatch.setitem(sys.modules, "no.such.trainer", types.ModuleType("no.such.trainer"))
    with pytest.raises(XTFError, match="SFTTrainer"):
        parse(recipe(xtf=True))


def test_a_dataclass_with_a_field_of_that_name_keeps_it(recipe):
    @dataclass
    class Own:
        xtf: str = "mine"

    _, own = parse(recipe(), (SFTConfig, Own))
    assert own.xtf == "mine"


def test_patches_are_idempotent_and_restorable(recipe, trainer):
    module, _ = trainer
    constructor = module.SFTTrainer.__init__
    patched = TrlParser.__init__
    boot.install()
    assert TrlParser.__init__ is patched
    parse(recipe(xtf=True))
    parse(recipe(xtf=True))
    assert module.SFTTrainer.__init__.__wrapped__ is constructor
    hooks.uninstall()
    assert "parse_args_into_dataclasses" not in vars(TrlParser)
    assert not hasattr(TrlParser.__init__, "_xtf_patch")
