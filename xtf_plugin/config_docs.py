"""The `xtf:` block in words: its legal values, its error messages and docs/config.md.

All of it is read off the JSON schema of the models, so a key, a bound or a default is written once. Run it
as `python -m xtf_plugin.config_docs` to write the page, with `--check` to be told whether it is current.
"""

from __future__ import annotations

import difflib
import functools
import reprlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from .config import ATTRIBUTES, PRESETS, XTFConfig
from .config_rules import TAGS, Problems
from .config_selectors import MOST, PartProblems, completed, schemas

Schema = Mapping[str, Any]
PAGE = Path(__file__).parents[1] / "docs" / "config.md"
_NEXT = "See docs/config.md, or run `xtf check --schema`."
_BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
_TEXTS = {"path": "path", "file-path": "path of a text file", "regex": "regular expression"}
_HEADER = """<!-- Generated from xtf_plugin/config.py by `python -m xtf_plugin.config_docs`. Edit that. -->

# The `xtf:` block

The same block stands in a recipe, in `XTFConfig(...)`, and as JSON or YAML text after `--xtf`. `xtf: true` or `xtf: {}`
takes the `default` preset; `xtf: false`, or no block, is stock training. Unknown keys are refused.

Each of the three attributes takes a mapping, `true` (on, as the preset has it, else as the tables say) or `false` (off:
neither scored nor used); the `default` preset has them off and works by one selector. Selectors are added to the
preset's; `false` in place of a selector takes one of the preset's out, `selectors: false` all of them. A `drop` mapping
holds exactly one rule and replaces the preset's rule as a whole.
"""


def complete(schema: dict[str, Any]) -> dict[str, Any]:
    """Add what is read before the models see a block: `true` for it and for its attributes, `false` and null for it."""
    schema = completed(schema)
    properties = dict(schema["properties"])
    for name in ATTRIBUTES:
        mapping = next(option for option in properties[name]["oneOf"] if "$ref" in option)
        properties[name] = {**properties[name], "oneOf": [mapping, {"type": "boolean"}]}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": "The xtf: block",
        "description": "A mapping of settings; true: the defaults; false or null: off.",
        "type": ["object", "boolean", "null"],
        "properties": properties,
    }


def _options(schema: Schema, root: Schema) -> list[Schema]:
    """The alternatives a schema offers, with references followed and nested unions flattened."""
    if "$ref" in schema:
        return _options(root["$defs"][schema["$ref"].rpartition("/")[2]], root)
    choices = schema.get("oneOf") or (schema.get("anyOf") if "properties" not in schema else None)
    if choices is None:
        return [schema]
    return [leaf for choice in choices for leaf in _options(choice, root)]


def _mapping(schema: Schema, root: Schema) -> Schema | None:
    """The alternative that is a mapping with keys, None if there is none."""
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
        extra = " (not empty" * ("minItems" in schema) + ", each once" * ("uniqueItems" in schema)
        return f"[{legal(schema['items'], root)}, ...]{extra}{')' if extra else ''}"
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
    """`reprlib` with longer texts, and with whole numbers of more digits than Python writes out."""

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


@functools.cache
def _root() -> Schema:
    return XTFConfig.json_schema()


def explain(error: ValidationError) -> str:
    """One message, a line for every problem (dotted key, value, what is wrong, the legal values), then what to do."""
    lines = list(dict.fromkeys(line for found in error.errors(include_url=False) for line in _lines(found, _root())))
    if len(lines) == 1:
        return f"{lines[0]} {_NEXT}"
    return "\n".join([f"the xtf: block has {len(lines)} problems:", *(f"  {line}" for line in lines), _NEXT])


def _lines(found: Mapping[str, Any], root: Schema, start: str = "xtf") -> Iterator[str]:
    kind, value = found["type"], found["input"]
    keys = found["loc"]
    unknown = keys[-1:] if kind == "extra_forbidden" else ()  # may look like a tag, and must be named all the same
    location = [*(key for key in keys[: len(keys) - len(unknown)] if key not in TAGS), *unknown]
    path, parent, schema = _follow(location, root, start)
    cause = found.get("ctx", {}).get("error")
    if isinstance(cause, PartProblems):
        for inner in cause.error.errors(include_url=False):
            yield from _lines(inner, cause.model.model_json_schema(), path)
    elif kind == "extra_forbidden":
        yield f"{path}: unknown key (with value {shown(value)}). {_nearest_key(str(location[-1]), parent, root)}"
    elif isinstance(cause, Problems):
        yield from (f"{path}.{key}: {shown(wrong)} {why}." for key, wrong, why in cause.problems)
    elif kind == "missing":
        yield f"{path}: missing. Legal: {legal(schema, root)}."
    else:
        why = str(cause) if isinstance(cause, ValueError) else "is not legal"
        near = _nearest(value, _names(schema, root)) if isinstance(value, str) else None
        hint = f"Did you mean {near}? " if near else ""
        yield f"{path}: {shown(value)} {why}. {hint}Legal: {legal(schema, root)}."


