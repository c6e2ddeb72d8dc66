"""The data files of a recipe's sources, by split, and the columns of their rows, without the package `datasets`.

Files are chosen as `datasets` chooses them. What it would do differently, or what only it can read, is left to the run:
a folder whose card names the files of its configurations, archives, files on the hub.
"""

from __future__ import annotations

import csv
import glob
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .hub import looked_at
from .model_files import TILDE

_BUILDERS = {"json": ".json .jsonl", "csv": ".csv", "parquet": ".parquet", "text": ".txt", "arrow": ".arrow"}
_KINDS = {suffix: kind for kind, suffixes in _BUILDERS.items() for suffix in suffixes.split()}
_SPLITS = {"train": "train|training", "validation": "validation|valid|dev|val", "test": "test|testing|eval|evaluation"}
_NO_DATA = {
    "readme.md",
    "config.json",
    "dataset_info.json",
    "dataset_infos.json",
    "dummy_data.zip",
    "dataset_dict.json",
}
_NO_DATA_SUFFIXES = {"", ".md", ".py", ".sh", ".yaml", ".yml", ".ipynb"}
_SHARD = re.compile(r"data/(.+)-[0-9]{5}-of-[0-9]{5}[^/]*\.[^/]*")
_ONE, _SEVERAL = "state.json", "dataset_dict.json"  # of save_to_disk: a data set, several
_HEAD = 1 << 22  # bytes of a file that are read

Splits = dict[str, list[Path]]


def is_named_on_hub(path: str) -> bool:
    """Whether a source that is not on this disk is looked for on the hub."""
    return path not in _BUILDERS and "://" not in path and not os.path.exists(path)


def splits_of(entry: Mapping[str, Any]) -> tuple[Splits, str]:
    """The data files of a source by split, and what is wrong with it; neither: it is not known here.

    Args:
        entry: as `datasets.load_dataset` takes it: `path`, and perhaps `data_files` and `data_dir`.
    """
    path, given = str(entry.get("path")), entry.get("data_files")
    folder, built = Path(path), path in _BUILDERS
    if not built and not os.path.isdir(folder):
        far = "://" in path or os.path.exists(folder) or not (path.startswith((".", "/", "~")) or path.count("/") > 1)
        next_ = TILDE if path.startswith("~") else "Correct the path"
        return {}, "" if far else f"{path}: there is no such folder of data{looked_at(path)}. {next_}."
    if not built and (why := _of_configurations(path, folder, entry.get("name"))):
        return {}, why
    inside = os.path.expanduser(str(entry.get("data_dir") or ""))
    root = Path(inside) if built else folder / inside
    if given:
        return _given(path, root, given)
    if built and not inside:
        return {}, f"{path}: this reader of files needs `data_files`. Name them, or the folder as the path."
    if (root / _ONE).is_file():
        return {}, f"{path}: it was written by save_to_disk, which the host does not read. Write it by to_parquet."
    saved = saved_splits(root)
    return (saved, "") if saved else _of_folder(path, root)


def _of_configurations(path: str, folder: Path, name: Any) -> str:
    """What is wrong with the name of a configuration of a folder; empty: nothing."""
    card = _card(folder)
    named = [each for each in card.get("configs") or () if isinstance(each, dict)]
    names = [str(each.get("config_name")) for each in named] or ["default"]
    if (folder / ".huggingface.yaml").exists():
        return ""
    if name is not None and str(name) not in names:
        return (
            f"{path}: there is no configuration {name!r}, only {', '.join(names)}. Correct it (dataset_config; `name` "
            "under `datasets`), or remove it."
        )
    if name is None and len(names) > 1 and "default" not in names and not any(each.get("default") for each in named):
        return f"{path}: it has the configurations {', '.join(names)}. Set dataset_config (`name` under `datasets`)."
    return ""


def _card(folder: Path) -> dict[str, Any]:
    """What the head of a folder's README.md says; empty if there is none."""
    from ..config.block import of_yaml

    file = folder / "README.md"
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    head = re.match(r"---\n(.*?)\n---", text, re.S)
    try:
        found = of_yaml(head[1]) if head else {}
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def saved_splits(folder: Path) -> Splits:
    """The files of a folder that save_to_disk wrote, by split; empty: it did not."""
    if os.path.isfile(folder / _ONE):
        return {"train": sorted(folder.glob("*.arrow"))}
    try:
        splits = json.loads((folder / _SEVERAL).read_text(encoding="utf-8"))["splits"]
    except (OSError, ValueError, LookupError, TypeError):
        return {}
    return {str(split): sorted((folder / str(split)).glob("*.arrow")) for split in splits}


