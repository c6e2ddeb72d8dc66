"""Error messages of the `xtf:` block: dotted key, value, what is wrong, the legal values.

Legal values come from the JSON schema of the models, so that each is written once.
"""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from pydantic import ValidationError

from ..environment import docs
from ..fields import TAGS, Drop, Problems
from ..scorers import registry
from .scores import FULL_NAMES, MOST, PRESETS, SLOTS, PartProblems

Schema = Mapping[str, Any]
NEXT = f"See {docs('config.md')}, or run `xtf check --schema`."
LONGEST_HINT = 200  # characters of a value that is likely meant
_BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
_RULES = ("quantile", "below", "of_median", "fence", "cluster", "known_above", "unknown_below")
_TEXTS = {"path": "path", "file-path": "path of a text file", "regex": "regular expression"}


def _options(schema: Schema, root: Schema) -> list[Schema]:
    """The alternatives of a schema, with references resolved and nested unions flattened."""
    if "$ref" in schema:
        return _options(root["$defs"][schema["$ref"].rpartition("/")[2]], root)
    choices = schema.get("oneOf") or (schema.get("anyOf") if "properties" not in schema else None)
    if choices is None:
        return [schema]
    return [leaf for choice in choices for leaf in _options(choice, root)]


def mapping(schema: Schema, root: Schema) -> Schema | None:
    """The alternative that is a mapping with fixed keys, or None."""
    return next((option for option in _options(schema, root) if "properties" in option), None)


def legal(schema: Schema, root: Schema) -> str:
    """The values that a schema accepts, in one line: "auto | whole number >= 1"."""
    return " | ".join(_legal_one(option, root) for option in _options(schema, root))


def _legal_one(schema: Schema, root: Schema) -> str:
    kind = schema.get("type")
    if "enum" in schema or "const" in schema:
        return " | ".join(shown(value, quote=False) for value in schema.get("enum", [schema.get("const")]))
    if "properties" in schema:
        return _legal_mapping(schema, root)
    if kind == "array":
        extra = ["not empty"] * ("minItems" in schema) + ["each once"] * ("uniqueItems" in schema)
        return f"[{legal(schema['items'], root)}, ...]" + (f" ({', '.join(extra)})" if extra else "")
    if kind == "string":
        return _TEXTS.get(schema.get("format", ""), "text")
    if kind == "object":
        return f"mapping of at most {MOST} names to selectors"
    if kind in ("integer", "number"):
        name = ("odd " if "not" in schema else "") + ("whole number" if kind == "integer" else "number")
        bounds = [f"{sign} {schema[key]:g}" for key, sign in _BOUNDS.items() if key in schema]
        return f"{name} {' and '.join(bounds)}".strip()
    return {"boolean": "true | false", "null": "null"}[str(kind)]


def _legal_mapping(schema: Schema, root: Schema) -> str:
    properties = schema["properties"]
    rules = [rule["required"] for rule in schema.get("anyOf", [])] or [list(properties)]
    if len(rules) == 1 and len(properties) > 1:
        return f"mapping ({', '.join(properties)})"
    written = [", ".join(f"{key}: {legal(properties[key], root)}" for key in rule) for rule in rules]
    return " | ".join(f"{{{text}}}" for text in written)


class _Short(reprlib.Repr):
    """`reprlib` with longer texts, and long whole numbers, which `repr` refuses, in hexadecimal and cut."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 80

    def repr_int(self, x: int, level: int) -> str:
        return super().repr_int(x, level) if x.bit_length() < 4096 else f"{x:#x}"[:20] + "..."


_SHORT = _Short()


def shown(value: Any, quote: bool = True) -> str:
    """A value as a user wrote it in YAML, cut to a line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str) and not quote:
        return value
    return " ".join(_SHORT.repr(value).split())


def explain(error: ValidationError, root: Schema) -> str:
    """The message of an error: a line for each problem (dotted key, value, problem, legal values) and the next step."""
    lines = list(dict.fromkeys(line for found in error.errors(include_url=False) for line in _lines(found, root)))
    if len(lines) == 1:
        return f"{lines[0]} {NEXT}"
    return "\n".join([f"the xtf: block has {len(lines)} problems:", *(f"  {line}" for line in lines), NEXT])


