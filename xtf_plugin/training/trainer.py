"""What we know of transformers' `Trainer`, in one place: where labels pass by, how to stand beside them, and
which trackers take a report.

Everything is done on the instance; no class is changed.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, IterableDataset

from ..environment import WORKERS_REFUSED, is_on, signature_columns
from ..errors import XTFError, XTFUserError
from .collator import XTFDataCollator
from .support import check_collator, check_columns, check_host

logger = logging.getLogger(__name__)

READ_COLUMNS = ("input_ids", "labels", "attention_mask", "seq_lengths", "position_ids")


def check_trainer(trainer: Any) -> None:
    """Refuse by name what cannot be masked.

    Raises:
        XTFUserError: see `check_host`; no train dataset or one of no known kind, or image data; a streamed one with
            dataloader workers, or in several processes.
    """
    check_host(trainer)
    check_collator(trainer.data_collator)
    dataset = trainer.train_dataset
    if dataset is None:
        raise XTFUserError("xtf: the trainer has no train_dataset; there is nothing to score.")
    if streamed(dataset):
        _check_streamed(trainer)
    elif not hasattr(dataset, "__len__"):
        raise XTFUserError(
            f"xtf: train_dataset is a {type(dataset).__name__}, which has no length and is no IterableDataset of "
            "datasets or torch; make it one of them."
        )
    visible_columns(trainer)


def streamed(dataset: Any) -> bool:
    """Whether rows of a dataset can only be had one after the other."""
    return isinstance(dataset, (IterableDataset, torch.utils.data.IterableDataset))


def _check_streamed(trainer: Any) -> None:
    workers, processes = trainer.args.dataloader_num_workers, trainer.accelerator.num_processes
    if workers:
        raise XTFUserError(WORKERS_REFUSED.format(workers=workers))
    if processes > 1:
        raise XTFUserError(
            f"xtf: the training data is streamed, which is supported in one process, and this run has {processes}. "
            "Train in one process, or do not stream (dataset_streaming: false; streaming: false under `datasets`)."
        )


def rows_under_way(trainer: Any) -> int:
    """How many rows may have been yielded by the dataset and not have reached the model yet, and some to spare.

    The Trainer collects the batches of a whole optimizer step before it takes the first, and its dataloader holds one
    more.
    """
    return int(trainer.args.train_batch_size) * (int(trainer.args.gradient_accumulation_steps) + 2) + 64


def visible_columns(trainer: Any) -> tuple[str, ...]:
    """The columns that reach the collator: documents must be cut alike while planning and while training.

    Raises:
        XTFUserError: some of them hold no text.
    """
    present = getattr(trainer.train_dataset, "column_names", None) or ()  # unknown of streams and torch datasets
    check_columns(_reaching(trainer, present))
    return _reaching(trainer, READ_COLUMNS)


def visible_part(trainer: Any) -> Callable[[Any], dict[str, Any]]:
    """What of a stream's row reaches the collator and is read, as `visible_columns` tells of a whole dataset.

    Raises (when called with a row):
        XTFUserError: the row is no mapping, has no `input_ids`, or holds more than text.
    """

    def part(row: Any) -> dict[str, Any]:
        if not hasattr(row, "keys"):
            raise XTFUserError(
                f"xtf: a row of the stream is a {type(row).__name__}; it must be a mapping with `input_ids` and "
                "`labels`."
            )
        names = _reaching(trainer, row.keys())
        check_columns(names)
        if "input_ids" not in names:
            raise XTFUserError(
                f"xtf: a row of the stream has no `input_ids` (it has {', '.join(map(str, row))}). Let the trainer "
                "prepare the dataset (no skip_prepare_dataset), or stream rows with `input_ids` and `labels`."
            )
        return {name: row[name] for name in READ_COLUMNS if name in names}

    return part


def _reaching(trainer: Any, names: Iterable[str]) -> tuple[str, ...]:
    """Those of some columns that reach the collator."""
    if not trainer.args.remove_unused_columns:
        return tuple(names)
    known = signature_columns(trainer)
    return tuple(name for name in names if name in known)


def rows(dataset: Any, columns: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Rows of a map-style dataset with numpy columns; Arrow-backed ones are read without making Python lists."""
    if not isinstance(dataset, Dataset) or dataset.format["type"] == "custom":
        for index in range(len(dataset)):
            row = dataset[index]
            if not hasattr(row, "keys"):
                raise XTFUserError(
                    f"xtf: row {index} of the train_dataset ({type(dataset).__name__}) is a {type(row).__name__}; it "
                    "must be a mapping with `input_ids` and `labels`."
                )
            check_columns(row.keys())
            yield {name: row[name] for name in columns if name in row}
        return
    names = [name for name in columns if name in dataset.column_names]
    missing = {"input_ids", "labels"} - set(names)
    if missing:
        raise XTFUserError(
            f"xtf: the training dataset has no column {sorted(missing)} (it has {dataset.column_names}), so "
            "completion and prompt cannot be told apart. Let the trainer prepare the dataset (no "
            "skip_prepare_dataset), call train_on_responses_only where Unsloth prepares it, or add `labels` with -100 "
            "outside the completion."
        )
    for batch in dataset.select_columns(names).with_format("arrow").iter(batch_size=1_000):
        lists = {name: _slices(name, batch.column(name)) for name in names}
        for index in range(len(batch)):
            yield {name: parts[index] for name, parts in lists.items() if parts[index] is not None}


