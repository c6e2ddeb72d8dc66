"""Declares the key `xtf` to Axolotl, so that its own validation checks the block and reports what is wrong with it.

Axolotl derives its recipe model from this one; the block stays the plain data that it was.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field, field_validator, model_validator

from ..config.block import XTFConfig
from ..config.block import plain
from .axolotl_recipe import check_settings, has_block


class XTFArgs(BaseModel):
    """The part of an Axolotl recipe that belongs to XTF."""

    xtf: Any = Field(
        default=None,
        json_schema_extra={
            "description": "Token-level noise filtering (xtf-plugin): true for the defaults, false for off, or a "
            "mapping; `xtf check --schema` prints what it may hold."
        },
    )

    @model_validator(mode="before")
    @classmethod
    def _goes_with_the_recipe(cls, recipe: Any) -> Any:
        if isinstance(recipe, dict) and has_block(recipe):
            check_settings(recipe)
        return recipe

    @field_validator("xtf")
    @classmethod
    def _is_a_block(cls, block: Any) -> Any:
        XTFConfig.parse(block)
        return plain(block)
