"""A plan's thresholds applied to documents that it has not seen: what a stream needs after its calibration sample.

Everything but the thresholds comes about as for a whole dataset, by the same functions. Scores are not stored: a stream
may have no end, and looking a few documents up among millions takes longer than scoring them.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .batches import ScoringStats, default_batch_tokens
from .config.block import XTFConfig
from .data.documents import DocumentSet
from .fingerprint import digest
from .selection.text_rules import Marks, segment_starts
from .plan import Plan, attention_layers, scores_of
from .records import Lookup, StoredScores, column_names
from .reference import Reference
from .relevance import RelevanceTable, cached_table, store_table, table_name
from .scorer import score
from .selection.select import Selection
from .selection import select
from .selectors import StoredPredictions, score_selectors
from .store import reference_folder

REMEMBERED = 4  # halvings of the batches; if memory is shorter than that, each stretch finds out again


class FrozenPlan:
    """Equals `make_plan` for any documents, with the thresholds and the task relevance of `plan`.

    Args:
        plan: of the calibration sample.
        reference: the one that the plan was scored with, open.
        tokenizer: the training tokenizer.

    Attributes:
        stats, excerpts: what scoring has taken so far, documents and second looks apart.
        warnings: what there was to tell, with every call of `select` anew.
    """

    def __init__(self, plan: Plan, reference: Reference, tokenizer: Any) -> None:
        self.config, self.reference, self.tokenizer = plan.config, reference, tokenizer
        self.stats, self.excerpts = ScoringStats(), ScoringStats()
        self.warnings: list[str] = []
        self._rules = plan.selection.rules
        self._layers = attention_layers(plan.config, reference.text_config)
        self._relevance = _over_vocabulary(plan, reference, tokenizer)

    @property
    def batch_tokens(self) -> int:
        """Padded tokens per scoring batch; less once memory has run out, so that not every stretch finds out anew, but
        not ever less: it may have been short for a moment only.
        """
        chosen = self.config.batch_tokens
        whole = default_batch_tokens(self.reference.device) if chosen == "auto" else int(chosen)
        return max(1, whole >> min(self.stats.halvings + self.excerpts.halvings, REMEMBERED))

    def select(self, documents: DocumentSet) -> Selection:
        """Score the documents and decide for every completion token."""
        marks = Marks.find(self.config, documents, self.tokenizer)
        source = _Predictions(self.config, documents, self.reference, self._layers, self.batch_tokens)
        if self.config.reasoning_importance or self.config.knowledge_novelty:
            source.under(None)
        starts = partial(segment_starts, documents, self.tokenizer)
        selectors = score_selectors(self.config, self.tokenizer, source, starts, marks.protected, marks.forced)
        relevance = None if self._relevance is None else self._relevance[documents.input_ids[documents.completion]]
        scores = scores_of(documents, source.known, relevance, selectors)
        selection = select(scores, self.config, marks.protected, marks.forced, marks.segments, self._rules)
        if source.main_pass is not None:
            self.stats.add(source.main_pass[0])
        self.excerpts.add(source.excerpts)
        self.warnings = source.warnings + selection.warnings
        return selection


class _Predictions(StoredPredictions):
    """What the run's own reference predicts in a few documents; nothing is looked up or kept."""

    whole = False

    def __init__(
        self, config: XTFConfig, documents: DocumentSet, reference: Reference, layers: tuple[int, ...], budget: int
    ) -> None:
        super().__init__(config, documents, None, None, None, progress=False)
        self.reference, self.layers, self.budget = reference, layers, budget

    def _scored(self, provider: Any, documents: DocumentSet) -> tuple[StoredScores, dict[str, Any], ScoringStats, int]:
        layers = self.layers if documents is self.documents else ()
        sizes = np.diff(documents.completion_offsets)
        lookup = Lookup(documents.keys, sizes, column_names(attention=bool(layers)))
        wanted = np.flatnonzero(sizes > 0)
        stats = score(documents, wanted, self.reference, layers, lookup.take, batch_tokens=self.budget, progress=False)
        return lookup.scores, {}, stats, 0

    def _check(self, scores: StoredScores, about: dict[str, Any]) -> None:
        """The sample was checked; in a few documents all scores may well be undefined."""


def _over_vocabulary(plan: Plan, reference: Reference, tokenizer: Any) -> NDArray[np.float32] | None:
    """Task relevance by token id, on the scale of the plan's own tokens; kept for the next run."""
    config = plan.config
    if not config.task_relevance:
        return None
    table = RelevanceTable(config.task_relevance, plan.documents, tokenizer)
    fingerprint = str(plan.reference["fingerprint"])
    name = table_name(digest({"over the vocabulary": table.key()}))
    path = reference_folder(config.resolved_cache_dir(), fingerprint) / name
    size = int(reference.model.get_input_embeddings().weight.shape[0])
    values = cached_table(path, fingerprint, size)
    if values is None:
        values = table.over_vocabulary(reference)
        store_table(path, fingerprint, values)
    return values
