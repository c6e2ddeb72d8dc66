"""Marks that somebody else has made: a critic, a reward model for steps, a person.

Each is a column of the dataset. Hosts tokenise rows before anybody sees them, so `training.columns` reads the column
where rows still have their text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from ..fields import Drop, Name
from .base import DROP, ScoreConfig, ScoringContext, scorer

if TYPE_CHECKING:
    from ..data.ragged import Floats


class ColumnConfig(ScoreConfig):
    """Scorer `column`: whether a column of the dataset marks the token."""

    column: Name = Field(description="Column with the marks of each row; null or an empty list: nothing is marked.")
    format: Literal["spans", "lines", "messages"] = Field(
        default="spans",
        description="spans: [start, end) characters of the completion. lines: indices of its lines that are not blank. "
        "messages: indices of assistant messages. In a chat, spans and lines are a list for each assistant message.",
    )
    text: Name | None = Field(
        default=None,
        description="Column with the text that is marked; null: completion, messages, conversations or text.",
    )
    drop: Drop = Field(default=Drop(below=0.5), description=DROP)


@scorer("column", ColumnConfig, finds_nothing=True)
def column(context: ScoringContext, config: ColumnConfig) -> Floats:
    """0 where the column marks the token, else 1, (M,) float32; low is dropped.

    A token is marked if spans hold at least half of its bytes.

    Source: the user's own.
    """
    import numpy as np  # not at the top: a block is read without NumPy

    marked = context.marks(config.column, config.format, config.text)
    if not marked.any():
        context.warn(f"the column {config.column} marks nothing in this dataset")
    scores: Floats = np.where(marked, np.float32(0), np.float32(1))
    return scores


def column_parts(scores: Mapping[str, ScoreConfig]) -> dict[str, ColumnConfig]:
    """The scores that read a column."""
    return {name: part for name, part in scores.items() if isinstance(part, ColumnConfig)}
