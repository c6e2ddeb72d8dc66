"""Large datasets: a row of millions of tokens, a packed row of very many documents, one row repeated very often.

Results equal those of a few array operations, and the time is bounded.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.made_scores import with_scores
from tests.reliability import amount, record
from tests.reliability.strategies import IGNORED, flat_labels
from xtf_plugin.config.block import XTFConfig
from xtf_plugin.data.documents import DocumentSet, collect
from xtf_plugin.data.keys import document_key
from xtf_plugin.plan import scores_of
from xtf_plugin.selection.masks import MaskTable
from xtf_plugin.selection.select import Selection, select
from xtf_plugin.training.collator import XTFDataCollator

BELOW, UNKNOWN = 0.3, 0.2
BLOCK = {
    "preset": "none",
    "reasoning_importance": {"drop": {"below": BELOW}},
    "knowledge_novelty": {"drop": {"unknown_below": UNKNOWN}},
    "min_kept": 1,
}
SECONDS = amount(5, 120)  # a loop over pairs of tokens or documents would take hours

Row = dict[str, np.ndarray[Any, Any]]


def one_long_row() -> list[Row]:
    size = amount(200_000, 2_000_000)
    ids = np.random.default_rng(0).integers(0, 50_000, size)
    return [{"input_ids": ids, "labels": np.where(np.arange(size) < size // 10, IGNORED, ids)}]


def many_packed_documents() -> list[Row]:
    """Of 1 to 8 tokens, of which the first two are the prompt; many of those with one token are the same."""
    rng = np.random.default_rng(1)
    lengths = rng.integers(1, 9, amount(10_000, 100_000))
    places = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    ids = rng.integers(0, 50_000, len(places))
    return [{"input_ids": ids, "labels": np.where(places < 2, IGNORED, ids), "seq_lengths": lengths}]


def many_duplicates() -> list[Row]:
    ids = np.arange(100, 112)
    row = {"input_ids": ids, "labels": np.where(ids < 105, IGNORED, ids)}
    return [row] * amount(10_000, 100_000)


def pieces(data: list[Row]) -> list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
    """Token ids and labels of every document, in order."""
    found = []
    for row in data:
        cuts = np.cumsum(row["seq_lengths"])[:-1] if "seq_lengths" in row else []
        found += zip(np.split(row["input_ids"], cuts), np.split(row["labels"], cuts), strict=True)
    return found


def check_documents(made: DocumentSet, data: list[Row]) -> None:
    """Documents are the distinct pieces by their keys, in order of appearance, and rows point to them."""
    keys = [document_key(ids, labels != IGNORED) for ids, labels in pieces(data)]
    index = {key: at for at, key in enumerate(dict.fromkeys(keys))}
    assert [key.tobytes() for key in made.keys] == list(index)
    rows = np.asarray([index[key] for key in keys])
    assert np.array_equal(made.row_documents, rows) and np.array_equal(made.counts, np.bincount(rows))
    firsts = np.unique(rows, return_index=True)[1]
    known = pieces(data)
    assert np.array_equal(made.input_ids, np.concatenate([known[at][0] for at in firsts]))
    assert np.array_equal(made.completion, np.concatenate([known[at][1] for at in firsts]) != IGNORED)


def made_up(documents: DocumentSet) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Attention received and log-probabilities that follow from the token alone; what stands first has none."""
    tokens, places = documents.input_ids[documents.completion], documents.completion_positions
    attention, logprobs = (np.abs(np.sin(tokens * step)).astype(np.float32) for step in (1.0, 0.7))
    return tuple(np.where(places == 0, np.nan, each).astype(np.float32) for each in (attention, -2 * logprobs))


def selected(documents: DocumentSet) -> Selection:
    attention, logprobs = made_up(documents)
    free = np.zeros(len(attention), dtype=bool)
    scores = with_scores(scores_of(documents, None, {}), logprobs=logprobs, reasoning_importance=attention)
    return select(scores, XTFConfig.parse(BLOCK), free, free)


def check_selection(made: Selection, documents: DocumentSet) -> None:
    """A token goes if one of its scores is below its bound, but for one in each document that would lose all."""
    attention, logprobs = made_up(documents)
    stays = ~((attention < BELOW) | (np.exp(logprobs) < UNKNOWN))
    trains = documents.completion_positions > 0
    owner = np.repeat(np.arange(len(documents)), np.diff(documents.completion_offsets))
    sizes = {
        name: np.bincount(owner[flags], minlength=len(documents))
        for name, flags in (("trains", trains), ("stays", stays & trains), ("kept", made.keep & trains))
    }
    floor = (sizes["stays"] == 0) & (sizes["trains"] > 0)
    assert np.array_equal(sizes["kept"], sizes["stays"] + floor)
    assert np.array_equal(made.keep[~floor[owner]], stays[~floor[owner]])
    assert 0.1 < made.keep.mean() < 0.9


def check_labels(data: list[Row], documents: DocumentSet, made: Selection) -> None:
    """The collator's labels of all rows are the flags of their documents, occurrence by occurrence."""
    table = MaskTable.build(documents.keys, documents.completion_offsets, made.keep, made.best)
    found = XTFDataCollator(flat_labels, table)(data)["labels"].numpy()
    starts, sizes = documents.completion_offsets[:-1], np.diff(documents.completion_offsets)
    each = sizes[documents.row_documents]
    inside = np.arange(each.sum()) - np.repeat(np.cumsum(each) - each, each)
    flags = made.keep[np.repeat(starts[documents.row_documents], each) + inside]
    expected = np.concatenate([row["labels"] for row in data])
    expected[np.flatnonzero(expected != IGNORED)[~flags]] = IGNORED
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("made", [one_long_row, many_packed_documents, many_duplicates])
def test_large_datasets_give_the_same_results(made: Callable[[], list[Row]]) -> None:
    data = made()
    begun = time.monotonic()
    documents = collect(data)
    selection = selected(documents)
    check_labels(data, documents, selection)
    took = time.monotonic() - begun
    check_documents(documents, data)
    check_selection(selection, documents)
    assert took < SECONDS
    tokens = sum(len(row["input_ids"]) for row in data)
    about = {"rows": len(data), "documents": int(documents.counts.sum()), "tokens": tokens, "seconds": took}
    record(f"huge: {made.__name__.replace('_', ' ')}", **about)
