"""What the scores of the default read and take, beside the same scores without their fast forms.

    python -m tests.benchmarks.bench_splices [--rows 16] [--write docs/benchmarks]

`explained` and `influence` ask how probable text is after a part of its document (`data.splices`). Splices of a
document begin alike, and the beginning is read once; the naive form reads each of them whole, in batches all the same.
`new_text` asks no model; its naive form compares every unit with all tokens before it.

SmolLM2-135M-Instruct on the demo's question and answer pairs, if `make models` has made it; else a tiny model. Every
score is computed for all units, `influence` with `among: null`, from an empty store, so it includes a forward over all
documents where it needs one. "x one pass" compares with such a forward alone. The procedures run in turn, and only
ratios within a round are compared. The last column is the largest difference between the two forms over all completion
tokens, where both are defined.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest import mock

import numpy as np

from tests import real, tiny
from tests.benchmarks.bench_overheads import Provider
from tests.benchmarks.bench_real import smoke_documents
from tests.benchmarks.common import arguments, device, publish, settled
from xtf_plugin.config.block import XTFConfig
from xtf_plugin.data.documents import DocumentSet
from xtf_plugin.data.splices import Splices
from xtf_plugin.scorers import explained, new_text, registry
from xtf_plugin.scorers.base import ScoringContext
from xtf_plugin.scoring.cached_scores import ScoreSource

HEAD = ["score", "form", "tokens read", "x naive", "x one pass", "s", "x naive", "x one pass", "largest difference"]
SCORES: dict[str, dict[str, Any]] = {"explained": {}, "influence": {"among": None}, "new_text": {}}
TINY = {"new_text": {"shortest": 4}}  # the sentences of the tiny model's text are short
NAIVE, FAST, ONCE = "naive", "as it runs", "one pass over the documents"


@dataclass(frozen=True)
class Found:
    """One computation of a score: its values, the tokens that a model read for it, and seconds."""

    values: np.ndarray
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Given:
    """What all computations share.

    Args:
        scores: keys of the scores' parts of a block, by scorer.
        least: median share below which `explained` gives up.
    """

    documents: DocumentSet
    tokenizer: Any
    provider: Provider
    scores: dict[str, dict[str, Any]]
    least: float


def tiny_given(count: int) -> Given:
    """The tiny model, to whose random weights prompts say too little."""
    provider = Provider(tiny.model().to(device()))
    return Given(smoke_documents(count), tiny.tokenizer(), provider, {**SCORES, **TINY}, -np.inf)


def real_given(count: int) -> Given:
    """SmolLM2 on the demo's pairs."""
    name = real.SMOLLM2
    provider = Provider(real.load(name, "bf16", device()))
    return Given(real.documents(name, count), real.tokenizer(name), provider, SCORES, explained.LEAST)


def apart(splices: Splices, source: DocumentSet, made: Any = Splices.documents) -> DocumentSet:
    """The documents of splices, without a word of what they have in common."""
    return replace(made(splices, source), branches=None)


def all_units(words: new_text._Words, run: int) -> np.ndarray:
    """That any unit may repeat earlier text."""
    del run
    return np.ones(len(words.begins), dtype=bool)


def one_pass(context: ScoringContext) -> np.ndarray:
    """Log-probabilities of the documents."""
    return context.log_probabilities()


def computed(given: Given, name: str, form: str) -> Found:
    """A score in one of its forms, or one pass over the documents, with an empty store."""
    score: Any = one_pass
    if name != ONCE:
        scorer = registry.BUILTIN[name]
        score = partial(scorer.score, config=scorer.Config.model_validate({"scorer": name, **given.scores[name]}))
    with ExitStack() as stack:
        config = XTFConfig.parse({"cache_dir": stack.enter_context(tempfile.TemporaryDirectory())})
        stack.enter_context(mock.patch.object(explained, "LEAST", given.least))
        source = stack.enter_context(ScoreSource(config, given.documents, given.tokenizer, given.provider))
        if form == NAIVE:
            stack.enter_context(mock.patch.object(Splices, "documents", apart))
            stack.enter_context(mock.patch.object(new_text, "_may_repeat", all_units))
        context = ScoringContext(given.documents, given.tokenizer, source)
        starts = context.segments("sentence")
        stack.enter_context(mock.patch.object(context, "segments", lambda unit: starts))  # part of no form
        begin = settled()
        values = score(context)
        return Found(values, source.stats.tokens + source.excerpts.tokens, settled() - begin)


def measure(given: Given, repeats: int) -> dict[tuple[str, str], Found]:
    """By score and form: what was found, with medians of the times; one round before those that count."""
    keys = [(ONCE, FAST), *((name, form) for name in SCORES for form in (NAIVE, FAST))]
    rounds = [{key: computed(given, *key) for key in keys} for _ in range(repeats + 1)][1:]
    return {key: replace(rounds[0][key], seconds=statistics.median(r[key].seconds for r in rounds)) for key in keys}


def rows_of(found: dict[tuple[str, str], Found]) -> list[list[str]]:
    once, rows = found[ONCE, FAST], []
    for (name, form), score in found.items():
        if name == ONCE:
            rows.append([name, "–", f"{once.tokens:,}", "–", "1.000", f"{once.seconds:.2f}", "–", "1.000", "–"])
            continue
        naive = found[name, NAIVE]
        tokens = [f"{score.tokens:,}", ratio(score.tokens, naive.tokens), ratio(score.tokens, once.tokens)]
        took = [f"{score.seconds:.2f}", ratio(score.seconds, naive.seconds), ratio(score.seconds, once.seconds)]
        rows.append([name, form, *tokens, *took, "–" if form == NAIVE else difference(naive, score)])
    return rows


def ratio(part: float, whole: float) -> str:
    return f"{part / whole:.3f}" if whole else "–"


def difference(one: Found, other: Found) -> str:
    """The largest difference of two forms; where one is undefined and the other is not, the number of such tokens."""
    undefined = int((np.isnan(one.values) != np.isnan(other.values)).sum())
    gaps = np.abs(one.values - other.values)
    largest = f"{np.nanmax(gaps):.1e}" if np.isfinite(gaps).any() else "nothing is defined"
    return largest + (f"; {undefined} undefined in one" if undefined else "")


def main(given: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__, repeats=3)
    parser.add_argument("--rows", type=int, default=16)
    options = parser.parse_args(given)
    small = options.smoke or not real.is_made(real.SMOLLM2)
    shared = tiny_given(options.rows) if small else real_given(options.rows)
    rows = rows_of(measure(shared, options.repeats))
    name = "a tiny Llama" if small else f"{real.SMOLLM2} in bf16"
    tokens = int(shared.documents.lengths.sum())
    caption = f"{name}, {options.rows} rows of {tokens:,} tokens in all, medians of {options.repeats}"
    publish("splices", caption, HEAD, rows, options.write)


if __name__ == "__main__":
    main()