def _slices(name: str, column: Any) -> list[Any]:
    """A list column as one numpy view per row; None for a missing list."""
    parts: list[Any] = []
    kinds = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    flat = (pa.types.is_integer, pa.types.is_boolean, pa.types.is_null)
    if not any(f(column.type) for f in kinds) or not any(f(column.type.value_type) for f in flat):
        raise XTFUserError(
            f"xtf: the column `{name}` of the training dataset holds {column.type}; it must hold a flat list of token "
            "ids in every row. Labels of whole rows (classification) cannot be masked."
        )
    if pa.types.is_fixed_size_list(column.type):
        column = column.cast(pa.large_list(column.type.value_type))
    for chunk in column.chunks:
        offsets = chunk.offsets.to_numpy()
        values = chunk.values.to_numpy(zero_copy_only=False)
        valid = chunk.is_valid().to_numpy(zero_copy_only=False)
        bounds = zip(offsets[:-1], offsets[1:], valid, strict=True)
        parts += [values[a:b].astype(np.int64) if ok else None for a, b, ok in bounds]
    return parts


class TrainerHooks:
    """Stand in for the collator while the train dataloader is built, see every training batch, add to every training
    log.

    Args:
        trainer: a finished trainer.
        collator: ours; its `inner` becomes the trainer's own collator.
        on_batch: called with the inputs of each training step, before it.
        on_trained: called when a training has ended without an error.
        metrics: called for each training log; what it returns is added to it.
        around: gives the dataset that stands in for the trainer's own in the train dataloader; None: none does.
    """

    def __init__(
        self,
        trainer: Any,
        collator: XTFDataCollator,
        on_batch: Callable[[Mapping[str, Any]], None],
        on_trained: Callable[[], None],
        metrics: Callable[[], dict[str, float]],
        around: Callable[[Any], Any] | None = None,
    ) -> None:
        if getattr(trainer, "_xtf_hooks", None) is not None:
            raise XTFError("xtf is attached to this trainer already; attach it once.")
        self.trainer = trainer
        self.collator = collator
        self._get_train_dataloader = trainer.get_train_dataloader
        self._training_step = trainer.training_step
        self._log, self._train = trainer.log, trainer.train
        self.on_batch, self.on_trained = on_batch, on_trained
        self.metrics = metrics
        self.around = around
        trainer._xtf_hooks = self
        trainer.get_train_dataloader = self.get_train_dataloader
        trainer.training_step = self.training_step
        trainer.log, trainer.train = self.log, self.train

    def get_train_dataloader(self) -> Any:
        """Build the train dataloader with our collator; evaluation shares `trainer.data_collator` and must not see
        it.
        """
        inner, dataset = self.trainer.data_collator, self.trainer.train_dataset
        self.collator.inner = inner
        self.trainer.data_collator = self.collator
        if self.around is not None:
            self.trainer.train_dataset = self.around(dataset)
        try:
            return self._get_train_dataloader()
        finally:
            self.trainer.data_collator, self.trainer.train_dataset = inner, dataset

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Show the batch to `on_batch`, then take the trainer's own step."""
        self.on_batch(inputs)
        return self._training_step(model, inputs, *args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add our metrics to training logs; evaluation logs stay as they are."""
        if "loss" in logs:
            logs.update(self.metrics())
        self._log(logs, *args, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as the trainer does, then let `on_trained` look back at it."""
        result = self._train(*args, **kwargs)
        self.on_trained()
        return result


def log_report(report_to: Sequence[str] | str | None, path: Path) -> list[str]:
    """Attach a report to the run in those trackers that keep files; return their names.

    W&B: with WANDB_LOG_MODEL, as transformers does with models. MLflow: with HF_MLFLOW_LOG_ARTIFACTS. transformers has
    no such switch for trackio, so nothing is attached there. A tracker is touched only if it is imported already. One
    that fails is logged: the masks do not depend on it.
    """
    used = [report_to] if isinstance(report_to, str) else list(report_to or ())
    done: list[str] = []
    if not path.exists():
        return done
    if "wandb" in used and os.environ.get("WANDB_LOG_MODEL", "false").lower() in ("end", "checkpoint", "true"):
        done += _attached(_wandb, path)
    if "mlflow" in used and is_on(os.environ.get("HF_MLFLOW_LOG_ARTIFACTS")):
        done += _attached(_mlflow, path)
    return done


def _attached(attach: Callable[[Path], list[str]], path: Path) -> list[str]:
    """What `attach` returns, nothing if it fails: trackers have errors of their own, which share no base."""
    try:
        return attach(path)
    except Exception as error:
        logger.warning("xtf: the report could not be attached to the tracker: %s", error)
        return []


def _wandb(path: Path) -> list[str]:
    wandb = sys.modules.get("wandb")
    if wandb is None or wandb.run is None:
        return []
    artifact = wandb.Artifact("xtf-report", type="report")
    artifact.add_file(str(path))
    wandb.run.log_artifact(artifact)
    return ["wandb"]


def _mlflow(path: Path) -> list[str]:
    mlflow = sys.modules.get("mlflow")
    if mlflow is None or mlflow.active_run() is None:
        return []
    mlflow.log_artifact(str(path), "xtf-report")
    return ["mlflow"]
