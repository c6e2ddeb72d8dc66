"""The settings of a recipe that decide which rows and tokens are trained.

A run keeps a hash of each in its score table, so that scores are not shown for a recipe that names other data or
another model. Only hashes, because tables are shared, and a setting may be a secret.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_DECIDES = re.compile(
    r"data|split|val_set_size|test_size|^seed$|max_length|sequence|sample_len|excess_length|trunc|template|system_message|"
    r"_only_loss|train_on|role|column|pack|padding_free|stream|^model|^base_model|revision|tokenizer|special_tokens|"
    r"added_tokens|(eos|bos|pad|unk|eot)_tokens?"
)
_OTHERS = re.compile(r"dataloader|num_proc|_processes|metadata|^hub_|auth|secret|api_key")
_OPTION = re.compile(r"--([A-Za-z_-]+)(?:=(.*))?", re.DOTALL)


def row_settings(recipe: Mapping[str, Any], words: Sequence[str] = ()) -> dict[str, str]:
    """A hash of each of these settings, by name; options of the command line `words` replace the recipe's."""
    given = {str(key): value for key, value in recipe.items()} | dict(_options(words))
    return {
        name: hashlib.blake2b(_plain(value).encode(errors="replace"), digest_size=8).hexdigest()
        for name, value in given.items()
        if value is not None and _DECIDES.search(name) and not _OTHERS.search(name)
    }


def differing(made_with: Any, settings: Mapping[str, str]) -> list[str]:
    """Names of settings that differ from those that a table was made with; none if these are not known."""
    if not isinstance(made_with, Mapping):
        return []
    return sorted(name for name in {*made_with, *settings} if made_with.get(name) != settings.get(name))


def _options(words: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Names and values of options, read as YAML; an option without a value is true."""
    for word, following in zip(words, [*words[1:], "--"], strict=False):
        if option := _OPTION.fullmatch(word):
            value = option[2] if option[2] is not None else following
            yield option[1].replace("-", "_"), True if option[2] is None and value.startswith("--") else _read(value)


def _read(value: str) -> Any:
    import yaml  # not at the top: a process without a recipe needs none

    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        return value


def _plain(value: Any) -> str:
    """A value as text, the same for equal values: as JSON, or as Python writes it where JSON cannot."""
    try:
        return json.dumps(value, sort_keys=True, default=str)
    except (TypeError, ValueError, RecursionError):
        return repr(value)
