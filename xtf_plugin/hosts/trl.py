"""Patches that make stock TRL accept an `xtf:` block.

They wrap three methods of its parser, two of `SFTTrainer`, and `Trainer.train`.

The parser gets the argument `--xtf` beside an SFTConfig, so YAML, command line and `--help` work, and every other
unknown key still fails. It validates the block and stores it on the SFTConfig as plain data. Trainers are patched only
after a block was parsed. Without a block, or with `xtf: false`, stock code gets stock values.

The module gets TRL's classes as arguments: it imports neither trl nor torch.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import os
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn

from .. import environment
from ..errors import XTFError, XTFUserError
from .boot import when_imported
from .fail_closed import EMPTY_BLOCK, complete_installation, exit_on_error, meant_as_block, wrap

if TYPE_CHECKING:
    from ..config.block import XTFConfig

TRAINER_MODULE = "trl.trainer.sft_trainer"
BASE_TRAINER_MODULE = "transformers.trainer"

_HELP = (
    "Token-level noise filtering (xtf-plugin): 'true' for the defaults, or the `xtf:` block as JSON or YAML text. "
    "`xtf check --schema` prints what a block may hold."
)
_argument_added = False
_block_parsed = False
_recipe: dict[str, Any] = {}  # what was parsed last


def patch(module: ModuleType) -> None:
    """Patch `module.TrlParser`. Raises AttributeError, before any change, if one of its methods is missing."""
    for name in ("set_defaults_with_config", "parse_args_into_dataclasses"):
        getattr(module.TrlParser, name)
    wrap(module.TrlParser, "__init__", _init_with_argument)
    wrap(module.TrlParser, "set_defaults_with_config", _refuse_ignored_keys)
    wrap(module.TrlParser, "parse_args_into_dataclasses", _parse_with_block)


def patch_trainer(module: ModuleType) -> None:
    """Attach XTF to every `module.SFTTrainer` that is created from now on. Raises XTFError if there is none."""
    if not hasattr(module, "SFTTrainer"):
        raise XTFError(f"xtf: {module.__name__} defines no SFTTrainer, so the `xtf:` block cannot be applied.")
    wrap(module.SFTTrainer, "__init__", _init_with_attach)
    if hasattr(module.SFTTrainer, "_prepare_dataset"):
        wrap(module.SFTTrainer, "_prepare_dataset", _prepare_with_columns)


def patch_base_trainer(module: ModuleType) -> None:
    """Make `module.Trainer.train` raise if the trainer's args have a block and XTF is not attached."""
    wrap(module.Trainer, "train", _train_only_attached)


def _init_with_argument(original: Any) -> Any:
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        global _argument_added
        original(self, *args, **kwargs)
        if any(_is_sft_config(kind) for kind in self.dataclass_types):
            with contextlib.suppress(argparse.ArgumentError):  # a dataclass of the user's has a field of that name
                self.add_argument("--xtf", nargs="?", const=True, metavar="BLOCK", help=_HELP)
                _argument_added = True

    return init


def _refuse_ignored_keys(original: Any) -> Any:
    """Refuse an empty block, a mistyped key, and a block outside SFT: TRL's scripts ignore unknown keys."""

    def set_defaults_with_config(self: Any, **config: Any) -> list[str]:
        _recipe.clear()
        _recipe.update(copy.deepcopy(config))  # TRL makes objects of its `datasets`, in place
        remaining: list[str] = original(self, **config)
        if "xtf" in config and config["xtf"] is None:
            _stop(self, EMPTY_BLOCK)
        if "--xtf" in remaining[::2] and config["xtf"] is not False:
            _stop(self, "unrecognized arguments: --xtf: an `xtf:` block works in SFT only; remove it from this recipe.")
        for key in (name.removeprefix("--") for name in remaining[::2]):
            if meant_as_block(key):
                _stop(self, f"unrecognized key {key!r} in this recipe. Did you mean `xtf:`?")
        return remaining

    return set_defaults_with_config


