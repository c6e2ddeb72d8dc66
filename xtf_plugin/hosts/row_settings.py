"""The settings of a recipe that decide which rows and tokens are trained.

A run keeps them in its score table, so that scores are not shown for a recipe that names other data or another model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

_DECIDES = re.compile(
    r"data(?!loader)|split|max_length|sequence|template|_only_loss|train_on|pack|trunc|padding_free|stream|token|"
    r"^model|^base_model|^eos|role|column|test_size"
)
_OPTION = re.compile(r"--([a-z_-]+)(?:=(.*))?", re.DOTALL)


def row_settings(recipe: Mapping[str, Any], words: Sequence[str] = ()) -> dict[str, Any]:
    """The settings as JSON holds them; those of the command line `words`, which win, by their options (`--name`)."""
    found = {str(key): value for key, value in recipe.items() if value is not None and _DECIDES.search(str(key))}
    for word, following in zip(words, [*words[1:], ""], strict=False):
        option = _OPTION.fullmatch(word)
        if option and _DECIDES.search(option[1]):
            found[f"--{option[1]}"] = following if option[2] is None else option[2]
    plain: dict[str, Any] = json.loads(json.dumps(found, default=str))
    return plain


def differing(made_with: Any, settings: Mapping[str, Any]) -> list[str]:
    """Names of settings that differ from those that a table was made with; none if these are not known."""
    if not isinstance(made_with, Mapping):
        return []
    return sorted(name for name in {*made_with, *settings} if made_with.get(name) != settings.get(name))
