"""The scores of a block: three named slots and selectors, each a scorer with its keys and a rule; and the presets.

Which keys a score takes depends on its scorer: the registry gives the scorer's config class, and that class checks the
score's part of the block. Errors of a part are kept together with its class, so that `messages` can explain them from
the schema of the class.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, get_args

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
# Where a preset sets no value, a key has its field's default. docs/evidence.md compares `default` with `paper`.
PRESETS: dict[str, dict[str, Any]] = {
    "default": {
        "reasoning_importance": {"scorer": "influence"},
        "knowledge_novelty": {"scorer": "new_text"},
        "task_relevance": {"scorer": "explained"},
    },
    "none": {},  # for a block that names all of its own rules
    "paper": {
        "reasoning_importance": {"layers": "last", "drop": {"fence": 1.0}},
        "knowledge_novelty": {"drop": {"known_above": 0.95}},
        "task_relevance": {"drop": {"cluster": 2, "of": 5}},
        "protect": {"special_tokens": False, "formats": None},
        "min_kept": 0,
    },
    "official": {
        "reasoning_importance": {"layers": "first", "drop": {"fence": 1.5}, "max_fraction": 0.05},
        "knowledge_novelty": {"drop": {"known_above": 0.95}, "max_fraction": 0.05},
        "task_relevance": {"embedding": "output", "drop": {"cluster": 2, "of": 5}, "max_fraction": 0.05},
        "protect": {"special_tokens": False, "formats": None},
        "min_kept": 0,
    },
}
SHORT_NAMES = {"reasoning_importance": "RI", "knowledge_novelty": "KN", "task_relevance": "TR"}  # in reports
FULL_NAMES = {short: name for name, short in SHORT_NAMES.items()}
MOST = 8  # selectors
SWITCH = {"const": False, "type": "boolean"}
NAME = re.compile(r"[a-z][a-z0-9_]*")
# Names that reasons, metrics or columns of the score table already have.
RESERVED = frozenset(
    "row document position token_id token prompt kept reason protected forced log_probability floor control".split()
) | {*SLOTS, *map(str.lower, FULL_NAMES)}  # with `xtf show --reason`, ri stands for the slot


class PartProblems(ValueError):
    """The part of a score that its scorer's config class refuses.

    `usual` is the paper's scorer of a slot whose preset has another one, `usual_refuses` what that scorer refuses.
    """

    def __init__(self, model: type[ScoreConfig], error: ValidationError) -> None:
        super().__init__(str(error))
        self.model, self.error = model, error
        self.usual: str | None = None
        self.usual_refuses: Sequence[Mapping[str, Any]] = ()

    def of_usual(self, problem: Mapping[str, Any]) -> bool:
        """Whether the paper's scorer takes what this scorer refuses: it has the key, and not this problem with it."""
        return self.usual is not None and not any(
            (other["loc"], other["type"]) == (problem["loc"], problem["type"])
            or (other["type"] == "extra_forbidden" and problem["loc"][: len(other["loc"])] == other["loc"])
            for other in self.usual_refuses
        )


def _part(value: Any, default: str | None = None) -> ScoreConfig:
    """A part of the block, checked by the config class of the scorer that it names, or of `default`."""
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
    if value is not True and not isinstance(value, Mapping | ScoreConfig):
        raise ValueError("is neither a mapping nor true or false")
    name, value = str(info.field_name), {} if value is True else value
    usual = SLOTS[name]
    try:
        return _part(value, usual)
    except PartProblems as problems:
        of_preset = PRESETS.get(info.data.get("preset", ""), {}).get(name, {}).get("scorer")
        if isinstance(value, Mapping) and value.get("scorer") == of_preset:
            problems.usual = usual
            try:
                registry.find(usual).Config.model_validate({**value, "scorer": usual})
            except ValidationError as error:
                problems.usual_refuses = error.errors(include_url=False)
        raise


