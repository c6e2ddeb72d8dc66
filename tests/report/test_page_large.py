"""The report of ten thousand documents, and of a very long one: small, quick to open, and still exact."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import yaml

from tests import tiny
from tests.browsing import browser, dropped, is_moved, put, shown  # noqa: F401 (a fixture)
from tests.report.tables import page_of, table_of
from tests.report.test_page import BLOCK
from xtf_plugin.config.block import XTFConfig
from xtf_plugin.data import token_text
from xtf_plugin.data.documents import collect
from xtf_plugin.plan import Plan, scores_of
from xtf_plugin.scoring.batching import ScoringStats
from xtf_plugin.selection.select import select
from xtf_plugin.selection.text_rules import TextRules

MANY = {
    **BLOCK,
    "knowledge_novelty": {"drop": {"known_above": 0.9}},
    "min_kept": 2,
    "force_drop": [],
    "protect": {"special_tokens": False, "patterns": []},
}


def large_plan(lengths, block=MANY, spread=4.0) -> Plan:
    """A plan of documents of these lengths with made-up scores; nothing was scored."""
    rng = np.random.default_rng(0)
    known = range(4, len(tiny.tokenizer()))  # without parts of characters
    pieces = zip(known, token_text.token_bytes(tiny.tokenizer(), known), strict=True)
    vocabulary = np.asarray([token for token, piece in pieces if token_text.is_text(piece)])
    rows = []
    for length in lengths:
        ids = rng.choice(vocabulary, length)
        rows.append({"input_ids": ids, "labels": np.where(np.arange(length) < 20, -100, ids)})
    documents = collect(rows)
    size = int(documents.completion_offsets[-1])
    config = XTFConfig.parse(block)
    ids = documents.input_ids[documents.completion]
    logprobs = -spread * rng.exponential(size=size).astype(np.float32)
    values = {
        "reasoning_importance": rng.lognormal(size=size).astype(np.float32),
        "knowledge_novelty": logprobs,
        "task_relevance": rng.random(len(tiny.tokenizer())).astype(np.float32)[ids],
    }
    scores = replace(scores_of(documents, None, values), logprobs=logprobs)
    text = TextRules.find(config, documents, tiny.tokenizer())
    selection = select(scores, config, np.zeros(size, dtype=bool))
    return Plan(config, documents, text, scores, selection, {"name": "none", "source": "made up"}, ScoringStats())


def selected(plan, config):
    """Keep flags of a run with another block; the documents are of ordinary tokens, and nothing is protected."""
    return select(plan.scores, config, np.zeros(len(plan.weights), dtype=bool)).keep


def test_a_dataset_of_10000_documents_opens_in_a_second(browser, tmp_path):
    plan = large_plan(np.random.default_rng(1).integers(60, 240, 10_000).tolist())
    path = page_of(table_of(plan), tmp_path / "xtf/report.html")
    assert path.stat().st_size < 3 << 20
    opened = browser.new_page(viewport={"width": 1280, "height": 900})
    times = []
    for _ in range(3):
        opened.goto(path.as_uri())
        times.append(
            opened.evaluate("performance.timing.domContentLoadedEventEnd - performance.timing.navigationStart")
        )
    assert shown(opened) == (dropped(plan, plan.selection.keep),) * 2
    assert min(times) < 1_000, times
    put(opened, "reasoning_importance", "quantile", 0.03)
    config = XTFConfig.parse(yaml.safe_load(opened.text_content("#yaml"))["xtf"])
    least, most = shown(opened)
    assert least <= dropped(plan, selected(plan, config)) <= most == least + opened.evaluate("D.whatif.slack")
    put(opened, "knowledge_novelty", "known_above", 0.8765)
    config = XTFConfig.parse(yaml.safe_load(opened.text_content("#yaml"))["xtf"])
    least, most = shown(opened)
    assert least <= dropped(plan, selected(plan, config)) <= most < 1.1 * least
    opened.close()


def test_a_document_of_more_tokens_than_16_bits_count(browser, tmp_path):
    off = {"preset": "none", "reasoning_importance": False, "task_relevance": False, "min_kept": 0}
    plan = large_plan([70_020, 90], {**MANY, **off}, spread=0)
    opened = browser.new_page()
    opened.goto(page_of(table_of(plan), tmp_path / "xtf/report.html").as_uri())
    assert shown(opened) == (dropped(plan, plan.selection.keep),) * 2
    kept = set()
    for value in (0.5, 0.95, 0.99):
        put(opened, "knowledge_novelty", "known_above", value)
        config = XTFConfig.parse(yaml.safe_load(opened.text_content("#yaml"))["xtf"])
        assert shown(opened) == (dropped(plan, selected(plan, config)),) * 2 and is_moved(opened)
        kept.add(70_070 - shown(opened)[0])
    assert 0 in kept
    put(opened, "knowledge_novelty", "known_above", None)
    assert opened.evaluate("count([-1])") == {
        "tokens": 70_070,
        "dropped": 0,
        "loose": 0,
        "fired": {"knowledge_novelty": 0},
    }
    opened.close()
