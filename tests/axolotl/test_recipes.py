"""Stock Axolotl takes every recipe of recipes/axolotl, and the demo's runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests import tiny
from tests.axolotl import stock
from tests.made_scores import odd_sentences

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes/axolotl").glob("*.yaml"))
CHECK = """
import json, sys, yaml
from axolotl.cli.config import prepare_plugins
from axolotl.utils.config import validate_config
from axolotl.utils.dict import DictDefault
from axolotl.utils.schemas.config import AxolotlInputConfig
from axolotl.utils.schemas.datasets import SFTDataset, UserDefinedPrompterType
recipe = yaml.safe_load(open(sys.argv[1]))
unknown = set(recipe) - set(AxolotlInputConfig.model_fields) - {"xtf"}
for dataset in recipe["datasets"] + recipe.get("test_datasets", []):
    unknown |= set(dataset) - set(SFTDataset.model_fields)
    if isinstance(dataset["type"], dict):
        unknown |= set(dataset["type"]) - set(UserDefinedPrompterType.model_fields)
cfg = DictDefault(recipe)
prepare_plugins(cfg)
checked = validate_config(cfg)
print(json.dumps([sorted(unknown), checked.xtf, checked.sample_packing, checked.load_in_4bit]))
"""


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_axolotl_takes_it_and_knows_every_key(path, tmp_path):
    recipe = yaml.safe_load(path.read_text())
    recipe |= {"bf16": False, **stock.NO_KERNELS}  # what its GPU would decide
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    result = stock.python("-c", CHECK, tmp_path / "recipe.yaml", cache=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    unknown, block, packed, quantised = json.loads(result.stdout.splitlines()[-1])
    assert unknown == [] and block == recipe["xtf"] and packed is True and quantised is True


def test_the_demo_masks_the_answers_of_conversations(tmp_path):
    """On another base and other data, whose names and places are the same."""
    tiny.save_base(tmp_path / ".models/SmolLM2-135M-Instruct")
    rows = tiny.conversations(40, turns=1)
    tiny.save_rows(tmp_path / ".demo/messages/train.jsonl", rows)
    recipe = yaml.safe_load((ROOT / "recipes/axolotl/demo.yaml").read_text())
    recipe["xtf"] = odd_sentences()  # to this base the prompts say nothing
    (tmp_path / "recipe.yaml").write_text(
        yaml.safe_dump(recipe | {"max_steps": 2, "special_tokens": {"pad_token": "<|pad|>"}})
    )
    words = stock.BIN / "axolotl", "train", "recipe.yaml", *stock.ONE
    result = stock.command(*words, cache=tmp_path, record=tmp_path / "seen")
    assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]
    totals = json.loads((tmp_path / ".demo/axolotl_run/xtf/summary.json").read_text())["totals"]
    answers = [row["messages"][-1]["content"] for row in rows]
    tokens = sum(len(tiny.tokenizer()(answer)["input_ids"]) + 1 for answer in answers)  # and the end of the turn
    assert totals["documents"] == len(rows) and abs(totals["completion_tokens"] - tokens) <= 2 * len(rows)
    assert 0 < totals["dropped_tokens"]
