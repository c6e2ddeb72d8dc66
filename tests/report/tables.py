"""Score tables of tiny plans, in memory and as files, for the tests of reports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests import tiny
from tests.test_plan import Provider, rows
from xtf_plugin.config.block import XTFConfig
from xtf_plugin.data.documents import collect
from xtf_plugin.plan import Plan, make_plan
from xtf_plugin.report import score_table
from xtf_plugin.report.page import render as page
from xtf_plugin.report.score_table import ScoreTable
from xtf_plugin.report.summary import described


def plan_of(folder: Path, data: list[dict[str, Any]] | None = None, **block: Any) -> Plan:
    config = XTFConfig.parse({"cache_dir": str(folder / "cache"), **block})
    return make_plan(config, collect(data or rows()), Provider(), tiny.tokenizer(), progress=False)


def table_of(plan: Plan, tokenizer: Any = None) -> ScoreTable:
    return described(plan, tokenizer or tiny.tokenizer())[0]


def saved(plan: Plan, path: Path, tokenizer: Any = None) -> Path:
    return score_table.write(table_of(plan, tokenizer), plan.documents, path)


def page_of(table: ScoreTable, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page.render(page.page_data(table), page.title(path)), encoding="utf-8")
    return path
