"""Unsloth itself on a CPU, against the stock trainer: by hand, since Unsloth is no dependency of ours.

In an environment of its own, without torchvision where that does not match a CPU build of torch:

    pip install "torch==2.13.0" unsloth==2026.10.9 unsloth_zoo==2026.10.9 -e .
    pip uninstall torchvision
    UNSLOTH_SKIP_TORCHVISION_CHECK=1 python -m tests.unsloth_for_real FOLDER

Each case trains in a process of its own, in FOLDER, and a second one trains the same rows in a stock Trainer. It ends
with 1 if a step was given other labels. On a CPU Unsloth leaves models as they are and does not rewrite TRL's trainer;
what it would do with that on a GPU is asked for by `rewritten`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BLOCK = {"preset": "paper", "reasoning_importance": {"layers": "all", "drop": {"quantile": 0.2}}}
CASES = {
    "attached after": {},
    "attached before": {"before": True},
    "rewritten, attached after": {"rewritten": True},
    "rewritten, attached before, LoRA, accumulation": {
        "rewritten": True,
        "before": True,
        "lora": True,
        "options": {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2},
    },
}


def trained(trainer) -> dict:
    """The rows that a trainer trains on and the positions with a label of every document that a step was given."""
    from tests.watch import watched

    found = watched(trainer)
    trainer.train()
    rows = [{name: row[name] for name in ("input_ids", "labels")} for row in trainer.train_dataset]
    return {"rows": rows, "found": sorted([list(ids), list(kept)] for ids, kept in found)}


def unsloths(folder: Path, case: dict) -> dict:
    import torch
    from unsloth import FastLanguageModel  # before TRL, as Unsloth asks
    from unsloth.chat_templates import train_on_responses_only

    if case.get("rewritten"):
        import trl
        from trl.trainer import sft_trainer
        from unsloth.models import rl

        sft_trainer.SFTTrainer = trl.trainer.SFTTrainer = trl.SFTTrainer = trl.SFTTrainer.__mro__[1]
        rl._patch_trl_rl_trainers("sft_trainer")
    import trl
    from datasets import Dataset

    from tests import unsloth_pattern as pattern
    from tests.unsloth_pattern import sft, texts
    from xtf_plugin import attach

    model, _ = FastLanguageModel.from_pretrained(
        str(folder / "base"), max_seq_length=256, load_in_4bit=False, dtype=torch.float32
    )
    if case.get("lora"):
        model = FastLanguageModel.get_peft_model(model, r=4, target_modules=["q_proj", "v_proj"])
    trainer = sft(folder / "out", trl.SFTTrainer, Dataset.from_list(texts()), model, **case.get("options", {}))
    assert type(trainer).__name__ == ("UnslothSFTTrainer" if case.get("rewritten") else "SFTTrainer")
    block = {"cache_dir": str(folder / "cache"), **BLOCK}
    if case.get("before"):
        attach(trainer, block)
    train_on_responses_only(trainer, pattern.ASK, pattern.ANSWER, num_proc=1)
    return trained(trainer if case.get("before") else attach(trainer, block))


def stocks(folder: Path, rows: list[dict]) -> dict:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, Trainer, TrainingArguments

    from tests import tiny
    from xtf_plugin import attach

    trainer = Trainer(
        AutoModelForCausalLM.from_pretrained(folder / "base"),
        args=TrainingArguments(output_dir=folder / "out", use_cpu=True, report_to="none", num_train_epochs=1),
        train_dataset=Dataset.from_list(rows),
        data_collator=DataCollatorForSeq2Seq(tiny.tokenizer()),
    )
    return trained(attach(trainer, {"cache_dir": str(folder / "stock-cache"), **BLOCK}))


def child(folder: Path, name: str) -> dict:
    subprocess.run([sys.executable, "-m", "tests.unsloth_for_real", str(folder), name], check=True)
    return json.loads((folder / "result.json").read_text())


def main(folder: Path, words: list[str]) -> int:
    if words:
        result = folder / "result.json"
        stock = words[0] == "stock"
        made = stocks(folder, json.loads(result.read_text())["rows"]) if stock else unsloths(folder, CASES[words[0]])
        result.write_text(json.dumps(made))
        return 0
    from tests import tiny

    tiny.save_base(folder / "base")
    differing = 0
    for number, name in enumerate(CASES):
        place = folder / str(number)
        place.mkdir(parents=True)
        (place / "base").symlink_to((folder / "base").resolve())
        ours = child(place, name)
        equal = child(place, "stock")["found"] == ours["found"]
        differing += not equal
        labels = sum(len(kept) for _, kept in ours["found"])
        print(f"{name}: {labels} labels in {len(ours['found'])} documents, {'equal' if equal else 'DIFFERENT'}")
    return int(differing > 0)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
