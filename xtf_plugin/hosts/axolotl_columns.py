"""Reads columns of the data in Axolotl, which drops all columns of text when it tokenises.

Its prepared datasets lack them too. So each dataset of the recipe is loaded and tokenised once more, by Axolotl's own
function. Row i of the text then belongs to row i of the tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from axolotl.utils.data import sft
from datasets import Dataset, concatenate_datasets

from ..config.block import XTFConfig
from ..errors import XTFUserError
from ..training.columns import Columns, Pieces, read
from .axolotl_data import BY_PATH


def read_columns(cfg: Any, tokenizer: Any, config: XTFConfig) -> Columns:
    """What the columns that a block names say of the training data.

    Raises:
        XTFUserError: rows and their tokens do not correspond, or see `training.columns.read`.
    """
    longest, found = cfg.sequence_len, list[Columns]()
    for entry in sft.datasets_with_name_generator(cfg.datasets):
        raw, tokenised = _both(entry, cfg, tokenizer)
        where = f"the dataset {entry.path}"
        if len(raw) != len(tokenised):
            raise XTFUserError(
                f"xtf: Axolotl makes {len(tokenised)} rows of the {len(raw)} rows of {where} (type: {entry.type}), so "
                "columns do not fit them. Use a type that makes one row of each, such as chat_template or alpaca, or "
                "remove the scorer `column` and `report_by`."
            )
        tokens = tokenised.select_columns(["input_ids", "labels"])
        rest = raw.select_columns([name for name in raw.column_names if name not in tokens.column_names])
        if BY_PATH in config.report_columns and BY_PATH not in raw.column_names:
            rest = rest.add_column(BY_PATH, [str(entry.path)] * len(rest))
        found.append(
            read(
                concatenate_datasets([tokens, rest], axis=1),
                config,
                tokenizer,
                pieces=_pieces(cfg),
                cut=lambda length: length >= longest,
                where=where,
                texts=_texts(entry),
            )
        )
    first, *others = found
    for other in others:
        first.join(other)
    return first


def _both(entry: Any, cfg: Any, tokenizer: Any) -> tuple[Dataset, Dataset]:
    """A dataset of the recipe as it was loaded, and as Axolotl tokenises it."""
    with _watched() as seen:
        tokenised, _ = sft._load_and_process_single_dataset(
            dataset_config=entry, cfg=cfg, tokenizer=tokenizer, split="train", seed=cfg.seed
        )
    return seen[0], tokenised


@contextmanager
def _watched() -> Iterator[list[Dataset]]:
    """The datasets that Axolotl is about to tokenise, in the order of its calls."""
    seen: list[Dataset] = []
    original = sft.get_dataset_wrapper

    def get_dataset_wrapper(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs["dataset"])
        return original(*args, **kwargs)

    sft.get_dataset_wrapper = get_dataset_wrapper
    try:
        yield seen
    finally:
        sft.get_dataset_wrapper = original


def _texts(entry: Any) -> Sequence[str]:
    """Columns that hold what is trained on, by a dataset's type; none where only the score's key `text` can tell."""
    kind = entry.type if isinstance(entry.type, str) else ""
    if kind.startswith("chat_template"):
        return (entry.field_messages or "messages",)
    if kind.startswith("completion"):
        return (entry.field or "text",)
    return ("output",) if kind.startswith("alpaca") else ()


def _pieces(cfg: Any) -> Pieces:
    """What Axolotl trains on of a row's tokens. It leaves some rows out; their marks are never looked up."""
    if cfg.excess_length_strategy == "truncate":
        return lambda length: [slice(0, cfg.sequence_len)]
    return lambda length: [slice(0, length)]
