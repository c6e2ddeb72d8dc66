"""A real Chromium for the tests of the report, and how they read and move it."""

from __future__ import annotations

import shutil

import pytest

from tests import tiny
from xtf_plugin.selection.select import select
from xtf_plugin.selection.text_rules import TextRules


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    path = shutil.which("chromium")
    assert path, "this test drives Debian's Chromium: apt-get install chromium"
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


def number(text: str) -> int:
    return int(text.replace(",", ""))


def shown(page) -> dict[str, int]:
    return {name: number(page.text_content(f"#now-{name}")) for name in ("kept", "dropped")}


def put(page, score, key, place) -> None:
    """Move a slider as a hand would."""
    script = "(input, place) => { input.value = place; input.dispatchEvent(new Event('input')); }"
    page.eval_on_selector(f"input[data-score={score}][data-key={key}]", script, place)


def is_moved(page) -> bool:
    return page.text_content("#change") != "as in the run"


def weigh(plan, keep):
    return {"kept": int(plan.weights[keep].sum()), "dropped": int(plan.weights[~keep].sum())}


def selected(plan, config):
    """What a run with this config, but `min_kept: 0`, would select from the plan's scores: what moved sliders count."""
    text = TextRules.find(config, plan.documents, tiny.tokenizer())
    config = config.model_copy(update={"min_kept": 0})
    return select(plan.scores, config, text.protected, text.forced, text.segments)
