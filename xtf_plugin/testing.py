"""The conformance test for scorers, for the tests of packages that bring one; needs no model and no torch.

It uses a few made-up documents with made-up predictions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import xxhash
from pydantic import ValidationError

from .data.documents import IGNORE_INDEX, DocumentSet, collect
from .data.predictions import Predictions
from .data.ragged import Bools, Doubles, Floats, Ints, Layout
from .data.splices import Splices, predictions_of
from .scorers import Drop, ReferenceConfig, ScoreConfig, Scorer, ScoringContext
from .scorers.registry import complaints
from .selection.rules import fires

Run = Callable[[ScoreConfig, DocumentSet], Floats]
_LENGTHS = (2, 3, 5, 8, 13, 21, 34, 55)


def check_scorer(scorer: Scorer, options: Mapping[str, Any], tokenizer: Any = None) -> Floats:
    """Check everything that a scorer must satisfy; raise one AssertionError that lists all problems.

    Checked: name, `version` and config (frozen, unknown keys refused); the docstring says which scores are dropped;
    scores are finite or NaN, float32, one per completion token, and the same in a second run; no input is written to;
    NaN is never dropped; each option that differs from its default changes some score; with `per_document` a document
    gets the same scores alone as among others. With `reads_scores` it finds a score `task_relevance`.

    Args:
        scorer: made by the decorator `scorer`.
        options: its part of the block, with values other than the defaults. `scorer` and `drop` may be left out.
        tokenizer: passed to the scorer; needed only by one that uses it.

    Returns:
        the scores of the made-up documents, (M,) float32, for further checks.

    Example:
        >>> def test_scorer():
        ...     check_scorer(my_scorer, {"strength": 2.0})
    """
    problems = complaints(scorer)
    if problems:
        raise AssertionError("; ".join(problems))
    block = {"scorer": scorer.name, "drop": {"quantile": 0.3}, **options}
    try:
        config = scorer.Config.model_validate(block)
    except ValidationError as error:
        raise AssertionError(f"its config refuses these options: {error}") from error
    documents = _documents(50 if tokenizer is None else len(tokenizer))

    def run(config: ScoreConfig, of: DocumentSet) -> Floats:
        protected = of.input_ids[of.completion] % 7 == 3
        context = ScoringContext(of, tokenizer, _MadeUpSource(of), protected)
        if scorer.reads_scores:
            context.scores["task_relevance"] = -_made_up(of, "another score").logprobs
            context.parts = {"task_relevance": ScoreConfig(scorer="made_up", drop=Drop(below=0.1))}
        return scorer.score(context, config)

    scores = run(config, documents)
    problems = _form(scores, len(documents.completion_positions))
    if not re.search(r"(?i)\blow|\bdrop", scorer.score.__doc__ or ""):
        problems.append("no docstring of its own says what a low score means; low scores are dropped")
    if not problems:
        if not _same(scores, run(config, documents)):
            problems.append("it is not deterministic: a second run gave other scores")
        if (fires(config, scores, Layout(documents.completion_offsets, documents.counts))[0] & np.isnan(scores)).any():
            problems.append("a token whose score is NaN would be dropped")
        problems += _idle_options(scorer, block, scores, partial(run, of=documents))
        if scorer.per_document and not _same_alone(scores, documents, config, run):
            problems.append("`per_document` is True, but a document gets other scores alone than among others")
    if problems:
        raise AssertionError(f"{scorer.name}: {'; '.join(problems)}")
    return scores


def _documents(vocabulary: int) -> DocumentSet:
    """Documents of several lengths: one occurs twice, one has no completion, one has nothing else."""
    rng, rows = np.random.default_rng(0), []
    for length in _LENGTHS:
        ids = rng.integers(0, vocabulary, length).tolist()
        rows.append({"input_ids": ids, "labels": [IGNORE_INDEX] * (length // 3) + ids[length // 3 :]})
    ids = rng.integers(0, vocabulary, 4).tolist()
    return collect([*rows, rows[3], {"input_ids": ids, "labels": [IGNORE_INDEX] * 4}])


class _MadeUpSource:
    """A `scorers.base.ScoreSource` without a model."""

    def __init__(self, documents: DocumentSet) -> None:
        self.documents = documents

    def predictions(self, reference: ReferenceConfig | None, others: DocumentSet | None = None) -> Predictions:
        wanted = self.documents if others is None else others
        return _made_up(wanted, "" if reference is None else reference.model_dump_json())

    def predictions_of(self, splices: Splices, reference: Any) -> Predictions:
        return predictions_of(self.documents, splices, partial(self.predictions, reference))

    def attention_received(self, layers: Any) -> Floats:
        received: Floats = np.exp(_made_up(self.documents, str(layers)).logprobs)
        return received

    def segments(self, unit: str) -> Ints:
        offsets = self.documents.completion_offsets
        place = np.arange(offsets[-1]) - np.repeat(offsets[:-1], np.diff(offsets))
        return np.flatnonzero(place % (4 if unit == "sentence" else 9) == 0)

    def embeddings(self, token_ids: Ints, kind: str) -> Floats:
        rows = [np.random.default_rng([int(i), len(kind)]).standard_normal(8) for i in token_ids]
        return np.asarray(rows, dtype=np.float32).reshape(-1, 8)

    def vocabulary_size(self) -> int:
        return 50

    def vocabulary_table(self, key: str, compute: Callable[[], Floats]) -> Floats:
        return compute()

    def marks(self, column: str, form: str, text: str | None) -> Bools:
        return _made_up(self.documents, f"{column} {form} {text}").entropy > 1


def _made_up(documents: DocumentSet, reference: str) -> Predictions:
    """Random predictions, seeded by reference and document, better the more was read; NaN at index 0."""
    parts: list[Doubles] = []
    for index, key in enumerate(documents.keys):
        seed = xxhash.xxh3_64_intdigest(reference.encode() + key.tobytes())
        tokens, completion = documents.document(index)
        parts.append(np.random.default_rng(seed).exponential(size=(3, len(tokens)))[:, completion])
    places = documents.completion_positions
    drawn = (np.concatenate(parts, axis=1) * 3 / np.sqrt(places + 1)).astype(np.float32)
    drawn[:, places == 0] = np.nan
    return Predictions(-drawn[0], drawn[1], drawn[2])


def _form(scores: Any, size: int) -> list[str]:
    if not isinstance(scores, np.ndarray) or scores.dtype != np.float32 or scores.shape != (size,):
        given = f"{scores.dtype} {scores.shape}" if isinstance(scores, np.ndarray) else type(scores).__name__
        return [f"it returned {given} where float32 ({size},) is needed"]
    if np.isinf(scores).any():
        return ["some scores are infinite; a token that no rule should drop gets NaN"]
    return ["every score is NaN"] if np.isnan(scores).all() else []


def _same(first: Floats, second: Any) -> bool:
    return bool(isinstance(second, np.ndarray) and np.array_equal(first, second, equal_nan=True))


def _idle_options(
    scorer: Scorer, block: Mapping[str, Any], scores: Floats, run: Callable[[ScoreConfig], Floats]
) -> list[str]:
    """Options without which the scores are the same; a reference is replaced by another one instead."""
    found = []
    for key in sorted(block.keys() - ScoreConfig.model_fields.keys()):
        other = {name: value for name, value in block.items() if name != key}
        if isinstance(block[key], Mapping) and "model" in block[key]:
            other[key] = {**block[key], "model": "another-model"}
        try:
            config = scorer.Config.model_validate(other)
        except ValidationError:  # a required key
            continue
        if config != scorer.Config.model_validate(block) and _same(scores, run(config)):
            found.append(f"the option {key!r} changes no score")
    return found


def _same_alone(scores: Floats, documents: DocumentSet, config: ScoreConfig, run: Run) -> bool:
    offsets = documents.completion_offsets
    for index in range(len(documents)):
        ids, completion = documents.document(index)
        if not completion.any():
            continue
        alone = run(config, collect([{"input_ids": ids, "labels": np.where(completion, ids, IGNORE_INDEX)}]))
        among = scores[offsets[index] : offsets[index + 1]]
        if alone.shape != among.shape or not np.allclose(alone, among, rtol=1e-5, atol=1e-6, equal_nan=True):
            return False
    return True
