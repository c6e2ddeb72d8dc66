"""The scores of a block: three named slots and selectors, each a scorer with its keys and a rule.

Which keys a score takes depends on its scorer: the registry gives the scorer's config class, and that class checks the
part. Errors of a part are kept together with their class, so that `messages` can explain them from its schema.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, SerializeAsAny, ValidationError, WrapValidator
from pydantic_core.core_schema import ValidationInfo

from ..errors import XTFUserError
from ..fields import Problems, ReferenceConfig
from ..scorers import ScoreConfig, registry

# The slots of the block, each with the scorer that it has where the block names none: the paper's.
SLOTS = {
    "reasoning_importance": "attention_received",
    "knowledge_novelty": "novelty",
    "task_relevance": "embedding_similarity",
}
MOST = 8  # selectors
SWITCH = {"const": False, "type": "boolean"}
NAME = re.compile(r"[a-z][a-z0-9_]*")
# What a reason, a metric or a column of the score table is called already.
RESERVED = frozenset(
    "row document position token_id token kept reason protected forced log_probability floor control".split()
) | set(SLOTS)


class PartProblems(ValueError):
    """The part of a score that its scorer's config class refuses."""

    def __init__(self, model: type[ScoreConfig], error: ValidationError) -> None:
        super().__init__(str(error))
        self.model, self.error = model, error


class NothingToTakeOut:
    """Stands for a `false` under a name that the preset does not have, so that the message can say which it has."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names

    def __repr__(self) -> str:
        """What the user wrote."""
        return "false"


def _part(value: Any, default: str | None = None) -> ScoreConfig:
    """A part of the block, checked by the config class of the scorer that it names, or of `default`."""
    if isinstance(value, NothingToTakeOut):
        has = f"has {', '.join(value.names)}" if value.names else "has no selector"
        raise ValueError(f"takes a selector of the preset out, but that {has}; remove the key or correct its name")
    if isinstance(value, ScoreConfig):
        value = value.model_dump()
    if not isinstance(value, Mapping):
        raise ValueError("is not a mapping; write {scorer: name, drop: {quantile: q}}")
    value = dict(value) if default is None else {"scorer": default, **value}
    name = value.get("scorer")
    model = ScoreConfig  # without the name of a scorer, the common keys say what is wrong
    if isinstance(name, str) and name:
        try:
            model = registry.find(name).Config
        except XTFUserError as error:
            raise Problems(("scorer", name, str(error).rstrip("."))) from None
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise PartProblems(model, error) from None


def _slot(value: Any, _: Any, info: ValidationInfo) -> Any:
    if value is False:
        return False
    if value is True:
        value = {}
    if not isinstance(value, Mapping | ScoreConfig):
        raise ValueError("is neither a mapping nor true or false")
    return _part(value, SLOTS[str(info.field_name)])


def _selector(value: Any, _: Any) -> ScoreConfig:
    return _part(value)


def _mapping(value: Any) -> Any:
    if not isinstance(value, Mapping):
        raise ValueError("is not a mapping; write {a_name: {scorer: ..., drop: ...}}")
    return value


def _named(selectors: dict[str, ScoreConfig]) -> dict[str, ScoreConfig]:
    problems: list[tuple[str, Any, str]] = []
    for name in selectors:
        if name in RESERVED:
            problems.append((name, name, "is taken: reasons, metrics and the score table use it; choose another name"))
        elif not NAME.fullmatch(name):
            problems.append((name, name, "is no name: use lower-case letters, digits and _, and begin with a letter"))
    if len(selectors) > MOST:
        problems.append((list(selectors)[MOST], len(selectors), f"selectors are more than {MOST}; leave some out"))
    if problems:
        raise Problems(*problems)
    return selectors


Slot = Annotated[SerializeAsAny[ScoreConfig] | bool, WrapValidator(_slot)]
Selectors = Annotated[
    dict[str, Annotated[SerializeAsAny[ScoreConfig], WrapValidator(_selector)]],
    Field(json_schema_extra={"maxProperties": MOST, "propertyNames": {"pattern": f"^{NAME.pattern}$"}}),
    AfterValidator(_named),
    BeforeValidator(_mapping),
]


def slot_over_preset(name: str, given: Any, preset: Any) -> Any:
    """A slot of the block over the preset's: key by key where both use the same scorer, else as given."""
    base = preset or {}  # off in the preset: what is given stands alone
    if given is True:
        return base or True
    if not isinstance(given, Mapping):
        return given
    same = given.get("scorer", SLOTS[name]) == base.get("scorer", SLOTS[name]) or "scorer" not in given
    return {**base, **given} if same else given


