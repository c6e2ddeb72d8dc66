"""The data files of a source of an Axolotl recipe, and the columns that its type needs.

Axolotl also reads single files and folders of `save_to_disk`, and takes the reader of files from their names.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..data.turns import TurnTexts
from . import data_files
from .chat_template import Template, special_tokens, text_of
from .data_files import Splits
from .model_files import source as source_of

BY_PATH = "dataset"  # in `report_by`, unless the data has such a column: the path of each of the recipe's datasets
_READERS = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv", ".txt": "text"}
_TOKENISED = {"input_ids", "attention_mask", "labels"}
_COLUMNS = {  # what a type cannot do without
    "alpaca": ("instruction", "output"),
    "gpteacher": ("instruction", "response"),
    "input_output": ("segments",),
    "alpaca_chat.load_qa": ("question", "answer"),
}


def splits_of(source: Mapping[str, Any]) -> tuple[Splits, str]:
    """As `data_files.splits_of`, for a source of Axolotl's `datasets`."""
    path, given = Path(str(source.get("path"))), source.get("data_files")
    if os.path.isfile(path):  # unlike `Path`, it takes names of any length
        return {"train": [path]}, ""
    if os.path.isdir(path) and given:
        return data_files.splits_of({**source, "path": reader(source), "data_dir": None})
    saved, split = data_files.saved_splits(path), str(source.get("split") or "train")
    if saved:  # in place of a split that is not there, Axolotl takes the one for training
        return {split: saved[split if split in saved else "train"]} if {split, "train"} & set(saved) else saved, ""
    return data_files.splits_of(source)


def reader(source: Mapping[str, Any]) -> str:
    """The kind of files that Axolotl reads a source as, where it is not a folder; otherwise its path."""
    path = str(source.get("path"))
    if os.path.isdir(path) and not source.get("data_files"):
        return path
    return str(source.get("ds_type") or next((kind for end, kind in _READERS.items() if end in path), "json"))


def of_columns(source: Mapping[str, Any], row: Mapping[str, Any]) -> Iterator[str]:
    """The problem of a row without the columns that the source's type needs."""
    kind = source.get("type")
    if set(row) >= _TOKENISED or not kind:
        return
    if isinstance(kind, dict):
        wanted, key = [kind.get("field_instruction")], "field_instruction"
    elif str(kind).split(".")[0].split(":")[0] == "chat_template":
        wanted, key = [source.get("field_messages") or "messages"], "field_messages"
    elif str(kind).split(":")[0] == "completion":
        wanted, key = [source.get("field") or "text"], "field"
    else:
        base = str(kind).split(":")[0]
        wanted, key = list(_COLUMNS.get(str(kind)) or _COLUMNS.get(base) or ()), "type"
    if missing := [name for name in wanted if name and name not in row]:
        shown = kind if isinstance(kind, str) else "of your own"
        yield (
            f"{source.get('path')}: the type {shown} needs the column `{missing[0]}`, and the data has "
            f"{', '.join(row)}. Rename it, or set {key}."
        )


def notes(source: Mapping[str, Any], data: Mapping[str, Any], folder: Path | None) -> Iterator[str]:
    """What a source says about ends of turns, where that is seldom meant.

    Args:
        source: one of the recipe's `datasets`.
        data: the recipe.
        folder: of the tokenizer's files, if they are here.
    """
    if str(source.get("type")).split(".")[0] != "chat_template":
        return
    if source.get("train_on_eos") == "none" and source.get("train_on_eot") in (None, "none"):
        yield (
            f"{source.get('path')}: no end of turn is trained (train_on_eos: none), so the model does not learn to "
            "stop. Remove it, or set train_on_eot: turn."
        )
        return
    own = data.get("special_tokens")
    special = {**special_tokens(folder), **(own if isinstance(own, dict) else {})}
    text, trained = _template(source, data, folder), data.get("eot_tokens") or [special.get("eos_token")]
    ends = TurnTexts.of(Template(text, special)).ends if text else ()
    if ends and special and not any(str(token) in end for token in trained for end in ends):
        yield (
            f"{source.get('path')}: no end of turn is trained, so the model does not learn to stop: the chat template "
            f"writes {ends[-1]!r}, and Axolotl trains {', '.join(map(repr, trained))}. Set eot_tokens: [{ends[-1]!r}]."
        )


def _template(source: Mapping[str, Any], data: Mapping[str, Any], folder: Path | None) -> str:
    """The chat template of a source; empty if it is not known here."""
    own = source if source.get("chat_template") else data
    chosen = str(own.get("chat_template") or "tokenizer_default")
    if chosen == "jinja":
        given = str(own.get("chat_template_jinja") or "")
        return Path(given).read_text(encoding="utf-8") if len(given) < 256 and Path(given).is_file() else given
    found = text_of(folder) if folder and chosen.startswith("tokenizer_default") else ""
    name = chosen.removeprefix("tokenizer_default_fallback_")
    return found or source_of("axolotl", f"utils/chat_templates/templates/{name}.jinja")
