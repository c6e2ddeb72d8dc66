"""The conformance test for scorers: packages that bring one run it in their own tests; needs no model and no torch.

It works on a few made-up documents with made-up log-probabilities, which follow from document and reference alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray
from pydantic import ValidationError

from .documents import IGNORE_INDEX, DocumentSet, collect
from .excerpts import Excerpted, predictions_without
from .firing import evaluate
from .scorers import ReferenceConfig, Scorer, ScoringContext, SelectorConfig
from .scorers.registry import complaints
from .segments import Layout

Floats = NDArray[np.float32]
_LENGTHS = (2, 3, 5, 8, 13, 21, 34, 55)


def check_scorer(scorer_class: type[Scorer], options: Mapping[str, Any], tokenizer: Any = None) -> Floats:
    """Check everything that xtf relies on in a scorer, and raise one AssertionError that lists what is wrong.

    Checked: name, `version` and `Config` (frozen, unknown keys refused); the docstring says which scores are dropped;
    `score` gives finite or NaN float32, one per completion token, the same every time, and writes to nothing it was
    given; NaN is never dropped; each option that differs from its default changes some score; and with `per_document` a
    document gets the same scores alone as among others.

    Args:
        scorer_class: the class.
        options: its part of the block: its own keys, best with other values than the defaults, and any common ones.
            `scorer` and `drop` may be left out.
        tokenizer: what the scorer is to be given; needed only by one that uses it.

    Returns:
        the scores of the made-up documents, (M,) float32, for checks of your own.

    Example:
        >>> def test_scorer():
        ...     check_scorer(MyScorer, {"strength": 2.0})
    """
    problems = complaints(scorer_class)
    if problems:
        raise AssertionError("; ".join(problems))
    block = {"scorer": scorer_class.name, "drop": {"quantile": 0.3}, **options}
    try:
        config = scorer_class.Config.model_validate(block)
    except ValidationError as error:
        raise AssertionError(f"its Config refuses these options: {error}") from error
    documents = _documents(50 if tokenizer is None else len(tokenizer))

    def run(config: SelectorConfig, of: DocumentSet = documents) -> Floats:
        return scorer_class(config).score(_context(of, tokenizer))

    scores = run(config)
    problems = [*_described(scorer_class, block), *_form(scores, len(documents.completion_positions))]
    if not problems:
        problems = [
            *([] if _same(scores, run(config)) else ["it is not deterministic: a second run gave other scores"]),
            *_never_drops_nan(scores, documents, config),
            *_idle_options(scorer_class, block, scores, run),
            *(_by_company(scores, documents, config, run) if scorer_class.per_document else []),
        ]
    if problems:
        raise AssertionError(f"{scorer_class.name}: {'; '.join(problems)}")
    return scores


def _documents(vocabulary: int) -> DocumentSet:
    """Documents of several lengths: one occurs twice, one has no completion, one has nothing else."""
    rng, rows = np.random.default_rng(0), []
    for length in _LENGTHS:
        ids = rng.integers(0, vocabulary, length).tolist()
        rows.append({"input_ids": ids, "labels": [IGNORE_INDEX] * (length // 3) + ids[length // 3 :]})
    ids = rng.integers(0, vocabulary, 4).tolist()
    return collect([*rows, rows[3], {"input_ids": ids, "labels": [IGNORE_INDEX] * 4}])


@dataclass(frozen=True)
class _MadeUp:
    """Predictions that follow from a reference and a document alone."""

    logprobs: Floats
    entropy: Floats
    deviation: Floats


def _context(documents: DocumentSet, tokenizer: Any) -> ScoringContext:
    def predictions(reference: ReferenceConfig | None, others: DocumentSet | None = None) -> _MadeUp:
        wanted = documents if others is None else others
        return _made_up(wanted, "" if reference is None else reference.model_dump_json())

    def without(hidden: Any, starts: Any, wanted: Any, reference: ReferenceConfig | None) -> Excerpted:
        breaks = documents.input_ids[documents.completion] % 11 == 5
        return predictions_without(documents, hidden, starts, wanted, breaks, partial(predictions, reference))

    def segments(unit: str) -> NDArray[np.int64]:
        offsets = documents.completion_offsets
        place = np.arange(offsets[-1]) - np.repeat(offsets[:-1], np.diff(offsets))
        return np.flatnonzero(place % (4 if unit == "sentence" else 9) == 0)

    protected = documents.input_ids[documents.completion] % 7 == 3

    return ScoringContext(documents, tokenizer, predictions, segments, without, protected)


def _made_up(documents: DocumentSet, reference: str) -> _MadeUp:
    """What a reference might predict; NaN in place 0, which nothing predicts."""
    parts: list[NDArray[np.float64]] = []
    for index, key in enumerate(documents.keys):
        seed = xxhash.xxh3_64_intdigest(reference.encode() + key.tobytes())
        tokens, completion = documents.document(index)
        parts.append(np.random.default_rng(seed).exponential(size=(3, len(tokens)))[:, completion])
    drawn = np.concatenate(parts, axis=1).astype(np.float32)
    drawn[:, documents.completion_positions == 0] = np.nan
    return _MadeUp(-drawn[0], drawn[1], drawn[2])


def _described(scorer_class: type[Scorer], block: Mapping[str, Any]) -> list[str]:
    found = []
    text = f"{scorer_class.__doc__ or ''} {scorer_class.score.__doc__ or ''}"
    if not re.search(r"\blow|\bdrop|\bgoes?\b", text):
        found.append("no docstring of its own says what a low score means; low scores are dropped")
    try:
        scorer_class.Config.model_validate({**block, "no_such_key_of_this_scorer": 1})
        found.append("its Config takes unknown keys")
    except ValidationError:
        pass
    return found


def _form(scores: Any, size: int) -> list[str]:
    if not isinstance(scores, np.ndarray) or scores.dtype != np.float32 or scores.shape != (size,):
        told = f"{scores.dtype} {scores.shape}" if isinstance(scores, np.ndarray) else type(scores).__name__
        return [f"`score` gave {told} where float32 ({size},) is needed"]
    if np.isinf(scores).any():
        return ["some scores are infinite; NaN is how a token is left alone"]
    return ["every score is NaN"] if np.isnan(scores).all() else []


def _same(first: Floats, second: Any) -> bool:
    return bool(isinstance(second, np.ndarray) and np.array_equal(first, second, equal_nan=True))


def _never_drops_nan(scores: Floats, documents: DocumentSet, config: SelectorConfig) -> list[str]:
    layout = Layout(documents.completion_offsets, documents.counts)
    fired = evaluate(config.scorer, scores, documents.completion_positions, layout, config).mask
    return ["a token whose score is NaN would be dropped"] if (fired & np.isnan(scores)).any() else []


def _idle_options(
    scorer_class: type[Scorer], block: Mapping[str, Any], scores: Floats, run: Callable[[SelectorConfig], Floats]
) -> list[str]:
    """Options without which the scores are the same. A reference is exchanged for another one instead."""
    found = []
    for key in sorted(block.keys() - SelectorConfig.model_fields.keys()):
        other = {name: value for name, value in block.items() if name != key}
        if isinstance(block[key], Mapping) and "model" in block[key]:
            other[key] = {**block[key], "model": "another-model"}
        try:
            config = scorer_class.Config.model_validate(other)
        except ValidationError:  # a required key that has no other value we could know of
            continue
        if config != scorer_class.Config.model_validate(block) and _same(scores, run(config)):
            found.append(f"the option {key!r} changes no score")
    return found


def _by_company(
    scores: Floats,
    documents: DocumentSet,
    config: SelectorConfig,
    run: Callable[[SelectorConfig, DocumentSet], Floats],
) -> list[str]:
    offsets = documents.completion_offsets
    for index in range(len(documents)):
        ids, completion = documents.document(index)
        if not completion.any():
            continue
        alone = run(config, collect([{"input_ids": ids, "labels": np.where(completion, ids, IGNORE_INDEX)}]))
        among = scores[offsets[index] : offsets[index + 1]]
        if alone.shape != among.shape or not np.allclose(alone, among, rtol=1e-5, atol=1e-6, equal_nan=True):
            return ["`per_document` is True, but a document gets other scores alone than among others"]
    return []
