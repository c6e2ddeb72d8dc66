"""What a recipe will die of, found before a host is imported or a model is loaded.

A model of 8 billion weights takes minutes to load, and many runs end after that: by a wrong path, a missing column, a
template without marks. All of this can be read from files. What cannot be known here (a data set on the hub that is not
in the cache) is left to the run. Standard library, and pyarrow for Parquet files.
"""

from __future__ import annotations

import ast
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
from .data_files import first_row, splits_of

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
_SHAPES = ("messages", "conversations", "prompt", "input_ids")
_TOKENIZERS = ("tokenizer.json", "vocab.*", "*.model", "*.tiktoken", "tekken.json", "tokenization_*.py")
_IMAGES = ("image", "images", "pixel_values")
_NO_CAUSAL_LM = ("ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")


def problems(recipe: Recipe, config: XTFConfig) -> list[str]:
    """One line for each thing that this recipe will be refused for or die of, with the next step; empty: none found."""
    data = recipe.data
    name = str(data.get("model_name_or_path" if recipe.host == "trl" else "base_model"))
    folder = _folder(name)
    found = [*_of_model("the model", name, apart=bool(data.get("tokenizer_config"))), *_of_output(recipe)]
    reference = config.reference.model
    if reference:
        found += [*_of_model("reference.model", reference), *_of_tokenizers(folder, _folder(reference), reference)]
    found += _of_architecture(folder, _folder(reference) if reference else folder, config)
    rows = list(_first_rows(recipe, found))
    for row in rows:
        found += _of_row(row, recipe, config)
    if recipe.host == "trl":
        found += [*_of_keys(data), *_of_template(data, folder, rows), *_of_trl(data, recipe.streamed, config, folder)]
    return list(dict.fromkeys(found))


def _of_model(what: str, name: str, *, apart: bool = False) -> Iterator[str]:
    """Problems of a model's folder; `apart`: its tokenizer is in another one."""
    path = Path(os.path.expanduser(name))
    if not path.is_dir():
        if name.startswith((".", "/", "~")) or name.count("/") > 1:
            yield f"{what}: there is no folder {name}. Give a folder written by save_pretrained, or a hub id."
        elif is_on(os.environ.get("HF_HUB_OFFLINE")) and _folder(name) is None:
            yield f"{what}: {name} is not in the cache, and HF_HUB_OFFLINE is set. Unset it, or name a folder."
        return
    if not (path / "config.json").is_file():
        adapters = (path / "adapter_config.json").is_file()
        next_ = (
            "It holds adapters: merge them into their base first" if adapters else "Give a folder of save_pretrained"
        )
        yield f"{what}: {name} has no config.json. {next_}."
        return
    if not any(path.glob("*.safetensors")) and not any(path.glob("*.bin")) and not any(path.glob("*.index.json")):
        yield f"{what}: {name} has no weights (*.safetensors). Give the folder that holds them."
    if not apart and not any(file for pattern in _TOKENIZERS for file in path.glob(pattern)):
        yield f"{what}: {name} has no tokenizer. Save it there: tokenizer.save_pretrained({name!r})."


def _folder(name: str | None) -> Path | None:
    """The folder of a model's files: its own, or the newest in the hub's cache; None: not here."""
    path = Path(os.path.expanduser(str(name)))
    if path.is_dir():
        return path
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    home = os.environ.get("HF_HOME") or os.path.join(caches, "huggingface")
    hub = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or os.path.join(home, "hub")
    found = Path(hub, "models--" + str(name).replace("/", "--"), "snapshots").glob("*/config.json")
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
    there = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        yield f"output_dir: {recipe.output_dir()} cannot be written. Name a folder that you may write to."


def _of_tokenizers(ours: Path | None, theirs: Path | None, name: str) -> Iterator[str]:
    one, two = _vocabulary(ours), _vocabulary(theirs)
    if one and two and one != two:
        yield (
            f"reference.model: the tokenizer of {name} has another vocabulary ({len(two)} entries against {len(one)}). "
            "Use a reference of the same model family."
        )


def _vocabulary(folder: Path | None) -> dict[str, int]:
    """Ids of a tokenizer's tokens, added ones among them; empty if they are not in a file that is read here."""
    facts = _json(folder, "tokenizer.json")
    vocabulary = facts.get("model", {}).get("vocab", {})
    if isinstance(vocabulary, list):  # of pieces and scores
        vocabulary = {piece: index for index, (piece, _) in enumerate(vocabulary)}
    return {**vocabulary, **{token["content"]: token["id"] for token in facts.get("added_tokens", ())}}


