"""The first row of each source of a recipe's training data, and what is wrong with sources and rows.

Only files on this disk are read. Of data on the hub only its name is checked.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from ..errors import reason
from . import axolotl_data, hub
from .chat_template import Row, is_chat
from .data_files import first_row, is_named_on_hub, splits_of

if TYPE_CHECKING:
    from ..config.block import XTFConfig
    from .recipes import Recipe

_SHAPES = ("messages", "conversations", "prompt", "input_ids")
_IMAGES = ("image", "images", "pixel_values")
_MAY_HOLD_CHATS = ("messages", "prompt", "completion", "chosen", "rejected")


def first_rows(recipe: Recipe, found: list[str]) -> Iterator[Row]:
    """The first row of each source of training data that is on this disk; appends what is wrong to `found`."""
    named = sources(recipe)
    if not named:
        key = "dataset_name` or `datasets" if recipe.host == "trl" else "datasets"
        found.append(f"the recipe names no training data. Set `{key}`.")
    if recipe.host == "trl":
        found += _of_mixture(recipe.data)
    for source in named:
        path = str(source.get("path"))
        by_split, why = splits_of(source) if recipe.host == "trl" else axolotl_data.splits_of(source)
        if not by_split and is_named_on_hub(path) and (beside := _beside(recipe, path)):
            why = f"datasets: {beside}"
        elif not why and not by_split and is_named_on_hub(path):
            why = hub.missing("dataset", path, None, {**os.environ, **recipe.env})
            why = f"datasets: {why}" if why else ""
        if why:
            found.append(why)
        if not by_split:
            continue
        names = _splits(source)
        if missing := [name for name in names if name not in by_split and name != "all"]:
            found.append(
                f"{path}: there is no split {missing[0]!r}, only {', '.join(by_split)}. Set its name, or add its files."
            )
            continue
        files = by_split.get(names[0]) or next(iter(by_split.values()))
        try:
            row = first_row(files, axolotl_data.reader(source) if recipe.host == "axolotl" else path)
        except (OSError, ValueError) as error:
            found.append(f"{files[0]} cannot be read: {reason(error)}. Repair the file.")
            continue
        if row is not None and recipe.host == "axolotl":
            found += axolotl_data.of_columns(source, row)
        if row is not None:
            columns = source.get("columns")
            yield {name: row[name] for name in row if not isinstance(columns, list) or name in columns}


def newest_change(recipe: Recipe) -> int:
    """When a file of the training data was last changed, in nanoseconds; 0: none is on this disk.

    Times in the future say nothing: files from a machine with another clock have them.
    """
    times = [0]
    for source in sources(recipe):
        with suppress(OSError):  # also of a folder with a name that is too long
            by_split, _ = splits_of(source) if recipe.host == "trl" else axolotl_data.splits_of(source)
            wanted = set(_splits(source)) & by_split.keys() or by_split.keys()
            times += [os.stat(file).st_mtime_ns for split in wanted for file in by_split[split]]
    return max(when for when in times if when <= time.time_ns())


def _splits(source: Mapping[str, Any]) -> list[str]:
    """Names of the splits that a source is trained on; `train[:5%]+test` names two."""
    return [name.split("[")[0].strip() for name in str(source.get("split") or "train").split("+")]


def _beside(recipe: Recipe, path: str) -> str:
    """What is wrong with a folder of data that is not in the current folder, but beside the recipe; empty: nothing."""
    folder = recipe.path.parent.absolute()
    if not os.path.isdir(folder / path):  # unlike `Path`, it takes names of any length
        return ""
    return f"{path} is a folder beside the recipe, and paths count from the current folder. Run this in {folder}."


def sources(recipe: Recipe) -> list[dict[str, Any]]:
    """The sources of a recipe's training data, as `datasets.load_dataset` takes them."""
    data, named = recipe.data, recipe.data.get("datasets")
    found = [each for each in named if isinstance(each, dict)] if isinstance(named, list) else []
    if not found and recipe.host == "trl" and data.get("dataset_name"):
        split = "+".join(_wanted(data).values())
        found = [{"path": data["dataset_name"], "split": split, "name": data.get("dataset_config")}]
    return found


