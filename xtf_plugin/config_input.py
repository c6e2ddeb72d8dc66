"""What stands under `xtf:` before the models see it: text as a value, mappings of any kind as plain dicts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import yaml

from .errors import XTFUserError


def plain(value: Any, depth: int = 5) -> Any:
    """Mappings of any kind as dicts with text keys, as deep as a block goes (YAML aliases can make one endless)."""
    if not isinstance(value, Mapping) or depth == 0:
        return value
    return {key_text(key): plain(item, depth - 1) for key, item in value.items()}


def key_text(key: Any) -> str:
    """`str(key)`, also of whole numbers with more digits than Python writes out."""
    try:
        return str(key)
    except ValueError:
        return f"{key:#x}"[:20] + "..." if isinstance(key, int) else f"<{type(key).__name__}>"


def read(text: str) -> Any:
    """JSON or YAML text as a value; empty text is refused, because it would switch the filter off unnoticed."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        try:
            value = yaml.safe_load(text)
        # besides YAMLError, PyYAML's constructors raise these on scalars that do not fit their tag
        except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            told = " ".join(str(error).split())
            raise XTFUserError(f"xtf: {text[:80]!r} is neither JSON nor YAML: {told}. See docs/config.md.") from None
    if value is None and text.strip().lower() not in ("null", "~"):
        raise XTFUserError(f"xtf: {text[:80]!r} is empty. Write true for the defaults, false for off, or a mapping.")
    return value
