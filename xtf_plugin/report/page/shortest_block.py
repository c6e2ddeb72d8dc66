"""The shortest block that equals a config, for a page to change and a reader to paste."""

from __future__ import annotations

from typing import Any

from ...config.block import XTFConfig
from ...config.scores import SLOTS


def minimal(config: XTFConfig) -> dict[str, Any]:
    """The shortest block that equals a config: its preset and the keys that differ from it."""
    usual = XTFConfig.model_validate({"preset": config.preset, "force_drop": ["."]}).to_dict() | {"force_drop": []}
    changed = {key: value for key, value in config.to_dict().items() if value != usual.get(key)}
    for key in ("reference", "protect") & changed.keys():
        changed[key] = {name: value for name, value in changed[key].items() if value != usual[key][name]}
    for key in SLOTS.keys() & changed.keys():
        changed[key] = _part(changed[key], usual[key], getattr(config, key))
    if "selectors" in changed:
        off = {name: False for name, value in changed["selectors"].items() if value is False}
        changed["selectors"] = {**{name: _part(True, None, part) for name, part in config.selectors.items()}, **off}
    return {"preset": config.preset, **changed}


def _part(value: Any, usual: Any, part: Any) -> Any:
    """The shortest part of a block for a score, beside the preset's part if both have the same scorer."""
    if value is False:
        return False
    if isinstance(usual, dict) and usual["scorer"] == part.scorer:
        return {key: own for key, own in value.items() if own != usual[key]}
    return {"scorer": part.scorer, **part.model_dump(mode="json", exclude_defaults=True, exclude={"scorer"})}
