"""The report of ten thousand documents: small, quick to open, and still exact."""

from __future__ import annotations

import numpy as np
import yaml

from tests import tiny
from tests.browsing import browser, put, shown, weigh  # noqa: F401 (a fixture)
from tests.test_page import BLOCK
from xtf_plugin import output
from xtf_plugin.batches import ScoringStats
from xtf_plugin.config import XTFConfig
from xtf_plugin.documents import collect
from xtf_plugin.lookup import StoredScores
from xtf_plugin.pipeline import Plan, scores_of
from xtf_plugin.selection import select


def large_plan(number: int) -> Plan:
    """A plan of many documents with made-up scores; nothing was scored."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(60, 240, number)
    vocabulary = np.arange(4, len(tiny.tokenizer()))
    rows = []
    for length in lengths.tolist():
        ids = rng.choice(vocabulary, length)
        rows.append({"input_ids": ids, "labels": np.where(np.arange(length) < 20, -100, ids)})
    documents = collect(rows)
    size = int(documents.completion_offsets[-1])
    config = XTFConfig.parse(
        {
            **BLOCK,
            "knowledge_novelty": {"drop": {"known_above": 0.9}},
            "min_kept": 2,
            "force_drop": [],
            "protect": {"special_tokens": False, "patterns": []},
        }
    )
    scores = scores_of(
        documents,
        StoredScores(
            found=np.ones(len(documents), dtype=bool),
            logprobs=-4 * rng.exponential(size=size).astype(np.float32),
            entropy=rng.exponential(size=size).astype(np.float32),
            deviation=rng.exponential(size=size).astype(np.float32),
            attention=rng.lognormal(size=size).astype(np.float32),
        ),
        rng.random(len(tiny.tokenizer())).astype(np.float32)[documents.input_ids[documents.completion]],
        {},
    )
    selection = select(scores, config, np.zeros(size, dtype=bool))
    return Plan(config, documents, scores, selection, {"name": "none", "source": "made up"}, ScoringStats(), 0)


def test_a_dataset_of_10000_documents_opens_in_a_second(browser, tmp_path):
    plan = large_plan(10_000)
    data = output.page_data(plan, tiny.tokenizer())
    assert data["whatif"]["complete"]
    path = output.write_page(data, tmp_path / "xtf/report.html")
    assert path.stat().st_size < 3 << 20
    opened = browser.new_page(viewport={"width": 1280, "height": 900})
    times = []
    for _ in range(3):
        opened.goto(path.as_uri())
        times.append(
            opened.evaluate("performance.timing.domContentLoadedEventEnd - performance.timing.navigationStart")
        )
    assert shown(opened) == weigh(plan, plan.selection.keep)
    assert min(times) < 1_000, times
    put(opened, "reasoning_importance", "quantile", 3)
    config = XTFConfig.parse(yaml.safe_load(opened.text_content("#yaml"))["xtf"])
    assert shown(opened) == weigh(
        plan, select(plan.scores, config, np.zeros(len(plan.scores.token_ids), dtype=bool)).keep
    )
    opened.close()
