"""Runs stock Axolotl on tiny recipes and reads what its training steps were given."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import yaml

from tests import forked, tiny

BIN = Path(sysconfig.get_path("scripts"))
RECORDER = Path(__file__).parents[1] / "recorder"
ONE = ("--launcher", "python")
PLUGIN = "xtf_plugin.XTFPlugin"
DROPS = {"preset": "paper", "reasoning_importance": {"layers": "all", "drop": {"quantile": 0.2}, "scope": "dataset"}}
NO_KERNELS = {f"lora_{name}_kernel": False for name in ("qkv", "mlp", "o", "embedding")}  # they want CUDA
ROWS = 18


def conversations() -> list[dict[str, Any]]:
    """Three turns each, every other conversation with a system message."""
    rows = tiny.conversations(ROWS, turns=3)
    for row in rows[::2]:
        row["messages"].insert(0, {"role": "system", "content": "Be brief."})
    return rows


def instructions() -> list[dict[str, Any]]:
    """Rows of type alpaca."""
    rng = random.Random(3)
    pairs = [tiny.problem(rng) for _ in range(ROWS)]
    return [{"instruction": prompt, "input": "", "output": answer.strip()} for prompt, answer in pairs]


def base(folder: Path) -> Path:
    """A folder with a model and the data of every recipe here."""
    tiny.save_base(folder / "model")
    tiny.save_rows(folder / "chat.jsonl", conversations())
    tiny.save_rows(folder / "alpaca.jsonl", instructions())
    tiny.save_rows(folder / "text.jsonl", [{"text": row["prompt"] + row["completion"]} for row in tiny.problems(ROWS)])
    return folder


def dataset(folder: Path, kind: str) -> dict[str, Any]:
    """What a recipe says about its data: chat, alpaca or text."""
    entry: dict[str, Any] = {"path": str(folder / f"{kind}.jsonl"), "ds_type": "json"}
    if kind == "chat":
        chat = {"type": "chat_template", "field_messages": "messages"}
        return {"datasets": [entry | chat], "chat_template": "tokenizer_default"}
    return {"datasets": [entry | {"type": "completion" if kind == "text" else "alpaca"}]}


def write(folder: Path, out: Path, kind: str = "chat", **changes: Any) -> Path:
    """A recipe for one epoch of 4-bit QLoRA on the CPU; `...` removes a key."""
    recipe: dict[str, Any] = {
        "base_model": str(folder / "model"),
        "plugins": [PLUGIN],
        **dataset(folder, kind),
        "dataset_prepared_path": str(out.parent / "prepared"),
        # Processes that Axolotl starts import everything again: none to tokenise, but 0 would make four to pack.
        "dataset_num_proc": int(bool(changes.get("sample_packing"))),
        "output_dir": str(out),
        "special_tokens": {"pad_token": "<|pad|>"},
        **{"load_in_4bit": True, "adapter": "qlora", "lora_r": 4, "lora_alpha": 8},
        "lora_target_modules": ["q_proj", "v_proj"],
        **NO_KERNELS,
        **{"sequence_len": 512, "micro_batch_size": 2, "gradient_accumulation_steps": 1, "num_epochs": 1},
        **{"optimizer": "adamw_torch", "lr_scheduler": "constant", "learning_rate": 0.01, "logging_steps": 1},
        **{"bf16": False, "fp16": False, "tf32": False, "val_set_size": 0, "save_strategy": "no", "seed": 7},
        "xtf": DROPS,
    } | changes
    path = out.parent / f"{out.name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({key: value for key, value in recipe.items() if value is not ...}))
    return path


def command(
    *words: Any, record: Path | None = None, cache: Path, real: bool = False, **environment: str
) -> subprocess.CompletedProcess:
    """Run a stock command of this environment, off the net, in a folder of its own.

    `real`: in a process of its own, whose imports come in their own order.
    """
    given = {"HF_HUB_OFFLINE": "1", "AXOLOTL_DO_NOT_TRACK": "1", "XTF_CACHE": str(cache), "CUDA_VISIBLE_DEVICES": ""}
    if record is not None:
        given |= {"PYTHONPATH": os.pathsep.join([str(RECORDER), str(Path(__file__).parents[2])]), "RECORD": str(record)}
    path = os.pathsep.join([str(BIN), os.environ["PATH"]])
    cache.mkdir(parents=True, exist_ok=True)
    everything = {**os.environ, **given, "PATH": path, **environment}
    if not real:
        return forked.run(words, env=everything, cwd=cache)
    return subprocess.run(
        tuple(map(str, words)), capture_output=True, text=True, env=everything, cwd=cache, timeout=600
    )


def python(*words: Any, **options: Any) -> subprocess.CompletedProcess:
    return command(sys.executable, *words, **options)


def train(recipe: Path, out: Path, cache: Path, *words: str, ok: bool = True, real: bool = False, **environment: str):
    """`axolotl train` on a recipe, in one process unless `words` say otherwise."""
    words = BIN / "axolotl", "train", recipe, *(words or ONE)
    result = command(*words, record=seen_path(out), cache=cache, real=real, **environment)
    if ok:
        assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]
    return result


def seen_path(out: Path) -> Path:
    return out.parent / f"{out.name}.seen"


def seen(out: Path, suffix: str = "") -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(token ids, positions with a label) of each document that the steps of a run were given, in their order.

    Padding that no attention mask marks is left out: it looks like documents, but is never trained on.
    """
    rows = map(json.loads, Path(f"{seen_path(out)}{suffix}.0").read_text().splitlines())
    found = [(tuple(row["ids"]), tuple(row["kept"])) for row in rows]
    padding = tiny.tokenizer().pad_token_id
    assert not any(kept for ids, kept in found if set(ids) == {padding})
    return [(ids, kept) for ids, kept in found if set(ids) != {padding}]


def losses(out: Path) -> list[float]:
    """The logged training losses of a run, from its last checkpoint."""
    state = max(out.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1])) / "trainer_state.json"
    return [entry["loss"] for entry in json.loads(state.read_text())["log_history"] if "loss" in entry]