def _selector(value: Any, _: Any, info: ValidationInfo) -> ScoreConfig:
    if value is False:  # `over_preset` has removed those that the preset has
        names = PRESETS.get(info.data.get("preset", ""), {}).get("selectors", {})
        has = f"has {', '.join(names)}" if names else "has no selector"
        raise ValueError(f"takes a selector of the preset out, but that {has}; remove the key or correct its name")
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
            problems.append(
                (name, name, "is not a legal name: use lower-case letters, digits and _, and begin with a letter")
            )
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


def over_preset(block: Mapping[str, Any]) -> dict[str, Any]:
    """The block over its preset.

    `reference`, `protect` and `selectors` are merged key by key, and so is a score whose scorer is the preset's; its
    `drop` is one value. A score with another scorer takes nothing of the preset. `true` keeps a slot as the preset has
    it, `false` takes a selector of the preset out, `selectors: false` takes out all of them.
    """
    name = block.get("preset", "default")
    preset = PRESETS.get(name, {}) if isinstance(name, str) else {}
    merged = {**preset, **block}
    for key in ("reference", "protect"):
        if isinstance(given := merged.get(key), Mapping):
            merged[key] = {**preset.get(key, {}), **given}
    for key in SLOTS.keys() & block.keys():
        base = preset.get(key)
        merged[key] = (base or True) if block[key] is True else _over(block[key], base, SLOTS[key])
    if isinstance(given := block.get("selectors"), Mapping):
        base = preset.get("selectors", {})
        names = dict.fromkeys((*given, *base))  # the block's order, then those that it does not name
        parts = {name: _over(given.get(name, {}), base.get(name)) for name in names}
        merged["selectors"] = {name: part for name, part in parts.items() if part is not False or name not in base}
    elif given is False:
        merged["selectors"] = {}
    return merged


def _over(given: Any, base: Mapping[str, Any] | None, usual: str | None = None) -> Any:
    """A score of the block over the preset's: key by key where both use the same scorer, else as given."""
    if base is None or not isinstance(given, Mapping):
        return given
    usual = base.get("scorer", usual)
    return {**base, **given} if given.get("scorer", usual) == usual else given


def among_problems(scores: Mapping[str, ScoreConfig]) -> list[tuple[str, Any, str]]:
    """Problems of the key `among`: the score is off, scores tokens, reads other scores, or has another unit."""
    found = []
    for name, part in scores.items():
        among = getattr(part, "among", None)
        usable = [other for other in scores if other != name and not _why_not_among(part, scores[other])]
        if among is None or among in usable:
            continue
        if among != name and among in scores:
            why = _why_not_among(part, scores[among])
        else:
            usual = PRESETS["default"].get(among if among != name else "", {}).get("scorer")
            line = f"{among}: {{scorer: {usual}{', unit: line' * (part.unit == 'line')}}}"
            why = f"is off; write `{line}`" if usual else "is not another score of this block that is on"
        rest = f"legal: {', '.join(usable) or 'none'}; or null, which scores all units, or switch {name} off"
        found.append((f"{name if name in SLOTS else f'selectors.{name}'}.among", among, f"{why} ({rest})"))
    return found


def _why_not_among(part: ScoreConfig, other: ScoreConfig) -> str:
    """Why a score cannot say in which units of another one it is doubtful; empty if it can.

    Its scorer must give one number for each unit. Averages over units do not count, since the rule takes them later.
    """
    scorer = registry.find(other.scorer)
    if scorer.reads_scores:
        return f"has the scorer {scorer.name}, which reads other scores itself"
    if "token" in get_args(type(other).model_fields["unit"].annotation) or scorer.seen is not None:
        return f"has the scorer {scorer.name}, which scores tokens, not complete units"
    return "" if other.unit == part.unit else f"has `unit: {other.unit}`; write `unit: {part.unit}` there too"


_NOT_STREAMED = "Remove it, or do not stream: dataset_streaming: false (streaming: false under `datasets`)."


