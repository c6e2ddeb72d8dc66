"""Stored scores under another block: what `xtf show` and `xtf report` print after a threshold was changed.

Nothing is loaded but the score table: no model, no host, no tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa

from ..config.block import XTFConfig
from ..errors import XTFUserError
from ..selection.select import reason_text, rule_bits
from . import score_table, whatif
from .by_value import by_value
from .score_table import ScoreTable
from .summary import Verdicts
from .terminal import Document, Part

NOTE = (
    "selected again from the stored scores, since only thresholds have changed. Scores that depend on what is dropped "
    "may differ in a run; for its exact figures: xtf score RECIPE"
)


def select_again(path: Path, config: XTFConfig, model: str | None) -> ScoreTable | None:
    """The score table of a file with the decisions of another block; None: its scores do not serve.

    Args:
        path: of the score table.
        config: the block.
        model: name of the model that is trained, which the table must be of unless the block names a reference.
    """
    try:
        table = score_table.read(path)
        selection = whatif.reselect(table, config)
    except XTFUserError:
        return None
    named = table.about.get("reference", {}).get("name")
    if not table.groups.keys() >= set(config.report_columns):
        return None
    if table.config.to_dict() == config.to_dict() or (config.reference.model is None and named != model):
        return None
    scores = {name: table.scores[name] for name in config.scores}  # the block may have lost some
    groups = {column: table.groups[column] for column in config.report_columns}
    found = replace(table, config=config, scores=scores, keep=selection.keep, reasons=selection.reasons, groups=groups)
    verdicts = Verdicts(config, found, found.weights)
    emptied = (found.layout.lengths > 0) & (found.layout.count(found.keep) == 0)
    totals = {**table.about["totals"], "fully_dropped_documents": int(found.counts[emptied].sum())}
    facts = {
        **table.about,
        "config": config.to_dict(),
        "thresholds": selection.thresholds,
        "totals": {**totals, **verdicts.totals()},
        "combinations": verdicts.combinations(),
        "by": by_value(groups, found.layout, found.keep),
        "recurring": [],
        "warnings": [NOTE, *selection.warnings],
    }
    return replace(found, about=dict(score_table.plain(facts)))


def documents(table: ScoreTable) -> Iterator[Part]:
    """The distinct documents of a table, in the order of their first rows."""
    bits = rule_bits(table.config)
    names = {int(each): reason_text(int(each), bits) for each in np.unique(table.reasons)}

    def read(index: int, where: slice) -> Document:
        prompts = table.prompts(where)
        columns = {
            "token_id": table.token_ids[where],
            "token": pa.nulls(where.stop - where.start, pa.string()),
            "prompt": [prompts.get(at) for at in range(where.stop - where.start)],
            "kept": table.keep[where],
            "reason": [names[int(each)] for each in table.reasons[where]],
        }
        return Document.read(int(table.rows[index]), table.key(index), pa.table(columns), table.pieces)

    sizes, kept = table.layout.lengths, table.layout.count(table.keep)
    for index in np.flatnonzero(sizes).tolist():
        where = slice(table.offsets[index], table.offsets[index + 1])
        yield Part(table.key(index), int(sizes[index]), int(sizes[index] - kept[index]), partial(read, index, where))
