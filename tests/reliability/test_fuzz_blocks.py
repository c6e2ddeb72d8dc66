"""`xtf:` blocks made of the schema's own keys and values, with a few things wrong: a config, or one clear refusal.

Blocks come from the JSON schema that the models give, so a new key is fuzzed once it is there. What is wrong about one
is known, so that a refusal can be held to name it. A config that parses is what its `to_dict` says, and selects.
"""

from __future__ import annotations

import copy
import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.config.test_config_errors import JARGON
from tests.reliability import amount, record
from tests.reliability.strategies import check_selection, collated, inputs, segments_of
from xtf_plugin.config.block import XTFConfig
from xtf_plugin.data.documents import collect
from xtf_plugin.errors import XTFUserError
from xtf_plugin.plan import scores_of
from xtf_plugin.selection.masks import MaskTable

ROOT = XTFConfig.json_schema()
PATTERNS = ["a", r"\d+", ".", "(?i)x|y", "^$", "漢字", r"\x1b", "[[a]b"]
TEXTS = {"path": ["out", "~/kept", "mit Leerzeichen", "漢字"], "regex": PATTERNS, None: ["some/model", "main", "é"]}
FAR = [0, 1, -1, 2, 3, 5, 7, 8, 1000, 10**13 + 1, 2**63 - 1, 2**63, -(2**63), 10**30 + 1, 10**400]
NUMBERS = [0.0, -0.0, 0.05, 0.5, 0.95, 1.0, 1e-320, 1e-38, 1e308, -1e308, 95.0, math.nan, math.inf, -math.inf]
WORDS = [
    "",
    " ",
    "1e-3",
    "0.5",
    "yes",
    "null",
    "true",
    "last",
    "\x1b[2J",
    "\u202e",
    "\ud800",
    "💥",
    "x" * 9_999,
    "\0",
    "(",
]
JUNK = [None, True, False, [], {}, [None], [[0]], {"a": {"b": {}}}, {1: 2}, b"\xff", 1j, np.float32(0.5), np.int64(3)]
JUNK += [Path("a"), np.asarray([1, 2]), ("a",), {"at_least": 2}, {"quantile": 0.1}, {"below": math.nan}, {"scorer": 3}]
KEYS = {name for part in (ROOT, *ROOT["$defs"].values()) for name in part.get("properties", ())}
wrong = st.sampled_from([*FAR, *NUMBERS, *WORDS, *JUNK]) | st.floats() | st.text(max_size=4) | st.integers()


def options(schema: Any) -> list[Any]:
    """What a schema offers, with references followed."""
    if "$ref" in schema:
        return options(ROOT["$defs"][schema["$ref"].rpartition("/")[2]])
    if "allOf" in schema and "scorer" in schema["properties"]:  # a score: what its scorer's own schema asks for
        return [leaf for case in schema["allOf"] if "$ref" in case["then"] for leaf in options(case["then"])]
    choices = schema.get("oneOf") or (schema.get("anyOf") if "properties" not in schema else None)
    return [schema] if choices is None else [leaf for choice in choices for leaf in options(choice)]


@st.composite
def legal(draw: Any, schema: Any) -> Any:
    """A value that a schema allows; not all of them are legal together."""
    chosen = draw(st.sampled_from(options(schema)))
    kind = chosen.get("type")
    if "enum" in chosen or "const" in chosen:
        return draw(st.sampled_from(chosen.get("enum", [chosen.get("const")])))
    if "properties" in chosen:
        rules = [rule["required"] for rule in chosen.get("anyOf", [])]
        must = draw(st.sampled_from(rules)) if rules else chosen.get("required", [])
        free = [] if rules else [name for name in chosen["properties"] if name not in must]
        names = [*must, *draw(st.lists(st.sampled_from(free), max_size=5, unique=True))] if free else must
        return {name: draw(legal(chosen["properties"][name])) for name in names}
    if kind == "object":
        names = draw(st.lists(st.sampled_from(["a", "b2", "out_of_place", "own_1"]), max_size=3, unique=True))
        return {name: draw(legal(chosen["additionalProperties"])) for name in names}
    if kind == "array":
        size = {"min_size": chosen.get("minItems", 0), "unique": chosen.get("uniqueItems", False)}
        return draw(st.lists(legal(chosen["items"]), max_size=3, **size))
    if kind in ("integer", "number"):
        return draw(numbers(chosen))
    if chosen.get("format") == "file-path":
        return draw(st.sampled_from(["dataset", __file__]))
    texts = TEXTS.get(chosen.get("format"), [])
    return {"boolean": draw(st.booleans()), "null": None}.get(kind, draw(st.sampled_from(texts)) if texts else "x")


