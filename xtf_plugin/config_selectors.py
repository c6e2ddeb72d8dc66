"""The `selectors:` part of the block: names of the user's choice, each with a scorer and that scorer's own keys.

Which keys a selector takes is known only when its scorer is: the registry names the class, the class's model checks
the part. So errors of a part are kept together with their model, for `config_docs` to explain from its schema.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, SerializeAsAny, ValidationError, WrapValidator

from .config_rules import AtLeast, Problems, ReferenceConfig
from .errors import XTFUserError
from .scorers import registry
from .scorers.base import SelectorConfig

MOST = 8
OFF = {"const": False, "type": "boolean"}
NAME = re.compile(r"[a-z][a-z0-9_]*")
# What a reason, a metric or a column of the score table is called already.
RESERVED = frozenset(
    "row document position token_id token kept reason reasoning_importance knowledge_novelty task_relevance "
    "protected floor forced control log_probability".split()
)


class PartProblems(ValueError):
    """A selector's part that its scorer's model refuses."""

    def __init__(self, model: type[SelectorConfig], error: ValidationError) -> None:
        super().__init__(str(error))
        self.model, self.error = model, error


class NothingToTakeOut:
    """Stands for a `false` under a name that the preset does not have, so that the message can say which it has."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names

    def __repr__(self) -> str:
        """What the user wrote."""
        return "false"


def _part(value: Any, _: Any) -> SelectorConfig:
    """One selector's part, checked by the model of the scorer that it names."""
    if isinstance(value, NothingToTakeOut):
        has = f"has {', '.join(value.names)}" if value.names else "has no selector"
        raise ValueError(f"takes a selector of the preset out, but that {has}; remove the key or correct its name")
    if isinstance(value, SelectorConfig):
        value = value.model_dump()
    if not isinstance(value, Mapping):
        raise ValueError("is not a mapping; write {scorer: name, drop: {quantile: q}}")
    name = value.get("scorer")
    model = SelectorConfig  # without a name of a scorer, the common keys say what is wrong
    if isinstance(name, str) and name:
        try:
            model = registry.find(name).Config
        except XTFUserError as error:
            raise Problems(("scorer", name, str(error).rstrip("."))) from None
    try:
        return model.model_validate(dict(value))
    except ValidationError as error:
        raise PartProblems(model, error) from None


def _mapping(value: Any) -> Any:
    if not isinstance(value, Mapping):
        raise ValueError("is not a mapping; write {a_name: {scorer: ..., drop: ...}}")
    return value


def _named(selectors: dict[str, SelectorConfig]) -> dict[str, SelectorConfig]:
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


Selectors = Annotated[
    dict[str, Annotated[SerializeAsAny[SelectorConfig], WrapValidator(_part)]],
    Field(json_schema_extra={"maxProperties": MOST, "propertyNames": {"pattern": f"^{NAME.pattern}$"}}),
    AfterValidator(_named),
    BeforeValidator(_mapping),
]


def with_preset(given: Any, preset: Mapping[str, Any]) -> Any:
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


def check_votes(
    attributes: tuple[str, ...],
    selectors: Mapping[str, SelectorConfig],
    combine: str | AtLeast,
    force_drop: list[str],
    control: str | None,
) -> None:
    """Refuse a block that could drop nothing, or that asks for more votes than there are; raises `Problems`."""
    voters = len(attributes) + len(selectors)
    problems: list[tuple[str, Any, str]] = []
    if not voters and not force_drop:
        why = (
            "is empty, every attribute is off and there is no selector, so nothing could be dropped; switch one on, "
            "add a selector, or write xtf: false"
        )
        problems.append(("force_drop", force_drop, why))
        if control is not None:
            problems.append(("control", control, "has no drop rate to match; switch an attribute on"))
    if isinstance(combine, AtLeast) and combine.at_least > voters:
        if selectors:
            why = f"is more than the {len(attributes)} attributes that are on and {len(selectors)} selectors"
        else:
            why = f"is more than the {voters} attributes that are on"
        problems.append(
            ("combine.at_least", combine.at_least, f"{why}; lower it, switch an attribute on or add a selector")
        )
    if problems:
        raise Problems(*problems)


def check_streamed(selectors: Mapping[str, SelectorConfig]) -> None:
    """Refuse, by name, selectors that cannot be had of streamed data.

    Raises:
        XTFUserError: one evolves, needs the whole dataset, or has a reference of its own.
    """
    for name, part in selectors.items():
        scorer = registry.find(part.scorer)(part)
        own = [value for _, value in part if isinstance(value, ReferenceConfig) and value.model]
        if scorer.evolves:
            why = "selects anew in every epoch, after the whole dataset was scored again"
        elif not scorer.per_document:
            why = f"has a scorer ({scorer.name}) that needs the whole dataset at once"
        elif own:
            why = f"has a reference of its own ({own[0].model}), which would have to stay loaded beside training"
        else:
            continue
        raise XTFUserError(
            f"xtf: the training data is streamed, and the selector {name} {why}. Remove it, or do not stream: "
            "dataset_streaming: false (streaming: false under `datasets`)."
        )


def schemas() -> dict[str, dict[str, Any]]:
    """JSON schema of each built-in scorer's part, by scorer name, with definitions of its own."""
    return {name: _with_const(name, scorer.Config.model_json_schema()) for name, scorer in registry.BUILTIN.items()}


def _with_const(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    own = {**schema["properties"]["scorer"], "const": name}
    return {**schema, "properties": {**schema["properties"], "scorer": own}}


def completed(schema: dict[str, Any]) -> dict[str, Any]:
    """The block's schema with what a selector may hold: the common keys, and by scorer the built-in ones' own.

    Selectors of other packages' scorers are held to the common keys alone; their keys are known once they are loaded.
    """
    definitions = dict(schema["$defs"])
    common = definitions.pop("SelectorConfig")
    cases = []
    for name, part in schemas().items():
        definitions |= part.pop("$defs")
        definitions[part["title"]] = part
        test = {"properties": {"scorer": {"const": name}}, "required": ["scorer"]}
        cases.append({"if": test, "then": {"$ref": f"#/$defs/{part['title']}"}})
    # not required: beside a preset a part may change single keys of the preset's selector
    selector = {key: value for key, value in common.items() if key not in ("additionalProperties", "required")}
    part = {"oneOf": [{**selector, "allOf": cases}, OFF]}
    mapping = {**schema["properties"]["selectors"], "additionalProperties": part}
    selectors = {"description": mapping.pop("description"), "default": mapping.pop("default"), "oneOf": [mapping, OFF]}
    return {**schema, "$defs": definitions, "properties": {**schema["properties"], "selectors": selectors}}
