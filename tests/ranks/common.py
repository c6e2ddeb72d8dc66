"""What the cases share: where they are listed, and scores of some documents as JSON can hold them."""

from __future__ import annotations

import numpy as np

from xtf_plugin.scoring.cached_scores import stored_scores
from xtf_plugin.store.store import ScoreStore

FINGERPRINT = "ab" * 8
CASES = {}
ENDING = {}  # cases that end the launch with an error


def case(function):
    CASES[function.__name__] = function
    return function


def ending(function):
    ENDING[function.__name__] = function
    return function


def lines(array):
    return [None if np.isnan(value) else float(value) for value in np.asarray(array, dtype=np.float64)]


def scored(ranks, root, documents, reference, layers=(0, 1), tag="0,1", budget=100):
    with ScoreStore(root, FINGERPRINT, tag) as store:
        stored, stats, reused = stored_scores(
            store, documents, reference, layers, batch_tokens=budget, progress=False, ranks=ranks
        )
    return {
        "logprobs": lines(stored.logprobs),
        "attention": lines(stored.attention) if stored.attention is not None else None,
        "stats": [stats.documents, stats.tokens, stats.batches],
        "reused": reused,
    }
