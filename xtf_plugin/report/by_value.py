"""Drops by the value of a column of the dataset: which source of a mixture loses most."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..data.column_values import Grouping
from ..data.ragged import Bools, Layout
from .terminal import on_one_line

LISTED = 20  # values; the others are summed


def by_value(groups: Mapping[str, Grouping], layout: Layout, keep: Bools) -> dict[str, list[dict[str, Any]]]:
    """For each column its values, the one that loses the largest share first; see `by` in docs/output-files.md.

    Args:
        groups: the values by column.
        layout: of N documents with M completion tokens; those without any are left out.
        keep: (M,).
    """
    tokens = layout.lengths * layout.counts
    dropped = layout.count(~keep) * layout.counts
    documents = np.where(layout.lengths > 0, layout.counts, 0)
    found = {}
    for column, (names, codes) in groups.items():
        sums = [np.bincount(codes, each, len(names)).astype(np.int64).tolist() for each in (documents, tokens, dropped)]
        entries = [_entry(*each) for each in zip(names, *sums, strict=True) if each[1]]
        entries.sort(key=lambda each: (-each["dropped_fraction"], -each["tokens"], each["value"]))
        if rest := entries[LISTED:]:
            numbers = (sum(each[key] for each in rest) for key in ("documents", "tokens", "dropped_tokens"))
            entries[LISTED:] = [{**_entry("other values", *numbers), "values": len(rest)}]
        found[column] = entries
    return found


def _entry(value: str, documents: int, tokens: int, dropped: int) -> dict[str, Any]:
    return {
        "value": on_one_line(value),
        "values": 1,
        "documents": documents,
        "tokens": tokens,
        "dropped_tokens": dropped,
        "dropped_fraction": dropped / tokens,
    }
