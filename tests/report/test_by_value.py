"""Drops by value of a column: counted by hand, in the file of scores, under other thresholds and on the page."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests import tiny
from tests.browsing import browser  # noqa: F401 (a fixture)
from tests.made_scores import DROPS
from tests.report.tables import page_of, plan_of, table_of
from tests.test_plan import rows
from xtf_plugin.config.block import XTFConfig
from xtf_plugin.data.column_values import Grouping
from xtf_plugin.data.ragged import Layout
from xtf_plugin.report import reselected, score_table
from xtf_plugin.report.by_value import LISTED, by_value
from xtf_plugin.report.summary import summary


def test_counts_and_order():
    layout = Layout(np.asarray([0, 2, 5, 5, 7]), np.asarray([1, 3, 1, 2]))
    keep = np.asarray([True, False, True, True, False, False, False])
    found = by_value({"source": Grouping(["web", "book", "none"], np.asarray([0, 1, 2, 0]))}, layout, keep)
    web = {"value": "web", "values": 1, "documents": 3, "tokens": 6, "dropped_tokens": 5, "dropped_fraction": 5 / 6}
    book = {"value": "book", "values": 1, "documents": 3, "tokens": 9, "dropped_tokens": 3, "dropped_fraction": 1 / 3}
    assert found == {"source": [web, book]}  # a document without a completion has no tokens to count


def test_values_beyond_the_first_are_summed():
    number = LISTED + 5
    layout = Layout(np.arange(number + 1) * 10, np.ones(number, dtype=np.int64))
    keep = np.ones(10 * number, dtype=bool)
    for document in range(10):
        keep[10 * document : 10 * document + document] = False
    names = [f"v{each:02}" for each in range(number)]
    (values,) = by_value({"id": Grouping(names, np.arange(number))}, layout, keep).values()
    assert [each["value"] for each in values[:3]] == ["v09", "v08", "v07"] and len(values) == LISTED + 1
    assert values[-1] == {
        "value": "other values",
        "values": 5,
        "documents": 5,
        "tokens": 50,
        "dropped_tokens": 0,
        "dropped_fraction": 0.0,
    }


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """A table with sources, one of which cannot be written as it is, and its file."""
    folder = tmp_path_factory.mktemp("by")
    plan = plan_of(folder, rows(12), **DROPS, report_by="source")
    codes = np.arange(len(plan.documents)) % 3
    plan = replace(plan, groups={"source": Grouping(["web", "book", "<b>a\u202eb\x1b[31m"], codes)})
    table = table_of(plan)
    return plan, table, score_table.write(table, plan.documents, folder / "scores.parquet")


def test_the_file_gives_the_values_back(scored):
    plan, table, path = scored
    again = score_table.read(path)
    names, codes = again.groups["source"]
    assert [names[code] for code in codes] == [
        ["web", "book", "<b>a\u202eb\x1b[31m"][at % 3] for at in range(len(codes))
    ]
    assert by_value(again.groups, again.layout, again.keep) == table.about["by"] == again.about["by"]
    assert "by" not in summary(replace(plan, groups={}), tiny.tokenizer())


def test_other_thresholds_are_counted_again(scored):
    plan, table, path = scored
    model, cache = table.about["reference"]["name"], plan.config.cache_dir
    block = {**DROPS, "combine": "majority", "report_by": "source", "cache_dir": cache}
    found = reselected.select_again(path, XTFConfig.parse(block), model)
    assert found.about["by"] == by_value(found.groups, found.layout, found.keep) != table.about["by"]
    assert reselected.select_again(path, XTFConfig.parse({**block, "report_by": []}), model).about["by"] == {}
    assert reselected.select_again(path, XTFConfig.parse({**block, "report_by": "place"}), model) is None


def test_the_page_shows_them(browser, scored, tmp_path):  # noqa: F811
    _, table, _ = scored
    page = browser.new_page()
    page.goto(page_of(table, tmp_path / "report.html").as_uri())
    lines = [line.split("\t") for line in page.locator("#by").inner_text().splitlines()]
    assert lines[0] == ["By source", "answers", "tokens", "dropped", "share"]
    wanted = [
        [each["value"], str(each["documents"]), f"{each['tokens']:,}", f"{each['dropped_tokens']:,}"]
        for each in table.about["by"]["source"]
    ]
    assert [line[:4] for line in lines[1:]] == wanted
    page.close()
