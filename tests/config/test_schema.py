"""What the JSON schema of the block takes, by a validator that editors use, beside what a run takes."""

from __future__ import annotations

import json

import pytest
import yaml
from jsonschema import Draft202012Validator

from tests.config.test_config import BLOCKS
from tests.config.test_config_errors import CASES
from tests.pages import PAGES, ROOT, blocks
from xtf_plugin.config.block import XTFConfig
from xtf_plugin.config.scores import PRESETS, SLOTS
from xtf_plugin.errors import XTFUserError
from xtf_plugin.scorers import registry

SCHEMA = json.loads(json.dumps(XTFConfig.json_schema()))
VALIDATOR = Draft202012Validator(SCHEMA)
EXAMPLES = {
    str(block): yaml.safe_load(block.text)["xtf"]
    for page in PAGES
    for block in blocks(page)
    if block.language == "yaml" and "xtf:" in block.text
}
RECIPES = {
    str(path.relative_to(ROOT)): yaml.safe_load(path.read_text(encoding="utf-8"))["xtf"]
    for path in sorted((ROOT / "recipes").rglob("*.yaml"))
}


def taken_by_a_run(block):
    try:
        return XTFConfig.parse(block) is not None or block in (None, False)
    except XTFUserError:
        return False


def test_it_is_a_schema():
    Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("where", [*EXAMPLES, *RECIPES])
def test_every_example_is_legal(where):
    VALIDATOR.validate({**EXAMPLES, **RECIPES}[where])


def test_the_examples_are_of_several_kinds():
    """Slots without a scorer, with one, selectors; a page or a recipe that moves must not leave these tests empty."""
    assert len(EXAMPLES) > 5 and len(RECIPES) >= 10
    slots = [block[slot] for block in EXAMPLES.values() if isinstance(block, dict) for slot in SLOTS if slot in block]
    assert {"scorer" in part for part in slots if isinstance(part, dict)} == {True, False}
    assert any("selectors" in block for block in EXAMPLES.values() if isinstance(block, dict))


@pytest.mark.parametrize("block", [None, True, False, *BLOCKS, *({"preset": name} for name in PRESETS)], ids=str)
def test_what_a_run_takes_is_legal(block):
    VALIDATOR.validate(block)
    if isinstance(block, dict) and block != {"preset": "none"}:
        VALIDATOR.validate(XTFConfig.parse(block).to_dict())


def homes(value):
    """Every mapping in a block whose keys are fixed."""
    for name, inner in value.items():
        if isinstance(inner, dict):
            yield from (
                homes(inner) if name != "selectors" else (found for one in inner.values() for found in homes(one))
            )
    yield value


@pytest.mark.parametrize("where", [*EXAMPLES, *RECIPES])
def test_a_wrong_key_is_refused_wherever_it_stands(where):
    block = {**EXAMPLES, **RECIPES}[where]
    for home in homes(block):
        home["no_such_key"] = 1
        assert not VALIDATOR.is_valid(block) and not taken_by_a_run(block), home
        del home["no_such_key"]
    assert VALIDATOR.is_valid(block)


# A value for each key that some scorer of a slot has, legal for that scorer, and rules and units that not all have.
VALUES = {
    "layers": "all",
    "horizon": 9,
    "among": None,
    "doubtful": 0.3,
    "shortest": 5,
    "first": 5,
    "domain": ["x"],
    "embedding": "output",
    "reference": {"model": "m"},
    "unit": "token",
    "drop": {"unknown_below": 0.1},
}


@pytest.mark.parametrize("slot", SLOTS)
@pytest.mark.parametrize(
    ("preset", "scorer"),
    [(None, None), *((name, None) for name in PRESETS), *(("default", name) for name in registry.BUILTIN)],
)
def test_a_slot_has_the_keys_of_its_scorer(preset, slot, scorer):
    """Of the preset's, if it names none. What is legal beside other keys alone is the run's to say."""
    part = {} if scorer is None else {"scorer": scorer}
    usual = PRESETS[preset or "default"].get(slot, {}).get("scorer", SLOTS[slot])
    fields = registry.BUILTIN[scorer or usual].Config.model_fields
    needed = {"drop": {"below": 0.0}, "column": "marks", "reference": {"model": "m"}}
    part |= {key: value for key, value in needed.items() if key in fields and fields[key].is_required()}
    part |= {"among": None} if "among" in fields else {}  # all other scores are off
    taken = set()
    for key, value in VALUES.items():
        block = {**dict.fromkeys(SLOTS, False), slot: {**part, key: value}}
        block |= {} if preset is None else {"preset": preset}
        assert VALIDATOR.is_valid(block) == taken_by_a_run(block), block
        taken |= {key} if VALIDATOR.is_valid(block) else set()
    assert taken - {"unit", "drop"} == (VALUES.keys() & fields) - {"unit", "drop"}
    assert ("drop" in taken) == ((scorer or usual) == "novelty")


def test_keys_of_another_packages_scorer_are_its_own():
    own = {"scorer": "of_some_package", "drop": {"below": 0}, "its_key": 1}
    assert VALIDATOR.is_valid({"task_relevance": own}) and VALIDATOR.is_valid({"selectors": {"a": own}})
    assert not VALIDATOR.is_valid({"task_relevance": {**own, "window": 2}})
    assert not VALIDATOR.is_valid({"selectors": {"a": {**own, "drop": {"below": 0, "quantile": 0.5}}}})


# What it does not say: what Python's own parser, a file or another key decides.
BEYOND = """
two rules | novelty rules that meet | class beyond the split | more than there are | all off | control of nothing
log scale without a fence | scope of a constant | window and unit | revision of the trained model | bad regex
type of the trained model | code of the trained model | impossible regex | missing word file | blank word
unknown scorer of a slot | key of the slot's usual scorer | NUL in a path | nan | infinity | number beyond floats
name that --reason takes for a slot
"""


def test_what_a_run_refuses_is_refused_where_a_schema_can_say_it():
    beyond = {name.strip() for line in BEYOND.splitlines() for name in line.split("|")}
    cases = {name: block for name, (block, _) in CASES.items() if not isinstance(block, str)}
    del cases["key that is no text"]
    legal = {name for name, block in cases.items() if VALIDATOR.is_valid(block)}
    assert legal <= beyond, legal - beyond
    assert len(cases) - len(legal) > 50