def _wanted(data: Mapping[str, Any]) -> dict[str, str]:
    """The splits that TRL's script takes, by the keys that name them."""
    wanted = {"dataset_train_split": str(data.get("dataset_train_split") or "train")}
    if data.get("eval_strategy", "no") not in ("no", False):
        wanted["dataset_test_split"] = str(data.get("dataset_test_split") or "test")
    return wanted


def _of_mixture(data: Mapping[str, Any]) -> Iterator[str]:
    """Problems of `datasets` in TRL: a mixture has a split `train`, and `test` if a part is set aside."""
    if not isinstance(data.get("datasets"), list) or not data["datasets"]:
        return
    made = ["train"] if data.get("test_split_size") is None else ["train", "test"]
    for key, split in _wanted(data).items():
        if split not in made:
            next_ = f"Remove {key}" if split not in ("train", "test") else "Set test_split_size, or eval_strategy: no"
            yield f"{key}: a mixture of `datasets` has no split {split!r}, only {', '.join(made)}. {next_}."
    parts = [each for each in data["datasets"] if isinstance(each, dict)]
    if len({each.get("fraction") is None for each in parts}) == 2:
        yield "fraction: some of `datasets` have one and others none. Set it for all, or for none."


def of_row(row: Row, recipe: Recipe, config: XTFConfig) -> Iterator[str]:
    """Problems of the columns of a row."""
    columns, data = ", ".join(row), recipe.data
    named = [(getattr(part, "column", None), "a score", "column") for part in config.scores.values()]
    named += [(name, "report_by", "report_by") for name in config.report_columns]
    for name, reader, key in named:
        by_path = recipe.host == "axolotl" and key == "report_by" and name == axolotl_data.BY_PATH
        if name is not None and name not in row and not by_path:
            chosen = any(isinstance(each.get("columns"), list) for each in sources(recipe))
            left_out = ", or add the column to `columns` under `datasets`" if chosen else ""
            yield f"the data has no column {name!r} for {reader}, only {columns}. Correct `{key}`{left_out}."
    if recipe.host != "trl":
        return
    if images := [name for name in _IMAGES if name in row]:
        yield f"the column {images[0]} holds images, and only text can be scored. Remove it, or the `xtf:` block."
    if "input_ids" in row:
        return
    text = str(data.get("dataset_text_field") or "text")
    chats = {isinstance(row[name], list) for name in _MAY_HOLD_CHATS if name in row}
    if not {text, *_SHAPES} & set(row):
        yield (
            f"the data has the columns {columns}; TRL trains on `messages`, `prompt` and `completion`, or `{text}`. "
            "Rename them, or set dataset_text_field."
        )
    elif "prompt" in row and "completion" not in row:
        beside = next((name for name in ("messages", text) if name in row), "")
        other = f", or remove `prompt`: TRL does not read `{beside}` beside it" if beside else ""
        yield f"the data has `prompt` and no `completion`. Rename the column of the answer to `completion`{other}."
    elif len(chats) == 2:
        yield (
            f"the data has messages and text in the columns {columns}, of which TRL takes any one as the kind of the "
            "data. Remove those that are not trained on."
        )
    yield from _of_messages(row, text)
    if data.get("assistant_only_loss") is True and not is_chat(row):
        yield "assistant_only_loss needs `messages`, and the data has none. Remove it."


def _of_messages(row: Row, text: str) -> Iterator[str]:
    column, keys, other = "messages", {"role"}, ""
    if column not in row:
        column, keys, other = "conversations", {"from", "value"}, " (or rename the column to `messages`)"
    messages = row.get(column)
    if messages is None or "prompt" in row or (column == "conversations" and text in row):
        return
    if not isinstance(messages, list) or not all(isinstance(each, dict) and keys <= set(each) for each in messages):
        shape = "role, content" if column == "messages" else "from, value"
        yield f"`{column}` must be a list of {{{shape}}}. Convert the data{other}."
