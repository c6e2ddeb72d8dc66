"""The Axolotl plugin: `plugins: [xtf_plugin.XTFPlugin]` and the same `xtf:` block as everywhere else.

Axolotl logs and skips a plugin whose import fails with an ImportError, so this module imports next to nothing when it
is loaded, and turns everything that a user can mend into one message and exit code 2. The block itself is validated by
Axolotl, through `XTFArgs`.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from axolotl.integrations.base import BasePlugin

from ..hosts import _compat
from .axolotl_recipe import check_surroundings, has_block, trains
from .guard import ending_with_2


class XTFPlugin(BasePlugin):  # type: ignore[misc]  # axolotl is untyped here
    """Token-level noise filtering for Axolotl's supervised fine-tuning.

    Equals `xtf_plugin.attach(trainer, cfg.xtf)` on the trainer that Axolotl has built. Without an `xtf:` block, or with
    `xtf: false`, it does nothing.

    Example:
        plugins: [xtf_plugin.XTFPlugin]
        xtf:
          preset: default
    """

    @ending_with_2
    def register(self, cfg: Any) -> None:
        """Refuse an empty block, a mistyped one, and an environment that cannot apply one; `cfg` is not validated."""
        if trains(sys.argv) and has_block(cfg):
            check_surroundings()

    def get_input_args(self) -> str:
        """Where Axolotl finds the model that declares the key `xtf`."""
        return f"{__package__}.axolotl_args.XTFArgs"

    @ending_with_2
    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Attach XTF to the trainer. A dry run begins and ends here, before Axolotl writes into its output folder."""
        from ..callback import attach
        from ..config.block import XTFConfig

        config = XTFConfig.parse(cfg.get("xtf"))
        if config is None:
            return
        attach(trainer, config)
        trainer.train = ending_with_2(trainer.train)
        if config.dry_run or _compat.is_on(os.environ.get("XTF_DRY_RUN")):
            trainer.train()
