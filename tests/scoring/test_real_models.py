"""The stock commands on a real pretrained model: 4-bit QLoRA, chats, `xtf score`, and masks against eager float32.

Other tests use tiny random models on meaningless text. Here tokens, templates, sizes and scores are those of a real
model (tests/real.py). `make test-long` takes more questions, and scores the larger models.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from tests import eager, forked, real, tiny
from tests.reliability import amount

pytestmark = real.needs(real.SMOLLM2)

BIN = Path(sys.executable).parent
COUNT = amount(4, 8)  # questions
BAND = 1e-4  # scores this close to a threshold may be on either side of it
RECEIVED, PROBABILITY = 0.15, 0.01
BLOCK = {
    "preset": "none",
    "reasoning_importance": {"layers": "all", "drop": {"below": RECEIVED}},
    "knowledge_novelty": {"drop": {"unknown_below": PROBABILITY}},
}


def pairs() -> list[dict[str, str]]:
    """Questions and answers of the demo."""
    lines = real.PAIRS.read_text(encoding="utf-8").splitlines()[:COUNT]
    return [{name: row[name] for name in ("prompt", "completion")} for row in map(json.loads, lines)]


def chats() -> list[dict[str, list[dict[str, str]]]]:
    """The same as chats of two questions each."""
    turns = [
        [{"role": "user", "content": pair["prompt"]}, {"role": "assistant", "content": pair["completion"]}]
        for pair in pairs()
    ]
    return [{"messages": one + two} for one, two in zip(turns[::2], turns[1::2], strict=True)]


def run(folder: Path, *words: str, rows, block=BLOCK, **changes):
    """A stock command on SmolLM2 and some rows; returns the output folder and the recorder's documents."""
    tiny.save_rows(folder / "data/train.jsonl", rows)
    settings = {
        "model_name_or_path": str(real.MODELS / real.SMOLLM2),
        "dataset_name": str(folder / "data"),
        "load_in_4bit": True,
        "use_peft": True,
        "lora_target_modules": ["q_proj", "v_proj"],
        "dtype": "float32",
        "per_device_train_batch_size": COUNT // 2,
        "max_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "output_dir": str(folder / "out"),
        "xtf": block,
        **changes,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in settings.items() if v is not None}, sort_keys=False))
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "XTF_CACHE": str(folder / "cache"),
        "RECORD": str(folder / "record"),
        "PYTHONPATH": f"{Path(__file__).parents[1] / 'recorder'}{os.pathsep}{Path(__file__).parents[2]}",
    }
    result = forked.run([*words, path], env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    record = folder / "record.0"
    steps = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
    return folder / "out", steps


def table_of(out: Path) -> list[dict[str, np.ndarray]]:
    """The score table's columns, a dictionary for each row of the data."""
    frame = pq.read_table(out / "xtf/scores.parquet").to_pandas()
    return [{name: group[name].to_numpy() for name in group} for _, group in frame.groupby("row")]


def trained_on_the_table(steps, table) -> int:
    """Compare the batches of the training steps with the table; returns how many of its rows were trained on."""
    rows = {tuple(zip(row["position"], row["token_id"], strict=True)): row for row in table}
    seen = set()
    for document in steps:
        at = next(key for key in rows if all(p < len(document["ids"]) and document["ids"][p] == t for p, t in key))
        assert document["kept"] == [int(p) for p in rows[at]["position"][rows[at]["kept"]]]
        seen.add(at)
    return len(seen)


@pytest.fixture(scope="module")
def qlora(tmp_path_factory):
    return run(tmp_path_factory.mktemp("qlora"), str(BIN / "trl"), "sft", "--config", rows=pairs())


def test_stock_qlora_trains_on_the_kept_tokens_of_the_table(qlora):
    out, steps = qlora
    facts, table = json.loads((out / "xtf/summary.json").read_text()), table_of(out)
    assert facts["reference"]["quantization"] == "nf4/fp4"
    assert facts["scoring"]["scored_documents"] == len(table) == COUNT
    assert trained_on_the_table(steps, table) == COUNT
    assert 0.02 < 1 - facts["totals"]["kept_fraction"] < 0.9


def test_only_assistant_tokens_of_a_chat_are_dropped(tmp_path):
    """SmolLM2's template marks no assistant turns, so the user names one that does, as TRL requires."""
    template = tmp_path / "template.jinja"
    template.write_text(tiny.CHAT_TEMPLATE)
    chat = {"chat_template_path": str(template), "assistant_only_loss": True}
    batches = {"per_device_train_batch_size": 2, "max_steps": COUNT // 4}
    out, steps = run(tmp_path, str(BIN / "trl"), "sft", "--config", rows=chats(), **batches, **chat)
    table, fast = table_of(out), real.tokenizer(real.SMOLLM2)
    assert trained_on_the_table(steps, table) == len(table) == COUNT // 2
    for row, chat in zip(table, chats(), strict=True):
        answers = [message["content"] + "<|im_end|>" for message in chat["messages"] if message["role"] == "assistant"]
        assert fast.decode(row["token_id"]) == "".join(answers)
        assert row["kept"][row["token_id"] == fast.eos_token_id].all(), "an end of turn is protected"
        assert 0 < row["kept"].sum() < len(row["kept"])


def test_scores_and_masks_equal_an_eager_computation_in_float32(tmp_path):
    full = {"load_in_4bit": None, "use_peft": None, "lora_target_modules": None}
    out, _ = run(tmp_path, str(BIN / "xtf"), "score", rows=pairs(), **full)
    model, fast, dropped = real.load(real.SMOLLM2, "fp32"), real.tokenizer(real.SMOLLM2), 0
    for row, pair in zip(table_of(out), pairs(), strict=True):
        ids = fast(pair["prompt"])["input_ids"] + fast(pair["completion"] + fast.eos_token)["input_ids"]
        positions = row["position"]
        assert row["token_id"].tolist() == ids[positions[0] :] and positions[-1] == len(ids) - 1
        logprobs, received = eager.scores(model, ids, range(model.config.num_hidden_layers))
        novelty, received = -np.expm1(logprobs[positions].numpy()), received[positions].numpy()
        np.testing.assert_allclose(row["knowledge_novelty"], novelty, atol=2e-4)
        np.testing.assert_allclose(row["reasoning_importance"].astype(float), received, atol=2e-4)
        special = np.isin(row["token_id"], fast.all_special_ids)
        kept = special | ~((np.nan_to_num(received, nan=1.0) < RECEIVED) | (1 - novelty < PROBABILITY))
        clear = (np.abs(received - RECEIVED) > BAND) & (np.abs(1 - novelty - PROBABILITY) > BAND) | np.isnan(received)
        assert clear.mean() > 0.95
        np.testing.assert_array_equal(row["kept"][clear], kept[clear])
        dropped += int((~kept).sum())
    assert dropped > 20, "the rules drop too few tokens for this test"
