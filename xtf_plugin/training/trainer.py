"""What is read of a transformers `Trainer`: whether it is supported, its rows, its tokenizer, its trackers."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, IterableDataset

from ..data.documents import PlainRows
from ..data.ragged import offsets_of
from ..environment import NO_CAUSAL_LM, WORKERS_REFUSED, is_on, signature_columns
from ..errors import XTFUserError
from .boundaries import Boundaries
from .collator import USE_STREAM

_UNSLOTHS_COPY = re.compile(r"_?Unsloth(\w+Trainer)")  # a rewritten copy of TRL's trainer
_NOT_TEXT = ("pixel_values", "pixel_values_videos", "image", "images", "input_features", "inputs_embeds")
READ_TWICE = 64  # rows of a dataset that may make its rows anew
READ_COLUMNS = ("input_ids", "labels", "attention_mask", "seq_lengths", "position_ids")


def check_trainer(trainer: Any) -> None:
    """Raise XTFUserError for a trainer whose labels cannot be masked.

    Besides `check_host` and `check_collator`: no train dataset or one of an unknown kind; columns that are not text; a
    streamed dataset with dataloader workers or in several processes.
    """
    check_host(trainer)
    check_collator(trainer.data_collator)
    dataset = trainer.train_dataset
    if dataset is None:
        raise XTFUserError("xtf: the trainer has no train_dataset. Pass one, or remove the block.")
    if streamed(dataset):
        workers, processes = trainer.args.dataloader_num_workers, trainer.accelerator.num_processes
        if workers:
            raise XTFUserError(WORKERS_REFUSED.format(workers=workers))
        if processes > 1:
            raise XTFUserError(
                f"xtf: the training data is streamed, which is supported in one process, and this run has {processes}. "
                "Train in one process, or do not stream (dataset_streaming: false; streaming: false under `datasets`)."
            )
    elif not hasattr(dataset, "__len__"):
        raise XTFUserError(
            f"xtf: train_dataset is a {type(dataset).__name__}, which has no length and is no IterableDataset. Give it "
            "__len__ and __getitem__, or derive it from the IterableDataset of datasets or torch."
        )
    elif not len(dataset):
        raise XTFUserError(
            "xtf: no row of the training data is left to train on. TRL and Axolotl leave out rows without a trained "
            "token: check max_length / sequence_len (is the answer cut off?), the chat template and the columns."
        )
    known = getattr(dataset, "column_names", None) or ()  # none for streams and torch datasets
    check_columns(filter(_reaching(trainer), known))


def check_host(trainer: Any) -> None:
    """Raise XTFUserError for anything but a transformers Trainer of a causal language model, with a supported loss."""
    from transformers import Trainer

    kind = type(trainer)
    if not isinstance(trainer, Trainer):
        raise XTFUserError(
            f"attach() needs a transformers Trainer, got {kind.__module__}.{kind.__name__}: xtf does not know where it "
            "handles labels. Use transformers' Trainer, TRL's SFTTrainer, or a subclass of one."
        )
    nearest = _of_trl(kind)
    if nearest not in (None, "SFTTrainer"):
        raise XTFUserError(
            f"xtf: {kind.__name__} is not supported: xtf masks the `labels` of rows, and TRL's {nearest} may not train "
            "on them. Use SFTTrainer, or remove the block."
        )
    derived = next((base.__name__ for base in kind.__mro__ if base.__module__.split(".")[0] == "axolotl"), None)
    if derived not in (None, "AxolotlTrainer"):
        raise XTFUserError(
            f"xtf: {kind.__name__} is not supported: xtf masks the `labels` of rows, and the loss of Axolotl's "
            f"{derived} may not use them. Remove the block, or what chooses this trainer (model type, `rl`, a plugin)."
        )
    if trainer.model_init is not None:
        raise XTFUserError(
            f"xtf: {kind.__name__} was given model_init, so train() makes a new model, which xtf cannot score with. "
            "Pass the model itself: model=model_init()."
        )
    _check_model(kind.__name__, trainer.model)


def _of_trl(kind: type) -> str | None:
    """The name of the TRL trainer that a class is, extends or copies; None if there is none."""
    for base in kind.__mro__:
        if copied := _UNSLOTHS_COPY.fullmatch(base.__name__):
            return copied[1]
        if base.__module__.split(".")[0] == "trl" and base.__name__.endswith("Trainer"):
            return base.__name__
    return None


def _check_model(trainer: str, model: Any) -> None:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    name = type(base).__name__
    if getattr(getattr(base, "config", None), "is_encoder_decoder", False):
        raise XTFUserError(
            f"xtf: {trainer} trains {name}, an encoder-decoder model: its labels are not tokens of its input. Train a "
            "causal language model (AutoModelForCausalLM), or remove the block."
        )
    headless = hasattr(base, "get_output_embeddings") and base.get_output_embeddings() is None
    if headless or any(part in name for part in NO_CAUSAL_LM):
        raise XTFUserError(
            f"xtf: {trainer} trains {name}, which predicts no next tokens: it has no LM head. Load the model with "
            "AutoModelForCausalLM, or remove the block."
        )


def check_collator(collator: Any) -> None:
    """Raise XTFUserError for a collator that makes labels from input ids and ignores those of the rows."""
    from transformers import DataCollatorForLanguageModeling, DataCollatorForPermutationLanguageModeling

    if isinstance(collator, (DataCollatorForLanguageModeling, DataCollatorForPermutationLanguageModeling)):
        raise XTFUserError(
            f"xtf: the data collator {type(collator).__name__} makes labels of its own from input_ids, so none can be "
            "masked. Give the rows a `labels` column (-100 outside the completion) and use "
            "DataCollatorForSeq2Seq(tokenizer), which pads it (Unsloth's train_on_responses_only does both: attach xtf "
            "after it)."
        )


def check_columns(names: Iterable[str]) -> None:
    """Raise XTFUserError for columns of images, audio or embeddings."""
    found = sorted(set(names) & set(_NOT_TEXT))
    if found:
        raise XTFUserError(
            f"xtf: the training rows have {', '.join(found)}, and only text can be scored. Remove them, or the block."
        )


def text_tokenizer(trainer: Any) -> Any:
    """The tokenizer of a trainer, its processor or its collator. Raises XTFUserError if there is none."""
    processing = trainer.processing_class
    if processing is None:
        processing = getattr(trainer.data_collator, "tokenizer", None)
    if processing is None:
        raise XTFUserError(
            f"xtf: {type(trainer).__name__} has no tokenizer, which xtf needs. Pass processing_class=tokenizer to it."
        )
    return getattr(processing, "tokenizer", processing)


def streamed(dataset: Any) -> bool:
    """Whether a dataset is an iterable one."""
    return isinstance(dataset, (IterableDataset, torch.utils.data.IterableDataset))


def rows_in_flight(trainer: Any) -> int:
    """An upper bound of the rows that the dataset has yielded and the model has not received yet.

    The Trainer collects all batches of an optimizer step before it uses the first, and its dataloader holds one more.
    """
    return int(trainer.args.train_batch_size) * (int(trainer.args.gradient_accumulation_steps) + 2) + 64


def visible_part(trainer: Any, boundaries: Boundaries) -> Callable[[Any], dict[str, Any]]:
    """A function from a row to those of its columns that are read, reach the collator, and are not ignored by it.

    Planning and training must split rows by the same columns. The function raises XTFUserError for a row that is no
    mapping, has no `input_ids`, or has columns that are not text.
    """

    reaches = _reaching(trainer)

    def part(row: Any) -> dict[str, Any]:
        if not hasattr(row, "keys"):
            raise XTFUserError(
                f"xtf: a row of the training data is a {type(row).__name__}; it must be a mapping with `input_ids` and "
                "`labels`."
            )
        names = set(filter(reaches, row.keys()))
        check_columns(names)
        if "input_ids" not in names:
            raise XTFUserError(
                f"xtf: a row of the training data has no `input_ids` (it has {', '.join(map(str, row))}). Let the "
                "trainer prepare the dataset (no skip_prepare_dataset), or give it rows with `input_ids` and `labels`."
            )
        read = {name: row[name] for name in READ_COLUMNS if name in names}
        return boundaries.visible(read, lambda: {name: row[name] for name in names})

    return part


def _reaching(trainer: Any) -> Callable[[str], bool]:
    """Whether a column reaches the collator, by its name."""
    if not trainer.args.remove_unused_columns:
        return lambda name: True
    return set(signature_columns(trainer)).__contains__


def rows(trainer: Any, boundaries: Boundaries) -> Iterator[dict[str, Any] | PlainRows]:
    """The rows of a map-style train dataset, with the columns that are read, reach the collator and matter to it.

    Arrow-backed columns become numpy arrays, without Python lists in between, and where no column cuts a row, all rows
    of a batch at once.

    Raises:
        XTFUserError: a row is not what can be masked; rows change whenever they are read.
    """
    dataset = trainer.train_dataset
    if not isinstance(dataset, Dataset) or dataset.format["type"] == "custom":
        part = visible_part(trainer, boundaries)
        _check_stable(part, dataset)
        yield from map(part, (dataset[index] for index in range(len(dataset))))
        return
    reaches = _reaching(trainer)
    names = [name for name in filter(reaches, READ_COLUMNS) if name in dataset.column_names]
    if missing := {"input_ids", "labels"} - set(names):
        raise XTFUserError(
            f"xtf: the training dataset has no column {sorted(missing)} (it has {dataset.column_names}). Let the "
            "trainer prepare it (no skip_prepare_dataset), call train_on_responses_only where Unsloth prepares it, or "
            "add `labels` with -100 outside the completion."
        )
    done = 0
    for batch in dataset.select_columns(names).with_format("arrow").iter(batch_size=1_000):
        plain = _plain(batch, [name for name in names if name not in boundaries.ignored]) if done else None
        if plain is not None:  # after the first rows, which `boundaries` tries the collator on
            yield plain
            done += len(batch)
            continue
        columns = {name: arrays(name, batch.column(name)) for name in names}
        for index in range(len(batch)):
            row = {name: parts[index] for name, parts in columns.items() if parts[index] is not None}
            place = done + index
            yield boundaries.visible(row, lambda: {k: v for k, v in dataset[place].items() if reaches(k)})  # noqa: B023
        done += len(batch)


def _plain(batch: Any, names: Sequence[str]) -> PlainRows | None:
    """A batch of an Arrow dataset whose rows are one document each, of all their tokens; None for any other batch."""
    columns = {name: batch.column(name).combine_chunks() for name in names}
    lists = all(pa.types.is_list(column.type) or pa.types.is_large_list(column.type) for column in columns.values())
    if not lists or any(column.null_count or column.flatten().null_count for column in columns.values()):
        return None
    if not all(pa.types.is_integer(column.type.value_type) for column in columns.values()):
        return None
    values = {name: column.flatten().to_numpy() for name, column in columns.items()}
    lengths = {name: column.value_lengths().to_numpy().astype(np.int64) for name, column in columns.items()}
    own, sizes = lengths.pop("input_ids"), lengths.pop("seq_lengths", None)
    whole = sizes is None or ((sizes == 1).all() and np.array_equal(values["seq_lengths"], own))
    if not whole or not all(np.array_equal(other, own) for other in lengths.values()):
        return None
    if not values.get("attention_mask", own).all():
        return None
    restarts = values["position_ids"] == 0 if "position_ids" in values else np.zeros(0, dtype=bool)
    restarts[offsets_of(own)[:-1][own > 0] if len(restarts) else []] = False
    return None if restarts.any() else PlainRows(values["input_ids"], values["labels"], own)


def _check_stable(part: Callable[[Any], dict[str, Any]], dataset: Any) -> None:
    """Read a few rows twice; raise XTFUserError if one is another row then."""
    for index in range(0, len(dataset), max(1, len(dataset) // READ_TWICE)):
        one, two = part(dataset[index]), part(dataset[index])
        if any(not np.array_equal(np.asarray(one[name]), np.asarray(two.get(name))) for name in one):
            raise XTFUserError(
                f"xtf: row {index} of the training data changes whenever it is read (a transform with random parts, "
                f"or a dataset that makes its rows anew), so no score would fit it. {USE_STREAM}"
            )


def arrays(name: str, column: Any) -> list[Any]:
    """One int64 array per row of a list column; None for a missing list."""
    parts: list[Any] = []
    kinds = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    flat = (pa.types.is_integer, pa.types.is_boolean, pa.types.is_null)
    if not any(f(column.type) for f in kinds) or not any(f(column.type.value_type) for f in flat):
        raise XTFUserError(
            f"xtf: the column `{name}` of the training dataset holds {column.type}; it must hold a flat list of token "
            "ids in every row. One label per row (classification) cannot be masked."
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


def log_report(report_to: Sequence[str] | str | None, path: Path) -> list[str]:
    """Attach a report to the run in W&B and MLflow; return the names of the trackers that took it.

    As transformers does with models: in W&B if WANDB_LOG_MODEL is set, in MLflow if HF_MLFLOW_LOG_ARTIFACTS is set, and
    only if the tracker is imported and has a run. A tracker's error is logged: the masks do not depend on it.
    """
    used = [report_to] if isinstance(report_to, str) else report_to or ()
    wandb = os.environ.get("WANDB_LOG_MODEL", "false").lower() in ("end", "checkpoint", "true")
    mlflow = is_on(os.environ.get("HF_MLFLOW_LOG_ARTIFACTS"))
    done = []
    for name, wanted, attach in (("wandb", wandb, _wandb), ("mlflow", mlflow, _mlflow)):
        if name in used and wanted and path.exists():
            try:
                done += [name] if attach(sys.modules.get(name), str(path)) else []
            except Exception as error:  # trackers' errors have no common base
                logging.getLogger(__name__).warning("xtf: the report could not be attached to %s: %s", name, error)
    return done


def _wandb(wandb: Any, path: str) -> bool:
    if wandb is None or wandb.run is None:
        return False
    artifact = wandb.Artifact("xtf-report", type="report")
    artifact.add_file(path)
    wandb.run.log_artifact(artifact)
    return True


def _mlflow(mlflow: Any, path: str) -> bool:
    if mlflow is None or mlflow.active_run() is None:
        return False
    mlflow.log_artifact(path, "xtf-report")
    return True
