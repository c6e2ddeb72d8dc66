"""Checks of an Axolotl recipe with an `xtf:` block, for the plugin, for `xtf check`, and for a patch of Axolotl.

Axolotl ignores keys that no plugin declares, and continues without a plugin that it cannot import: a recipe with a
block would train plain SFT. So `axolotl.cli.config.prepare_plugins`, which every command calls, is patched to refuse
such a recipe. Standard library only, until Axolotl has loaded its plugins.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from .. import environment
from ..errors import XTFUserError
from .fail_closed import EMPTY_BLOCK, exit_on_error, meant_as_block, wrap

PLUGIN = "xtf_plugin.XTFPlugin"

_SPLIT = ("tensor_parallel_size", "context_parallel_size", "expert_parallel_size")
_REFUSED = {
    **dict.fromkeys(("rl", "reward_model", "process_reward_model"), "`xtf:` works in supervised fine-tuning only"),
    **dict.fromkeys(_SPLIT, "it splits a model or a sequence between processes; use data parallel ranks (DDP, FSDP)"),
    "pretraining_dataset": "its data is streamed, and thresholds need all data before training; name it under "
    "`datasets`",
    "streaming": "thresholds need all data before training; set streaming: false",
    "kd_trainer": "distillation trains on a mask of its own, which xtf cannot change",
    "processor_type": "labels of image and audio data are made as batches are built, after xtf has scored the rows",
}
_DIFFUSION = re.compile(r"(axolotl\.integrations\.)?diffusion\b")
_NOT_TRAINING = frozenset(
    ("inference", "evaluate", "merge-lora", "merge-sharded-fsdp-weights", "quantize", "vllm-serve", "lm-eval")
)


def has_block(recipe: Mapping[str, Any]) -> bool:
    """Whether a recipe has `xtf:`, other than false. Raises XTFUserError for an empty block and a mistyped key."""
    for key in recipe:
        if meant_as_block(str(key)):
            raise XTFUserError(
                f"xtf: unrecognized key {key!r} in this recipe. Did you mean `xtf:`? Its settings belong into its "
                "mapping, also in a sweep."
            )
    if "xtf" not in recipe or recipe["xtf"] is False:
        return False
    if recipe["xtf"] is None or str(recipe["xtf"]).strip().lower() in ("", "null", "~"):
        raise XTFUserError(f"xtf: {EMPTY_BLOCK}")
    return True


def running_command(words: Sequence[str]) -> str | None:
    """The Axolotl command ("train") of a process with these `sys.argv`; None for another program."""
    first = Path(words[0]) if words else Path()
    if first.name == "axolotl":
        return words[1] if len(words) > 1 else ""
    return first.stem.replace("_", "-") if first.parts[-3:-1] == ("axolotl", "cli") else None


def trains(words: Sequence[str]) -> bool:
    """Whether a process with these `sys.argv` may train, or prepare data for it; any other program may."""
    return running_command(words) not in _NOT_TRAINING


def check_words(words: Sequence[str]) -> None:
    """Raise XTFUserError if options of Axolotl's command hold a block: the command ignores unknown options."""
    for option in (word.split("=")[0] for word in words if word.startswith("--")):
        if option == "--xtf" or meant_as_block(option[2:]):
            raise XTFUserError(f"xtf: Axolotl's command has no `{option}`: write the `xtf:` block into the recipe.")


def check_surroundings() -> None:
    """Raise XTFUserError if XTF is switched off, or for an Axolotl that cannot apply a block."""
    environment.check_disabled(os.environ)
    environment.check_version("axolotl")


def check_settings(recipe: Mapping[str, Any]) -> None:
    """Raise XTFUserError for settings with which Axolotl would not train by the masks."""
    found = {key: why for key, why in _REFUSED.items() if recipe.get(key) and not (key in _SPLIT and recipe[key] == 1)}
    found |= {name: "it also noises its input by the labels" for name in _plugins(recipe) if _DIFFUSION.match(name)}
    for key, why in found.items():
        value = recipe.get(key)
        shown = f"{key}: {getattr(value, 'value', value)}" if isinstance(value, (str, bool, int)) else key
        raise XTFUserError(f"xtf: `{shown}` and `xtf:` do not go together: {why}. Remove one of them.")


def check_plugin_line(recipe: Mapping[str, Any]) -> None:
    """Raise XTFUserError, with the line to write, unless `plugins:` is a list that holds ours."""
    if not isinstance(recipe.get("plugins") or [], list):
        raise XTFUserError(f"xtf: `plugins:` must be a list. Write: {_line(recipe)}")
    if PLUGIN not in _plugins(recipe):
        raise missing_plugin(recipe)


def missing_plugin(recipe: Mapping[str, Any]) -> XTFUserError:
    """The error for a recipe with a block and without its plugin."""
    return XTFUserError(
        "xtf: this recipe has an `xtf:` block, but its plugin is not loaded, so Axolotl would train without it. "
        f"Add this line to the recipe: {_line(recipe)}"
    )


def _plugins(recipe: Mapping[str, Any]) -> list[str]:
    named = recipe.get("plugins") or []
    return [str(name) for name in named] if isinstance(named, list) else [str(named)]


def _line(recipe: Mapping[str, Any]) -> str:
    others = [name for name in _plugins(recipe) if name.rpartition(".")[2] != "XTFPlugin"]
    return f"plugins: [{', '.join([*others, PLUGIN])}]"


def patch(module: ModuleType) -> None:
    """Patch `module.prepare_plugins` to refuse a block that is not applied. Raises AttributeError if there is none."""
    wrap(module, "prepare_plugins", _guarded)


def _guarded(original: Any) -> Any:
    @exit_on_error
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
    """Raise XTFUserError unless Axolotl has loaded our plugin."""
    from axolotl.integrations.base import PluginManager

    held = type(PluginManager.get_instance().plugins.get(PLUGIN))
    if held.__module__ == f"{__package__}.axolotl" and held.__name__ == "XTFPlugin":
        return
    try:
        import_module(f"{__package__}.axolotl")  # for its error
    except ImportError as error:
        raise XTFUserError(
            f"xtf: the plugin {PLUGIN} cannot be imported here ({type(error).__name__}: {error}), so Axolotl would "
            "train without it. Repair the installation: pip install --force-reinstall xtf-plugin"
        ) from error
    raise missing_plugin(cfg)