def selectors_over_preset(given: Any, preset: Mapping[str, Any]) -> Any:
    """The block's selectors over the preset's: by name, and key by key where both use the same scorer.

    `false` takes one of the preset's out; `selectors: false` takes out all of them.
    """
    if given is False:
        return {}
    if not isinstance(given, Mapping):
        return given
    merged = {name: preset.get(name) for name in (*given, *preset)}  # the block's order, then what it does not name
    for name, part in given.items():
        base = preset.get(name)
        if part is False:
            merged[name] = NothingToTakeOut(tuple(preset))
            if base is not None:
                del merged[name]
        elif isinstance(part, Mapping) and base is not None and part.get("scorer", base["scorer"]) == base["scorer"]:
            merged[name] = {**base, **part}
        else:
            merged[name] = part
    return merged


def check_streamed(scores: Mapping[str, ScoreConfig]) -> None:
    """Refuse, by name, scores that cannot be had of streamed data.

    Raises:
        XTFUserError: a scorer needs the whole dataset, or has a reference of its own.
    """
    for name, part in scores.items():
        scorer = registry.find(part.scorer)
        own = [value for _, value in part if isinstance(value, ReferenceConfig) and value.model]
        if not scorer.per_document and scorer.frozen is None:
            why = f"has a scorer ({scorer.name}) that needs the whole dataset at once"
        elif own:
            why = f"has a reference of its own ({own[0].model}), which would have to stay loaded beside training"
        else:
            continue
        raise XTFUserError(
            f"xtf: the training data is streamed, and {name} {why}. Remove it, or do not stream: "
            "dataset_streaming: false (streaming: false under `datasets`)."
        )


def schemas() -> dict[str, dict[str, Any]]:
    """JSON schema of each built-in scorer's part, by scorer name, with definitions of its own."""
    return {name: _with_const(name, scorer.Config.model_json_schema()) for name, scorer in registry.BUILTIN.items()}


def _with_const(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    own = {**schema["properties"]["scorer"], "const": name}
    return {**schema, "properties": {**schema["properties"], "scorer": own}}


def completed(schema: dict[str, Any]) -> dict[str, Any]:
    """The block's schema with what a score may hold: the common keys, and by scorer the built-in ones' own.

    Scores of other packages' scorers are checked for the common keys alone; their keys are known once they are loaded.
    """
    definitions = dict(schema["$defs"])
    common = definitions.pop("ScoreConfig")
    cases = {}
    for name, part in schemas().items():
        definitions |= part.pop("$defs")
        definitions[part["title"]] = part
        cases[name] = {"$ref": f"#/$defs/{part['title']}"}
    # not required: beside a preset a part may change single keys of the preset's score
    loose = {key: value for key, value in common.items() if key not in ("additionalProperties", "required")}

    def part_of(default: str | None) -> dict[str, Any]:
        """What a slot with this default scorer, or a selector, may hold."""
        keys = loose["properties"]
        if default is not None:
            keys = definitions[cases[default]["$ref"].rpartition("/")[2]]["properties"]
            keys = {**keys, "scorer": {**loose["properties"]["scorer"], "default": default}}
        tests = []
        for name, case in cases.items():
            test: dict[str, Any] = {"properties": {"scorer": {"const": name}}}
            tests.append({"if": test if name == default else {**test, "required": ["scorer"]}, "then": case})
        return {**loose, "properties": keys, "allOf": tests}

    properties = dict(schema["properties"])
    mapping = {**properties["selectors"], "additionalProperties": {"oneOf": [part_of(None), SWITCH]}}
    described = {"description": mapping.pop("description"), "default": mapping.pop("default")}
    properties["selectors"] = {**described, "oneOf": [mapping, SWITCH]}
    for name, default in SLOTS.items():
        about = {key: properties[name][key] for key in ("description", "default")}
        properties[name] = {**about, "oneOf": [part_of(default), {"type": "boolean"}]}
    return {**schema, "$defs": definitions, "properties": properties}