def _given(path: str, root: Path, given: Any) -> tuple[Splits, str]:
    found: Splits = {}
    for split, names in (given if isinstance(given, dict) else {"train": given}).items():
        for name in names if isinstance(names, list) else [names]:
            if not isinstance(name, str) or "://" in name or "{" in name:
                return {}, ""
            where = os.path.join(root, name)
            files = [where] if os.path.exists(where) else sorted(glob.glob(where, recursive=True))
            if not files:
                return (
                    {},
                    f"{path}: there is no file {name}. {TILDE if name.startswith('~') else 'Correct `data_files`'}.",
                )
            found.setdefault(str(split), []).extend(Path(file) for file in files if not os.path.isdir(file))
    return found, ""


def _of_folder(path: str, root: Path) -> tuple[Splits, str]:
    if _card(root).get("configs") or (root / ".huggingface.yaml").exists():
        return {}, ""
    names = [each.relative_to(root).as_posix() for each in sorted(root.rglob("*")) if each.is_file()]
    names = [name for name in names if not re.search(r"(^|/)(\.|__)", name)]
    names = [name for name in names if name.rpartition("/")[2] not in _NO_DATA]
    if all(Path(name).suffix in _NO_DATA_SUFFIXES for name in names):
        return {}, f"{path}: the folder holds no data file ({', '.join(sorted(_KINDS))}). Add one."
    return {split: [root / name for name in chosen] for split, chosen in _by_split(names).items()}, ""


def _by_split(names: list[str]) -> dict[str, list[str]]:
    """Names of files in a folder, by split: of shards, else of folders, else of files, else all are for training."""
    found: dict[str, list[str]] = {}
    for name in names:
        if shard := _SHARD.fullmatch(name):
            found.setdefault(shard[1], []).append(name)
    if found:
        return found
    for place in (r"(?:^|[-._ 0-9/])(?:{})(?:[-._ 0-9][^/]*)?/", r"(?:^|[-._ 0-9/])(?:{})[-._ 0-9][^/]*$"):
        for split, words in _SPLITS.items():
            if chosen := [name for name in names if re.search(place.format(words), name)]:
                found[split] = chosen
        if found:
            return found
    return {"train": names}


def first_row(files: list[Path], reader: str) -> dict[str, Any] | None:
    """The columns of data files, with a value of each, or one of its type; None: they are not known here.

    Args:
        files: of one split.
        reader: the source's path, which may name a kind of files.

    Raises:
        OSError, ValueError: the first file cannot be read, or holds nothing.
    """
    kinds = {_KINDS.get(file.suffix) for file in files if file.suffix not in _NO_DATA_SUFFIXES}
    if len(kinds) != 1 or None in kinds or (reader in _BUILDERS and kinds != {reader}):
        return None
    file = next(file for file in files if file.suffix in _KINDS)
    readers = {"json": _of_json, "csv": _of_csv, "parquet": _of_parquet, "arrow": _of_arrow}
    read = readers.get(str(kinds.pop()))
    return read(file) if read else None


def _of_json(file: Path) -> dict[str, Any] | None:
    with file.open("rb") as opened:
        lines = opened.read(_HEAD).split(b"\n")
        if opened.read(1):
            lines.pop()  # which is not complete
        elif not any(line.strip() for line in lines):
            raise ValueError("it is empty")
    numbered = [(number, line.strip()) for number, line in enumerate(lines, start=1) if line.strip()]
    if not numbered or not (numbered[0][1].startswith(b"{") and numbered[0][1].endswith(b"}")):
        return None  # a list, or an object over several lines
    row: dict[str, Any] = {}
    for number, line in numbered:  # a column may begin later
        try:
            found = json.loads(line)
        except RecursionError:
            raise ValueError(f"line {number} is nested too deeply") from None
        if not isinstance(found, dict):
            raise ValueError(f"line {number} is not a JSON object")
        row |= {name: value for name, value in found.items() if row.get(name) is None}
    return row


def _of_csv(file: Path) -> dict[str, Any] | None:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        try:
            header = next(csv.reader(lines), [])
        except csv.Error:
            return None
    if not header:
        raise ValueError("it is empty")
    return dict.fromkeys(header, "")


def _of_parquet(file: Path) -> dict[str, Any]:
    from pyarrow import ArrowException, parquet

    try:
        return _of_schema(parquet.read_schema(file))
    except ArrowException as error:
        raise ValueError(str(error)) from error


def _of_arrow(file: Path) -> dict[str, Any] | None:
    from pyarrow import ArrowException, ipc

    try:
        with file.open("rb") as opened:
            return _of_schema(ipc.open_stream(opened).schema)
    except ArrowException:
        return None  # a file of the other of Arrow's two formats


def _of_schema(schema: Any) -> dict[str, Any]:
    from pyarrow import types

    lists = (types.is_list, types.is_large_list, types.is_fixed_size_list)
    return {field.name: [] if any(each(field.type) for each in lists) else "" for field in schema}
