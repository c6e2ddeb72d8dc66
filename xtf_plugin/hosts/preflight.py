"""What a recipe will die of, found before a host is imported or a model is loaded.

A model of 8 billion weights takes minutes to load, and many runs end after that: by a wrong path, a missing column, a
template without marks. All of this can be read from files. What cannot be known here (a data set on the hub that is not
in the cache) is left to the run. Standard library, and pyarrow for Parquet files.
"""

from __future__ import annotations

import ast
import csv
import difflib
import json
import os
import re
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..environment import is_on

if TYPE_CHECKING:
    from ..config.block import XTFConfig
    from .recipes import Recipe

_SOURCES = (  # files of hosts, and the classes in them whose fields are keys of a recipe
    ("trl", "trainer/sft_config.py", "SFTConfig"),
    ("trl", "trainer/base_config.py", "_BaseConfig"),
    ("trl", "trainer/model_config.py", "ModelConfig"),
    ("trl", "scripts/utils.py", "ScriptArguments DatasetMixtureConfig"),
    ("transformers", "training_args.py", "TrainingArguments"),
)
_BUILDERS = {"json": "json jsonl", "csv": "csv", "parquet": "parquet", "text": "txt", "arrow": "arrow"}
_SUFFIXES = {suffix for names in _BUILDERS.values() for suffix in names.split()}
_SPLITS = {"train": "train training", "test": "test testing eval evaluation", "validation": "validation valid dev val"}
_SHAPES = ("messages", "conversations", "prompt", "input_ids")
_IMAGES = ("image", "images", "pixel_values")
_NO_CAUSAL_LM = ("ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")


def problems(recipe: Recipe, config: XTFConfig) -> list[str]:
    """One line for each thing that this recipe will be refused for or die of, with the next step; empty: none found."""
    data = recipe.data
    name = str(data.get("model_name_or_path" if recipe.host == "trl" else "base_model"))
    found = [*_of_model("the model", name), *_of_output(recipe)]
    folder = _folder(name)
    reference = config.reference.model
    if reference:
        found += [*_of_model("reference.model", reference), *_of_tokenizers(folder, _folder(reference), reference)]
    found += _of_architecture(folder, _folder(reference) if reference else folder, config)
    rows = list(_first_rows(recipe, found))
    for row in rows:
        found += _of_row(row, recipe, config)
    if recipe.host == "trl":
        found += [*_of_keys(data), *_of_template(data, folder, rows), *_of_trl(data, config, folder)]
    return list(dict.fromkeys(found))


