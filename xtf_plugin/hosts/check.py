"""What can be refused of a recipe before its host is started: asked by `xtf check` and `xtf score`, never by a run.

A run asks the same questions itself, where it can see the answers; this is for the user who asks beforehand.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from ..errors import XTFUserError
from ..hosts import _compat, axolotl_recipe

if TYPE_CHECKING:
    from ..config.block import XTFConfig
    from .recipe import Recipe

_NO_ENTRY = "the boot hook of xtf-plugin is not registered in {prefix} (entry point group torch.backends)"


def parse_block(recipe: Recipe) -> XTFConfig | None:
    """The config of a recipe's block, None when it is absent or off.

    Raises XTFUserError for a wrong block, and for one that its host would not apply, whatever the environment.
    """
    from ..config.block import XTFConfig
    from ..config.scores import check_streamed

    if recipe.host == "axolotl":
        axolotl_recipe.has_block(recipe.data)  # an empty one, and a mistyped key
    config = XTFConfig.parse(recipe.block)
    if config is None:
        return None
    if recipe.host == "axolotl":
        axolotl_recipe.check_plugin_line(recipe.data)
        axolotl_recipe.check_settings(recipe.data)
    elif recipe.streamed:
        if recipe.data.get("dataloader_num_workers"):
            raise XTFUserError(_compat.WORKERS_REFUSED.format(workers=recipe.data["dataloader_num_workers"]))
        check_streamed(config.selectors)
    return config


def check_environment(recipe: Recipe) -> str:
    """Raise XTFUserError unless a run of this recipe, here, would apply its block; else say what applies it."""
    if recipe.host == "axolotl":
        _compat.check_axolotl(_compat.installed_version("axolotl"))
        _compat.check_disabled(os.environ)
        return _axolotl_hook()
    if not _compat.hook_installed():
        raise XTFUserError(
            f"{_NO_ENTRY.format(prefix=sys.prefix)}, so `trl sft` would not see the block. Run: pip install xtf-plugin"
        )
    _compat.check_switches(os.environ)
    _compat.check_switches(recipe.env, f"the `env:` block of {recipe.path}")
    _compat.check_trl(_compat.installed_version("trl"))
    return "installed and on"


def _axolotl_hook() -> str:
    """Axolotl loads the plugin by the recipe's line; the hook is what notices that it did not."""
    if not _compat.hook_installed():
        off = _NO_ENTRY.format(prefix=sys.prefix)
    else:
        try:
            _compat.check_switches(os.environ)
            return "installed and on"
        except XTFUserError:
            off = f"off (TORCH_DEVICE_BACKEND_AUTOLOAD={os.environ['TORCH_DEVICE_BACKEND_AUTOLOAD']})"
    return f"{off}: the recipe's plugin applies the block, but nothing would notice if Axolotl could not import it"
