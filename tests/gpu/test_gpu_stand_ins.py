"""What scoring does on GPUs alone, with stand-ins: batches that overlap, and as many tokens as there is memory for."""

from __future__ import annotations

import numpy as np
import pytest

from tests import tiny
from tests.scoring.test_engine import rows, run
from xtf_plugin.data.documents import collect
from xtf_plugin.scoring import batching as batching
from xtf_plugin.scoring import engine
from xtf_plugin.scoring.reference import Reference


def test_scores_that_are_waited_for_later_are_the_same(monkeypatch):
    model, documents = tiny.model(), collect(rows(sizes=range(10, 60)))
    at_once, _ = run(documents, model, (1,), batch_tokens=400)
    monkeypatch.setattr(engine, "LAG", {"cpu": 2})
    later, stats = run(documents, model, (1,), batch_tokens=400)
    assert stats.batches > 3 and stats.documents == len(later) == len(documents)
    for key, records in at_once.items():
        for name, values in records.columns.items():
            np.testing.assert_array_equal(values, later[key].columns[name])


def test_an_error_takes_no_batch_with_it_that_was_begun(monkeypatch):
    model, documents, found = tiny.model(), collect(rows(sizes=range(30, 60))), []
    monkeypatch.setattr(engine, "LAG", {"cpu": 1})
    launch, begun = engine._Pass._launch, []

    def broken(*given, **options):
        if len(begun) == 2:
            raise RuntimeError("an illegal memory access")
        begun.append(given[1])
        return launch(*given, **options)

    monkeypatch.setattr(engine._Pass, "_launch", broken)
    wanted = np.arange(len(documents))
    with pytest.raises(RuntimeError, match="illegal"):
        engine.score(documents, wanted, Reference(model, "tiny"), (), found.append, batch_tokens=300, progress=False)
    assert [len(records.keys) for records in found] == [len(batch) for batch in begun]


@pytest.mark.parametrize("free, batches", [(10**9, 2), (200_000, 5), (0, 5)])
def test_batches_are_as_large_as_the_memory_of_the_first_says(monkeypatch, free, batches):
    class Meter:
        def reset(self):
            pass

        def grown(self):
            return 300 * 1_000  # a thousand bytes a token

        def free(self):
            return free

    monkeypatch.setattr(engine, "meter", lambda device: Meter())
    monkeypatch.setattr(engine, "PROBE_TOKENS", 300)
    monkeypatch.setattr(batching, "PROBE_TOKENS", 300)
    documents = collect(rows(sizes=(30,) * 50))
    _, stats = run(documents, tiny.model(), ())
    assert stats.batches == batches
    _, stats = run(documents, tiny.model(), (), batch_tokens=600)
    assert stats.batches == 3  # what the block says is not measured


def test_a_batch_takes_what_is_free_and_no_more():
    assert batching.budget_for(1_000, 10**6, 10**6 * 12) == 8_400
    assert batching.budget_for(1_000, 10**6, 10**12) == batching.MAX_BATCH_TOKENS
    assert batching.budget_for(1_000, 10**6, 0) == batching.PROBE_TOKENS
    assert batching.budget_for(1_000, 0, 10**6) == batching.MAX_BATCH_TOKENS
