"""Task relevance of a sentence or line: how much of it its prompt and the text before it explain.

A sentence that belongs to the task is easier to predict for a reader who knows the task. Stock phrases, digressions,
page remains and lines of other answers are as hard to predict with the prompt as without it, however fluent they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from ..fields import Drop, Positive, ReferenceConfig
from .base import DROP, Score, ScoreConfig, ScoringContext, scorer

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..data.documents import DocumentSet
    from ..data.ragged import Bools, Doubles, Floats, Ints

PRIOR = 5.0  # nats added to the surprise of a unit, so that a unit of two tokens has no extreme share
LEAST = 0.1  # median share below which a reference does not read the prompts of a dataset
ROUNDS = 3  # of scoring units again without dropped text before them
SKIPPED = 1  # first tokens after such a gap: what they lack is the line's indentation, not what it says


class ExplainedConfig(ScoreConfig):
    """Scorer `explained`: the share of a unit's surprise that its prompt and the text before it explain."""

    unit: Literal["sentence", "line"] = Field(default="sentence", description="What gets one score.")
    first: Positive = Field(default=16, description="Only this many tokens of a unit are read, its first ones.")
    drop: Drop = Field(default=Drop(of_median=0.2), description=DROP)
    reference: ReferenceConfig | None = Field(
        default=None, description="Model that scores, same vocabulary; null: the run's own reference."
    )


@dataclass(frozen=True)
class Explained:
    """What `explained` takes from a dataset; None where it is still to be found.

    Args:
        template: token ids that all prompts have in common.
        limit: shares below it are dropped; units after dropped text are scored again without it.
        readable: whether the reference reads the prompts at all.
    """

    template: NDArray[Any] | None = None
    limit: float | None = None
    readable: bool | None = None


def _frozen(context: ScoringContext, config: ExplainedConfig) -> Score:
    found = _Units(context, config)
    _, fixed = found.scored(Explained())

    def score(later: ScoringContext, part: ExplainedConfig) -> Floats:
        return _Units(later, part).scored(fixed)[0]

    return score


@scorer("explained", ExplainedConfig, finds_nothing=True, stored=True, frozen=_frozen, version=3)
def explained(context: ScoringContext, config: ExplainedConfig) -> Floats:
    """`1 - ((A + B) / 2 + PRIOR) / (C + PRIOR)` of a sentence or line, (M,) float32, at most 1; low is dropped.

    A, B and C are the surprise (minus the log-probability, in nats) of the unit's first tokens: A right after its
    prompt, B after the prompt and the text before the unit, C after what all prompts of the dataset have in common.
    Tokens of white space alone do not count, because the lines around explain how a line is laid out. So 0 means that
    the context explains nothing of the unit, 0.3 that it explains three tenths of it, and a negative share that the
    context makes it less probable. The prompt of a turn is all that stands before the turn. Where there is no prompt, B
    alone counts, and the first unit is NaN. So is a unit of white space alone.

    Text that belongs to dropped text before it looks explained. So B of a kept unit is computed again, without the
    dropped units that stand directly before it, until nothing changes or three times; its first token, which lacks the
    indentation that goes with a dropped line, counts as before. Units of which the prompt alone explains twice the
    threshold are left out: they are kept unless the share computed from B alone is negative.

    If the median share of the dataset is below 0.1, all scores are NaN: a reference to which prompts say so little
    cannot tell what belongs to them.

    Source: ours, for the paper's task relevance; its Eq. (4) is the scorer `embedding_similarity`. The difference of
    the logarithms is pointwise mutual information.
    """
    return _Units(context, config).scored(Explained())[0]