def _follow(location: Sequence[str | int], root: Schema, start: str) -> tuple[str, Schema, Schema]:
    """Dotted path, schema of the mapping that holds the last key, schema of the value; both empty once unknown."""
    path, parent, schema = start, root, root
    for key in location:
        if isinstance(key, int):
            items = [option["items"] for option in _options(schema, root) if "items" in option]
            path, schema = f"{path}[{key}]", items[0] if items else {}
        else:
            parent = _mapping(schema, root) or {}
            path = f"{path}.{key if len(key) <= 80 and key.isprintable() else shown(key)}"
            schema = parent.get("properties", {}).get(key) or _values(schema, root)
    return path, parent, schema


def _values(schema: Schema, root: Schema) -> Schema:
    """What a mapping with names of the user's choice holds; empty for any other."""
    found = (option.get("additionalProperties") for option in _options(schema, root))
    return next((values for values in found if isinstance(values, dict)), {})


def _names(schema: Schema, root: Schema) -> list[str]:
    values = [v for option in _options(schema, root) for v in [*option.get("enum", []), option.get("const")]]
    return [value for value in values if isinstance(value, str)]


def _nearest(word: str, words: Sequence[str]) -> str | None:
    found = difflib.get_close_matches(word.lower().replace("-", "_"), words, n=1, cutoff=0.5)
    return found[0] if found and len(word) <= 80 else None


def _nearest_key(key: str, parent: Schema, root: Schema) -> str:
    keys = list(parent["properties"])
    homes = [path for path, section in _sections(root) if key in section["properties"] and section is not parent]
    near = _nearest(key, keys)
    if homes:
        hint = f"It belongs under {' or '.join(homes)}. "
    else:
        hint = f"Did you mean {near}? " if near else ""
    return f"{hint}Legal keys: {', '.join(keys)}."


def _sections(root: Schema, path: str = "xtf", section: Schema | None = None) -> Iterator[tuple[str, Schema]]:
    """Every mapping of the block with its dotted path, each before those inside it."""
    section = section or root
    yield path, section
    for key, schema in section["properties"].items():
        inner = _mapping(schema, root)
        if inner is not None:
            yield from _sections(root, f"{path}.{key}", inner)


def render_markdown() -> str:
    """docs/config.md: a table per part of the block, and what the presets set."""
    root = _root()
    parts = [_HEADER, *(_section(path.removeprefix("xtf."), section, root) for path, section in _sections(root))]
    parts += [_section(f"selectors.<name> with scorer: {name}", part, part) for name, part in schemas().items()]
    rows = _preset_rows()
    about = "Settings in which the presets differ; all others are the defaults above.\n\n"
    parts.append(f"## Presets\n\n{about}{_table(['key', *(f'`{name}`' for name in PRESETS)], rows)}")
    return "\n".join(parts)


def _section(title: str, section: Schema, root: Schema) -> str:
    about = "" if title == "xtf" else f"{section.get('description', '').splitlines()[0]}\n\n"
    rows = [
        [f"`{key}`", _default(schema, root), legal(schema, root), schema.get("description", "")]
        for key, schema in section["properties"].items()
    ]
    heading = "Top level" if title == "xtf" else f"`{title}`"
    return f"## {heading}\n\n{about}{_table(['key', 'default', 'legal values', 'meaning'], rows)}"


def _default(schema: Schema, root: Schema) -> str:
    if "default" not in schema:
        return ""
    inner = _mapping(schema, root)
    whole = inner is not None and "anyOf" not in inner and isinstance(schema["default"], dict)
    return "see its table" if whole else _code(schema["default"])


def _preset_rows() -> list[list[str]]:
    """A row for each setting in which the presets differ; empty where a preset has no such setting."""
    something = {"none": {"force_drop": ["-"]}}  # a block has to drop something
    settings = {}
    for name, preset in PRESETS.items():
        whole = XTFConfig(preset=name, **something.get(name, {})).to_dict()
        selectors = {f"selectors.{key}": value for key, value in preset.get("selectors", {}).items()}
        settings[name] = dict(_flat({**whole, "selectors": {}, "force_drop": []})) | selectors
    keys = dict.fromkeys(key for values in settings.values() for key in values if key != "preset")
    rows = [[f"`{key}`", *(_code(v[key]) if key in v else "" for v in settings.values())] for key in keys]
    return [row for row in rows if len(set(row[1:])) > 1]


def _code(value: Any) -> str:
    return f"`{_yaml(value)}`"


def _yaml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_yaml(item)}" for key, item in value.items()) + "}"
    return shown(value, quote=False)


def _flat(settings: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, dict) and key != "drop":
            yield from _flat(value, f"{path}{key}.")
        else:
            yield path + key, value


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main(arguments: Sequence[str]) -> str | None:
    """Write docs/config.md; with `--check`, return a message if it is not what would be written."""
    if list(arguments) not in ([], ["--check"]):
        return "usage: python -m xtf_plugin.config_docs [--check]"
    if not PAGE.parent.is_dir():
        return f"{PAGE.parent} is not a folder: run this from a source checkout."
    if not arguments:
        PAGE.write_text(render_markdown(), encoding="utf-8")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != render_markdown():
        return f"{PAGE} is stale. Run: python -m xtf_plugin.config_docs"
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