def _of_architecture(trained: Path | None, scored: Path | None, config: XTFConfig) -> Iterator[str]:
    facts = _json(trained, "config.json")
    kind = " ".join(facts.get("architectures") or [])
    if facts.get("is_encoder_decoder") or any(part in kind for part in _NO_CAUSAL_LM):
        yield f"the model: {kind or 'it'} predicts no next tokens of its input. Train a causal language model."
    about = _json(scored, "config.json")
    if not any(part.scorer == "attention_received" for part in config.scores.values()):
        return
    type_ = str(about.get("text_config", about).get("model_type"))
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
                except (TypeError, ValueError, OverflowError):
                    yield f"{key}: {value!r} is no {'whole ' if kind is int else ''}number. Write one."


def _sources(recipe: Recipe) -> list[dict[str, Any]]:
    named = recipe.data.get("datasets")
    entries = [each for each in named if isinstance(each, dict)] if isinstance(named, list) else []
    if not entries and recipe.host == "trl" and recipe.data.get("dataset_name"):
        split = str(recipe.data.get("dataset_train_split") or "train")
        if recipe.data.get("eval_strategy", "no") not in ("no", False):
            split += "+" + str(recipe.data.get("dataset_test_split") or "test")
        entries = [{"path": recipe.data["dataset_name"], "split": split}]
    return entries


def _first_rows(recipe: Recipe, found: list[str]) -> Iterator[dict[str, Any]]:
    """The first row of each source of training data that is on this disk; appends what is wrong to `found`."""
    entries = _sources(recipe)
    if not entries:
        key = "dataset_name` or `datasets" if recipe.host == "trl" else "datasets"
        found.append(f"the recipe names no training data. Set `{key}`.")
    for entry in entries:
        path, split = str(entry.get("path")), str(entry.get("split") or "train")
        by_split, why = splits_of(entry)
        if why:
            found.append(why)
        if not by_split or recipe.host != "trl":  # Axolotl also reads single files and folders of save_to_disk
            continue
        names = [name.split("[")[0].strip() for name in split.split("+")]
        if missing := [name for name in names if name not in by_split and name != "all"]:
            found.append(
                f"{path}: there is no split {missing[0]!r}, only {', '.join(by_split)}. Set its name, or add its files."
            )
            continue
        files = by_split.get(names[0]) or next(iter(by_split.values()))
        try:
            row = first_row(files, path)
        except (OSError, ValueError) as error:
            found.append(f"{files[0]} cannot be read: {error}. Repair the file.")
            continue
        if row is not None:
            columns = entry.get("columns")
            yield {name: row[name] for name in row if not isinstance(columns, list) or name in columns}


def _of_row(row: Mapping[str, Any], recipe: Recipe, config: XTFConfig) -> Iterator[str]:
    columns, data = list(row), recipe.data
    if images := [name for name in _IMAGES if name in row]:
        yield f"the column {images[0]} holds images, and only text can be scored. Remove it, or the `xtf:` block."
    for name in (getattr(part, "column", None) for part in config.scores.values()):
        if name is not None and name not in row:
            yield f"the data has no column {name!r} for a score, only {', '.join(columns)}. Correct `column`."
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
        source = _folder(given) if given else folder
        if source is None or not any(source.glob("tokenizer*")):
            return  # on the hub, or not completely here
        files = [file for name in ("chat_template.jinja", "chat_template.json") if (file := source / name).is_file()]
        template = files[0].read_text(encoding="utf-8") if files else None
        template = template or _json(source, "tokenizer_config.json").get("chat_template")
    if not any(_is_chat(row) for row in rows):
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


def _of_trl(data: Mapping[str, Any], streamed: bool, config: XTFConfig, folder: Path | None) -> Iterator[str]:
    """What TRL, or XTF in TRL, refuses of combinations of settings."""
    if streamed and not data.get("use_peft") and not config.reference.model:
        yield "streamed data needs a reference that training does not change. Set use_peft: true, or reference.model."
    if streamed and str(data.get("max_steps") or -1).startswith("-"):
        yield "streamed data has no length. Set max_steps."
    resumed = data.get("resume_from_checkpoint")
    if isinstance(resumed, str) and resumed.lower() not in ("true", "false") and not Path(resumed).is_dir():
        yield f"resume_from_checkpoint: there is no folder {resumed}. Correct the path, or remove it."
    known = _vocabulary(folder)
    for key in ("eos_token", "pad_token"):
        cloned = key == "pad_token" and data.get("chat_template_path")  # perhaps with tokens
        if known and not cloned and data.get(key) and data[key] not in known:
            yield f"{key}: {data[key]!r} is not in the tokenizer's vocabulary. Correct it, or remove it."
