"""The `xtf:` block: its keys, their defaults and how a block is read.

The same block stands in a TRL recipe, in `--xtf '{...}'` and in `XTFConfig(...)`. docs/config.md, the JSON schema and
the legal values in error messages are derived from these models.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from platformdirs import user_cache_dir
from pydantic import Field, StrictBool, ValidationError, model_validator

from ..errors import XTFUserError
from ..fields import (
    Block,
    ByText,
    Calibration,
    Columns,
    Count,
    PathText,
    Patterns,
    Positive,
    Problems,
    ReferenceConfig,
    Share,
    Whole,
)
from ..scorers import ScoreConfig
from .messages import NEXT, explain, shown
from .scores import PRESETS, SLOTS, Selectors, Slot, among_problems, complete, over_preset


class ProtectConfig(Block):
    """Tokens that no rule may drop."""

    special_tokens: StrictBool = Field(default=True, description="Keep EOS, end-of-turn and all other special tokens.")
    patterns: Patterns = Field(default=[], description="Regexes over the decoded completion; matches are kept.")
    formats: Share | None = Field(
        default=0.2,
        description="Keep openings of lines and sentences, such as `####` or `<think>`, which this share of documents "
        "has, and short lines that begin so, unless `force_drop` matches them; null: off.",
    )


class AtLeast(Block):
    """Drop a token if the rules of at least this many scores fire on it."""

    at_least: Positive = Field(description="Number of scores whose rules must fire.")


class XTFConfig(Block):
    """The `xtf:` block; `XTFConfig()` equals `xtf: true`.

    Keywords are read as YAML is: the preset is merged in, and nested parts may be mappings or booleans.

    Raises:
        XTFUserError: wrong keys or values; the message has a line for each of them.
    """

    preset: Literal["default", "none", "paper", "official"] = Field(
        default="default",
        description="Settings to start from; every other key of the block wins over its preset. none: no rule at all.",
    )
    reference: ReferenceConfig = Field(default=ReferenceConfig(), description="Model that scores the tokens.")
    reasoning_importance: Slot = Field(
        default=False, description="What the answer's reasoning rests on; in the paper Eqs. (2) and (5)."
    )
    knowledge_novelty: Slot = Field(default=False, description="What is not known yet; in the paper Eqs. (3) and (6).")
    task_relevance: Slot = Field(default=False, description="What belongs to the task; in the paper Eqs. (4) and (7).")
    selectors: Selectors = Field(
        default={}, description="Further scores, added to the preset's: names of your choice, each with a scorer."
    )
    combine: ByText[Literal["union", "intersection", "majority"], AtLeast] = Field(
        default="union", description="How many scores' rules must fire to drop a token: any (Eq. (1)), all, most, or k."
    )
    protect: ProtectConfig = Field(default=ProtectConfig(), description="What no rule may drop.")
    force_drop: Patterns = Field(
        default=[], description="Regexes over the decoded completion; matches are dropped unless protected."
    )
    min_kept: Count = Field(
        default=1,
        description="Trained tokens per document that are kept whatever the rules say: those that the first score "
        "rates highest (selectors come before slots), of equal ones the most probable. With 0, an empty batch still "
        "keeps one, counted and reported.",
    )
    control: Literal["random"] | None = Field(
        default=None, description="random: drop as many tokens of each document as the rules would, but at random."
    )
    seed: Whole = Field(default=0, description="Seed of `control: random`; nothing else is random.")
    cache_dir: PathText | None = Field(
        default=None, description="Where scores are kept; null: $XTF_CACHE, else the platform's user cache folder."
    )
    batch_tokens: ByText[Literal["auto"], Positive] = Field(
        default="auto",
        description="Tokens per scoring batch; auto: 4,096 on a CPU, on a GPU by its memory, up to 32,768 (16,384 for "
        "a stream, under FSDP, and where texts share a prefix, as with the default); halved when memory runs out.",
    )
    calibration: Calibration = Field(
        default=1000,
        description="Streamed data only: this many documents are scored before training; quantiles, medians, "
        "classes, formats and the domain, which depend on a dataset, are taken from them.",
    )
    report: ByText[PathText, StrictBool] = Field(
        default=True,
        description="true: write report.html, summary.json and scores.parquet to `output_dir`/xtf; a path: there.",
    )
    report_by: Columns = Field(
        default=[],
        description="Columns of the dataset, such as `source`: the report counts what is dropped for each of their "
        "values. One name, or a list.",
    )
    dry_run: StrictBool = Field(default=False, description="Score, report, then end the run before the first step.")

    def __init__(self, /, **block: Any) -> None:
        try:
            super().__init__(**over_preset(plain(block)))
        except ValidationError as error:
            raise XTFUserError(explain(error, self.json_schema())) from None

    @classmethod
    def parse(cls, value: XTFConfig | Mapping[str, Any] | str | bool | None) -> XTFConfig | None:
        """Read the value of `xtf:`, or the text after `--xtf`; the input is not changed.

        Equals `XTFConfig(**value)` for a mapping. True gives the defaults, None and False give None: no filtering. Text
        is read as JSON, else as YAML. An XTFConfig is returned as it is.

        Raises:
            XTFUserError: anything else, or a block with wrong keys or values; the message has a line for each of them.
        """
        if isinstance(value, str):
            value = read(value)
        if isinstance(value, XTFConfig):
            return value
        if value is None or value is False:
            return None
        if value is not True and not isinstance(value, Mapping):
            hint = f" For the preset write {{preset: {value}}}." if isinstance(value, str) and value in PRESETS else ""
            raise XTFUserError(
                f"xtf: {shown(value)} is not a block.{hint} Legal: a mapping of settings, true (the defaults) or false "
                f"(off). {NEXT}"
            )
        return cls() if value is True else cls(**plain(value, 1))

    @property
    def scores(self) -> dict[str, ScoreConfig]:
        """The scores that are on, by name: slots in the order of `SLOTS`, then selectors in the order of the block."""
        slots = {name: part for name in SLOTS if isinstance(part := getattr(self, name), ScoreConfig)}
        return {**slots, **self.selectors}

    @property
    def report_columns(self) -> list[str]:
        """The columns of `report_by`."""
        return [self.report_by] if isinstance(self.report_by, str) else self.report_by

    def to_dict(self) -> dict[str, Any]:
        """Every setting as plain JSON values; `XTFConfig.parse` turns it back into an equal config.

        A selector of the preset that is off is written as false. Without selectors the key is left out.
        """
        settings = self.model_dump(mode="json")
        off = PRESETS[self.preset].get("selectors", {}).keys() - self.selectors.keys()
        settings["selectors"] |= dict.fromkeys(sorted(off), False)
        return settings if settings["selectors"] else {k: v for k, v in settings.items() if k != "selectors"}

    @classmethod
    @functools.cache
    def json_schema(cls) -> dict[str, Any]:
        """JSON schema (2020-12) of what may stand under `xtf:`, the booleans included."""
        return complete(cls.model_json_schema())

    def resolved_cache_dir(self) -> Path:
        """Where scores are kept: `cache_dir`, else $XTF_CACHE, else the platform's user cache folder. Not created."""
        chosen = self.cache_dir or os.environ.get("XTF_CACHE")
        return Path(os.path.expanduser(chosen) if chosen else user_cache_dir("xtf-plugin"))

    @model_validator(mode="after")
    def _can_drop(self) -> XTFConfig:
        """Refuse a block that could drop nothing, or that needs more scores than it has."""
        number = len(self.scores)
        problems: list[tuple[str, Any, str]] = []
        if not number and not self.force_drop:
            why = "is empty and every score is off, so nothing could be dropped; switch a score on, or write xtf: false"
            problems.append(("force_drop", self.force_drop, why))
            if self.control is not None:
                problems.append(("control", self.control, "has no drop rate to match; switch a score on"))
        problems += among_problems(self.scores)
        if isinstance(self.combine, AtLeast) and self.combine.at_least > number:
            why = f"is more than there are scores ({number}); lower it, or switch a score on"
            problems.append(("combine.at_least", self.combine.at_least, why))
        if problems:
            raise Problems(*problems)
        return self


