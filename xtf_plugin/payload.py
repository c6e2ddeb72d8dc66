"""All that report.html shows, as one JSON-able mapping, and the facts that summary.json has of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from . import facts, page, sample, whatif
from .selection import select as selection
from .data import token_text as spans
from .config.block import XTFConfig
from .config.block import PRESETS
from .plan import Plan
from .sample import packed
from .sliders import Slider
from .whatif import WhatIf


def build(plan: Plan, tokenizer: Any, summary: Mapping[str, Any], counted: Mapping[str, Any]) -> dict[str, Any]:
    """The page's data.

    Args:
        plan: of the run.
        tokenizer: the training tokenizer.
        summary: of `report.summary`.
        counted: of `explained`, whose what-if it takes.
    """
    bits = selection.rule_bits(plan.config)
    seen = np.unique(plan.selection.reasons).tolist()
    table: WhatIf = counted["whatif"]
    return {
        "format": page.FORMAT,
        "summary": summary,
        "block": minimal(plan.config),
        "preset_selectors": sorted(PRESETS[plan.config.preset].get("selectors", {})),
        "reasons": {value: [name for name in selection.reason_text(value, bits).split(",") if name] for value in seen},
        "whatif": _whatif(table),
        **sample.documents(plan, table, counted["marks"], tokenizer),
    }


def explained(plan: Plan, tokenizer: Any) -> dict[str, Any]:
    """What the sliders need (`whatif`, `marks`), and `facts` for summary.json: score distributions,
    combinations of rules, tables of tokens, how documents end.
    """
    marks = plan.marked(tokenizer)
    table = whatif.build(plan.scores, plan.config, marks.protected, marks.forced, marks.segments)
    if plan.config.control is not None:
        table = _still(table)
    distinct = np.unique(plan.scores.token_ids).tolist()
    pieces = dict(zip(distinct, spans.token_bytes(tokenizer, distinct), strict=True))
    told = {
        "distributions": facts.distributions(plan, marks.segments),
        "combinations": facts.combinations(plan),
        "tokens": facts.token_tables(plan, pieces, table.sliders),
        "endings": facts.endings(plan, tokenizer, pieces),
    }
    return {"whatif": table, "marks": marks, "facts": told}


def minimal(config: XTFConfig) -> dict[str, Any]:
    """The shortest block that equals a config: its preset, and what differs from it."""
    usual = XTFConfig.model_validate({"preset": config.preset, "force_drop": ["."]}).to_dict() | {"force_drop": []}
    return {
        "preset": config.preset,
        **{key: value for key, value in config.to_dict().items() if value != usual.get(key)},
    }


def _still(table: WhatIf) -> WhatIf:
    """Sliders that cannot be moved: with `control: random` tokens are drawn, whatever the thresholds."""
    told = "control: random draws the tokens, so that a moved threshold would show nothing"
    still = []
    for slider in table.sliders:
        here, limits = slider.patterns[:, [slider.at]], [slider.limits[slider.at]]
        still.append(Slider(slider.voter, "", [None], 0, here, slider.codes, limits, slider.own, told))
    return replace(table, sliders=still)


def _whatif(table: WhatIf) -> dict[str, Any]:
    """Sliders and cells for the page; patterns as text of 0 and 1."""
    none = np.zeros((0, len(table.sliders) + 1), dtype=np.int64)
    lasting = np.concatenate([none, *(documents.tokens for documents in table.floored)])
    return {
        "sliders": [
            {
                "voter": slider.voter,
                "key": slider.key,
                "stops": list(slider.stops),
                "at": slider.at,
                "patterns": ["".join("01"[bit] for bit in row) for row in slider.patterns.astype(int).tolist()],
                "limits": [list(limits) for limits in slider.limits],
                "own": slider.own,
                "told": slider.told,
            }
            for slider in table.sliders
        ],
        "cells": packed(table.cells, "<u1"),
        "flags": packed(table.flags, "<u1"),
        "weights": table.weights.tolist(),
        "floored": [[f.occurrences, f.kept, f.wanted, len(f.tokens)] for f in table.floored],
        "lasting": packed(lasting[:, :-1], "<u1"),
        "lasting_tokens": packed(lasting[:, -1], "<u4"),
        "complete": table.complete,
    }
