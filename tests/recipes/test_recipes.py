"""Every recipe must be one that its host takes, with an `xtf:` block that XTF takes, and files it names must exist.

That Axolotl takes its recipes is checked where Axolotl is: tests/axolotl/test_recipes.py.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import pytest
import yaml

from tests import forked

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
AXOLOTL = sorted((ROOT / "recipes" / "axolotl").glob("*.yaml"))
ALL = RECIPES + AXOLOTL
DOMAINS = sorted((ROOT / "recipes" / "domains").glob("*.txt"))
CONVERTER = ROOT / "recipes" / "prepare_prompt_completion.py"

# TRL's own parser, in a process without our hook: what is checked is that the rest of the recipe is stock.
PARSE = """
import json, sys
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, SFTConfig, TrlParser
for path in sys.argv[1:]:
    parser = TrlParser((ScriptArguments, SFTConfig, ModelConfig, DatasetMixtureConfig))
    try:
        script, training, model, _ = parser.parse_args_and_config(["--config", path, "--bf16", "false", "--use_cpu"])
        print(json.dumps([script.dataset_name, training.max_length, model.load_in_4bit, model.use_peft]))
    except ValueError as error:
        print(json.dumps(["error", str(error)]))
"""


def names(paths):
    return [str(path.relative_to(ROOT / "recipes").with_suffix("")) for path in paths]


def without_block(path, folder):
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    recipe.pop("xtf")
    stock = folder / path.name
    stock.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return stock


def run(*arguments):
    environment = {**os.environ, "XTF_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
    return forked.run([sys.executable, *arguments], env=environment, cwd=ROOT, timeout=300)


def test_there_are_recipes_for_every_domain():
    for recipes in (RECIPES, AXOLOTL):
        assert "demo" in {path.stem for path in recipes}
        for domain in DOMAINS:
            assert any(path.stem.startswith(domain.stem) for path in recipes), domain


def test_stock_trl_takes_every_recipe_without_its_block(tmp_path):
    stock = [without_block(path, tmp_path) for path in RECIPES]
    misspelt = tmp_path / "misspelt.yaml"
    misspelt.write_text(stock[0].read_text(encoding="utf-8") + "lora_rank: 8\n", encoding="utf-8")
    result = run("-c", PARSE, *map(str, stock), str(misspelt))
    assert result.returncode == 0, result.stderr
    *lines, refused = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("[")]
    assert len(lines) == len(RECIPES)
    for dataset, length, in_4bit, use_peft in lines:
        assert dataset and length and in_4bit is True and use_peft is True
    assert refused[0] == "error" and "lora_rank" in refused[1]


@pytest.mark.parametrize("path", ALL, ids=names(ALL))
def test_block_is_valid(path, monkeypatch):
    from xtf_plugin.config.block import XTFConfig

    monkeypatch.chdir(ROOT)
    config = XTFConfig.parse(yaml.safe_load(path.read_text(encoding="utf-8"))["xtf"])
    assert config is not None and config.scores
    for pattern in (*config.protect.patterns, *config.force_drop):
        re.compile(pattern)


def test_commented_keys_of_the_demo_are_valid_too(monkeypatch):
    from xtf_plugin.config.block import XTFConfig

    monkeypatch.chdir(ROOT)
    text = (ROOT / "recipes" / "demo.yaml").read_text(encoding="utf-8")
    block = text[text.index("\nxtf:") :]
    opened = re.sub(r"^  # ", "  ", block, flags=re.MULTILINE)
    keys = yaml.safe_load(opened)["xtf"]
    assert {"reasoning_importance", "knowledge_novelty", "task_relevance", "combine", "control", "dry_run"} <= set(keys)
    assert XTFConfig.parse(keys) is not None


@pytest.mark.parametrize("path", ALL, ids=names(ALL))
def test_recipe_opens_with_its_launch_command_and_its_files_exist(path):
    text = path.read_text(encoding="utf-8")
    header = text.split("\n\n")[0]
    command = "axolotl train" if path in AXOLOTL else "trl sft --config"
    assert header.startswith("# ") and f"{command} recipes/{path.relative_to(ROOT / 'recipes')}" in header
    assert re.search(r"\bCPU\b|\bGPU\b", header)
    assert "Run" in header or "run" in header
    for named in re.findall(r"recipes/[\w/.]+\.(?:py|txt|yaml)", text):
        assert (ROOT / named).is_file(), named


@pytest.mark.parametrize("path", DOMAINS, ids=names(DOMAINS))
def test_domain_words_are_single_distinct_lower_case_words(path):
    words = path.read_text(encoding="utf-8").splitlines()
    assert 40 <= len(words) <= 100
    assert words == sorted(set(words))
    assert all(re.fullmatch(r"[a-z]+", word) for word in words)


def test_readme_lists_every_recipe():
    readme = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")
    listed = {ROOT / "recipes" / name for name in re.findall(r"\]\(([\w/]+\.yaml)\)", readme)}
    assert listed == set(ALL)


@pytest.mark.parametrize("path", AXOLOTL, ids=names(AXOLOTL))
def test_recipes_of_axolotl_load_the_plugin_and_have_the_block_of_trls(path):
    from xtf_plugin.hosts import axolotl_checks

    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    axolotl_checks.check_plugin_line(recipe)
    axolotl_checks.check_settings(recipe)
    assert recipe["xtf"] == yaml.safe_load((ROOT / "recipes" / path.name).read_text(encoding="utf-8"))["xtf"]


@pytest.fixture
def source(tmp_path):
    rows = [
        {"question": f"How much is {n} + 1?", "context": None if n % 2 else "Count.", "answer": str(n + 1)}
        for n in range(9)
    ]
    rows.append({"question": "  ", "context": None, "answer": "nothing asked"})
    path = tmp_path / "source.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def convert(source, output, *more):
    columns = ("--prompt", "context", "question", "--completion", "answer", "--template", r"Q: {prompt}\nA:")
    return run(str(CONVERTER), str(source), *columns, "--output", str(output), *more)


def test_converter_renames_joins_and_splits(source, tmp_path):
    result = convert(source, tmp_path / "out", "--test-rows", "3")
    assert result.returncode == 0, result.stderr
    parts = {
        name: [
            json.loads(line) for line in (tmp_path / "out" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        for name in ("train", "test")
    }
    rows = parts["train"] + parts["test"]
    assert len(rows) == 9 and "1 without a prompt" in result.stdout
    assert {"prompt": "Q: Count.\n\nHow much is 0 + 1?\nA:", "completion": " 1"} in rows
    assert {"prompt": "Q: How much is 1 + 1?\nA:", "completion": " 2"} in rows


def test_converter_names_the_columns_there_are(source, tmp_path):
    result = run(
        str(CONVERTER), str(source), "--prompt", "q", "--completion", "answer", "--output", str(tmp_path / "out")
    )
    assert result.returncode != 0
    assert "'q'" in result.stderr and "question" in result.stderr and "Traceback" not in result.stderr
