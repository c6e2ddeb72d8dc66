"""One fine-tuning run: TRL's own SFTTrainer on prepared rows, optionally with an `xtf:` block attached, then accuracy.

What a run trains on is decided in one of two ways: by the product, `attach(trainer, block)`, exactly as a recipe would;
or, for the oracle and the span-matched control, by labels that are already -100 in the rows.
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from xtf_plugin import XTFCallback, attach

from .data import Encoder, Row
from .models import IGNORE, accuracy
from .worlds import Problem


@dataclass(frozen=True)
class TuneSettings:
    """How a run trains; the same for every arm unless the arm says otherwise."""

    epochs: float = 2
    batch: int = 16
    learning_rate: float = 1e-3
    method: str = "full"  # full | qlora
    loss: str = "nll"  # nll | dft


def dataset(rows: Sequence[Row], keep: NDArray[np.bool_] | None = None) -> Dataset:
    """Rows as TRL's prepared columns; `keep` (M,) over all completion tokens: the others get -100."""
    labels, at = [], 0
    for row in rows:
        own = row.completion
        if keep is not None:
            part = keep[at : at + len(own)]
            own = [token if kept else IGNORE for token, kept in zip(own, part.tolist(), strict=True)]
        labels.append([IGNORE] * len(row.prompt) + own)
        at += len(row.completion)
    ids = [row.prompt + row.completion for row in rows]
    return Dataset.from_dict({"input_ids": ids, "labels": labels})


def load(base: Path, method: str) -> Any:
    """The base model, in float32, or 4-bit for QLoRA."""
    options: dict[str, Any] = {"dtype": torch.float32}
    if method == "qlora":
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
    return AutoModelForCausalLM.from_pretrained(base, **options)


class Clock(TrainerCallback):  # type: ignore[misc]
    """How long a trainer that has begun takes until its first step: scoring and selection, where a block is attached.

    The trainer is asked, not the product: whatever a selection does before training is part of what it costs.
    """

    def __init__(self) -> None:
        self.seconds, self._begun = 0.0, 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._begun = time.perf_counter()

    def on_step_begin(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        if not state.global_step and not self.seconds:
            self.seconds = time.perf_counter() - self._begun


def tune(
    base: Path,
    rows: Sequence[Row],
    seed: int,
    settings: TuneSettings,
    *,
    block: Mapping[str, Any] | None = None,
    keep: NDArray[np.bool_] | None = None,
    max_steps: int = -1,
) -> tuple[Any, Any, float]:
    """Train and return (trainer, model, seconds of `train()`)."""
    peft_config = None
    if settings.method == "qlora":
        from peft import LoraConfig

        peft_config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            load(base, settings.method),
            args=SFTConfig(
                output_dir=folder,
                num_train_epochs=settings.epochs,
                max_steps=max_steps,
                per_device_train_batch_size=settings.batch,
                learning_rate=settings.learning_rate,
                lr_scheduler_type="cosine",
                warmup_steps=5,
                loss_type=settings.loss,
                dataset_kwargs={"skip_prepare_dataset": True},
                gradient_checkpointing=False,
                bf16=False,
                seed=seed,
                report_to="none",
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
                use_cpu=not torch.cuda.is_available(),
            ),
            train_dataset=dataset(rows, keep),
            processing_class=AutoTokenizer.from_pretrained(base),
            peft_config=peft_config,
            callbacks=[Clock()],  # before the product's callback, which scores when training begins
        )
        if block is not None:
            attach(trainer, dict(block))
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
    return trainer, trainer.model, seconds


def quiet() -> None:
    """Leave the terminal to the laboratory's own lines."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    for name in ("transformers", "trl", "xtf_plugin", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)


def measure(model: Any, problems: Sequence[Problem], encoder: Encoder, seed: int) -> dict[str, float]:
    """Accuracy, greedy and of one sample at temperature 1, and the share of greedy completions cut at the limit."""
    right, truncated = accuracy(model, problems, encoder)
    sampled, _ = accuracy(model, problems, encoder, temperature=1.0, seed=seed)
    return {"accuracy": right, "sampled": sampled, "truncated": truncated}


def _callback(trainer: Any, kind: type) -> Any:
    return next(c for c in trainer.callback_handler.callbacks if isinstance(c, kind))


def seconds_before_training(trainer: Any) -> float:
    """See Clock."""
    return float(_callback(trainer, Clock).seconds)


def plan_of(trainer: Any) -> Any:
    """What the attached callback decided."""
    callback = _callback(trainer, XTFCallback)
    assert callback.plan is not None
    return callback.plan


def kept_tokens(trainer: Any, rows: Sequence[Row]) -> NDArray[np.bool_]:
    """The plan's keep flags in the order of the rows' completion tokens, (M,)."""
    plan = plan_of(trainer)
    offsets, documents = plan.scores.offsets, plan.documents
    parts = [plan.selection.keep[offsets[d] : offsets[d + 1]] for d in documents.row_documents]
    keep = np.concatenate(parts)
    assert len(keep) == sum(len(row.completion) for row in rows), "every row is one document"
    return keep
