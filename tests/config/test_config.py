"""The `xtf:` block: what each way of writing it comes to, presets, round trips, the schema and docs/config.md."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
import types
from collections import OrderedDict, UserDict
from pathlib import Path

import numpy
import pytest
import yaml

from tests import config_page
from xtf_plugin.config import block as block_module
from xtf_plugin.config.block import AtLeast, ProtectConfig, XTFConfig
from xtf_plugin.config.scores import PRESETS, SLOTS
from xtf_plugin.fields import Block
from xtf_plugin.scorers import registry
from xtf_plugin.scorers.novelty import NoveltyConfig

FULL = """
preset: default
reference: {model: null, revision: null, quantization: nf4, dtype: auto, trust_remote_code: false}
reasoning_importance:
  scorer: influence
  horizon: 64
  among: task_relevance
  doubtful: 0.4
  reference: null
  drop: {below: 0.0}
  unit: sentence
  scale: linear
  scope: dataset
  window: 1
  max_fraction: null
knowledge_novelty:
  scorer: new_text
  shortest: 6
  drop: {below: 0.1}
  unit: sentence
  scale: linear
  scope: dataset
  window: 1
  max_fraction: null
task_relevance:
  scorer: explained
  first: 16
  reference: null
  drop: {of_median: 0.2}
  unit: sentence
  scale: linear
  scope: dataset
  window: 1
  max_fraction: null
