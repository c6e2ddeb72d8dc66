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


def shown(page) -> tuple[int, int] | None:
    """The dropped tokens that the page counts, as (least, most); None where it says that it does not count."""
    if not page.is_visible("#now-dropped"):
        return None
    ends = [int(text.replace(",", "")) for text in page.text_content("#now-dropped").split(" to ")]
    return ends[0], ends[-1]


def put(page, score, key, value) -> None:
    """Type a number into a rule's field, or switch the rule off with None."""
    place = f"[data-score={score}][data-key={key}]"
    if value is None:
        page.uncheck(f"input[type=checkbox]{place}")
    else:
        page.fill(f"input[type=number]{place}", repr(value))


def values(page, score, key, most=12) -> list:
    """Values of a rule, those of the page's own places and what lies between them."""
    slider = page.evaluate("([score, key]) => sliders.find((s) => s.score === score && s.key === key)", [score, key])
    found = slider["places"]
    if slider["kind"] == "line":
        start, slope = slider["line"]
        found = [round((place - start) / slope, 4) for place in found]
    if slider["kind"] != "class":
        found = sorted({*found, *(round((a + b) / 2, 5) for a, b in zip(found, found[1:], strict=False))})
    return found[:: max(1, len(found) // most)]


def is_moved(page) -> bool:
    return page.text_content("#change") != "as in the run"


def dropped(plan, keep) -> int:
    return int(plan.weights[~keep].sum())


def selected(plan, config):
    """What a run with this config selects from the plan's scores."""
    text = TextRules.find(config, plan.documents, tiny.tokenizer())
    return select(plan.scores, config, text.protected, text.forced, text.segments, inside=text.inside)
