"""From documents to a plan: scores out of the store or the reference, thresholds, keep flags.

No trainer is known here. The reference comes as a provider, so that it is loaded only if some score is missing.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from . import relevance
from .batches import ScoringStats
from .collator import MaskTable
from .documents import DocumentSet
from .marks import Marks, segment_starts, special_ids
from .passes import stored_scores
from .ranks import ALONE, Ranks
from .reference import Reference, resolve_layers
from .selection import Scores, Selection, select
from .selectors import Floats, StoredPredictions, check_finite, facts, score_selectors
from .sharing import open_on_all
from .store import ScoreStore, StoredScores

if TYPE_CHECKING:
    from .config import XTFConfig
    from .scorers import ReferenceConfig

logger = logging.getLogger(__name__)

OF_ONE_RANK = ("cache_dir", "report")  # keys of the block that only the rank's own files follow
NOTHING_DROPPED = "nothing at all is dropped: this run trains exactly as it would without its `xtf:` block"


class ReferenceProvider(Protocol):
    """A reference that need not be there yet."""

    def fingerprint(self) -> str:
        """Hex key of everything its scores depend on."""

    def description(self) -> dict[str, Any]:
        """What to tell about it: name, quantisation, dtype."""

    def text_config(self) -> Any:
        """Config of its language model."""

    def open(self) -> AbstractContextManager[Reference]:
        """The reference, ready to score; a separate one is freed on exit."""


@dataclass(frozen=True)
class Plan:
    """What will be trained on, and why.

    `selectors`: about the selectors, for the report. `streaming`: about the calibration sample that this is a plan of,
    if it is one. `marks`: see `marked`.
    """

    config: XTFConfig
    documents: DocumentSet
    scores: Scores
    selection: Selection
    reference: dict[str, Any]
    stats: ScoringStats
    reused: int
    warnings: list[str] = field(default_factory=list)
    selectors: dict[str, Any] = field(default_factory=dict)
    streaming: dict[str, Any] = field(default_factory=dict)
    marks: Marks | None = field(default=None, compare=False, repr=False)

    def marked(self, tokenizer: Any) -> Marks:
        """What the text says of its tokens: as it was selected with, or found anew if that was not kept."""
        return self.marks or Marks.find(self.config, self.documents, tokenizer)

    def masks(self) -> MaskTable:
        """The collator's view of the plan."""
        return MaskTable.build(self.scores.keys, self.scores.offsets, self.selection.keep, self.selection.best)

    @property
    def weights(self) -> NDArray[np.int64]:
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
) -> Plan:
    """Score what is missing and decide for every completion token.

    Args:
        config: the block.
        documents: of the dataset.
        provider: of the run's own reference.
        tokenizer: the training tokenizer.
        references: makes the provider of a selector's own reference.
        progress: show a bar.
        ranks: of the run; each gets the same plan, and scores its share.

    Raises:
        XTFError: ranks with different blocks, data or references, or that come to different masks; the reference gives
            no finite score at all; see also `scorer.score` and `score_selectors`.
        XTFUserError: from the layers, the domain or a reference's tokenizer.
    """
    block = {name: value for name, value in config.to_dict().items() if name not in OF_ONE_RANK}
    ranks.agree(json.dumps(block, sort_keys=True).encode(), "block")
    ranks.agree(special_ids(tokenizer).tobytes(), "special tokens")
    layers = attention_layers(config, provider.text_config())
    fingerprint = ranks.each(provider.fingerprint)
    ranks.agree(documents.keys.tobytes() + documents.counts.tobytes(), "training data")
    ranks.agree(fingerprint.encode(), "reference")
    table = None
    if config.task_relevance:
        table = relevance.RelevanceTable(config.task_relevance, documents, tokenizer)
    description = {**provider.description(), "fingerprint": fingerprint}
    tag = ",".join(map(str, layers)) or None
    root = config.resolved_cache_dir()
    with ScoreStore(root, fingerprint, tag, description=description) as store:
        stats, reused, stored, values = _gather(
            config, documents, provider, fingerprint, table, layers, store, progress=progress, ranks=ranks
        )
    warnings = [] if stored is None else check_finite(stored.logprobs, documents.completion_positions, description)
    source = StoredPredictions(config, documents, provider, references, stored, progress=progress, ranks=ranks)
    marks, starts = Marks.find(config, documents, tokenizer), partial(segment_starts, documents, tokenizer)
    selectors = score_selectors(config, tokenizer, source, starts, marks.protected, marks.forced)
    stats, reused = source.main_pass or (stats, reused)
    given = None
    if table is not None and values is not None:
        given = table.gather(values, documents.input_ids[documents.completion])
    scores = scores_of(documents, source.known, given, selectors)
    selection, told = _selected(config, scores, marks, ranks)
    told = warnings + source.warnings + told
    plan = Plan(config, documents, scores, selection, description, stats, reused, told, marks=marks)
    if not config.selectors:
        return plan
    about = {"scorers": facts(config), "references": source.passes, **source.about_excerpts()}
    return replace(plan, selectors=about)