combine: union
protect: {special_tokens: true, patterns: [], formats: 0.2}
force_drop: []
min_kept: 1
control: null
seed: 0
cache_dir: null
batch_tokens: auto
calibration: 1000
report: true
report_by: []
dry_run: false
"""

BLOCKS = [
    {},
    {"preset": "paper"},
    {"preset": "official", "task_relevance": False},
    {"reference": {"model": "some/model", "quantization": "none", "dtype": "bfloat16", "revision": "v1"}},
    {
        "preset": "none",
        "reasoning_importance": {
            "layers": [0, -1],
            "drop": {"fence": 0},
            "scale": "log",
            "scope": "dataset",
            "window": 9,
        },
    },
    {"reasoning_importance": {"drop": {"below": 0.1}, "max_fraction": 1}},
    {"reasoning_importance": {"unit": "line"}, "task_relevance": {"unit": "line"}},
    {"reasoning_importance": {"horizon": 9, "doubtful": 1, "among": "knowledge_novelty"}, "task_relevance": False},
    {"reasoning_importance": {"among": None}, "knowledge_novelty": {"shortest": 3}, "task_relevance": {"first": 5}},
    {"task_relevance": {"drop": {"of_median": 0.5}}, "protect": {"formats": 1}},
    {"preset": "paper", "knowledge_novelty": {"drop": {"of_median": 0}}, "protect": {"formats": 0.5}},
    {"protect": {"formats": None}},
    {"knowledge_novelty": {"scorer": "typicality", "drop": {"below": -6}, "unit": "sentence"}},
    {"preset": "paper", "task_relevance": {"drop": {"fence": 1.0}, "scope": "document"}},
    {"selectors": {"heads": {"scorer": "attention_received", "layers": [1]}, "known": {"scorer": "novelty"}}},
    {"selectors": {"known": {"scorer": "novelty", "drop": {"unknown_below": 0.01}, "unit": "line"}}},
    {"preset": "none", "knowledge_novelty": {"drop": {"unknown_below": 0.05, "known_above": 0.95}}},
    {"knowledge_novelty": {"drop": {"quantile": 0.2}}},
    {
        "preset": "none",
        "task_relevance": {"domain": ["derivative", "matrix"], "drop": {"cluster": 1, "of": 2}, "embedding": "output"},
    },
    {"task_relevance": {"drop": {"cluster": 5}}},
    {"task_relevance": {"drop": {"quantile": 0.5}}},
    {"combine": {"at_least": 1}},
    {"combine": "majority", "control": "random", "seed": 7},
    {"reasoning_importance": False, "knowledge_novelty": False, "task_relevance": False, "force_drop": [r"\bum+\b"]},
    {"protect": {"special_tokens": False, "patterns": [r"\d+"]}, "min_kept": 0},
    {"cache_dir": "some/where", "batch_tokens": 512, "calibration": 8, "report": "out", "dry_run": True},
    {"report": False},
]


def test_the_full_block_is_the_default():
    block = yaml.safe_load(FULL)
    assert XTFConfig().to_dict() == block and XTFConfig.parse(block) == XTFConfig()
    assert XTFConfig.parse({**block, **dict.fromkeys(SLOTS, True)}) == XTFConfig()


@pytest.mark.parametrize("value", [True, {}, "true", "{}", " True\n", "preset: default", '{"preset": "default"}'])
def test_ways_to_ask_for_the_defaults(value):
    assert XTFConfig.parse(value) == XTFConfig()


@pytest.mark.parametrize("value", [None, False, "false", "null", "off", " ~ "])
def test_ways_to_ask_for_nothing(value):
    assert XTFConfig.parse(value) is None


def test_a_config_is_its_own_parse():
    config = XTFConfig(min_kept=3)
    assert XTFConfig.parse(config) is config


def test_text_is_json_first_and_yaml_else():
    expected = XTFConfig(min_kept=4, report="x", knowledge_novelty={"drop": {"quantile": 0.001}})
    block = {"min_kept": 4, "report": "x", "knowledge_novelty": {"drop": {"quantile": 0.001}}}
    assert XTFConfig.parse(json.dumps(block)) == expected
    assert XTFConfig.parse("{min_kept: 4, report: x, knowledge_novelty: {drop: {quantile: 1e-3}}}") == expected
    assert XTFConfig.parse("min_kept: 4\nreport: x\nknowledge_novelty:\n  drop:\n    quantile: 1.0e-3\n") == expected


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_round_trips(block):
    before = copy.deepcopy(block)
    config = XTFConfig.parse(block)
    assert block == before
    plain = config.to_dict()
    assert json.loads(json.dumps(plain)) == plain
    for again in (plain, json.dumps(plain), yaml.safe_dump(plain)):
        assert XTFConfig.parse(again) == config
    assert XTFConfig(**block) == config
    assert pickle.loads(pickle.dumps(config)) == config == copy.deepcopy(config)
    assert holds(plain, block)


def holds(settings, given):
    """Whether settings have what was given, key by key."""
    if not isinstance(given, dict):
        return settings == given
    return all(holds(settings[key], value) for key, value in given.items())


def test_mappings_that_are_not_dicts():
    class Default(dict):
        def __missing__(self, key):
            return None

    drop = types.MappingProxyType({"known_above": 0.9})
    expected = XTFConfig(preset="paper", knowledge_novelty={"drop": {"known_above": 0.9}})
    for kind in (Default, OrderedDict, UserDict):
        block = kind({"preset": "paper", "knowledge_novelty": kind({"drop": drop})})
        assert XTFConfig.parse(block) == expected
        assert XTFConfig(**block) == expected


def test_the_paper_preset_is_the_papers_equations():
    paper = XTFConfig(preset="paper")
    importance, novelty, relevance = (getattr(paper, name) for name in SLOTS)
    assert importance.drop.fence == 1.0 and importance.layers == "last"
    assert (importance.scale, importance.scope) == ("linear", "document")
    assert novelty.drop.known_above == 0.95
    assert (relevance.drop.cluster, relevance.drop.of, relevance.embedding) == (2, 5, "input")
    assert all(part.window == 1 and part.max_fraction is None for part in (importance, novelty, relevance))
    assert paper.combine == "union" and not paper.protect.special_tokens and paper.min_kept == 0


def test_the_official_preset_has_the_scripts_thresholds():
    official = XTFConfig(preset="official")
    importance, novelty, relevance = (getattr(official, name) for name in SLOTS)
    assert importance.drop.fence == 1.5 and importance.layers == "first"
    assert novelty.drop.known_above == 0.95 and relevance.embedding == "output"
    assert all(part.max_fraction == 0.05 for part in (importance, novelty, relevance))
    assert not official.protect.special_tokens and official.min_kept == 0


def test_a_block_wins_over_its_preset_key_by_key():
    config = XTFConfig(
        preset="official",
        reasoning_importance={"drop": {"quantile": 0.1}},
        knowledge_novelty=True,
        task_relevance=False,
        protect={"patterns": ["x"]},
        min_kept=5,
    )
    assert str(config.reasoning_importance.drop) == "{quantile: 0.1}"
    assert config.reasoning_importance.layers == "first" and config.reasoning_importance.max_fraction == 0.05
    assert config.knowledge_novelty == XTFConfig(preset="official").knowledge_novelty
    assert config.task_relevance is False and list(config.scores) == list(SLOTS)[:2]
    assert config.protect.patterns == ["x"] and not config.protect.special_tokens
    assert config.min_kept == 5
    assert XTFConfig(preset="official") == XTFConfig.parse({"preset": "official"})


def test_models_are_taken_whole():
    config = XTFConfig(preset="official", knowledge_novelty=NoveltyConfig(scorer="novelty"), protect=ProtectConfig())
    assert config.knowledge_novelty.max_fraction is None and config.protect.special_tokens
    assert XTFConfig(preset="paper", combine=AtLeast(at_least=3)).combine.at_least == 3


def test_presets_and_defaults_stay_what_they_are():
    before = copy.deepcopy(PRESETS)
    XTFConfig(preset="official", reasoning_importance={"layers": [1]}, protect={"special_tokens": True})
    assert before == PRESETS
    config = XTFConfig()
    config.force_drop.append("x")
    config.protect.patterns.append("x")
    assert XTFConfig().force_drop == [] and XTFConfig().protect.patterns == []
    with pytest.raises(ValueError, match="frozen"):
        config.min_kept = 3


def test_numbers_of_other_libraries_and_paths(tmp_path):
    words = tmp_path / "words.txt"
    words.write_text("# maths\n\nmatrix\n", encoding="utf-8")
    config = XTFConfig(
        preset="none",
        min_kept=numpy.int64(2),
        knowledge_novelty={"drop": {"known_above": numpy.float32(0.5)}},
        task_relevance={"domain": words},
        report=tmp_path,
        cache_dir=tmp_path,
    )
    assert type(config.min_kept) is int and config.knowledge_novelty.drop.known_above == 0.5
    assert config.task_relevance.domain == str(words) and config.report == config.cache_dir == str(tmp_path)
    json.dumps(config.to_dict())


def test_where_scores_are_kept(monkeypatch, tmp_path):
    monkeypatch.setattr(block_module, "user_cache_dir", lambda name: f"/platform/{name}")
    monkeypatch.delenv("XTF_CACHE", raising=False)
    assert XTFConfig().resolved_cache_dir() == Path("/platform/xtf-plugin")
    monkeypatch.setenv("XTF_CACHE", "")
    assert XTFConfig().resolved_cache_dir() == Path("/platform/xtf-plugin")
    monkeypatch.setenv("XTF_CACHE", str(tmp_path))
    assert XTFConfig().resolved_cache_dir() == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    assert XTFConfig(cache_dir="~/scores").resolved_cache_dir() == tmp_path / "scores"
    assert XTFConfig(cache_dir="other").resolved_cache_dir() == Path("other")


def test_schema_says_what_parse_accepts():
    schema = json.loads(json.dumps(XTFConfig.json_schema()))
    assert set(schema["type"]) == {"object", "boolean", "null"}
    assert set(schema["properties"]) == {*XTFConfig().to_dict(), "selectors"}
    for name in SLOTS:
        assert {"type": "boolean"} in schema["properties"][name]["oneOf"]
    sections = {"": schema, **schema["$defs"]}
    for title, section in sections.items():
        assert section["additionalProperties"] is False
        for key, field in section["properties"].items():
            assert field.get("description") or "$ref" in field, f"{title}.{key} has no description"
    novelty = schema["$defs"]["NoveltyDrop"]
    assert novelty["properties"]["known_above"].items() >= {"type": "number", "minimum": 0, "maximum": 1}.items()
    rules = [set(rule["required"]) for rule in novelty["anyOf"]]
    assert {"known_above", "unknown_below"} in rules and {"cluster", "of"} in rules
    assert {"known_above", "below"} not in rules


def models(base):
    return {base}.union(*(models(child) for child in base.__subclasses__()))


def test_every_field_is_described():
    described = {part: part.model_fields for part in models(Block)}
    assert XTFConfig in described and AtLeast in described
    for part, fields in described.items():
        for name, field in fields.items():
            assert field.description and field.description.endswith("."), f"{part.__name__}.{name}"


def test_config_page_is_current(monkeypatch, tmp_path):
    assert config_page.main(["--check"]) is None, "run: python -m tests.config_page"
    monkeypatch.setattr(config_page, "PAGE", tmp_path / "config.md")
    assert "python -m tests.config_page" in config_page.main(["--check"])
    assert config_page.main([]) is None and config_page.main(["--check"]) is None
    (tmp_path / "config.md").write_text("old")
    assert "out of date" in config_page.main(["--check"])
    assert "usage" in config_page.main(["--help"])


def test_config_page_holds_every_key_and_the_presets():
    page = config_page.render_markdown()
    sections = page.split("\n## ")
    for key, value in XTFConfig().to_dict().items():
        assert f"\n| `{key}` |" in sections[1]
        homes = ("A score\n", f"`scorer: {value['scorer']}`") if key in SLOTS else f"`{key}`"
        for inner in value if isinstance(value, dict) else ():
            assert any(f"\n| `{inner}` |" in section for section in sections if section.startswith(homes)), inner
    presets = sections[-1]
    paper, official = "{layers: last, drop: {fence: 1.0}}", "{layers: first, drop: {fence: 1.5}, max_fraction: 0.05}"
    assert f"| `reasoning_importance` | `{{scorer: influence}}` | `false` | `{paper}` | `{official}` |" in presets
    assert "| `protect.formats` | `0.2` | `0.2` | `null` | `null` |" in presets
    for name in registry.BUILTIN:
        assert any(section.startswith(f"`scorer: {name}`") for section in sections)
    assert "seed" not in presets


def test_reading_a_block_imports_no_torch():
    read = "from xtf_plugin.config.block import XTFConfig; XTFConfig.parse(True)"
    code = f"import sys; {read}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
