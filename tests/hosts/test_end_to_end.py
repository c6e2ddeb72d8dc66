"""The stock commands, as a user types them: 4-bit QLoRA on a real bitsandbytes base, with an `xtf:` block in the
recipe.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from tests import eager, forked, tiny
from tests.made_scores import DROPS
from xtf_plugin.hosts.recipes import load_recipe
from xtf_plugin.hosts.row_settings import differing, row_settings

BIN = Path(sys.executable).parent
DROPS_NOTHING = {"preset": "none", "reasoning_importance": {"drop": {"below": 0.0}}}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny.save_base(folder / "model")
    tiny.save_rows(folder / "data/train.jsonl", tiny.problems(24))
    tiny.save_rows(folder / "data/test.jsonl", tiny.problems(8, seed=5))
    return folder


def recipe(base: Path, out: Path, **changes) -> Path:
    settings = {
        "model_name_or_path": str(base / "model"),
        "dataset_name": str(base / "data"),
        "load_in_4bit": True,
        "use_peft": True,
        "lora_r": 4,
        "lora_dropout": 0.1,
        "lora_target_modules": ["q_proj", "v_proj"],
        "gradient_checkpointing": True,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 3,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "output_dir": str(out),
        **changes,
    }
    path = out.parent / f"{out.name}.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in settings.items() if v is not None}, sort_keys=False))
    return path


def command(*words, cache: Path, real=False, **environment):
    """A command to its end; `real`: in a process of its own, whose imports come in their own order."""
    settings = {"XTF_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **environment}
    env = {**os.environ, **settings}
    if real:
        return subprocess.run([str(w) for w in words], env=env, capture_output=True, text=True, timeout=300)
    return forked.run(words, env=env, timeout=300)


def history(out: Path) -> list[dict]:
    return json.loads((out / "checkpoint-3/trainer_state.json").read_text())["log_history"]


def steps(out: Path) -> list[tuple[float, float]]:
    return [(entry["loss"], entry["grad_norm"]) for entry in history(out) if "loss" in entry]


@pytest.fixture(scope="module")
def runs(base, tmp_path_factory):
    """Plain SFT, XTF that drops nothing, XTF that drops: the same recipe three times through `trl sft`."""
    folder = tmp_path_factory.mktemp("runs")
    blocks = {"plain": None, "nothing": DROPS_NOTHING, "drops": DROPS}
    results = {}
    for name, block in blocks.items():
        path = recipe(base, folder / name, xtf=block, eval_strategy="steps", eval_steps=3)
        results[name] = command(BIN / "trl", "sft", "--config", path, cache=folder / "cache", real=name == "drops")
        assert results[name].returncode == 0, results[name].stderr[-3000:]
    return folder, results


def test_block_that_drops_nothing_equals_plain_sft_step_for_step(runs):
    folder, _ = runs
    assert steps(folder / "nothing") == steps(folder / "plain")
    assert len(steps(folder / "plain")) == 3


def test_block_that_drops_changes_training_but_not_evaluation_data(runs):
    folder, results = runs
    assert steps(folder / "drops") != steps(folder / "plain")
    facts = json.loads((folder / "drops/xtf/summary.json").read_text())
    assert facts["totals"]["dropped_tokens"] > 0
    assert facts["reference"]["quantization"] == "nf4/fp4"
    assert differing(facts["recipe"], row_settings(load_recipe(folder / "drops.yaml").data)) == []
    entry = next(e for e in history(folder / "drops") if "loss" in e)
    assert entry["xtf/kept_fraction"] == pytest.approx(facts["totals"]["kept_fraction"])
    evaluations = [next(e["eval_loss"] for e in history(folder / n) if "eval_loss" in e) for n in ("plain", "nothing")]
    assert evaluations[0] == evaluations[1]
    assert "not comparable with plain SFT" in results["drops"].stderr


def test_training_arguments_load_without_us(runs):
    folder, _ = runs
    code = (
        "import sys, torch; sys.modules['xtf_plugin'] = None;"
        f"a = torch.load({str(folder / 'drops/training_args.bin')!r}, weights_only=False); print(type(a.xtf).__name__)"
    )
    result = command(sys.executable, "-c", code, cache=folder, XTF_DISABLE="1")
    assert result.stdout.split()[-1] == "dict", result.stderr[-2000:]


def test_packing_through_the_stock_command_finds_the_same_scores(runs, base):
    folder, _ = runs
    path = recipe(base, folder / "packed", xtf=DROPS, packing=True, max_length=200, save_steps=3)
    result = command(BIN / "trl", "sft", "--config", path, cache=folder / "cache")
    assert result.returncode == 0, result.stderr[-3000:]
    packed, plain = (json.loads((folder / n / "xtf/summary.json").read_text()) for n in ("packed", "drops"))
    assert packed["scoring"]["scored_documents"] == 0
    assert packed["totals"]["dropped_tokens"] == plain["totals"]["dropped_tokens"]


@pytest.mark.parametrize("launcher", ["python -m", "accelerate launch"])
def test_other_launchers_apply_the_block(base, tmp_path, launcher):
    path = recipe(base, tmp_path / "out", xtf=DROPS)
    script = (
        [sys.executable, "-m", "trl.scripts.sft"]
        if launcher == "python -m"
        else [BIN / "accelerate", "launch", "--num_processes", "1", "--cpu", "-m", "trl.scripts.sft"]
    )
    result = command(*script, "--config", path, cache=tmp_path / "cache")
    assert result.returncode == 0, result.stderr[-3000:]
    assert json.loads((tmp_path / "out/xtf/summary.json").read_text())["totals"]["dropped_tokens"] > 0


def test_score_agrees_with_eager_float32(base, tmp_path):
    """`xtf score` on the full-precision model: every token within 2e-4 of maps and logits computed independently."""
    block = {"preset": "none", "reasoning_importance": True, "knowledge_novelty": True}
    path = recipe(base, tmp_path / "out", xtf=block, load_in_4bit=None, use_peft=None)
    output = tmp_path / "scores.parquet"
    result = command(BIN / "xtf", "score", path, "--output", output, cache=tmp_path / "cache")
    assert result.returncode == 0, result.stderr[-3000:]
    assert not list((tmp_path / "out").glob("checkpoint*"))
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base / "model", dtype="float32").eval()
    fast = tiny.tokenizer()
    table = pq.read_table(output).to_pandas()
    assert table["row"].nunique() == 24
    for row, group in table.groupby("row"):
        prompt, completion = (tiny.problems(24)[row][key] for key in ("prompt", "completion"))
        ids = fast(prompt + completion + fast.eos_token)["input_ids"]
        assert group["token_id"].tolist() == [ids[p] for p in group["position"]]
        logprobs, received = eager.scores(model, ids, range(model.config.num_hidden_layers))
        positions = group["position"].to_numpy()
        novelty = -np.expm1(logprobs[positions].numpy())
        np.testing.assert_allclose(group["knowledge_novelty"], novelty, atol=2e-4)
        np.testing.assert_allclose(group["reasoning_importance"].astype(float), received[positions].numpy(), atol=2e-4)


def test_separate_reference_is_freed_and_a_second_run_does_not_load_it(base, tmp_path):
    reference = tmp_path / "reference"
    tiny.model(seed=3, num_hidden_layers=1).save_pretrained(reference)
    tiny.tokenizer().save_pretrained(reference)
    separate = {"model": str(reference), "quantization": "nf4", "dtype": "float32"}
    block = {**DROPS, "reference": separate, "dry_run": True}
    path = recipe(base, tmp_path / "out", xtf=block)
    launch = [sys.executable, "-m", "trl.scripts.sft", "--config", path]
    first = command(*launch, cache=tmp_path / "cache")
    assert first.returncode == 0, first.stderr[-3000:]
    assert json.loads((tmp_path / "out/xtf/summary.json").read_text())["scoring"]["scored_documents"] == 24
    weights = reference / "model.safetensors"
    data = weights.read_bytes()
    code = (
        "import runpy, sys, transformers; cls = transformers.AutoModelForCausalLM; load = "
        "cls.from_pretrained.__func__\n"
        "def guarded(c, name, *a, **k):\n"
        f"    assert str(name) != {str(reference)!r}, 'the reference was loaded again'\n"
        "    return load(c, name, *a, **k)\n"
        "cls.from_pretrained = classmethod(guarded)\n"
        f"sys.argv = ['sft.py', '--config', {str(path)!r}]\n"
        "runpy.run_module('trl.scripts.sft', run_name='__main__')"
    )
    second = command(sys.executable, "-c", code, cache=tmp_path / "cache")
    assert second.returncode == 0, second.stderr[-3000:]
    assert json.loads((tmp_path / "out/xtf/summary.json").read_text())["scoring"]["scored_documents"] == 0
    assert weights.read_bytes() == data


@pytest.mark.parametrize("words, code", [(("trl", "sft", "--config"), 1), (("xtf", "score"), 2)])
def test_data_that_cannot_be_masked_ends_with_one_message(base, tmp_path, words, code):
    """The host finds out in the training process, whose launcher ends with 1; `xtf score` asks before it starts."""
    path = recipe(base, tmp_path / "out", xtf=True, dataset_streaming=True, dataloader_num_workers=2)
    result = command(BIN / words[0], *words[1:], path, cache=tmp_path / "cache")
    assert result.returncode == code, result.stderr[-3000:]
    assert result.stderr.count("xtf: error: the training data is streamed") == 1
    assert "dataset_streaming: false" in result.stderr and not list((tmp_path / "out").glob("**/*.safetensors"))


def test_wrong_key_ends_with_2_and_one_message(base, tmp_path):
    path = recipe(base, tmp_path / "out", xtf={"reasoning_importance": {"drop": {"quantle": 0.1}}})
    result = command(BIN / "trl", "sft", "--config", path, cache=tmp_path / "cache")
    assert result.returncode == 2
    assert "quantle" in result.stderr and "quantile" in result.stderr and "Traceback" not in result.stderr