def _selected(config: XTFConfig, scores: Scores, marks: Marks, ranks: Ranks) -> tuple[Selection, list[str]]:
    """The decision for every completion token, the same on every rank, and what to tell about it."""
    forced = marks.forced
    selection = select(scores, config, marks.protected, forced, marks.segments)
    ranks.agree(selection.keep.tobytes() + selection.best.tobytes(), "masks")
    warnings = list(selection.warnings)
    if forced is not None and not forced.any():
        warnings.append(f"force_drop: {config.force_drop} matches nothing in the whole dataset")
    if selection.keep.all():
        warnings.append(NOTHING_DROPPED)
    return selection, warnings


def attention_layers(config: XTFConfig, text_config: Any) -> tuple[int, ...]:
    """The layers whose attention is recorded, by the config of the reference's language model; none if it is off."""
    if not config.reasoning_importance:
        return ()
    choice = config.reasoning_importance.layers
    return resolve_layers(choice if isinstance(choice, str) else list(choice), text_config)


def _gather(
    config: XTFConfig,
    documents: DocumentSet,
    provider: ReferenceProvider,
    fingerprint: str,
    table: relevance.RelevanceTable | None,
    layers: tuple[int, ...],
    store: ScoreStore,
    *,
    progress: bool,
    ranks: Ranks,
) -> tuple[ScoringStats, int, StoredScores | None, NDArray[np.float32] | None]:
    """Scores of all documents: stored ones as they are, missing ones from one opening of the reference."""
    path = None if table is None else store.directory.parent / relevance.table_name(table.key())
    values = None if table is None or path is None else relevance.cached_table(path, fingerprint, len(table.scored_ids))
    stats, reused, stored = ScoringStats(), 0, None
    with ExitStack() as stack:
        reference = cache(lambda: stack.enter_context(provider.open()))
        if config.reasoning_importance or config.knowledge_novelty:
            budget = None if config.batch_tokens == "auto" else int(config.batch_tokens)
            stored, stats, reused = stored_scores(
                store, documents, reference, layers, batch_tokens=budget, progress=progress, ranks=ranks
            )
        if table is not None and path is not None:
            sent = ranks.first(None if values is None else values.tobytes())
            if sent is None:
                known = table.compute(open_on_all(ranks, reference))
            else:
                known = np.frombuffer(sent, dtype=np.float32)
            if values is None and (sent is not None or ranks.main):
                relevance.store_table(path, fingerprint, known)
            values = ranks.same(known)
    return stats, reused, stored, values


def scores_of(
    documents: DocumentSet,
    stored: StoredScores | None,
    task_relevance: Floats | None,
    selectors: Mapping[str, Floats],
) -> Scores:
    """What is known about the documents' completion tokens: by the reference, by the vocabulary, by selectors."""
    return Scores(
        keys=documents.keys,
        offsets=documents.completion_offsets,
        counts=documents.counts,
        token_ids=documents.input_ids[documents.completion],
        positions=documents.completion_positions,
        reasoning_importance=None if stored is None else stored.attention,
        logprobs=None if stored is None else stored.logprobs,
        entropy=None if stored is None else stored.entropy,
        deviation=None if stored is None else stored.deviation,
        task_relevance=task_relevance,
        selectors=selectors,
    )
