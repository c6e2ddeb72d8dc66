"""Trainers over streamed and map-style rows for the tests, and what labels reached the model in them."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from tests import tiny
from xtf_plugin import attach

ROWS = 40
LORA = LoraConfig(r=4, lora_dropout=0.1, target_modules=["q_proj", "v_proj"])


def trainer(folder: Any, dataset: Any = None, peft_config: Any = LORA, model: Any = None, **options: Any) -> Any:
    """An SFTTrainer with an adapter; over a stream of `ROWS` word problems, if no dataset is given."""
    settings = {"max_steps": ROWS // 4, "per_device_train_batch_size": 4, "max_length": 256, "bf16": False, **options}
    args = SFTConfig(
        output_dir=str(folder / "out"), report_to="none", use_cpu=True, logging_steps=1, disable_tqdm=True, **settings
    )
    return SFTTrainer(
        model or tiny.model(),
        args=args,
        train_dataset=rows().to_iterable_dataset() if dataset is None else dataset,
        processing_class=tiny.tokenizer(),
        peft_config=peft_config,
    )


def rows(n: int = ROWS, seed: int = 0) -> Dataset:
    """Word problems; those of the second half have other numbers and more noise than the first."""
    made = tiny.problems(n, seed)
    for index, row in enumerate(made):
        if index >= n // 2:
            row["completion"] += " Qzx? It is 7 past 9, by & by."
    return Dataset.from_list(made)


def attached(folder: Any, made: Any, block: dict[str, Any]) -> Any:
    """The trainer with XTF attached, its scores kept below `folder`."""
    return attach(made, {"cache_dir": str(folder / "cache"), **block})


def watched(made: Any) -> list[dict[str, torch.Tensor]]:
    """The batches of its training steps, in a list that fills while it trains."""
    seen: list[dict[str, torch.Tensor]] = []
    step = made.training_step

    def spy(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append({name: inputs[name].clone() for name in inputs if hasattr(inputs[name], "clone")})
        return step(model, inputs, *args, **kwargs)

    made.training_step = spy
    return seen


def labels_by_document(seen: list[dict[str, torch.Tensor]]) -> dict[tuple[int, ...], list[int]]:
    """Labels of every document that was trained on, by its token ids; the first one, which trains nothing, left out."""
    found: dict[tuple[int, ...], list[int]] = {}
    for batch in seen:
        for row in range(len(batch["input_ids"])):
            real = batch["attention_mask"][row].bool() if "attention_mask" in batch else slice(None)
            ids, labels = batch["input_ids"][row][real].tolist(), batch["labels"][row][real].tolist()
            places = batch["position_ids"][row][real].tolist() if "position_ids" in batch else list(range(len(ids)))
            cuts = [index for index, place in enumerate(places) if place == 0]
            for a, b in zip(cuts, [*cuts[1:], len(ids)], strict=True):
                assert found.setdefault(tuple(ids[a:b]), labels[a + 1 : b]) == labels[a + 1 : b]
    return found


def trained(folder: Any, made: Any, block: dict[str, Any]) -> dict[tuple[int, ...], list[int]]:
    """Attach, train, and give the labels of every document."""
    seen = watched(attached(folder, made, block))
    made.train()
    return labels_by_document(seen)


def stream_of(made: Any) -> Any:
    """The `Stream` of an attached trainer."""
    return made._xtf_hooks._stream
