"""What makes stock Axolotl fail closed: one patched function, which reads the recipe before and after its plugins load.

Axolotl drops keys that no plugin declares, and goes on without a plugin that it could not import. Either way a recipe
with an `xtf:` block would train plain SFT and say nothing. So `axolotl.cli.config.prepare_plugins`, through which every
command's recipe goes, refuses what nothing would apply. Without a block it does what it did.

Axolotl is known here only as an argument and by the plugin manager that it has loaded itself by then.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from ..errors import XTFUserError
from .axolotl_recipe import (
    PLUGIN,
    check_plugin_line,
    check_surroundings,
    check_words,
    has_block,
    missing_plugin,
    running_command,
    trains,
)
from .guard import ending_with_2, handing_on_2, mentions_block, wrap

TRAINING_MODULE = "axolotl.cli.train"  # what the launched process runs

_undo: list[Callable[[], None]] = []


def patch_config(module: ModuleType) -> None:
    """Make `module.prepare_plugins` refuse blocks that nothing applies. Raises AttributeError if Axolotl moved it."""
    wrap(module, "prepare_plugins", _guarded, _undo)


def patch_launcher() -> None:
    """In the process that launches a training with a block: hand on the exit code 2 of the process that trains."""
    words = sys.argv[sys.argv.index(TRAINING_MODULE) + 1 :]
    try:
        if not (words and mentions_block(words[0])):
            return
    except OSError:
        return  # Axolotl says what is wrong with it
    _undo.append(functools.partial(setattr, sys, "excepthook", sys.excepthook))
    sys.excepthook = handing_on_2(sys.excepthook, lambda command: TRAINING_MODULE in command)


def unpatch() -> None:
    """Take every patch back; for tests."""
    while _undo:
        _undo.pop()()


def _guarded(original: Any) -> Any:
    @ending_with_2
    def prepare_plugins(cfg: Any) -> Any:
        if not trains(sys.argv):
            return original(cfg)
        if running_command(sys.argv) is not None:
            check_words(sys.argv)
        if not has_block(cfg):
            return original(cfg)
        check_surroundings()
        check_plugin_line(cfg)
        result = original(cfg)
        _check_loaded(cfg)
        return result

    return prepare_plugins


def _check_loaded(cfg: Any) -> None:
    """Raise XTFUserError unless Axolotl holds our plugin under the name in this recipe."""
    from axolotl.integrations.base import PluginManager

    held = type(PluginManager.get_instance().plugins.get(PLUGIN))
    if held.__module__ == f"{__package__}.axolotl" and held.__name__ == "XTFPlugin":
        return
    try:
        from ..hosts import axolotl  # noqa: F401 for its error
    except ImportError as error:
        raise XTFUserError(
            f"xtf: the plugin {PLUGIN} cannot be imported here ({type(error).__name__}: {error}), so Axolotl would "
            "train without it. Repair the installation: pip install xtf-plugin. The recipe's line is right as it is: "
            f"plugins: [{PLUGIN}]"
        ) from error
    raise missing_plugin(cfg)
