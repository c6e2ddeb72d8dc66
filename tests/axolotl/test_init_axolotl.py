"""`xtf init --host axolotl` writes recipes that stock Axolotl trains, with labels on the answers alone."""

from __future__ import annotations

import json

import pytest
import yaml

from tests import tiny
from tests.axolotl import stock

PAIRS = [{"question": row["prompt"], "answer": row["completion"].strip()} for row in tiny.problems(stock.ROWS)]
SHARED = [
    {"conversations": [{"from": {"user": "human", "assistant": "gpt"}[m["role"]], "value": m["content"]} for m in row]}
    for row in (conversation["messages"] for conversation in tiny.conversations(stock.ROWS))
]


@pytest.mark.parametrize("kind", ["questions", "questions of a base model", "conversations", "conversations of a bot"])
def test_stock_axolotl_trains_it(kind, tmp_path):
    rows = SHARED if "conversations" in kind else PAIRS
    if "bot" in kind:
        rows = json.loads(json.dumps(SHARED).replace('"gpt"', '"bot"'))
    tiny.save_base(tmp_path / "model")
    if "base model" in kind:
        (tmp_path / "model/chat_template.jinja").unlink()
        settings = json.loads((tmp_path / "model/tokenizer_config.json").read_text())
        settings.pop("pad_token")
        (tmp_path / "model/tokenizer_config.json").write_text(json.dumps(settings))
    tiny.save_rows(tmp_path / "data.jsonl", rows)
    words = ("init", "--model", "model", "--dataset", "data.jsonl", "--host", "axolotl")
    made = stock.command(stock.BIN / "xtf", *words, cache=tmp_path)
    assert made.returncode == 0, made.stderr
    recipe = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    assert ("special_tokens" in recipe) == ("base model" in kind)
    checked = stock.command(stock.BIN / "xtf", "check", "recipe.yaml", cache=tmp_path)
    assert checked.returncode == 0, checked.stderr
    run = ("train", "recipe.yaml", *stock.ONE, "--max-steps", "1", "--dataset-num-proc", "1")
    result = stock.command(stock.BIN / "axolotl", *run, cache=tmp_path, record=tmp_path / "seen")
    assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]
    totals = json.loads((tmp_path / "runs/recipe/xtf/summary.json").read_text())["totals"]
    turns = ("".join(m["value"] for m in row["conversations"] if m["from"] == "gpt") for row in SHARED)
    answers = list(turns) if "conversations" in kind else [row["answer"] for row in PAIRS]
    tokens = sum(len(tiny.tokenizer()(answer)["input_ids"]) for answer in answers)
    assert totals["documents"] == len(rows) and tokens <= totals["completion_tokens"] <= 1.2 * tokens
