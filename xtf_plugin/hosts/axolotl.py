"""The Axolotl plugin: `plugins: [xtf_plugin.XTFPlugin]` beside the `xtf:` block.

Axolotl logs an ImportError of a plugin and continues without it, so little of ours is imported here at the top.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, Field, field_validator, model_validator

from ..environment import RECIPE, is_on
from .axolotl_checks import check_settings, check_surroundings, has_block, trains
from .fail_closed import exit_on_error

logger = logging.getLogger(__name__)


class XTFArgs(BaseModel):
    """Declares the key `xtf` to Axolotl, whose validation then checks the block; its value stays plain data."""

    xtf: Any = Field(
        default=None,
        json_schema_extra={
            "description": "Token-level noise filtering (xtf-plugin): true for the defaults, false for off, or a "
            "mapping; `xtf check --schema` prints what it may hold."
        },
    )

    @model_validator(mode="before")
    @classmethod
    def _check_other_settings(cls, recipe: Any) -> Any:
        if isinstance(recipe, dict) and has_block(recipe):
            check_settings(recipe)
        return recipe

    @field_validator("xtf")
    @classmethod
    def _check_block(cls, block: Any) -> Any:
        from ..config.block import XTFConfig, plain

        XTFConfig.parse(block)
        return plain(block)


class XTFPlugin(BasePlugin):  # type: ignore[misc]  # axolotl is untyped here
    """Token-level noise filtering for Axolotl's supervised fine-tuning.

    Equals `xtf_plugin.attach(trainer, cfg.xtf)` on Axolotl's trainer. Does nothing without an `xtf:` block, or with
    `xtf: false`.

    Example:
        plugins: [xtf_plugin.XTFPlugin]
        xtf:
          preset: default
    """

    @exit_on_error
    def register(self, cfg: Any) -> None:
        """Refuse an empty block, and an environment that cannot apply one; warn without a block. `cfg` is raw."""
        if not trains(sys.argv):
            return
        if has_block(cfg):
            from .row_settings import row_settings

            check_surroundings()
            self._recipe = row_settings(cfg)
        elif "xtf" not in cfg:
            logger.warning(
                "xtf: the plugin is loaded, but the recipe has no `xtf:` key, so every label is trained on. Axolotl "
                "ignores unknown keys, mistyped ones too. Write `xtf: false` if this is intended."
            )

    def get_input_args(self) -> str:
        """The name of the model that declares the key `xtf`."""
        return f"{__name__}.XTFArgs"

    @exit_on_error
    def pre_model_load(self, cfg: Any) -> None:
        """Read the columns of the data that the block names: a wrong one is refused before the model is loaded."""
        from ..config.block import XTFConfig
        from ..training.columns import reads_columns

        config = XTFConfig.parse(cfg.get("xtf"))
        if config is None or not reads_columns(config):
            return
        from axolotl.loaders import load_tokenizer

        from .axolotl_columns import read_columns

        self._columns = read_columns(cfg, load_tokenizer(cfg), config)

    @exit_on_error
    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Attach XTF to the trainer. A dry run ends here, before Axolotl writes into its output folder."""
        from ..config.block import XTFConfig
        from ..training import columns
        from ..training.callback import attach

        config = XTFConfig.parse(cfg.get("xtf"))
        if config is None:
            return
        setattr(trainer, RECIPE, getattr(self, "_recipe", {}))
        if columns.reads_columns(config):
            setattr(trainer, columns.ATTRIBUTE, self._columns)
        attach(trainer, config)
        trainer.train = exit_on_error(trainer.train)
        if config.dry_run or is_on(os.environ.get("XTF_DRY_RUN")):
            trainer.train()
