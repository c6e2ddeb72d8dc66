"""What makes stock TRL understand `xtf:`: three patched methods of its parser, one of its trainer.

`TrlParser.__init__` gains the argument `--xtf` next to an SFTConfig (so YAML, command line and `--help` work, and every
other unknown key still fails); `TrlParser.set_defaults_with_config` refuses the key elsewhere;
`TrlParser.parse_args_into_dataclasses` validates the block and leaves it on the SFTConfig as plain data. Only when that
found a block is `SFTTrainer.__init__` wrapped, to attach XTF to the finished trainer. Without a block, or with
`xtf: false`, stock code sees stock values.

The module knows these classes only as arguments: it imports neither trl nor torch.
"""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn

from .. import environment
from ..errors import XTFError, XTFUserError
from .boot import when_imported
from .fail_closed import EMPTY_BLOCK, exit_on_user_error, meant_as_block, whole_installation, wrap

if TYPE_CHECKING:
    from ..config.block import XTFConfig

TRAINER_MODULE = "trl.trainer.sft_trainer"
BASE_TRAINER_MODULE = "transformers.trainer"

_HELP = (
    "Token-level noise filtering (xtf-plugin): 'true' for the defaults, or the `xtf:` block as JSON or YAML text. "
    "`xtf check --schema` prints what a block may hold."
)
_MISSING: Any = object()
_argument_added = False
_block_parsed = False


def patch_parser(module: ModuleType) -> None:
    """Teach `module.TrlParser` the `xtf:` block. Raises AttributeError, before any change, if TRL moved a method."""
    for name in ("set_defaults_with_config", "parse_args_into_dataclasses"):
        getattr(module.TrlParser, name)
    wrap(module.TrlParser, "__init__", _init_with_argument)
    wrap(module.TrlParser, "set_defaults_with_config", _refusing_elsewhere)
    wrap(module.TrlParser, "parse_args_into_dataclasses", _parse_with_block)


def patch_trainer(module: ModuleType) -> None:
    """Make every `module.SFTTrainer` built from now on carry XTF, or raise."""
    if not hasattr(module, "SFTTrainer"):
        raise XTFError(f"xtf: {module.__name__} defines no SFTTrainer, so the `xtf:` block cannot be applied.")
    wrap(module.SFTTrainer, "__init__", _init_with_attach)


def patch_base_trainer(module: ModuleType) -> None:
    """Make every `module.Trainer` whose args carry a block refuse to train unless XTF is attached to it."""
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


def _refusing_elsewhere(original: Any) -> Any:
    """Stock `trl dpo` refuses the key already; its script, launched by hand, would ignore it and train unfiltered.

    The same scripts ignore every key that they do not know, `XTF` and `xtf.control` among them; and an empty block
    reads as null, which would switch the filter off unnoticed.
    """

    def set_defaults_with_config(self: Any, **config: Any) -> list[str]:
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
        # Arguments that belong to no dataclass come back in one extra Namespace: ours must not be the reason for it.
        extra = next((output for output in outputs if isinstance(output, argparse.Namespace)), None)
        if not _argument_added or not hasattr(extra, "xtf"):
            return outputs
        assert extra is not None
        try:
            config = _validated(extra.xtf)
        except XTFUserError as error:
            _stop(self, str(error))
        targets = [output for output in outputs if _is_sft_config(type(output))]
        for target in targets:
            _record(target, config)
        if not targets:  # make_parser(subparsers): stock code gets every value in the Namespace, so ours too
            _record(extra, config)
            return outputs
        del extra.xtf
        return outputs if vars(extra) else tuple(output for output in outputs if output is not extra)

    return parse_args_into_dataclasses


def _validated(value: Any) -> XTFConfig | None:
    """Return the block's config, None when it is absent or off; check first that it can be applied at all."""
    if value is None or value is False:
        return None
    with whole_installation():
        from ..config.block import XTFConfig

    config = XTFConfig.parse(value)
    if config is not None:
        environment.check_switches(os.environ, "the environment or the recipe's `env:` block")
        environment.check_version("trl")
    return config


def _record(target: Any, config: XTFConfig | None) -> None:
    """Leave the block on `target` as plain data, so that training_args.bin loads without us; arm the trainer."""
    global _block_parsed
    if config is not None:
        target.xtf = config.to_dict()
        _block_parsed = True
        when_imported(TRAINER_MODULE, patch_trainer)
        when_imported(BASE_TRAINER_MODULE, patch_base_trainer)
    elif _block_parsed:
        target.xtf = False  # a second parse in one process: this one asks for plain SFT, and says so to the trainer
    elif isinstance(target, argparse.Namespace):
        del target.xtf


def _init_with_attach(original: Any) -> Any:
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        given = kwargs["args"] if "args" in kwargs else (args[1] if len(args) > 1 else None)
        block = getattr(given, "xtf", _MISSING)
        if block is False:
            original(self, *args, **kwargs)
            return
        if block is _MISSING or block is None:
            raise XTFUserError(
                "xtf: this process parsed an `xtf:` block, but the args of this SFTTrainer do not carry it "
                f"(args.xtf is missing on {type(given).__name__}). Pass on the parsed SFTConfig, copy its `xtf` "
                "attribute to yours, or set `args.xtf = False` to train this one without XTF."
            )
        attach, parse = _attaching()
        config = parse(block)
        original(self, *args, **kwargs)
        if config is not None:
            exit_on_user_error(attach)(self, config)
            self.train = exit_on_user_error(self.train)

    return init


@exit_on_user_error
def _attaching() -> tuple[Callable[..., Any], Callable[[Any], XTFConfig | None]]:
    """What reads a block and what attaches it, before the trainer is built for nothing."""
    with whole_installation():
        from ..config.block import XTFConfig
        from ..training.callback import attach
    return attach, XTFConfig.parse


def _train_only_attached(original: Any) -> Any:
    """A parsed block in a trainer that is not TRL's SFTTrainer: nothing attached XTF; it would train unfiltered."""

    def train(self: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(self.args, "xtf", None) and getattr(self, "_xtf_hooks", None) is None:
            raise XTFUserError(
                f"xtf: the args of this {type(self).__name__} carry an `xtf:` block, but XTF is not attached to it. "
                "Call xtf_plugin.attach(trainer, trainer.args.xtf) before train(), or set args.xtf = False."
            )
        return original(self, *args, **kwargs)

    return train


def _is_sft_config(kind: type) -> bool:
    """Return whether a class is TRL's SFTConfig or derives from it; by name, since trl must not be imported here."""
    return any(base.__name__ == "SFTConfig" and base.__module__.startswith("trl.") for base in kind.__mro__)


def _stop(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    """End the process as `parser.error` does, without the two hundred lines of usage that would bury the message."""
    parser.exit(2, f"{parser.prog}: error: {message}\n")
    raise SystemExit(2)  # a parser whose exit() returns must not let the run go on
