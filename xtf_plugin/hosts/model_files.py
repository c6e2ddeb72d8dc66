"""What the files of a model say: whether it can be loaded, its tokens, its architecture.

No host is imported for it, so `xtf check` answers in a moment. Of a model on the hub only what its cache holds is read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..environment import NO_CAUSAL_LM
from . import hub

if TYPE_CHECKING:
    from ..config.block import XTFConfig

TILDE = "`~` stands for no folder here: write the whole path"

_TOKENIZERS = ("tokenizer.json", "vocab.*", "*.model", "*.tiktoken", "tekken.json", "tokenization_*.py")


def of_model(
    what: str, name: str, revision: str | None, env: Mapping[str, str], *, apart: bool = False
) -> Iterator[str]:
    """Problems of a model's folder; `apart`: its tokenizer is in another one."""
    path = Path(name)
    if not os.path.isdir(path):
        if name.startswith((".", "/", "~")) or name.count("/") > 1:
            next_ = TILDE if name.startswith("~") else "Give a folder written by save_pretrained, or a hub id"
            yield f"{what}: there is no folder {name}{hub.looked_at(name)}. {next_}."
        elif why := hub.missing("model", name, revision, env):
            yield f"{what}: {why}"
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


@cache
def facts(folder: Path | None, name: str) -> dict[str, Any]:
    """A JSON file of a folder; empty if there is none, or it holds something else."""
    try:
        found = json.loads((folder / name).read_text(encoding="utf-8")) if folder else {}
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def vocabulary(folder: Path | None) -> dict[str, int]:
    """Ids of a tokenizer's tokens, added ones among them; empty if they are not in a file that is read here."""
    about = facts(folder, "tokenizer.json")
    found = about.get("model", {}).get("vocab", {})
    if isinstance(found, list):  # of pieces and scores
        found = {piece: index for index, (piece, _) in enumerate(found)}
    return {**found, **{token["content"]: token["id"] for token in about.get("added_tokens", ())}}


def of_tokenizers(ours: Path | None, theirs: Path | None, name: str) -> Iterator[str]:
    """The problem of a reference with another vocabulary."""
    one, two = vocabulary(ours), vocabulary(theirs)
    if one and two and one != two:
        yield (
            f"reference.model: the tokenizer of {name} has another vocabulary ({len(two)} entries against {len(one)}). "
            "Use a reference of the same model family."
        )


def of_architecture(trained: Path | None, scored: Path | None, config: XTFConfig) -> Iterator[str]:
    """Problems of what a model computes, and of scores that its attention does not give."""
    about = facts(trained, "config.json")
    kind = " ".join(about.get("architectures") or [])
    if about.get("is_encoder_decoder") or any(part in kind for part in NO_CAUSAL_LM):
        yield f"the model: {kind or 'it'} predicts no next tokens of its input. Train a causal language model."
    about = facts(scored, "config.json")
    if not any(part.scorer == "attention_received" for part in config.scores.values()):
        return
    type_ = str(about.get("text_config", about).get("model_type"))
    code = source("transformers", f"models/{type_}/modeling_{type_}.py")
    without = code and "ALL_ATTENTION_FUNCTIONS" not in code
    if without or "s_aux" in code or "position_bias" in code:
        yield (
            f"reasoning_importance: attention received cannot be recorded in the architecture {type_}. Remove the "
            "scores with `scorer: attention_received`, use `preset: default`, or name another reference.model."
        )


@cache
def source(package: str, path: str) -> str:
    """The source of a module of an installed package, which is not imported; empty if there is none."""
    spec = util.find_spec(package)
    roots = list(spec.submodule_search_locations or []) if spec else []
    files = [Path(root, path) for root in roots]
    return next((file.read_text(encoding="utf-8") for file in files if file.is_file()), "")
