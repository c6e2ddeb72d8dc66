"""Writes docs/config.md from the models of the `xtf:` block.

`python -m tests.config_page` writes the page; with `--check` it fails if the page is out of date.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from xtf_plugin.config.block import XTFConfig
from xtf_plugin.config.messages import Schema, legal, mapping, sections, shown
from xtf_plugin.config.scores import PRESETS, SLOTS, schemas
from xtf_plugin.scorers import ScoreConfig

PAGE = Path(__file__).parents[1] / "docs" / "config.md"
_HEADER = """<!-- Generated from xtf_plugin/config by `python -m tests.config_page`. Edit that. -->

# The `xtf:` block

Most recipes need one line, `preset: default`. [Choosing what to drop](choosing.md) says when to set another key. This
page lists all of them.

The same block stands in a recipe, in `XTFConfig(...)`, and as JSON or YAML text after `--xtf`. `xtf: true` or `xtf: {}`
takes the `default` preset; `xtf: false`, or no block, is stock training. Unknown keys are refused.

A *score* gives one number to every completion token, and its rule drops tokens with low numbers. Three scores have a
slot: `reasoning_importance`, `knowledge_novelty` and `task_relevance`. A slot takes a mapping, `true` (on, as in the
preset, else with the defaults of its scorer) or `false` (off: neither scored nor used). `selectors` holds further
scores under names of your choice and adds them to the preset's. `false` as a selector removes one of the preset's,
`selectors: false` removes all of them. Keys that a score does not set come from the preset's score of that name, if
both use the same scorer. A `drop` mapping holds exactly one rule and replaces the preset's rule.
"""
_SCORE = """All scores share these keys; the sections after this one list the keys that a scorer adds or changes. A slot
without `scorer` has the preset's scorer, see [Presets](#presets). Where the preset names none, it has the paper's: """


def render_markdown() -> str:
    """The page: a table per part of the block and per scorer, and the settings of the presets."""
    root = XTFConfig.json_schema()
    parts = [_HEADER]
    for path, section in sections(root):
        if path.split(".")[1:2] not in ([name] for name in SLOTS):
            parts.append(_section(path.removeprefix("xtf."), section, root))
    common = ScoreConfig.model_json_schema()
    paper = ", ".join(f"`{scorer}` in `{slot}`" for slot, scorer in SLOTS.items())
    parts.append(_section("A score", common, common, f"{_SCORE}{paper}."))
    parts.append(_section("drop", mapping(common["properties"]["drop"], common) or {}, common))
    for name, part in schemas().items():
        own = {key: value for key, value in part["properties"].items() if value != common["properties"].get(key)}
        own.pop("scorer")
        parts.append(_section(f"scorer: {name}", {**part, "properties": own}, part))
        drop = mapping(part["properties"]["drop"], part) or {}
        if drop.get("title") != "Drop":
            parts.append(_section(f"drop of scorer: {name}", drop, part))
    about = "Settings in which the presets differ; all others are the defaults above.\n\n"
    parts.append(f"## Presets\n\n{about}{_table(['key', *(f'`{name}`' for name in PRESETS)], _preset_rows())}")
    return "\n".join(parts)


def _section(title: str, section: Schema, root: Schema, about: str = "") -> str:
    """A heading, a description and a table of the keys."""
    about = about or ("" if title == "xtf" else section.get("description", "").splitlines()[0])
    keys = section["properties"].items()
    rows = [[f"`{key}`", _default(key, one, root), legal(one, root), one.get("description", "")] for key, one in keys]
    heading = {"xtf": "Top level", "A score": "A score"}.get(title, f"`{title}`")
    table = "" if not rows else _table(["key", "default", "legal values", "meaning"], rows)
    return f"## {heading}\n\n{about}{chr(10) * 2 if about else ''}{table}"


def _default(key: str, schema: Schema, root: Schema) -> str:
    if "default" not in schema:
        return "the preset's" if key in SLOTS else ""
    inner = mapping(schema, root)
    whole = inner is not None and "anyOf" not in inner and isinstance(schema["default"], dict)
    return "see its table" if whole else _code(schema["default"])


def _preset_rows() -> list[list[str]]:
    """A row for each key that some preset sets; presets that do not set it show the default."""
    defaults = dict(_flat(XTFConfig.model_construct().model_dump()))
    settings = {name: {**defaults, **dict(_flat(preset))} for name, preset in PRESETS.items()}
    keys = dict.fromkeys(key for preset in PRESETS.values() for key, _ in _flat(preset))
    return [[f"`{key}`", *(_code(preset.get(key, "")) for preset in settings.values())] for key in keys]


def _code(value: Any) -> str:
    return f"`{_yaml(value)}`" if value != "" else ""


def _yaml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_yaml(item)}" for key, item in value.items()) + "}"
    return shown(value, quote=False)


def _flat(preset: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in preset.items():
        if key in ("protect", "selectors"):
            yield from ((f"{key}.{name}", inner) for name, inner in value.items())
        else:
            yield key, value


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main(arguments: Sequence[str]) -> str | None:
    """Write docs/config.md; with `--check`, return a message if it is out of date."""
    if list(arguments) not in ([], ["--check"]):
        return "usage: python -m tests.config_page [--check]"
    if not PAGE.parent.is_dir():
        return f"{PAGE.parent} is not a folder: run this from a source checkout."
    if not arguments:
        PAGE.write_text(render_markdown(), encoding="utf-8")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != render_markdown():
        return f"{PAGE} is out of date. Run: python -m tests.config_page"
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