def check_streamed(scores: Mapping[str, ScoreConfig], columns: Sequence[str] = ()) -> None:
    """Refuse scores that cannot be computed for streamed data, and columns of `report_by`.

    Raises:
        XTFUserError: a scorer needs the whole dataset, or has a reference of its own; names the score. Or `columns` is
            not empty.
    """
    if columns:
        raise XTFUserError(f"xtf: the training data is streamed, so no column is read for report_by. {_NOT_STREAMED}")
    for name, part in scores.items():
        scorer = registry.find(part.scorer)
        own = [value for _, value in part if isinstance(value, ReferenceConfig) and value.model]
        if not scorer.per_document and scorer.frozen is None:
            why = f"has a scorer ({scorer.name}) that needs the whole dataset at once"
        elif own:
            why = f"has a reference of its own ({own[0].model}), which would have to stay loaded beside training"
        else:
            continue
        raise XTFUserError(f"xtf: the training data is streamed, and {name} {why}. {_NOT_STREAMED}")


def schemas() -> dict[str, dict[str, Any]]:
    """JSON schema of each built-in scorer's config class, by scorer name; each contains its own `$defs`."""
    made = {name: scorer.Config.model_json_schema() for name, scorer in registry.BUILTIN.items()}
    for name, schema in made.items():
        schema["properties"]["scorer"]["const"] = name
    return made


def complete(schema: dict[str, Any]) -> dict[str, Any]:
    """The JSON schema of the block's model, plus what is read before the model checks a block.

    That is `true`, `false` and null in place of the block, switches in place of scores, and the keys of a score by its
    scorer, which for a slot without `scorer` is the preset's. Scores of other packages' scorers are checked for the
    common keys alone.
    """
    definitions, parts = dict(schema["$defs"]), schemas()
    common = definitions.pop("ScoreConfig")
    for part in parts.values():
        definitions |= {**part.pop("$defs"), part["title"]: part}
    # nothing is required: beside a preset a part may change single keys of the preset's score
    loose = {key: common[key] for key in ("title", "description", "type")}
    loose["properties"] = {key: {"description": one["description"]} for key, one in common["properties"].items()}
    loose["allOf"] = [
        *(
            {"if": _scored_by({"const": name}), "then": {"$ref": f"#/$defs/{part['title']}"}}
            for name, part in parts.items()
        ),
        {"if": _scored_by({"not": {"enum": list(parts)}}), "then": {"properties": common["properties"]}},
    ]
    properties = dict(schema["properties"])
    mapping = {**properties["selectors"], "additionalProperties": {"oneOf": [loose, SWITCH]}}
    described = {"description": mapping.pop("description"), "default": mapping.pop("default")}
    properties["selectors"] = {**described, "oneOf": [mapping, SWITCH]}
    for slot in SLOTS:
        about = {"description": properties[slot]["description"]}  # the default is the preset's
        usual = [parts[_usual(slot, preset)]["properties"] for preset in PRESETS]
        keys = {key: {"description": one["description"]} for part in usual for key, one in part.items()}
        part = {**loose, "properties": {**loose["properties"], **keys}}
        properties[slot] = {**about, "oneOf": [part, {"type": "boolean"}]}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "$defs": definitions,
        "properties": properties,
        "allOf": [_of_preset(name, parts) for name in PRESETS],
        "title": "The xtf: block",
        "description": "A mapping of settings; true: the defaults; false or null: off.",
        "type": ["object", "boolean", "null"],
    }


def _usual(slot: str, preset: str) -> str:
    """The scorer of a slot that names none."""
    scorer: str = PRESETS[preset].get(slot, {}).get("scorer", SLOTS[slot])
    return scorer


def _scored_by(scorer: Mapping[str, Any]) -> dict[str, Any]:
    return {"properties": {"scorer": scorer}, "required": ["scorer"]}


def _of_preset(preset: str, parts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Schema of a block with this preset: slots that name no scorer have the keys of the preset's."""
    slots = {}
    for slot in SLOTS:
        part = parts[_usual(slot, preset)]
        keys = {key: {"$ref": f"#/$defs/{part['title']}/properties/{key}"} for key in part["properties"]}
        slots[slot] = {"if": {"not": _scored_by({})}, "then": {"properties": keys, "additionalProperties": False}}
    needed = {} if preset == "default" else {"required": ["preset"]}
    return {"if": {"properties": {"preset": {"const": preset}}, **needed}, "then": {"properties": slots}}
