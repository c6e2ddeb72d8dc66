"""Scores of a set of documents: from the cache where they are stored, else from the reference; the same on every rank.

The run's own reference, a selector's and the excerpts of second looks all go through here.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .batches import ScoringStats
from .cache import warn_of_unused_scores
from .data.documents import DocumentSet
from .ranks import ALONE, Ranks, open_on_all, pool
from .records import Records, StoredScores
from .reference import Reference
from .scorer import score
from .store import ScoreStore


def stored_scores(
    store: ScoreStore,
    documents: DocumentSet,
    reference: Callable[[], Reference],
    layers: tuple[int, ...],
    *,
    batch_tokens: int | None = None,
    progress: bool = True,
    label: str = "scoring",
    ranks: Ranks = ALONE,
) -> tuple[StoredScores, ScoringStats, int]:
    """Scores of all documents, the cost of the missing ones, and how many were stored. A collective of `ranks`.

    Args:
        store: where scores are found and kept; each rank has its own view of it, on a shared disk or not.
        documents: the same on every rank.
        reference: opens the reference; called only if some document's scores are known to no rank.
        layers, batch_tokens, progress, label: see `scorer.score`.

    Raises:
        XTFError: from `scorer.score`.
    """
    sizes = np.diff(documents.completion_offsets)
    found = store.lookup(documents.keys, sizes)
    pool(ranks, found)
    missing = np.flatnonzero(~found.found & (sizes > 0))
    stats = ScoringStats()
    if len(missing):
        of_dataset = label == "scoring"  # second looks come in rounds; one warning is enough
        if of_dataset and ranks.main and store.description is not None and not found.found.any():
            warn_of_unused_scores(store.root, store.reference, store.description)

        def sink(records: Records) -> None:
            found.take(records)
            store.add(records)

        stats = score(
            documents,
            missing,
            open_on_all(ranks, reference),
            layers,
            sink,
            batch_tokens=batch_tokens,
            progress=progress,
            label=label,
            ranks=ranks,
            others=found.take,
        )
        store.flush()
    # ranks may have stored different scores of a document, and a plan must not differ by so much as a rounding
    columns = {name: ranks.broadcast_if_different(values) for name, values in found.columns.items()}
    return StoredScores(found.found, **columns), stats, int((sizes > 0).sum()) - stats.documents