def _of_model(what: str, name: str) -> Iterator[str]:
    path = Path(os.path.expanduser(name))
    if not path.is_dir():
        if name.startswith((".", "/", "~")) or name.count("/") > 1:
            yield f"{what}: there is no folder {name}. Give a folder written by save_pretrained, or a hub id."
        elif is_on(os.environ.get("HF_HUB_OFFLINE")) and _folder(name) is None:
            yield f"{what}: {name} is not in the cache, and HF_HUB_OFFLINE is set. Unset it, or name a folder."
        return
    if not (path / "config.json").is_file() and not (path / "adapter_config.json").is_file():
        yield f"{what}: {name} has no config.json. Give a folder written by save_pretrained."
        return
    if not any(path.glob("*.safetensors")) and not any(path.glob("*.bin")) and not any(path.glob("*.index.json")):
        yield f"{what}: {name} has no weights (*.safetensors). Give the folder that holds them."
    if not any((path / each).is_file() for each in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")):
        yield f"{what}: {name} has no tokenizer. Save it there: tokenizer.save_pretrained({name!r})."


def _folder(name: str | None) -> Path | None:
    """The folder of a model's files: its own, or the newest in the hub's cache; None: not here."""
    path = Path(os.path.expanduser(str(name)))
    if path.is_dir():
        return path
    home = os.environ.get("HF_HUB_CACHE") or os.path.join(
        os.environ.get("HF_HOME") or os.path.expanduser("~/.cache/huggingface"), "hub"
    )
    found = Path(home, "models--" + str(name).replace("/", "--"), "snapshots").glob("*/config.json")
    return max((each.parent for each in found), key=lambda each: each.stat().st_mtime, default=None)


@cache
def _json(folder: Path | None, name: str) -> dict[str, Any]:
    try:
        found = json.loads((folder / name).read_text(encoding="utf-8")) if folder else {}
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _of_output(recipe: Recipe) -> Iterator[str]:
    folder = recipe.output_dir().absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        yield f"output_dir: {recipe.output_dir()} cannot be written. Name a folder that you may write to."


def _of_tokenizers(ours: Path | None, theirs: Path | None, name: str) -> Iterator[str]:
    one, two = (_json(folder, "tokenizer.json").get("model", {}).get("vocab") for folder in (ours, theirs))
    if one is not None and two is not None and one != two:
        yield (
            f"reference.model: the tokenizer of {name} has another vocabulary ({len(two)} entries against {len(one)}). "
            "Use a reference of the same model family."
        )


def _of_architecture(trained: Path | None, scored: Path | None, config: XTFConfig) -> Iterator[str]:
    facts = _json(trained, "config.json")
    kind = " ".join(facts.get("architectures") or [])
    if facts.get("is_encoder_decoder") or any(part in kind for part in _NO_CAUSAL_LM):
        yield f"the model: {kind or 'it'} predicts no next tokens of its input. Train a causal language model."
    about = _json(scored, "config.json")
    if not any(part.scorer == "attention_received" for part in config.scores.values()):
        return
    type_ = str(about.get("model_type"))
    source = _source("transformers", f"models/{type_}/modeling_{type_}.py")
    without = source and "ALL_ATTENTION_FUNCTIONS" not in source
    if without or "s_aux" in source or "position_bias" in source:
        yield (
            f"reasoning_importance: attention received cannot be recorded in the architecture {type_}. Remove the "
            "scores with `scorer: attention_received`, use `preset: default`, or name another reference.model."
        )


@cache
def _source(package: str, path: str) -> str:
    """The source of a module of an installed package, which is not imported; empty if there is none."""
    spec = util.find_spec(package)
    roots = list(spec.submodule_search_locations or []) if spec else []
    files = [Path(root, path) for root in roots]
    return next((file.read_text(encoding="utf-8") for file in files if file.is_file()), "")


def _fields() -> dict[str, str]:
    """Keys of TRL's recipes with their annotated types, as the installed packages declare them."""
    found: dict[str, str] = {}
    for package, path, names in _SOURCES:
        for node in ast.parse(_source(package, path)).body:
            if isinstance(node, ast.ClassDef) and node.name in names.split():
                fields = (each for each in node.body if isinstance(each, ast.AnnAssign))
                found = {ast.unparse(each.target): ast.unparse(each.annotation) for each in fields} | found
    return found if "output_dir" in found and "model_name_or_path" in found else {}


def _of_keys(data: Mapping[str, Any]) -> Iterator[str]:
    fields = _fields()
    launch = set(re.findall(r"\"--([a-z][\w-]*)\"", _source("accelerate", "commands/launch.py")))
    known = {
        *fields,
        "xtf",
        "env",
        "config",
        "accelerate_config",
        *launch,
        *(each.replace("-", "_") for each in launch),
    }
    for key, value in data.items() if fields else ():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            near = ["max_length"] if key == "max_seq_length" else near
            yield f"{key}: TRL has no such key. " + (f"Did you mean {near[0]}?" if near else "Remove it.")
        for kind in (int, float):
            if re.fullmatch(rf"{kind.__name__}( \| None)?", fields.get(str(key), "")) and value is not None:
                try:
                    kind(value)
                except (TypeError, ValueError):
                    yield f"{key}: {value!r} is no {'whole ' if kind is int else ''}number. Write one."


def _sources(recipe: Recipe) -> list[dict[str, Any]]:
    named = recipe.data.get("datasets")
    entries = [each for each in named if isinstance(each, dict)] if isinstance(named, list) else []
    if not entries and recipe.host == "trl" and recipe.data.get("dataset_name"):
        split = recipe.data.get("dataset_train_split", "train")
        entries = [{"path": recipe.data["dataset_name"], "split": split}]
        if recipe.data.get("eval_strategy", "no") not in ("no", False):
            entries.append(
                {"path": recipe.data["dataset_name"], "split": recipe.data.get("dataset_test_split", "test")}
            )
    return entries


def _first_rows(recipe: Recipe, found: list[str]) -> Iterator[dict[str, Any]]:
    """The first row of each source of training data that is on this disk; appends what is wrong to `found`."""
    entries = _sources(recipe)
    if not entries:
        key = "dataset_name` or `datasets" if recipe.host == "trl" else "datasets"
        found.append(f"the recipe names no training data. Set `{key}`.")
    for entry in entries:
        path, split = str(entry.get("path")), str(entry.get("split") or "train").split("[")[0]
        files, why = _files(path, entry)
        if why:
            found.append(why)
        if not files:
            continue
        by_split: dict[str, list[Path]] = {}
        for file in files:
            by_split.setdefault(_split_of(file, entry), []).append(file)
        if split not in by_split:
            found.append(
                f"{path}: there is no split {split!r}, only {', '.join(by_split)}. Set its name, or add its files."
            )
            continue
        try:
            row = _first_row(by_split[split][0])
        except (OSError, ValueError) as error:
            found.append(f"{by_split[split][0]} cannot be read: {error}. Repair the file.")
            continue
        if row is not None:
            yield row


def _files(path: str, entry: Mapping[str, Any]) -> tuple[list[Path], str]:
    """The data files of a source on this disk, and what is wrong with it."""
    folder = Path(os.path.expanduser(path))
    given = entry.get("data_files")
    if path in _BUILDERS or given:
        listed = list(given.values()) if isinstance(given, dict) else given
        names = [str(name) for name in (listed if isinstance(listed, list) else [listed] if listed else [])]
        if not names:
            return [], f"{path}: this reader of files needs `data_files`. Name them, or the folder as the path."
        root = folder if folder.is_dir() else Path(os.path.expanduser(str(entry.get("data_dir") or ".")))
        files = []
        for name in (name for name in names if "://" not in name):
            own = [Path(name)] if os.path.isabs(name) and "*" not in name else sorted(root.glob(name.lstrip("/")))
            if not own or not own[0].exists():
                unknown = path not in _BUILDERS and not folder.is_dir()  # a data set on the hub
                return [], "" if unknown else f"{path}: there is no file {name}. Correct `data_files`."
            files += own
        return files, ""
    if folder.is_dir():
        files = [file for file in sorted(folder.rglob("*")) if file.suffix.lstrip(".") in _SUFFIXES]
        return (
            files,
            "" if files else f"{path}: the folder holds no data file ({', '.join(sorted(_SUFFIXES))}). Add one.",
        )
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        return [], f"{path}: there is no such folder of data. Correct the path."
    return [], ""


def _split_of(file: Path, entry: Mapping[str, Any]) -> str:
    """The split of a file, as `datasets` reads names of files."""
    given = entry.get("data_files")
    if isinstance(given, dict):
        return next((name for name, value in given.items() if file.name in str(value)), "train")
    words = re.split(r"[\W_]+", f"{file.parent.name} {file.stem}".lower())
    return next((split for split, names in _SPLITS.items() if set(names.split()) & set(words)), "train")


def _first_row(file: Path) -> dict[str, Any] | None:
    """The first row of a data file; None if its kind is not read here. Raises ValueError or OSError."""
    if file.suffix in (".json", ".jsonl"):
        with file.open(encoding="utf-8") as lines:
            line = next((each for each in lines if each.strip()), "")
        if not line:
            raise ValueError("it is empty")
        if line.lstrip()[0] != "{" or not line.rstrip().endswith("}"):
            return None  # a list, or an object over several lines
        row = json.loads(line)
        return dict(row)
    if file.suffix == ".csv":
        with file.open(encoding="utf-8", newline="") as lines:
            rows = csv.DictReader(lines)
            return dict(next(rows, {}))
    if file.suffix == ".parquet":
        from pyarrow import ArrowException, parquet

        try:
            return dict.fromkeys(parquet.read_schema(file).names)
        except ArrowException as error:
            raise ValueError(str(error)) from error
    return None


def _of_row(row: Mapping[str, Any], recipe: Recipe, config: XTFConfig) -> Iterator[str]:
    columns, data = list(row), recipe.data
    if images := [name for name in _IMAGES if name in row]:
        yield f"the column {images[0]} holds images, and only text can be scored. Remove it, or the `xtf:` block."
    for name in (getattr(part, "column", None) for part in config.scores.values()):
        if name is not None and name not in row:
            yield f"the data has no column {name!r} for a score, only {', '.join(columns)}. Correct `column`."
    if recipe.host != "trl":
        return
    text = str(data.get("dataset_text_field") or "text")
    if not {text, *_SHAPES} & set(row):
        yield (
            f"the data has the columns {', '.join(columns)}; TRL trains on `messages`, `prompt` and `completion`, or "
            f"`{text}`. Rename them, or set dataset_text_field."
        )
    elif "prompt" in row and "completion" not in row and "messages" not in row:
        yield "the data has `prompt` and no `completion`. Rename the column of the answer to `completion`."
    messages = row.get("messages")
    if messages is not None and not (
        isinstance(messages, list) and all(isinstance(each, dict) and "role" in each for each in messages)
    ):
        yield "`messages` must be a list of {role, content}. Convert the data."
    if data.get("assistant_only_loss") is True and not _is_chat(row):
        yield "assistant_only_loss needs `messages`, and the data has none. Remove it."


def _is_chat(row: Mapping[str, Any]) -> bool:
    return any(isinstance(row.get(name), list) for name in ("messages", "conversations", "prompt", "completion"))


def _of_template(data: Mapping[str, Any], folder: Path | None, rows: list[dict[str, Any]]) -> Iterator[str]:
    """Problems of the chat template that TRL would use."""
    given = data.get("chat_template_path")
    path = Path(os.path.expanduser(str(given)))
    if given and path.is_file():
        template: Any = path.read_text(encoding="utf-8", errors="replace")
    elif given and not path.exists() and str(given).startswith((".", "/", "~")):
        yield f"chat_template_path: there is no {given}. Correct the path."
        return
    else:
        source = path if given else folder
        file = source / "chat_template.jinja" if source else None
        template = file.read_text(encoding="utf-8") if file and file.is_file() else None
        template = template or _json(source, "tokenizer_config.json").get("chat_template")
    if folder is None or not any(_is_chat(row) for row in rows):
        return
    if not template:
        yield "the data is chat, and the tokenizer has no chat template. Set chat_template_path."
    elif data.get("assistant_only_loss") is True and not re.search(r"\{%-?\s*generation", str(template)):
        spec = util.find_spec("trl")
        known = [
            file
            for root in (spec.submodule_search_locations or [] if spec else [])
            for file in Path(root).rglob("*.jinja")
        ]
        if not any(file.read_text(encoding="utf-8").strip() == str(template).strip() for file in known):
            yield (
                "assistant_only_loss needs a chat template with {% generation %} around the answers, and this one has "
                "none. Set chat_template_path to one that has it."
            )


def _of_trl(data: Mapping[str, Any], config: XTFConfig, folder: Path | None) -> Iterator[str]:
    """What TRL, or XTF in TRL, refuses of combinations of settings."""
    streamed = data.get("dataset_streaming") is True or data.get("streaming") is True
    if streamed and not data.get("use_peft") and not config.reference.model:
        yield "streamed data needs a reference that training does not change. Set use_peft: true, or reference.model."
    if streamed and not int(data.get("max_steps") or -1) > 0:
        yield "streamed data has no length. Set max_steps."
    resumed = data.get("resume_from_checkpoint")
    if isinstance(resumed, str) and resumed.lower() not in ("true", "false") and not Path(resumed).is_dir():
        yield f"resume_from_checkpoint: there is no folder {resumed}. Correct the path, or remove it."
    vocabulary = _json(folder, "tokenizer.json")
    known = {*vocabulary.get("model", {}).get("vocab", ()), *(t["content"] for t in vocabulary.get("added_tokens", ()))}
    for key in ("eos_token", "pad_token"):
        if known and data.get(key) and data[key] not in known:
            yield f"{key}: {data[key]!r} is not in the tokenizer's vocabulary. Correct it, or remove it."
