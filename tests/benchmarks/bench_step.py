"""What masks do to a training step of a model with a large vocabulary.

    python -m tests.benchmarks.bench_step [--repeats 5] [--write docs/benchmarks]

One trainer of TRL's with LoRA, a small decoder under a vocabulary of 128,256, and the same batch of rows for every
variant: collated by the trainer's own collator, and by ours with masks that keep all, three quarters or half of the
completion tokens, drawn at random. A step is collating, forward, loss and backward.

TRL's head leaves out positions without a label where it runs on Triton, and works through all positions elsewhere
(`trl.trainer.utils.add_fused_lm_head`). On a CPU both are measured: as it comes, and with the positions left out.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

from tests import tiny
from tests.benchmarks import reach
from tests.benchmarks.bench_overheads import make_rows
from tests.benchmarks.common import NOT_MEASURED, arguments, device, in_turn, publish
from xtf_plugin.data.documents import collect
from xtf_plugin.selection.masks import MaskTable
from xtf_plugin.training.collator import XTFDataCollator

BATCH, LONGEST, KEPT = 4, 200, (1.0, 0.75, 0.5)
HEAD = ["head", "step", "ms", "x plain", "collator, ms added", "of a step", "reach"]


def small(vocabulary: int) -> LlamaConfig:
    """A small decoder."""
    shape = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "num_attention_heads": 4}
    return LlamaConfig(vocab_size=vocabulary, num_key_value_heads=2, tie_word_embeddings=True, **shape)


def make_trainer(rows: list[dict[str, list[int]]], config: LlamaConfig, folder: str) -> SFTTrainer:
    """TRL's trainer with LoRA on a random decoder; its tokenizer is asked for nothing but the padding."""
    torch.manual_seed(0)
    quiet = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "max_length": None}
    where = {"use_cpu": device().type == "cpu", "bf16": device().type == "cuda"}
    with device():
        model = LlamaForCausalLM(config)
    trainer = SFTTrainer(
        model,
        args=SFTConfig(folder, per_device_train_batch_size=BATCH, **quiet, **where),
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny.tokenizer(),
        peft_config=LoraConfig(r=16, target_modules="all-linear"),
    )
    trainer.current_gradient_accumulation_steps = 1  # which `train()` sets
    return trainer


def masks(rows: list[dict[str, list[int]]], kept: float) -> MaskTable:
    """Masks that keep a share of all completion tokens, drawn at random."""
    documents = collect(rows)
    offsets = documents.completion_offsets
    keep = np.random.default_rng(0).random(int(offsets[-1])) < kept
    return MaskTable.build(documents.keys, offsets, keep, np.zeros(len(documents), dtype=np.int64))


def step(trainer: SFTTrainer, collator: Callable[[Any], Any], rows: list[Any]) -> None:
    trainer.training_step(trainer.model, collator(rows))
    trainer.model.zero_grad()


def measure(config: LlamaConfig, repeats: int, skip: bool) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of a step, and of collating its batch, without masks and with.

    Args:
        skip: the head leaves out positions without a label, whatever the device.
    """
    rows = make_rows(BATCH, high=LONGEST, vocabulary=config.vocab_size)
    with tempfile.TemporaryDirectory() as folder, mock.patch("trl.trainer.utils._use_triton") as uses:
        uses.side_effect = lambda where: skip or where.type == "cuda"  # asked for this alone; the kernels ask elsewhere
        trainer = make_trainer(rows, config, folder)
        trainer.model.train()
        collators = {"plain": trainer.data_collator}
        for kept in KEPT:
            collators[f"XTF, {kept:.0%} kept"] = XTFDataCollator(trainer.data_collator, masks(rows, kept))
        steps = in_turn({name: partial(step, trainer, one, rows) for name, one in collators.items()}, repeats)
        collating = in_turn({name: partial(one, rows) for name, one in collators.items()}, 20 * repeats)
    return steps, collating


def rows_of(head: str, steps: dict[str, float], collating: dict[str, float]) -> list[list[str]]:
    rows, plain = [], steps["plain"]
    for name, took in steps.items():
        cells = [head, name, f"{took * 1e3:.0f}", f"{took / plain:.3f}"]
        if name == "plain":
            rows.append([*cells, "–", "–", "–"])
            continue
        added = collating[name] - collating["plain"]
        goal = f"{reach.STEP.judge(took / plain)}; collator {reach.COLLATOR.judge(added / plain)}"
        rows.append([*cells, f"{added * 1e3:.2f}", f"{added / plain:.2%}", goal])
    return rows


def main(given: Sequence[str] | None = None) -> None:
    options = arguments(__doc__).parse_args(given)
    vocabulary = 512 if options.smoke else 128_256
    if device().type == "cuda":
        rows = rows_of("on a GPU", *measure(small(vocabulary), options.repeats, True))
    else:
        rows = rows_of("as it comes on a CPU", *measure(small(vocabulary), options.repeats, False))
        rows += rows_of("unlabelled positions left out", *measure(small(vocabulary), options.repeats, True))
        rows.append(["on a GPU", "XTF, any", *[NOT_MEASURED] * 4, f"{reach.STEP}; collator {reach.COLLATOR}"])
    caption = f"vocabulary {vocabulary:,}, {BATCH} rows of 50-{LONGEST} tokens a step, medians of {options.repeats}"
    publish("bench_step", caption, HEAD, rows, options.write)


if __name__ == "__main__":
    main()
