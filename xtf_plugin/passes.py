"""Scores of a set of documents: stored ones as they are, missing ones from the reference, the same on every rank.

The run's own reference, a selector's and the excerpts of second looks all come through here, so that what holds for
several processes holds for each of them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np

from .batches import ScoringStats
from .cache import tell_relatives
from .documents import DocumentSet
from .errors import XTFError
from .lookup import StoredScores
from .ranks import ALONE, Ranks
from .reference import Reference
from .scorer import score
from .sharing import alike, open_on_all, pool
from .store import ScoreStore

logger = logging.getLogger(__name__)


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
    """Scores of all documents, what it took to get the missing ones, and how many were stored. A collective of `ranks`.

    Args:
        store: where scores are found and kept; each rank has its own view of it, on a shared disk or not.
        documents: the same on every rank.
        reference: opens the reference; called only if some document's scores are known to no rank.
        layers, batch_tokens, progress, label: see `scorer.score`.

    Raises:
        XTFError: from `scorer.score`; or one of several ranks cannot find again what was scored.
    """
    sizes = np.diff(documents.completion_offsets)
    stored = pool(ranks, store, documents, store.load(documents.keys, sizes))
    missing = np.flatnonzero(~stored.found & (sizes > 0))
    stats = ScoringStats()
    if len(missing):
        of_dataset = label == "scoring"  # second looks come in rounds, and need not be told each time
        if of_dataset and ranks.main and store.description is not None and not stored.found.any():
            tell_relatives(store.root, store.reference, store.description)
        opened = open_on_all(ranks, reference)
        told: dict[str, Any] = {"batch_tokens": batch_tokens, "progress": progress, "label": label, "ranks": ranks}
        stats = score(documents, missing, opened, layers, store.add, others=store.hold, **told)
        store.flush()
        stored, warned = store.load(documents.keys, sizes), False
        # reading again may lose what was read before, so until nothing is missing: what is held cannot be lost
        while len(lost := np.flatnonzero(~stored.found & (sizes > 0))):
            about = (
                f"{len(lost)} documents were scored but could not be read back from {store.directory}: it was deleted, "
                "changed or out of reach while this run scored"
            )
            if ranks.size > 1:  # what is lost to one rank may not be to another
                raise XTFError(
                    f"{about}. Run it again: what is stored is not scored again. If that does not help, name another "
                    "folder under xtf `cache_dir`, or in XTF_CACHE."
                )
            if not warned:
                logger.warning("xtf: %s. They are scored again, and kept in memory for this run alone.", about)
            warned = True
            stats.add(score(documents, lost, opened, layers, store.hold, **told))
            stats.documents = min(stats.documents, len(missing))
            stored = store.load(documents.keys, sizes)
    return alike(ranks, stored), stats, int((sizes > 0).sum()) - stats.documents
