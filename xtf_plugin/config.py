"""The `xtf:` block: the only source of its keys, defaults, presets, documentation and JSON schema.

The same block stands in a TRL recipe, in `--xtf '{...}'` and in `XTFConfig(...)`. What a preset leaves out is its
field's default; docs/config.md, the schema and the legal values in error messages are all derived from these models.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, StrictBool, ValidationError, model_validator

from .config_input import plain, read
from .config_presets import ATTRIBUTES, PRESETS, over_preset
from .config_rules import (
    AtLeast,
    Block,
    ByText,
    Calibration,
    Count,
    Domain,
    Layers,
    NoveltyDrop,
    PathText,
    Patterns,
    Positive,
    Problems,
    ProtectConfig,
    ReasoningDrop,
    ReferenceConfig,
    RelevanceDrop,
    Share,
    Switched,
    Whole,
    Window,
)
from .config_selectors import Selectors, check_votes
from .errors import XTFUserError
from .scorers import SelectorConfig

__all__ = [
    "ATTRIBUTES",
    "AtLeast",
    "KnowledgeNoveltyConfig",
    "NoveltyDrop",
    "PRESETS",
    "ProtectConfig",
    "ReasoningDrop",
    "ReasoningImportanceConfig",
    "ReferenceConfig",
    "RelevanceDrop",
    "SelectorConfig",
    "TaskRelevanceConfig",
    "XTFConfig",
]

_WINDOW = "Before the rule, {what} averaged over this many (odd) neighbours, or over the token's sentence or line."
_MAX_FRACTION = "Never drop more than this share of a document's completion through this attribute; null: no cap."


class ReasoningImportanceConfig(Block):
    """Reasoning importance: the attention that a token receives from later tokens, Eq. (2)."""

    layers: Layers = Field(
        default="all",
        description="Layers whose attention is averaged. Numbers count from 0; negative ones, from the last.",
    )
    drop: ReasoningDrop = Field(default=ReasoningDrop(quantile=0.05), description="Which tokens go: exactly one rule.")
    scale: Literal["linear", "log"] = Field(default="linear", description="What a fence's quartiles are taken over.")
    scope: Literal["document", "dataset"] = Field(
        default="document",
        description="Whose quantiles a fence or a quantile uses: each document's own, or the dataset's.",
    )
    window: Window = Field(default=1, description=_WINDOW.format(what="scores are"))
    max_fraction: Share | None = Field(default=None, description=_MAX_FRACTION)

    @model_validator(mode="after")
    def _every_key_acts(self) -> ReasoningImportanceConfig:
        idle: list[tuple[str, Any, str]] = []
        if self.scale == "log" and self.drop.fence is None:
            idle.append(("scale", self.scale, f"has no effect on drop: {self.drop}; remove it, or use {{fence: k}}"))
        if self.scope == "dataset" and self.drop.below is not None:
            why = f"has no effect on drop: {self.drop}; remove it, or use {{fence: k}} or {{quantile: q}}"
            idle.append(("scope", self.scope, why))
        if idle:
            raise Problems(*idle)
        return self


class KnowledgeNoveltyConfig(Block):
    """Knowledge novelty: one minus the probability that the reference gives the token, Eq. (3)."""

    drop: NoveltyDrop = Field(default=NoveltyDrop(known_above=0.95), description="Which tokens go: exactly one rule.")
    window: Window = Field(default=1, description=_WINDOW.format(what="log-probabilities are"))
    max_fraction: Share | None = Field(default=None, description=_MAX_FRACTION)


class TaskRelevanceConfig(Block):
    """Task relevance: how close a token's embedding is to the domain's, Eq. (4)."""

    domain: Domain = Field(
        default="dataset",
        description="What the domain is: the dataset's own tokens, expert words, or a file with a word a line.",
    )
    embedding: Literal["input", "output"] = Field(
        default="input",
        description="Vectors compared: the embedding layer's, or the last hidden state of the token alone.",
    )
    drop: RelevanceDrop = Field(default=RelevanceDrop(cluster=2), description="Which tokens go: exactly one rule.")
    window: Window = Field(default=1, description=_WINDOW.format(what="scores are"))
    max_fraction: Share | None = Field(default=None, description=_MAX_FRACTION)


class XTFConfig(Block):
    """The whole block; `XTFConfig()` is what `xtf: true` means.

    Built from keywords as from YAML: presets are merged in, the nested parts may be mappings or booleans, and wrong
    values raise `XTFUserError` with every problem on a line. (Pydantic's own entrances, such as `model_validate`, raise
    its `ValidationError` around the same text.)
    """

    preset: Literal["default", "none", "paper", "official"] = Field(
        default="default",
        description="Settings to start from; every other key of the block wins over its preset. none: no rule at all.",
    )
    reference: ReferenceConfig = Field(default=ReferenceConfig(), description="Whose scores decide.")
    reasoning_importance: Switched[ReasoningImportanceConfig] = Field(
        default=ReasoningImportanceConfig(),
        description="The attention a token receives from later tokens, Eqs. (2) and (5).",
    )
    knowledge_novelty: Switched[KnowledgeNoveltyConfig] = Field(
        default=KnowledgeNoveltyConfig(), description="How unsure the reference is of the token, Eqs. (3) and (6)."
    )
    task_relevance: Switched[TaskRelevanceConfig] = Field(
        default=TaskRelevanceConfig(), description="How close the token is to the domain, Eqs. (4) and (7)."
    )
    selectors: Selectors = Field(
        default={},
        description="Selectors, added to the preset's: a name of your choice and its scorer; see docs/selectors.md.",
    )
    combine: ByText[Literal["union", "intersection", "majority"], AtLeast] = Field(
        default="union",
        description="How many attributes and selectors must say so for a token to go: any (Eq. (1)), all, most, or k.",
    )
    protect: ProtectConfig = Field(default=ProtectConfig(), description="What no rule may drop.")
    force_drop: Patterns = Field(
        default=[],
        description="Regexes over the decoded completion; tokens of a match are always dropped. Protection wins.",
    )
    min_kept: Count = Field(
        default=1,
        description="Tokens per document that survive whatever the rules say: those that the first selector scores "
        "highest; without selectors, the most novel. With 0, an empty batch still keeps one, counted and reported.",
    )
    control: Literal["random"] | None = Field(
        default=None,
        description="random: drop as many tokens per document as the rules would, but at random; a control run.",
    )
    seed: Whole = Field(default=0, description="Seed of `control: random`; nothing else is random.")
    cache_dir: PathText | None = Field(
        default=None, description="Where scores are kept; null: $XTF_CACHE, else the platform's user cache folder."
    )
    batch_tokens: ByText[Literal["auto"], Positive] = Field(
        default="auto",
        description="Tokens per scoring batch; auto: 4,096 on a CPU, on a GPU by its memory, up to 32,768 (16,384 for "
        "a stream and under FSDP); halved when memory runs out.",
    )
    calibration: Calibration = Field(
        default=1000,
        description="Streamed data only: the stream's first so many documents are scored before training, and what "
        "depends on a whole dataset (its quantiles, classes and domain) is taken from them.",
    )
    report: ByText[PathText, StrictBool] = Field(
        default=True,
        description="true: write report.html, summary.json and scores.parquet to `output_dir`/xtf; a path: to that "
        "folder; false: none of them.",
    )
    dry_run: StrictBool = Field(
        default=False, description="Score, report, then end the run before the first optimizer step."
    )

    def __init__(self, /, **block: Any) -> None:
        """Validate the keys of a block; see the class."""
        try:
            super().__init__(**over_preset(plain(block)))
        except ValidationError as error:
            from .config_docs import explain

            raise XTFUserError(explain(error)) from None

    @classmethod
    def parse(cls, value: XTFConfig | Mapping[str, Any] | str | bool | None) -> XTFConfig | None:
        """Read what stands under `xtf:`, or after `--xtf`; the input is left as it is.

        Equals `XTFConfig(**value)` for a mapping. True is the defaults; None and False are None: no filtering. Text is
        read as JSON, else as YAML, of one of these. An XTFConfig is returned as it is.

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
            from .config_docs import shown

            hint = f" For the preset write {{preset: {value}}}." if isinstance(value, str) and value in PRESETS else ""
            raise XTFUserError(
                f"xtf: {shown(value)} is not a block.{hint} Legal: a mapping of settings, true (the defaults) or false "
                "(off). See docs/config.md."
            )
        return cls() if value is True else cls(**plain(value, 1))

    @property
    def attributes(self) -> tuple[str, ...]:
        """The attributes that are on, in the order of `ATTRIBUTES`."""
        return tuple(name for name in ATTRIBUTES if getattr(self, name) is not False)

    @property
    def scores(self) -> dict[str, Any]:
        """The parts of the block that give a score: attributes that are on, then selectors, by name."""
        return {name: self.part(name) for name in self.voters}

    @property
    def voters(self) -> tuple[str, ...]:
        """Whose rules `combine` counts: the attributes that are on, then the selectors as the block names them."""
        return (*self.attributes, *self.selectors)

    def part(self, voter: str) -> Any:
        """The part of the block of an attribute that is on, or of a selector."""
        return self.selectors[voter] if voter in self.selectors else getattr(self, voter)

    def to_dict(self) -> dict[str, Any]:
        """Every setting as plain JSON values; `XTFConfig.parse` turns it back into an equal config.

        A selector of the preset that is off is written as false. The key is left out where it would be empty, as in
        configs that were written before there were selectors.
        """
        settings = self.model_dump(mode="json")
        off = PRESETS[self.preset].get("selectors", {}).keys() - self.selectors.keys()
        settings["selectors"] |= dict.fromkeys(sorted(off), False)
        return settings if settings["selectors"] else {k: v for k, v in settings.items() if k != "selectors"}

    @classmethod
    def json_schema(cls) -> dict[str, Any]:
        """JSON schema (2020-12) of what may stand under `xtf:`, the booleans included."""
        from .config_docs import complete

        return complete(cls.model_json_schema())

    def resolved_cache_dir(self) -> Path:
        """Where scores are kept: `cache_dir`, else $XTF_CACHE, else the platform's user cache folder. Not created."""
        chosen = self.cache_dir or os.environ.get("XTF_CACHE")
        if chosen:
            return Path(os.path.expanduser(chosen))
        from platformdirs import user_cache_dir

        return Path(user_cache_dir("xtf-plugin"))

    @model_validator(mode="after")
    def _something_can_go(self) -> XTFConfig:
        check_votes(self.attributes, self.selectors, self.combine, self.force_drop, self.control)
        return self
