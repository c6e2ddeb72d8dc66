"""From documents to a plan, without a trainer: scores from the store or the reference, thresholds, keep flags."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from .data.column_marks import AllMarks
from .data.column_values import UNKNOWN, Grouping, Values
from .data.documents import DocumentSet
from .data.ragged import Floats, Ints
from .scoring.batching import ScoringStats
from .scoring.cached_scores import ReferenceProvider, ScoreSource, about_scorers, run_scorers
from .scoring.distributed import ALONE, Ranks
from .selection.masks import MaskTable
from .selection.recurring import Recurring, recurring, warnings_of
from .selection.select import Scores, Selection, select
from .selection.text_rules import TextRules, special_ids

if TYPE_CHECKING:
    from .config.block import XTFConfig
    from .fields import ReferenceConfig

OF_ONE_RANK = ("cache_dir", "report")  # keys of the block that may differ between ranks
UNFILTERED = ": this run trains exactly as it would without its `xtf:` block"
NOTHING_DROPPED = f"nothing at all is dropped{UNFILTERED}. What other thresholds drop: xtf tune RECIPE"


@dataclass(frozen=True)
class Plan:
    """The tokens to train on, and what they were selected from.

    Args:
        config, documents, text, scores, selection: the block, its input and its result.
        reference: what to report of the run's own reference.
        stats: the cost of scoring.
        warnings: for the user.
        scorers: what to report of each score's scorer, of other references and of parts of documents.
        streaming: what to report of the calibration sample, for a plan of one.
        recurring: texts that several documents share.
        groups: what drops are counted by, by column.
        recipe: settings of the recipe that decide which rows are trained, where there is a recipe.
    """

    config: XTFConfig
    documents: DocumentSet
    text: TextRules
    scores: Scores
    selection: Selection
    reference: dict[str, Any]
    stats: ScoringStats
    warnings: list[str] = field(default_factory=list)
    scorers: dict[str, Any] = field(default_factory=dict)
    streaming: dict[str, Any] = field(default_factory=dict)
    recurring: list[Recurring] = field(default_factory=list)
    groups: Mapping[str, Grouping] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)

    def masks(self) -> MaskTable:
        """The table that the collator needs."""
        return MaskTable.build(self.scores.keys, self.scores.offsets, self.selection.keep, self.selection.best)

    @property
    def weights(self) -> Ints:
        """How often each completion token occurs in the dataset, (M,)."""
        return np.repeat(self.scores.counts, np.diff(self.scores.offsets))


def make_plan(
    config: XTFConfig,
    documents: DocumentSet,
    provider: ReferenceProvider,
    tokenizer: Any,
    *,
    references: Callable[[ReferenceConfig], ReferenceProvider] | None = None,
    progress: bool = True,
    ranks: Ranks = ALONE,
    marks: AllMarks | None = None,
    values: Mapping[str, Values] | None = None,
) -> Plan:
    """Score the documents that have no scores yet, and decide for every completion token.

    Args:
        provider: loads the run's own reference, if some score is missing.
        tokenizer: the training tokenizer.
        references: makes the provider of a score's own reference.
        ranks: of the run; each scores a share, and all get the same plan.
        marks: of the columns that the scorer `column` reads.
        values: of the columns of `report_by`.

    Raises:
        XTFError: ranks differ in block, data, reference or masks; see also `engine.score` and `run_scorers`.
        XTFUserError: from the layers, the domain or a reference's tokenizer.
    """
    block = {name: value for name, value in config.to_dict().items() if name not in OF_ONE_RANK}
    ranks.agree(json.dumps(block, sort_keys=True).encode(), "block")
    ranks.agree(special_ids(tokenizer).tobytes(), "special tokens")
    ranks.agree(documents.keys.tobytes() + documents.counts.tobytes(), "training data")
    text = TextRules.find(config, documents, tokenizer)
    about_run: dict[str, Any] = {"progress": progress, "ranks": ranks, "marks": marks}
    with ScoreSource(config, documents, tokenizer, provider, references, **about_run) as source:
        fingerprint = source.fingerprint(provider)
        computed = run_scorers(config, source, text)
        scores = scores_of(documents, source.logprobs, computed)
    selection = select(scores, config, text.protected, text.forced, text.segments, inside=text.inside)
    ranks.agree(selection.keep.tobytes() + selection.best.tobytes(), "masks")
    shared = recurring(config, documents, text, selection, tokenizer)
    groups = {column: each.of(documents) for column, each in (values or {}).items()}
    return Plan(
        config,
        documents,
        text,
        scores,
        selection,
        reference={**provider.description(), "fingerprint": fingerprint},
        stats=source.stats,
        warnings=[*_warnings(config, documents, source, text, selection, shared), *_unread(groups, documents)],
        scorers={
            "scores": about_scorers(config.scores),
            "references": source.passes,
            **source.about_excerpts(),
        },
        recurring=shared,
        groups=groups,
    )


def _warnings(
    config: XTFConfig,
    documents: DocumentSet,
    source: ScoreSource,
    text: TextRules,
    selection: Selection,
    shared: list[Recurring],
) -> list[str]:
    """All warnings about a plan."""
    found = [*source.warnings, *selection.warnings, *warnings_of(shared, int(documents.counts.sum()))]
    found += [each.warning() for each in text.matches if not each.tokens]
    if text.turns is not None:
        found += text.turns.warnings(selection.keep, documents.counts)
    if selection.keep.all():
        found.append(NOTHING_DROPPED)
    return found


def _unread(groups: Mapping[str, Grouping], documents: DocumentSet) -> list[str]:
    """Warnings of documents whose value is not known."""
    unread = {
        column: int(documents.counts[each.codes == each.names.index(UNKNOWN)].sum())
        for column, each in groups.items()
        if UNKNOWN in each.names
    }
    return [
        f"report_by: {number:,} documents are not among the rows that {column} was read from, so something changed "
        f"them afterwards; they are counted as {UNKNOWN}"
        for column, number in unread.items()
    ]


def scores_of(documents: DocumentSet, logprobs: Floats | None, values: dict[str, Floats]) -> Scores:
    """Scores of the documents' completion tokens."""
    return Scores(
        keys=documents.keys,
        offsets=documents.completion_offsets,
        counts=documents.counts,
        token_ids=documents.completion_ids,
        positions=documents.completion_positions,
        values=values,
        logprobs=logprobs,
    )
