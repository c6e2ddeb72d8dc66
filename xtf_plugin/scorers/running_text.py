"""Running text: whether a line is one of sentences, or stands among such.

Menus, links and captions of a scraped page explain each other, so a model does not tell them from the article. Their
form does: an article is long lines that end like a sentence, and what is around it is short lines that do not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from ..fields import Drop
from .base import DROP, ScoreConfig, ScoringContext, scorer

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..data.ragged import Doubles, Floats, Ints

SENTENCE = 20  # characters of a line that is running text if it ends like a sentence
PARAGRAPH = 100  # characters of a line that is running text however it ends
MOST = 200  # characters that a line counts for
NEXT = 0.5  # what a line counts for its neighbour; for the one after that half as much


class RunningTextConfig(ScoreConfig):
    """Scorer `running_text`: how many characters of running text a line and the lines around it have."""

    unit: Literal["line"] = Field(default="line", description="What gets one score.")
    drop: Drop = Field(default=Drop(below=150), description=DROP)


@scorer("running_text", RunningTextConfig, finds_nothing=True, per_document=True)
def running_text(context: ScoringContext, config: RunningTextConfig) -> Floats:
    """Sum over the lines of a turn of `r / 2 ** distance`, (M,) float32 in characters, 0 to 600; low is dropped.

    `r` is the number of characters of a line that is running text, at most 200, and 0 of another line. Running text has
    at least 20 characters and ends with the mark of a sentence, or has at least 100. Wide characters, as Chinese has
    them, count twice among the first 100. `distance` is 0 for the line itself, 1 for its neighbours and so on; lines of
    white space alone do not count, and are NaN. So a heading between two paragraphs scores 200, and a menu 0.

    It needs no model. Code, tables and lists are not running text either: use it only for pages and transcripts.

    Source: ours. Finding the text of a page by the length of its blocks is known from boilerplate removal.
    """
    import numpy as np  # not at the top: a block is read without NumPy

    starts = context.segments(config.unit)
    texts = [text.strip() for text in _texts(context, starts)]
    own = np.asarray([characters(text) for text in texts], dtype=np.float64)
    turns = np.searchsorted(context.documents.completion_runs, starts, side="right")
    filled = np.flatnonzero([bool(text) for text in texts])
    scores = np.full(len(starts), np.nan, dtype=np.float32)
    scores[filled] = _spread(own[filled], turns[filled])
    return np.repeat(scores, np.diff(starts, append=len(context.token_ids)))


def characters(line: str) -> int:
    """Characters that a line without white space around it counts for: 0 unless it is running text, and 200 at most."""
    from unicodedata import east_asian_width

    from ..data.sentences import ends_sentence

    size = len(line) + sum(east_asian_width(char) in "WF" for char in line[:PARAGRAPH])
    return min(size, MOST) if size >= (SENTENCE if ends_sentence(line) else PARAGRAPH) else 0


def _texts(context: ScoringContext, starts: Ints) -> list[str]:
    """The text of each line."""
    import numpy as np

    from ..data.token_text import token_bytes

    distinct, which = np.unique(context.token_ids, return_inverse=True)
    pieces: NDArray[Any] = np.empty(len(distinct), dtype=object)
    pieces[:] = token_bytes(context.tokenizer, distinct.tolist())
    lines = np.split(pieces[which], starts[1:])
    return [b"".join(line).decode("utf-8", errors="replace") for line in lines]


def _spread(own: Doubles, turns: Ints) -> Doubles:
    """What each line has with what it takes from those before and after it in its turn, (L,)."""
    import numpy as np

    total = own.copy()
    for step in (1, -1):
        taken, last = 0.0, -1
        for at in range(len(own))[::step]:
            taken = taken if turns[at] == last else 0.0
            total[at] += taken
            taken, last = NEXT * (taken + own[at]), int(turns[at])
    return np.asarray(total)
