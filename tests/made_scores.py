"""Scores for the tests, from numbers instead of a reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from xtf_plugin.config.scores import SLOTS
from xtf_plugin.selection.select import Scores

RI, KN, TR = SLOTS
ALL_ON = dict.fromkeys(SLOTS, True)
ALL_OFF = dict.fromkeys(SLOTS, False)
# Drops tokens of tiny models. The default preset does not: to random weights the prompts say too little.
DROPS = {
    "preset": "none",
    "reasoning_importance": {"drop": {"quantile": 0.2}},
    "knowledge_novelty": {"drop": {"quantile": 0.1}},
}
# The default preset as it drops from them, too, after `read_prompts`.
DEFAULT = {
    "reasoning_importance": {"among": None},
    "knowledge_novelty": {"shortest": 4, "drop": {"below": 0.65}},
    "task_relevance": {"drop": {"below": -0.1}},
}


def read_prompts(monkeypatch: Any) -> None:
    """Let `explained` score whatever little the prompts explain."""
    monkeypatch.setattr("xtf_plugin.scorers.explained.LEAST", -np.inf)


def odd_sentences(below: float = -1.8) -> dict[str, Any]:
    """A block that drops sentences of tiny models that are more surprising than the model expects."""
    part = {"scorer": "typicality", "unit": "sentence", "drop": {"below": below}}
    return {"preset": "none", "selectors": {"odd": part}, "protect": {"formats": None}}


def scores_of(lengths: Sequence[int], first: int = 1, **known: Any) -> Scores:
    """Scores of documents with these numbers of completion tokens, each after a prompt of `first` tokens.

    Args:
        lengths: of the documents' completions.
        first: place of each document's first completion token.
        known: fields of `Scores`, and scores by name; see `with_scores`.
    """
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    size, number = int(offsets[-1]), len(lengths)
    keys = np.zeros((number, 16), dtype=np.uint8)
    keys[:, :8] = np.arange(number, dtype="<i8")[:, None].view(np.uint8)
    fields = {
        "keys": keys,
        "offsets": offsets,
        "counts": np.ones(number, dtype=np.int64),
        "token_ids": np.arange(size, dtype=np.int32),
        "positions": (np.arange(size) - np.repeat(offsets[:-1], lengths) + first).astype(np.int32),
    }
    given = {name: known.pop(name) for name in fields if known.get(name) is not None}
    return with_scores(Scores(**{**fields, **given}), **known)


def with_scores(scores: Scores, **values: Any) -> Scores:
    """The same documents with other scores by name; None takes one out.

    `logprobs` are those of the run's own reference, which is also what `knowledge_novelty` has for scores.
    """
    made = {n: None if v is None else np.asarray(v, dtype=np.float32) for n, v in values.items()}
    if "logprobs" in made:
        logprobs = made.pop("logprobs")
        scores, made = replace(scores, logprobs=logprobs), {KN: logprobs, **made}
    known = {**scores.values, **made}
    return replace(scores, values={name: value for name, value in known.items() if value is not None})


def taken(scores: Scores, order: Sequence[int]) -> tuple[Scores, Any]:
    """The same documents in another order, or some of them several times; and where each token came from."""
    spans = [np.arange(scores.offsets[i], scores.offsets[i + 1]) for i in order]
    flat = np.concatenate([np.zeros(0, dtype=np.int64), *spans]).astype(np.int64)
    offsets = np.concatenate([[0], np.cumsum([len(span) for span in spans])]).astype(np.int64)
    values = {name: each[flat] for name, each in scores.values.items()}
    logprobs = None if scores.logprobs is None else scores.logprobs[flat]
    ids, places = scores.token_ids[flat], scores.positions[flat]
    return Scores(scores.keys[order], offsets, scores.counts[order], ids, places, values, logprobs), flat
