"""Second looks: what would be dropped is judged once more behind what was kept, until the verdicts stand.

The definition is a loop over a document's units in order, each judged behind the verdicts before it. The same verdicts
come out of a few rounds over all units of all documents at once: a unit's verdict is final as soon as all before it
are, and whole batches go through the reference.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from ..config_rules import ReferenceConfig
    from .base import ScoringContext

logger = logging.getLogger(__name__)

Bools = NDArray[np.bool_]
Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

# In the laboratory one round settles all but a few units and three settle them all (docs/evidence.md). The budget, in
# lengths of the document, bounds documents of which the reference would drop nearly everything.
ROUNDS = 6
BUDGET = 6


class SecondLooks:
    """Units of all documents, and which of them have to be looked at again.

    Args:
        context: what the scorer is given.
        starts: (S,) first completion token of each unit, ascending from 0.
        limit: a unit goes if its score is below.
        reference: who looks; None: the run's own.
    """

    def __init__(self, context: ScoringContext, starts: Ints, limit: float, reference: ReferenceConfig | None) -> None:
        self.context, self.starts, self.limit, self.reference = context, starts, limit, reference
        self.lengths = np.diff(starts, append=context.offsets[-1])
        self.document = np.searchsorted(context.offsets, starts, side="right") - 1
        self.left = BUDGET * context.documents.lengths.astype(np.int64)

    def scores(self, typical: Floats, judge: Callable[[Floats], Floats]) -> Floats:
        """The higher of a unit's two scores where the first is below the limit, else the first, (M,) float32.

        Args:
            typical: (M,) of all tokens behind the whole document.
            judge: typicality of all tokens -> score of all tokens, equal throughout a unit.
        """
        once = judge(typical)
        suspect = once < self.limit  # NaN, undefined, is none
        scores, again = once, typical.copy()
        dropped, before = suspect & ~self.context.protected, np.zeros_like(suspect)
        for _ in range(ROUNDS):
            found = self._look(suspect, dropped, before, typical, again)
            again = np.where(np.isnan(found), again, found)
            scores = np.where(suspect, np.maximum(once, judge(again)), once)
            before, dropped = dropped, (scores < self.limit) & ~self.context.protected
            if np.array_equal(before, dropped):
                break
        else:
            logger.info("xtf: some verdicts still changed after %d second looks; they stay as they are", ROUNDS)
        return scores

    def _look(self, suspect: Bools, dropped: Bools, before: Bools, typical: Floats, again: Floats) -> Floats:
        """Typicality of the units whose past has changed since the last look, NaN elsewhere, (M,)."""
        hidden = self._preceding(dropped)
        changed = suspect[self.starts] & (self._preceding(dropped ^ before) > 0)
        whole = np.repeat(changed & (hidden == 0), self.lengths)  # all before it was kept after all
        wanted = self._affordable(np.flatnonzero(changed & (hidden > 0)), hidden)
        seen = self.context.predictions_without(dropped, self.starts, wanted, self.reference)
        return np.where(whole, typical, seen.logprobs + seen.entropy)

    def _preceding(self, marks: Bools) -> Ints:
        """How many of the marked tokens (M,) stand before each unit in its document, (S,)."""
        running = np.concatenate([[0], np.cumsum(marks, dtype=np.int64)])
        before: Ints = running[self.starts] - running[self.context.offsets[self.document]]
        return before

    def _affordable(self, wanted: Ints, hidden: Ints) -> Ints:
        """The first of each document's wanted units, as far as its budget goes; the others keep their verdict."""
        tokens = self.context.positions[self.starts[wanted]] - hidden[wanted] + self.lengths[wanted]
        document = self.document[wanted]
        running = np.cumsum(tokens)
        opens = np.diff(document, prepend=-1) > 0
        spent = running - np.repeat((running - tokens)[opens], np.diff(np.flatnonzero(opens), append=len(wanted)))
        paid: Bools = spent <= self.left[document]
        np.subtract.at(self.left, document[paid], tokens[paid])
        if not paid.all():
            logger.info("xtf: %d second looks were left out, beyond %d lengths of a document", (~paid).sum(), BUDGET)
        return wanted[paid]