class _Units:
    """The units of a context and what they are compared with."""

    def __init__(self, context: ScoringContext, config: ExplainedConfig) -> None:
        import numpy as np  # not at the top: a block is read without NumPy

        from ..data.sentences import blanks

        documents = context.documents
        self.context, self.config, self.documents = context, config, documents
        self.starts = context.segments(config.unit)
        self.lengths = np.diff(self.starts, append=len(context.token_ids))
        self.read = np.minimum(self.lengths, config.first)
        # white space is layout: the line before explains it, whatever the unit says
        self.not_blank = ~blanks(context.tokenizer, context.token_ids)
        runs = documents.completion_runs
        self.turns = runs[np.searchsorted(runs, self.starts, side="right") - 1]  # first token of each unit's turn
        places = documents.completion_positions
        self.prompts = places[self.turns]  # tokens before the turn
        self.blank = self._sums(self.not_blank.astype(np.float32)) == 0
        self.asked = ~context.protected[self.starts] & (places[self.starts] > 0) & ~self.blank

    def scored(self, given: Explained) -> tuple[Floats, Explained]:
        """Scores of all completion tokens, and what was taken from the dataset."""
        import numpy as np

        if given.readable is False:  # nothing would come of reading later documents
            return np.full(len(self.context.token_ids), np.nan, dtype=np.float32), given
        template = common_template(self.documents, self.context.tokenizer) if given.template is None else given.template
        later = self.starts > self.turns
        # before the documents' own scores, which are then found in the same pass
        after_prompt = self._logprobs_after(self.turns, template, np.flatnonzero(self.asked & later))
        in_context = self._sums(self.context.log_probabilities(self.config.reference))
        after_prompt = np.where(later, after_prompt, in_context)
        without_prompt = self._logprobs_after(np.full(len(self.starts), -1), template)
        prompted = self.prompts > len(template)
        shares = self._shares(in_context, after_prompt, without_prompt, prompted)
        median = self._median(shares)
        readable = given.readable if given.readable is not None else bool(median >= LEAST)
        if not readable:
            why = (
                f"the context explains {median:.2f} of the median {self.config.unit}: to this reference the prompts of "
            )
            why += "this data say too little"
            if np.isnan(median):
                why = f"no {self.config.unit} is left to ask: all have no prompt, are a format, or are protected"
            self.context.warn(f"{why}, so it finds no text that is off the task")
            return np.full(len(self.context.token_ids), np.nan, dtype=np.float32), Explained(template, -np.inf, False)
        limit = given.limit if given.limit is not None else self._limit(median)
        by_prompt = (after_prompt - without_prompt) / (PRIOR - without_prompt)
        read = self.starts.copy()  # what stands directly before a unit is read from here on
        for _ in range(ROUNDS):
            begins = self._before_dropped(shares < limit)
            # with twice the limit from the prompt alone a unit is kept, whatever B is
            changed = np.flatnonzero((begins < read) & (shares >= limit) & ~(by_prompt >= 2 * limit))
            if not len(changed):
                break
            read[changed] = begins[changed]
            in_context[changed] = self._logprobs_after(begins, template, changed, SKIPPED)[changed]
            shares = self._shares(in_context, after_prompt, without_prompt, prompted)
        return self._spread(shares), Explained(template, limit, True)

    def _limit(self, median: float) -> float:
        drop = self.config.drop
        if drop.of_median is not None:
            return drop.of_median * median
        return -float("inf") if drop.below is None else drop.below

    def _shares(self, in_context: Doubles, after_prompt: Doubles, without_prompt: Doubles, prompted: Bools) -> Doubles:
        import numpy as np

        known = np.where(prompted, (in_context + after_prompt) / 2, in_context)
        shares = (known - without_prompt) / (PRIOR - without_prompt)
        usable = self.asked & (prompted | (self.starts > self.turns))
        return np.where(usable & np.isfinite(shares), shares, np.nan)

    def _median(self, shares: Doubles) -> float:
        from ..data.ragged import Layout, dataset_quantiles

        layout = Layout(self.context.offsets, self.context.counts)
        return float(dataset_quantiles(self._spread(shares), layout, [0.5])[0])

    def _spread(self, shares: Doubles) -> Floats:
        """The share of every token's unit, (S,) -> (M,)."""
        import numpy as np

        return np.repeat(shares.astype(np.float32), self.lengths)

    def _sums(self, logprobs: Floats) -> Doubles:
        """Sum over the first tokens of each unit that are more than white space, (S,)."""
        import numpy as np

        from ..data.ragged import CHUNK_TOKENS, runs, stretches

        ends, sums = np.append(self.starts, len(logprobs)), np.zeros(len(self.starts))
        for part in runs(ends, CHUNK_TOKENS):
            here, first = slice(int(ends[part.start]), int(ends[part.stop])), self.starts[part] - ends[part.start]
            place = stretches(np.zeros_like(first), self.lengths[part])
            read = (place < self.config.first) & self.not_blank[here]
            sums[part] = np.add.reduceat(np.where(read, np.nan_to_num(logprobs[here].astype(np.float64)), 0.0), first)
        return sums

    def _logprobs_after(
        self, keep: Ints, template: NDArray[Any], only: Ints | None = None, skipped: int = 0
    ) -> Doubles:
        """Log-probability of the first tokens of each unit after what `keep` says, (S,); see `Splices`.

        The first `skipped` tokens count as they do after all text before them.
        """
        import numpy as np

        from ..data.splices import Splices

        chosen = np.flatnonzero(self.asked) if only is None else only
        chosen = chosen[(keep[chosen] < 0) | (self.documents.completion_positions[np.maximum(keep[chosen], 0)] > 0)]
        begin = self.starts[chosen]
        splices = Splices(keep[chosen], begin, begin + self.read[chosen], template)
        result = np.full(len(self.starts), np.nan)
        found = self.context.predictions_of(splices, self.config.reference).logprobs
        own = self.context.log_probabilities(self.config.reference) if skipped else found

        def counted(tokens: slice, place: Ints, at: Ints) -> Floats:
            here = np.where(place < skipped, own[at], found[tokens]) if skipped else found[tokens]
            return np.where(self.not_blank[at], here, np.float32(0))

        result[chosen] = splices.sums(counted)
        return result

    def _before_dropped(self, dropped: Bools) -> Ints:
        """First token of the dropped units directly before each unit in its turn, or of the unit itself, (S,).

        Units of white space alone go with the dropped unit that they follow.
        """
        import numpy as np

        starts = self.starts
        speaks = np.maximum.accumulate(np.where(self.blank, 0, np.arange(len(starts))))
        dropped = dropped[speaks] & (self.turns[speaks] == self.turns)
        opens = np.ones(len(starts), dtype=bool)  # units that no dropped unit of the same turn stands before
        opens[1:] = ~(dropped[:-1] & (self.turns[1:] == self.turns[:-1]))
        begins: Ints = starts[np.maximum.accumulate(np.where(opens, np.arange(len(starts)), 0))]
        return begins


def common_template(documents: DocumentSet, tokenizer: Any) -> NDArray[Any]:
    """What all prompts begin and end with, (K,) token ids: BOS, a system prompt, the mark of an answer.

    At least one token, so that there is something to predict the first token of a unit from.
    """
    import numpy as np

    from ..data.prompts import contexts, shared_ends

    (begins, ends), ids = contexts(documents), documents.input_ids
    if len(begins):
        front, back = shared_ends(ids, begins, ends)
        template = np.concatenate([ids[begins[0] : begins[0] + front], ids[ends[0] - back : ends[0]]])
        if len(template):
            return template
    marks = [
        value for name in ("bos_token_id", "eos_token_id") if (value := getattr(tokenizer, name, None)) is not None
    ]
    return np.asarray(marks[:1] or documents.input_ids[:1], dtype=np.int32)
