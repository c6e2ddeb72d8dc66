"""Scores of a set of documents: stored ones as they are, missing ones from the reference, the same on every rank.

The run's own reference, a selector's and the excerpts of second looks all come through here, so that what holds for
several processes holds for each of them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import numpy as np

from .batches import ScoringStats
from .cache import tell_relatives
from .documents import DocumentSet
from .errors import XTFError
from .lookup import StoredScores
from .neighbours import Neighbours
from .ranks import ALONE, Ranks
from .reference import Reference
from .scorer import score
from .sharing import alike, open_on_all, pool
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
    """Scores of all documents, what it took to get the missing ones, and how many were stored. A collective of `ranks`.

    Args:
        store: where scores are found and kept; each rank has its own view of it, on a shared disk or not.
        documents: the same on every rank.
        reference: opens the reference; called only if some document's scores are known to no rank.
        layers, batch_tokens, progress, label: see `scorer.score`.

    Raises:
        XTFError: from `scorer.score`; or what was scored cannot be found again.
    """
    sizes = np.diff(documents.completion_offsets)
    stored = pool(ranks, store, documents, store.load(documents.keys, sizes))
    missing = np.flatnonzero(~stored.found & (sizes > 0))
    stats = ScoringStats()
    if len(missing):
        of_dataset = label == "scoring"  # second looks come in rounds, and need not be told each time
        if of_dataset and ranks.main and store.description is not None and not stored.found.any():
            tell_relatives(store.root, store.reference, store.description)
        opened, neighbours = open_on_all(ranks, reference), Neighbours(store, documents.keys, sizes)
        with neighbours if ranks.size == 1 else nullcontext() as beside:
            stats = score(
                documents,
                missing,
                opened,
                layers,
                store.add,
                batch_tokens=batch_tokens,
                progress=progress,
                label=label,
                ranks=ranks,
                others=store.hold,
                beside=beside,
            )
            store.flush()
        stored = store.load(documents.keys, sizes)
        lost = int((~stored.found & (sizes > 0)).sum())
        if lost:
            raise XTFError(
                f"{lost} documents were scored but could not be read back from {store.directory}: it was deleted, "
                "changed or out of reach while this run scored. Run it again: what is stored is not scored again. If "
                "that does not help, name another folder under xtf `cache_dir`, or in XTF_CACHE."
            )
    return alike(ranks, stored), stats, int((sizes > 0).sum()) - stats.documents