def plain(value: Any, depth: int = 5) -> Any:
    """Mappings as dicts with text keys, to the depth of a block (a YAML alias can make a mapping contain itself).

    Arrays become lists, because comparing them with a value gives no single answer.
    """
    if not isinstance(value, Mapping) or depth == 0:
        return value.tolist() if isinstance(value, np.ndarray) else value
    return {key if isinstance(key, str) else shown(key): plain(item, depth - 1) for key, item in value.items()}


def read(text: str) -> Any:
    """JSON or YAML text as a value; empty text is refused, because it would switch the filter off without a warning."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        try:
            value = of_yaml(text)
        except ValueError as error:
            why = " ".join(str(error).split())
            raise XTFUserError(f"xtf: {text[:80]!r} is neither JSON nor YAML: {why}. {NEXT}") from None
    if value is None and text.strip().lower() not in ("null", "~"):
        raise XTFUserError(f"xtf: {text[:80]!r} is empty. Write true for the defaults, false for off, or a mapping.")
    return value


def of_yaml(text: str) -> Any:
    """The value of YAML text. Raises ValueError, with PyYAML's message, for any other text."""
    try:
        return yaml.safe_load(text)
    # besides YAMLError, PyYAML's constructors raise these on scalars that do not fit their tag
    except (yaml.YAMLError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise ValueError(str(error)) from error


def repeated_key(text: str) -> tuple[str, int] | None:
    """A key of a recipe's `xtf:` block, or `xtf` itself, that is written twice, and its line; None: there is none.

    `text` is YAML that can be read. A reader of YAML takes the last of two and says nothing.
    """
    recipe = yaml.compose(text, Loader=yaml.SafeLoader)
    of_recipe = recipe.value if isinstance(recipe, yaml.MappingNode) else []
    block = [(key, value) for key, value in of_recipe if key.value == "xtf"]
    waiting, mappings = [block], set[int]()  # an alias can make a mapping contain itself
    while waiting:
        seen = set[str]()
        for key, value in waiting.pop(0):
            if str(key.value) in seen:
                return str(key.value), key.start_mark.line + 1
            seen.add(str(key.value))
            if isinstance(value, yaml.MappingNode) and id(value) not in mappings:
                mappings.add(id(value))
                waiting.append(value.value)
    return None
