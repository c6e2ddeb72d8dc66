"""Scores flagged pieces of text again with the dropped text before them removed, until nothing changes.

The definition is a loop over a document's pieces in order, each scored after the text that was kept before it. A few
rounds over all flagged pieces of all documents give the same result, because a piece is final once all before it are,
and they send full batches through the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ..data.ragged import Bools, Floats, Ints
from .typicality import typicality_of

if TYPE_CHECKING:
    from ..fields import ReferenceConfig
    from .base import ScoringContext

# They limit the cost of documents of which most is dropped; a warning reports what they leave out. The budget is in
# lengths of the completion, so that a long prompt does not use it up.
ROUNDS = 6
BUDGET = 16


class IterativeRescoring:
    """Scores the pieces of all documents, and flagged ones again with the dropped text before them removed.

    Args:
        context: what the scorer is given.
        starts: (S,) first completion token of each piece, ascending from 0.
        limit: a piece is dropped if its score is below.
        reference: scores the pieces; None: the run's own.
    """

    def __init__(self, context: ScoringContext, starts: Ints, limit: float, reference: ReferenceConfig | None) -> None:
        self.context, self.starts, self.limit, self.reference = context, starts, limit, reference
        self.lengths = np.diff(starts, append=context.offsets[-1])
        self.document = np.searchsorted(context.offsets, starts, side="right") - 1
        self.left = BUDGET * np.diff(context.offsets)
        self.droppable = np.logical_or.reduceat(~context.protected, starts)
        self.left_out = np.zeros(len(starts), dtype=bool)

    def scores(self, typical: Floats, judge: Callable[[Floats, Bools], Floats]) -> Floats:
        """The higher of a piece's two scores where the first is below the limit, else the first, (M,) float32.

        An undefined second score drops nothing.

        Args:
            typical: (M,) typicality of all tokens in the complete document.
            judge: computes (M,) scores, equal within a piece, from the typicality of all tokens and the tokens that do
                not count before a piece within its sentence or line.
        """
        nothing = np.zeros(len(typical), dtype=bool)
        once = judge(typical, nothing)
        flagged = self._below(once)
        scores, again, before = once, typical, nothing
        gone = self._gone(flagged)
        for _ in range(ROUNDS):
            again = self._rescored(flagged, gone, before, typical, again)
            scores = np.where(flagged, np.maximum(once, judge(again, gone)), once)
            before, gone = gone, self._gone(self._below(scores))
            if np.array_equal(before, gone):
                break
        else:
            number = int((before ^ gone)[self.starts].sum())
            self.context.warn(f"rescoring ended after {ROUNDS} rounds while {number} sentences or lines still changed")
        if self.left_out.any():
            self.context.warn(
                f"{int(self.left_out.sum())} sentences or lines were not scored again, because rescoring had read "
                f"{BUDGET} times the length of their completion. The rule drops most of these documents: loosen it, or "
                "check that the reference knows this kind of text"
            )
        return scores

    def _below(self, scores: Floats) -> Bools:
        """Compared as the rule does, in double precision; NaN is not below."""
        below: Bools = scores.astype(np.float64) < self.limit
        return below

    def _gone(self, below: Bools) -> Bools:
        """What this score and `force_drop` drop."""
        gone: Bools = (below | self.context.forced) & ~self.context.protected
        return gone

    def _rescored(self, flagged: Bools, gone: Bools, before: Bools, typical: Floats, again: Floats) -> Floats:
        """`again` with new values for the flagged pieces before which `gone` differs from the last round's `before`."""
        hidden = self._preceding(gone)
        changed = flagged[self.starts] & self.droppable & (self._preceding(gone ^ before) > 0)
        wanted = self._affordable(np.flatnonzero(changed & (hidden > 0)), hidden)
        found = self.context.predictions_without(gone, self.starts, wanted, self.reference)
        scored = np.zeros(len(self.starts), dtype=bool)
        scored[wanted] = True
        values = np.where(np.repeat(scored, self.lengths), typicality_of(found), again)
        unhidden = np.repeat(changed & (hidden == 0), self.lengths)  # nothing before them is dropped any more
        return np.where(unhidden, typical, values)

    def _preceding(self, marks: Bools) -> Ints:
        """How many of the marked tokens (M,) stand before each piece in its document, (S,)."""
        running = np.concatenate([[0], np.cumsum(marks, dtype=np.int64)])
        before: Ints = running[self.starts] - running[self.context.offsets[self.document]]
        return before

    def _affordable(self, wanted: Ints, hidden: Ints) -> Ints:
        """The first of each document's wanted pieces, within its budget; the others keep their score."""
        place = self.starts[wanted] - self.context.offsets[self.document[wanted]]  # completion tokens before
        tokens = place - hidden[wanted] + self.lengths[wanted]
        document = self.document[wanted]
        running = np.cumsum(tokens)
        opens = np.diff(document, prepend=-1) > 0
        spent = running - np.repeat((running - tokens)[opens], np.diff(np.flatnonzero(opens), append=len(wanted)))
        paid: Bools = spent <= self.left[document]
        np.subtract.at(self.left, document[paid], tokens[paid])
        self.left_out[wanted[~paid]] = True
        return wanted[paid]
