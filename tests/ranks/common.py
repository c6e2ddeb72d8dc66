"""The list of cases, and scores of documents as JSON values."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np

from tests import tiny
from xtf_plugin.config.block import XTFConfig
from xtf_plugin.scoring.cached_scores import ScoreSource

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


class Opened:
    """A provider of the reference that `reference` returns."""

    def __init__(self, reference):
        self.reference = reference

    def fingerprint(self):
        return FINGERPRINT

    def description(self):
        return {"name": "tiny"}

    def text_config(self):
        return tiny.model().config

    @contextmanager
    def open(self):
        yield self.reference()


def scored(ranks, root, documents, reference, budget=100):
    """Scores of both layers from the cache in `root`, missing ones from a pass."""
    config = XTFConfig.parse({"cache_dir": str(root), "batch_tokens": budget})
    with ScoreSource(config, documents, None, Opened(reference), ranks=ranks) as source:
        attention, stats = source.attention_received([0, 1]), source.stats
        logprobs = source.predictions().logprobs
    return {
        "logprobs": lines(logprobs),
        "attention": lines(attention),
        "stats": [stats.documents, stats.tokens, stats.batches],
        "reused": source.stats.stored_documents,
    }
