"""Presets of the `xtf:` block, and how a block is laid over one.

Apart from `config.py` so that both stay readable; nothing here is validated, that is left to the models there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .config_selectors import with_preset

ATTRIBUTES = ("reasoning_importance", "knowledge_novelty", "task_relevance")

# What a preset changes from the defaults of the fields. Key by key, a block wins over its preset.
# The default asks which lines and sentences are out of place, told by how they begin; docs/evidence.md has the
# comparison with the paper's attributes that led there.
PRESETS: dict[str, dict[str, Any]] = {
    "default": {
        **dict.fromkeys(ATTRIBUTES, False),
        "selectors": {
            "out_of_place": {"scorer": "opening", "unit": "both", "context": "kept", "drop": {"below": -4.0}},
        },
    },
    "none": dict.fromkeys(ATTRIBUTES, False),  # for a block that names all of its own rules
    "paper": {
        "reasoning_importance": {"layers": "last", "drop": {"fence": 1.0}},
        "protect": {"special_tokens": False},
        "min_kept": 0,
    },
    "official": {
        "reasoning_importance": {"layers": "first", "drop": {"fence": 1.5}, "max_fraction": 0.05},
        "knowledge_novelty": {"drop": {"known_above": 0.95}, "max_fraction": 0.05},
        "task_relevance": {"embedding": "output", "drop": {"cluster": 2, "of": 5}, "max_fraction": 0.05},
        "protect": {"special_tokens": False},
        "min_kept": 0,
    },
}


def over_preset(block: Mapping[str, Any]) -> dict[str, Any]:
    """The block over its preset: mappings key by key, `drop` as a whole; `true` keeps an attribute's preset."""
    name = block.get("preset", "default")
    preset = PRESETS.get(name, {}) if isinstance(name, str) else {}
    merged = {**preset, **block}
    for key in ("reference", "protect", *ATTRIBUTES):
        given, base = merged.get(key), preset.get(key, {}) or {}  # off in the preset: what is given stands alone
        if given is True and key in ATTRIBUTES:
            merged[key] = base
        elif isinstance(given, Mapping):
            merged[key] = {**base, **given}
    if "selectors" in block:
        merged["selectors"] = with_preset(block["selectors"], preset.get("selectors", {}))
    return merged
