"""What would stop a run, found before a host is imported or a model is loaded.

A model of 8 billion weights takes minutes to load, and many runs end after that: by a wrong path, a missing column, a
template without marks. All of this can be read from files. Of what is not on this disk the hub is asked once whether it
has it; the rest is left to the run.
"""

from __future__ import annotations

import ast
import difflib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..scoring.adapters import ADAPTER_INITS
from . import axolotl_data
from .chat_template import notes as of_turns
from .chat_template import of_template, template_of
from .hub import folder_of
from .model_files import of_architecture, of_model, of_tokenizers, source, vocabulary
from .training_rows import first_rows, of_row, sources

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


def problems(recipe: Recipe, config: XTFConfig) -> list[str]:
    """One line for each thing at which this recipe would fail, with the next step; empty: none found."""
    data, env, separate = recipe.data, _environment(recipe), config.reference
    (name, revision), folder = _model(recipe), _folder(recipe)
    apart = bool(data.get("tokenizer_config"))
    found = [*_of_types(recipe), *of_model("the model", name, revision, env, apart=apart), *_of_output(recipe)]
    scored = folder
    if separate.model:
        scored = folder_of(separate.model, separate.revision, env)
        found += [*of_model("reference.model", separate.model, separate.revision, env)]
        found += of_tokenizers(_tokenizer(recipe), scored, separate.model)
    found += of_architecture(folder, scored, config)
    rows = list(first_rows(recipe, found))
    for row in rows:
        found += of_row(row, recipe, config)
    if recipe.host == "axolotl" and not separate.model:
        found += _of_adapters(data)
    if recipe.host == "trl":
        template, why = template_of(data, folder, env)
        found += [*_of_keys(data), *of_template(data, template, why, rows)]
        found += _of_trl(data, recipe.streamed, config, folder)
    return list(dict.fromkeys(found))


def notes(recipe: Recipe) -> list[str]:
    """One line for each thing that this recipe trains, or leaves out, and that is seldom meant; such a recipe runs."""
    folder = _tokenizer(recipe)
    if recipe.host == "axolotl":
        found = [note for each in sources(recipe) for note in axolotl_data.notes(each, recipe.data, folder)]
        return list(dict.fromkeys(found))
    template, _ = template_of(recipe.data, folder, _environment(recipe))
    return list(of_turns(recipe.data, template, list(first_rows(recipe, []))))


def _environment(recipe: Recipe) -> dict[str, str]:
    return {**os.environ, **recipe.env}


def _model(recipe: Recipe) -> tuple[str, str | None]:
    """Name and revision of the model that a recipe trains."""
    name, revision = ("model_name_or_path", "model_revision")
    if recipe.host == "axolotl":
        name, revision = ("base_model", "revision_of_model")
    chosen = recipe.data.get(revision)
    return str(recipe.data.get(name)), None if chosen is None else str(chosen)


def _folder(recipe: Recipe) -> Path | None:
    return folder_of(*_model(recipe), _environment(recipe))


def _tokenizer(recipe: Recipe) -> Path | None:
    """The folder of the tokenizer: that of `tokenizer_config`, if the recipe names one, else the model's."""
    named = recipe.data.get("tokenizer_config") if recipe.host == "axolotl" else None
    return folder_of(str(named), _model(recipe)[1], _environment(recipe)) if named else _folder(recipe)


def _of_types(recipe: Recipe) -> Iterator[str]:
    """Problems of keys that hold another type of value than the host reads."""
    types: dict[str, type] = {"datasets": list}
    if recipe.host == "axolotl":
        types |= {"special_tokens": dict, "peft": dict}
    for key, type_ in types.items():
        value = recipe.data.get(key)
        if value is not None and not isinstance(value, type_):
            yield f"{key}: {value!r} is no {'list' if type_ is list else 'mapping'}. Write one, or remove it."


def _of_output(recipe: Recipe) -> Iterator[str]:
    folder = recipe.output_dir().absolute()
    there = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        yield f"output_dir: {recipe.output_dir()} cannot be written. Name a folder that you may write to."


def _of_adapters(data: Mapping[str, Any]) -> Iterator[str]:
    """The problem of an initialisation of Axolotl's adapters that changes the base model."""
    peft = data.get("peft")
    loftq = peft.get("loftq_config") if isinstance(peft, dict) else None
    of_loftq = isinstance(loftq, dict) and loftq.get("loftq_bits")
    chosen = data.get("peft_init_lora_weights") or ("loftq" if of_loftq else True)
    legal = ADAPTER_INITS["init_lora_weights"]
    if data.get("adapter") in ("lora", "qlora") and chosen not in legal:
        yield (
            f"peft_init_lora_weights: {chosen} changes the base model, which is the reference with its adapters off. "
            f"Legal: {', '.join(map(str, legal))}. Use one of them, or name the base under xtf `reference.model`."
        )


def _fields() -> dict[str, str]:
    """Keys of TRL's recipes with their annotated types, as the installed packages declare them."""
    found: dict[str, str] = {}
    for package, path, names in _SOURCES:
        for node in ast.parse(source(package, path)).body:
            if isinstance(node, ast.ClassDef) and node.name in names.split():
                fields = (each for each in node.body if isinstance(each, ast.AnnAssign))
                found = {ast.unparse(each.target): ast.unparse(each.annotation) for each in fields} | found
    return found if "output_dir" in found and "model_name_or_path" in found else {}


def _of_keys(data: Mapping[str, Any]) -> Iterator[str]:
    from ..config.block import XTFConfig

    fields = _fields()
    launch = set(re.findall(r"\"--([a-z][\w-]*)\"", source("accelerate", "commands/launch.py")))
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
            hint = f"Did you mean {near[0]}?" if near else "Remove it."
            yield f"{key}: TRL has no such key. {'It belongs under `xtf:`.' if key in XTFConfig.model_fields else hint}"
        for kind in (int, float):
            if re.fullmatch(rf"{kind.__name__}( \| None)?", fields.get(str(key), "")) and value is not None:
                try:
                    kind(value)
                except (TypeError, ValueError, OverflowError):
                    yield f"{key}: {value!r} is no {'whole ' if kind is int else ''}number. Write one."


def _of_trl(data: Mapping[str, Any], streamed: bool, config: XTFConfig, folder: Path | None) -> Iterator[str]:
    """What TRL, or XTF in TRL, refuses of combinations of settings."""
    if streamed and not data.get("use_peft") and not config.reference.model:
        yield "streamed data needs a reference that training does not change. Set use_peft: true, or reference.model."
    if streamed and str(data.get("max_steps") or -1).startswith("-"):
        yield "streamed data has no length. Set max_steps."
    if data.get("packing") is True and data.get("max_length", 0) is None:
        yield "packing needs a length to fill. Set max_length."
    resumed = data.get("resume_from_checkpoint")
    if isinstance(resumed, str) and resumed.lower() not in ("true", "false") and not os.path.isdir(resumed):
        yield f"resume_from_checkpoint: there is no folder {resumed}. Correct the path, or remove it."
    known = vocabulary(folder)
    for key in ("eos_token", "pad_token"):
        cloned = key == "pad_token" and data.get("chat_template_path")  # perhaps with tokens
        if known and not cloned and data.get(key) and not (isinstance(data[key], str) and data[key] in known):
            yield f"{key}: {data[key]!r} is not in the tokenizer's vocabulary. Correct it, or remove it."