def numbers(schema: Any) -> Any:
    """Numbers within a schema's bounds, the bounds themselves and far ones among them."""
    low = schema.get("minimum", schema.get("exclusiveMinimum", -math.inf))
    high = schema.get("maximum", schema.get("exclusiveMaximum", math.inf))
    outside = (schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum"))
    whole = [n for n in FAR if abs(n) < 10**300 and (schema["type"] == "number" or -(2**63) <= n < 2**63)]
    given = whole if schema["type"] == "integer" else [*whole, *filter(math.isfinite, NUMBERS)]
    inside = [n for n in given if low <= n <= high and n not in outside]
    return st.sampled_from([n for n in inside if "not" not in schema or n % 2])


def spots(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value inside mappings and lists."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, item in inner for found in [(*path, key), *spots(item, (*path, key))]]


def typo(draw: Any, key: str) -> Any:
    at = draw(st.integers(0, len(key)))
    return draw(
        st.sampled_from([key[:at] + key[at + 1 :], key[:at] + "x" + key[at:], key.upper(), f"{key} ", "<on>", 3])
    )


@st.composite
def damaged(draw: Any, block: dict[str, Any]) -> tuple[Any, Any, Any]:
    """A block with one thing wrong about it: itself, the key that is wrong, the value under it."""
    block = copy.deepcopy(block)
    everywhere = spots(block) or [("seed",)]
    path = draw(st.sampled_from(everywhere))
    home: Any = block
    for key in path[:-1]:
        home = home[key]
    key, kind = path[-1], draw(st.sampled_from(["value", "value", "rename", "add", "remove"]))
    if kind == "remove" and isinstance(home, dict) and key in home:
        return block, key, home.pop(key)
    if isinstance(key, str) and kind in ("rename", "add"):
        new = (
            typo(draw, key)
            if kind == "rename"
            else draw(st.sampled_from(["fence", "self", "", "漢", "\u202e", None, 7]))
        )
        value = home.pop(key, 0) if kind == "rename" else draw(wrong)
        home[new] = value
        return block, new, value
    home[key] = draw(wrong)
    return block, key, home[key]


def refused(block: Any) -> str:
    """The one message of a block that is refused, "" for one that is not; nothing else may come."""
    try:
        config = XTFConfig.parse(block)
    except XTFUserError as error:
        message = str(error)
        # a name of the block's own may be one
        jargon = {word.group() for word in JARGON.finditer(message) if word.group().rstrip(".") not in str(block)}
        assert message and not jargon, message
        assert all(char.isprintable() or char == "\n" for char in message), ascii(message)
        assert all(len(line) < 1_500 for line in message.splitlines()), message
        return message
    survives(config, block)
    return ""


def survives(config: XTFConfig | None, block: Any) -> None:
    """Parsed again, from values or from their JSON, a config is the same."""
    if config is None:
        assert block in (None, False)
        return
    assert XTFConfig.parse(config.to_dict()) == config
    assert XTFConfig.parse(json.dumps(config.to_dict(), allow_nan=False)) == config


def names(message: str, key: Any, value: Any, home: list[Any]) -> bool:
    """Whether a message names a key or its value, or a key that stands beside it and does not go with it."""
    about = [f".{key}" if isinstance(key, str) and key.isidentifier() else "", *(f".{k}" for k in home)]
    if isinstance(key, int):
        about.append(f"[{key}]")
    about += [f".{name}" for name in value] if isinstance(value, dict) else []
    about += [f".{word}" for word in ("null", "true", "false") if json.dumps(key, default=str) == word]  # YAML's words
    about += [
        repr(key)[:20],
        repr(value)[:20],
        str(key)[:20] or "''",
        "null" if value is None else str(value).lower()[:20],
    ]
    about += ["xtf.force_drop: [] is empty", "xtf.combine.at_least: ", "xtf.control: "]  # of the block as a whole
    return any(text and text in message for text in about)


def rows() -> list[dict[str, Any]]:
    """Rows whose completions begin at once, are one token, or nothing, or are packed."""
    rng = np.random.default_rng(0)
    made = []
    for length, prompt in [(9, 3), (1, 0), (4, 4), (30, 1), (2, 0), (15, 2)]:
        ids = rng.integers(0, 50, length).tolist()
        made.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    joined = {name: made[0][name] + made[3][name] for name in ("input_ids", "labels")}
    return [*made, {**joined, "seq_lengths": [9, 30]}]


DATA = rows()
DOCUMENTS = collect(DATA)
SIZE = int(DOCUMENTS.completion.sum())


def scored(config: XTFConfig) -> Any:
    """Fixed scores for all that a block asks for, a few of them undefined."""
    rng = np.random.default_rng(1)
    noise = [rng.normal(-2, 3, SIZE).astype(np.float32) for _ in range(8)]
    for values in noise:
        values[rng.random(SIZE) < 0.05] = np.nan
    parts = enumerate(config.scores.items())
    own = {name: -np.abs(noise[0]) if part.scorer == "novelty" else noise[1 + i % 7] for i, (name, part) in parts}
    return replace(scores_of(DOCUMENTS, None, own), logprobs=-np.abs(noise[0]))


def selects(config: XTFConfig) -> None:
    """The masks of a config keep their promises, and the collator changes nothing but labels, to -100."""
    scores, rng = scored(config), np.random.default_rng(2)
    protected, forced = rng.random((2, SIZE)) < 0.1
    starts = segments_of({"offsets": scores.offsets}, rng.random(SIZE) < 0.2)
    made = check_selection(scores, config, protected, forced, starts)
    collated(DATA, MaskTable.build(scores.keys, scores.offsets, made.keep, made.best))


@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_block_becomes_a_config_that_selects_or_one_refusal_that_names_what_is_wrong() -> None:
    """Each input is two blocks: one that the schema allows, and the same with one thing wrong about it."""
    seen: Counter[str] = Counter()

    @inputs(400, 5_500)
    @given(st.data(), legal(ROOT | {"type": "object"}))
    def holds(data: Any, block: dict[str, Any]) -> None:
        before = copy.deepcopy(block)
        message = refused(block)
        assert block == before, "the block itself was changed"
        seen.update(inputs=1, accepted=not message, refused=bool(message))
        if not message:
            selects(XTFConfig.parse(block))
        worse, key, value = data.draw(damaged(block), label="damaged")
        why = refused(worse)
        seen.update(inputs=1, accepted=not why, refused=bool(why))
        if why and not message and key != "preset":  # another preset may leave any other key without effect
            home = next((list(h) for h in homes(worse) if key in h), [])
            assert names(why, key, value, home), (key, value, why)
        mappings = [home for home in homes(worse) if home is not worse.get("selectors")]
        unknown = key not in KEYS and any(key in home for home in mappings)
        assert why or not unknown, f"a key that there is not was taken: {key!r}"
        if not why:
            selects(XTFConfig.parse(worse))

    holds()
    assert seen["inputs"] >= amount(700, 10_000), seen
    assert min(seen["accepted"], seen["refused"]) > seen["inputs"] // 10, seen
    record("fuzzed blocks", **seen)


def homes(value: Any) -> list[dict[Any, Any]]:
    """Every mapping in a block."""
    inner = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    own = [value] if isinstance(value, dict) else []
    return own + [found for item in inner for found in homes(item)]


BIG = 10**5_000
UNWRITTEN = {
    "min_kept": {"min_kept": -BIG},
    "seed": {"seed": BIG},
    "below": {"preset": "paper", "reasoning_importance": {"drop": {"below": BIG}}},
    "layers": {"preset": "paper", "reasoning_importance": {"layers": [0, BIG]}},
    "window": {"preset": "paper", "task_relevance": {"window": BIG + 1}},
    "key": {BIG: 1},
    "key of a part": {"protect": {BIG: 1}},
    "batch_tokens": f"batch_tokens: -0x{BIG:x}",
}


@pytest.mark.parametrize("name", list(UNWRITTEN))
def test_a_number_that_python_does_not_write_out_is_refused_as_any_other(name: str) -> None:
    """Python refuses to turn more than 4,300 digits into text, and YAML reads such numbers in hexadecimal."""
    assert name.split()[0] in refused(UNWRITTEN[name])