def _lines(found: Mapping[str, Any], root: Schema, start: str = "xtf") -> Iterator[str]:
    kind, value = found["type"], found["input"]
    keys = found["loc"]
    unknown = keys[-1:] if kind == "extra_forbidden" else ()  # to be named even if it looks like a tag
    location = [*(key for key in keys[: len(keys) - len(unknown)] if key not in TAGS), *unknown]
    path, parent, schema = _follow(location, root, start)
    cause = found.get("ctx", {}).get("error")
    if isinstance(cause, PartProblems):
        for inner in cause.error.errors(include_url=False):
            hint = f" The paper's scorer takes it: add `scorer: {cause.usual}`." if cause.of_usual(inner) else ""
            yield from (line + hint for line in _lines(inner, cause.model.model_json_schema(), path))
    elif kind == "extra_forbidden":
        yield f"{path}: unknown key (with value {shown(value)}). {_nearest_key(str(location[-1]), parent, root, start)}"
    elif isinstance(cause, Problems):
        yield from (f"{path}.{key}: {shown(wrong)} {why}." for key, wrong, why in cause.problems)
    elif kind == "missing":
        yield f"{path}: missing. Legal: {legal(schema, root)}."
    else:
        why = str(cause) if isinstance(cause, ValueError) else "is not legal"
        near = _nearest(value, _names(schema, root)) if isinstance(value, str) else None
        hint = f"Did you mean {near}? " if near else _corrected(str(location[-1]) if location else "", value, parent)
        yield f"{path}: {shown(value)} {why}. {hint}Legal: {legal(schema, root)}."


def _follow(location: Sequence[str | int], root: Schema, start: str) -> tuple[str, Schema, Schema]:
    """Dotted path, schema of the mapping that holds the last key, schema of the value; empty if unknown."""
    path, parent, schema = start, root, root
    for key in location:
        if isinstance(key, int):
            items = [option["items"] for option in _options(schema, root) if "items" in option]
            path, schema = f"{path}[{key}]", items[0] if items else {}
        else:
            parent = mapping(schema, root) or {}
            path = f"{path}.{key if len(key) <= 80 and key.isprintable() else shown(key)}"
            schema = parent.get("properties", {}).get(key) or _values(schema, root)
    return path, parent, schema


def _values(schema: Schema, root: Schema) -> Schema:
    """Schema of the values of a mapping whose names the user chooses; empty for any other."""
    found = (option.get("additionalProperties") for option in _options(schema, root))
    return next((values for values in found if isinstance(values, dict)), {})


def _names(schema: Schema, root: Schema) -> list[str]:
    values = [v for option in _options(schema, root) for v in [*option.get("enum", []), option.get("const")]]
    return [value for value in values if isinstance(value, str)]


def _nearest(word: str, words: Sequence[str]) -> str | None:
    found = difflib.get_close_matches(word.lower().replace("-", "_"), words, n=1, cutoff=0.5)
    return found[0] if found and len(word) <= 80 else None


def _corrected(key: str, value: Any, parent: Schema) -> str:
    """A hint: for a number under `drop` the scorer's usual rule with it, for a list under `protect` its `patterns`.

    Empty: no hint.
    """
    if key == "drop" and isinstance(value, (int, float)) and not isinstance(value, bool):
        usual = next(iter(parent["properties"][key].get("default") or {"quantile": None}))
        with suppress(ValueError, OverflowError):  # not each number is one of that rule
            Drop.model_validate({usual: value})
            return f"Did you mean drop: {{{usual}: {value!r}}}? "
    patterns = value if isinstance(value, list) else [value]
    if key == "protect" and all(type(each) is str and each and each.isprintable() for each in patterns):
        with suppress(re.error):  # not each text is a regular expression
            list(map(re.compile, patterns))
            text = _as_yaml(patterns)
            return f"Did you mean protect: {{patterns: {text}}}? " if len(text) <= LONGEST_HINT else ""
    return ""


def _as_yaml(value: Any) -> str:
    """A value on one line of YAML, to be pasted."""
    import yaml  # not at the top: most blocks need no message

    return str(yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10_000)).strip()


def _nearest_key(key: str, parent: Schema, root: Schema, start: str) -> str:
    keys = list(parent["properties"])
    homes = [path for path, section in sections(root, start) if key in section["properties"] and section is not parent]
    of_block = "preset" in keys
    near = _nearest(key, [*keys, *registry.BUILTIN] if of_block else keys)
    if of_block and key.upper() in FULL_NAMES:
        hint = f"In reports {key.upper()} stands for {FULL_NAMES[key.upper()]}. "
    elif of_block and key in _RULES:
        hint = f"A rule belongs to a score: `task_relevance: {{drop: {{{key}: ...}}}}`. "
    elif near in keys or not near or homes:
        hint = f"It belongs under {' or '.join(homes)}. " if homes else f"Did you mean {near}? " if near else ""
    else:
        slots = [name for name in SLOTS if PRESETS["default"].get(name, {}).get("scorer") == near]
        where = f"{slots[0]}: {{...}}" if slots else f"selectors: {{a_name: {{scorer: {near}, drop: ...}}}}"
        hint = f"{near} is a scorer: write `{where}`. "
    return f"{hint}Legal keys: {', '.join(keys)}."


def sections(root: Schema, path: str = "xtf", section: Schema | None = None) -> Iterator[tuple[str, Schema]]:
    """Every mapping of the block with its dotted path, outer ones first."""
    section = section or root
    yield path, section
    for key, schema in section["properties"].items():
        inner = mapping(schema, root)
        if inner is not None:
            yield from sections(root, f"{path}.{key}", inner)