def _parse_with_block(original: Any) -> Any:
    def parse_args_into_dataclasses(self: Any, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        outputs: tuple[Any, ...] = original(self, *args, **kwargs)
        # Arguments that belong to no dataclass are returned in an extra Namespace. If it has ours alone, remove it.
        extra = next((output for output in outputs if isinstance(output, argparse.Namespace)), None)
        if not _argument_added or extra is None or not hasattr(extra, "xtf"):
            return outputs
        try:
            config = _validated(extra.xtf)
        except XTFUserError as error:
            _stop(self, str(error))
        targets = [output for output in outputs if _is_sft_config(type(output))]
        for target in targets or [extra]:  # make_parser(subparsers): stock code gets every value in the Namespace
            _record(target, config)
        if not targets:
            return outputs
        del extra.xtf
        return outputs if vars(extra) else tuple(output for output in outputs if output is not extra)

    return parse_args_into_dataclasses


def _validated(value: Any) -> XTFConfig | None:
    """The block's config, None if it is absent or off. Raises XTFUserError if it could not be applied here."""
    if value is None or value is False:
        return None
    with complete_installation():
        from ..config.block import XTFConfig

    config = XTFConfig.parse(value)
    if config is not None:
        environment.check_switches(os.environ, "the environment or the recipe's `env:` block")
        environment.check_version("trl")
    return config


def _record(target: Any, config: XTFConfig | None) -> None:
    """Store the block on `target` as plain data, so that training_args.bin loads without us, and patch the trainers."""
    global _block_parsed
    if config is not None:
        target.xtf = config.to_dict()
        _block_parsed = True
        when_imported(TRAINER_MODULE, patch_trainer)
        when_imported(BASE_TRAINER_MODULE, patch_base_trainer)
    elif _block_parsed:
        target.xtf = False  # the trainers are patched already; this parse asks for plain SFT
    elif isinstance(target, argparse.Namespace):
        del target.xtf


def _init_with_attach(original: Any) -> Any:
    @exit_on_error
    def init_and_attach(self: Any, block: Any, *args: Any, **kwargs: Any) -> None:
        with complete_installation():
            from ..config.block import XTFConfig
            from ..training import columns
            from ..training.callback import attach
            from .row_settings import row_settings
        config = XTFConfig.parse(block)  # a wrong block is refused before the trainer is built
        self._xtf_block = config
        known = getattr(kwargs.get("train_dataset"), "column_names", None)
        if config is not None and isinstance(known, list):  # here, before the model is loaded
            columns.check(known, config)
        original(self, *args, **kwargs)
        if config is not None:
            setattr(self, environment.RECIPE, row_settings(_recipe, sys.argv))
            attach(self, config)
            self.train = exit_on_error(self.train)

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        given = kwargs["args"] if "args" in kwargs else (args[1] if len(args) > 1 else None)
        block = getattr(given, "xtf", None)
        if block is False:
            original(self, *args, **kwargs)
            return
        if block is None:
            raise XTFUserError(
                "xtf: this process parsed an `xtf:` block, but the args of this SFTTrainer do not carry it "
                f"(args.xtf is missing on {type(given).__name__}). Pass the parsed SFTConfig, copy its `xtf` "
                "attribute to yours, or set `args.xtf = False` to train without XTF."
            )
        init_and_attach(self, block, *args, **kwargs)

    return init


def _prepare_with_columns(original: Any) -> Any:
    """TRL's preparation of datasets, which reads the columns that a block's scores need before it drops them."""

    def _prepare_dataset(self: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(self, "_xtf_block", None) is None:
            return original(self, *args, **kwargs)
        with complete_installation():
            from .trl_columns import prepare
        return prepare(original, self._xtf_block, self, *args, **kwargs)

    return _prepare_dataset


def _train_only_attached(original: Any) -> Any:
    def train(self: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(self.args, "xtf", None) and getattr(self, "_xtf_hooks", None) is None:
            raise XTFUserError(
                f"xtf: the args of this {type(self).__name__} have an `xtf:` block, but XTF is not attached to it. "
                "Call xtf_plugin.attach(trainer, trainer.args.xtf) before train(), or set args.xtf = False."
            )
        return original(self, *args, **kwargs)

    return train


def _is_sft_config(kind: type) -> bool:
    """Whether a class is TRL's SFTConfig or derives from it; by name, since trl must not be imported here."""
    return any(base.__name__ == "SFTConfig" and base.__module__.startswith("trl.") for base in kind.__mro__)


def _stop(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    """End the process as `parser.error` does, without its two hundred lines of usage."""
    parser.exit(2, f"{parser.prog}: error: {message}\n")
    raise SystemExit(2)  # a subclass's exit() may return
