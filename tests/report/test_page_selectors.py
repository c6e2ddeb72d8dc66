"""The report of blocks with selectors: every stop gives a block that a run accepts, or the page says why not."""

from __future__ import annotations

import pytest
import yaml

from tests import tiny
from tests.browsing import browser, is_moved, put, selected, shown, weigh  # noqa: F401 (a fixture)
from tests.training.test_callback import trainer
from xtf_plugin import attach
from xtf_plugin.config.block import XTFConfig

OWN = {"scorer": "typicality", "drop": {"below": -1.5}}
BLOCKS = {
    "the preset's alone": {"selectors": {"out_of_place": {"drop": {"below": -2}, "context": "document"}}},
    "one's own beside it": {"selectors": {"out_of_place": {"drop": {"below": -2}, "context": "document"}, "mine": OWN}},
    "one's own alone": {"preset": "none", "selectors": {"mine": OWN, "other": {**OWN, "drop": {"quantile": 0.1}}}},
    "at least two": {"preset": "none", "selectors": {"mine": OWN, "other": OWN}, "combine": {"at_least": 2}},
}


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """The report of a run with the three attributes."""
    folder = tmp_path_factory.mktemp("three")
    made = trainer(folder, rows=tiny.problems(40), max_steps=1)
    attach(made, {"cache_dir": str(folder / "cache"), "preset": "paper"})
    made.train()
    return folder / "out/xtf/report.html"


@pytest.mark.parametrize("name", BLOCKS)
def test_every_stop_gives_the_block_that_is_counted(browser, tmp_path, name):
    made = trainer(tmp_path, rows=tiny.problems(40), max_steps=1)
    attach(made, {"cache_dir": str(tmp_path / "cache"), **BLOCKS[name]})
    made.train()
    plan = made._xtf_hooks.on_batch.__self__.plan
    opened = browser.new_page()
    opened.goto((tmp_path / "out/xtf/report.html").as_uri())
    legal = set()
    for score in plan.config.scores:
        (key,) = plan.config.scores[score].drop.model_dump(mode="json", exclude_none=True)
        stops = int(opened.get_attribute(f"input[data-score={score}][data-key={key}]", "max")) + 1
        for place in range(stops):
            put(opened, score, key, place)
            block = yaml.safe_load(opened.text_content("#yaml"))["xtf"]
            if opened.is_visible("#illegal"):
                with pytest.raises(ValueError):
                    XTFConfig.parse(block)
                continue
            config = XTFConfig.parse(block)
            keep = selected(plan, config).keep if is_moved(opened) else plan.selection.keep
            assert shown(opened) == weigh(plan, keep), block
            legal.add(len(config.scores))
        opened.click("#reset")
    assert len(legal) == (2 if name in ("one's own beside it", "one's own alone") else 1)
    opened.close()


def test_selector_names_collide_with_nothing(browser, tmp_path):
    """Filters are called `dropped` and `emptied` too, and every object of the page has a `constructor`."""
    names = ("dropped", "emptied", "constructor", "preset")
    made = trainer(tmp_path, rows=tiny.problems(24), max_steps=1)
    parts = {name: {**OWN, "drop": {"below": -1.5 + place / 2}} for place, name in enumerate(names)}
    attach(made, {"cache_dir": str(tmp_path / "cache"), "preset": "none", "combine": "majority", "selectors": parts})
    made.train()
    opened, errors = browser.new_page(), []
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.goto((tmp_path / "out/xtf/report.html").as_uri())
    assert [text for text in opened.locator(".score h3").all_inner_texts()] == list(names)
    for place, name in enumerate(names):
        opened.select_option("#reason", f"rule:{name}")
        fired = opened.evaluate("view.list.map((doc) => doc.key)")
        script = "place => documents.filter((d) => own(d).some((t) => t.bits >> place & 1)).map((doc) => doc.key)"
        assert fired and fired == opened.evaluate(script, place)
    opened.select_option("#reason", "dropped")
    assert opened.evaluate("view.list.every((doc) => own(doc).some((token) => !token.kept))")
    opened.select_option("#reason", "")
    opened.hover(".document .token >> nth=3")
    assert all(f" {name}: " in opened.inner_text("#tip") for name in names)
    put(opened, "constructor", "below", 3)
    part = yaml.safe_load(opened.text_content("#yaml"))["xtf"]["selectors"]["constructor"]
    assert part["scorer"] == "typicality" and part["drop"] != parts["constructor"]["drop"] and not errors
    opened.close()


def test_words_follow_scorer_and_unit(browser, tmp_path):
    """A score is described by its scorer, not by its slot; and thresholds of two scores are no pair."""
    made = trainer(tmp_path, rows=tiny.problems(12), max_steps=1)
    block = {
        "preset": "none",
        "knowledge_novelty": {"scorer": "log_probability", "drop": {"quantile": 0.1}},
        "selectors": {
            "known": {"scorer": "novelty", "drop": {"known_above": 0.5}},
            "unknown": {"scorer": "novelty", "drop": {"unknown_below": 0.9}},
            "mine": {**OWN, "window": 3},
            "other": OWN,
            "lines": {**OWN, "unit": "line"},
        },
        "combine": "majority",
    }
    attach(made, {"cache_dir": str(tmp_path / "cache"), **block})
    made.train()
    opened = browser.new_page()
    opened.goto((tmp_path / "out/xtf/report.html").as_uri())
    opened.hover(".document .token >> nth=3")
    lines = opened.locator("#tip p:not(.verdict)").all_inner_texts()
    words = {name.lstrip("✗· "): text for name, text in (line.split(": ") for line in lines)}
    assert words["knowledge novelty"].startswith("score -") and words["known"].startswith("the model gives it ")
    assert words["mine"].endswith("(mean over 3 tokens)") and words["lines"].endswith("(mean over its line)")
    assert "surprising than the model expected" in words["other"]
    assert "mean" not in words["other"] + words["known"] + words["knowledge novelty"]
    put(opened, "knowledge_novelty", "quantile", 1)
    assert not opened.is_visible("#illegal") and is_moved(opened)
    opened.close()


def test_the_legend_shows_every_rule_with_its_underline(browser, three):
    opened = browser.new_page()
    opened.goto(three.as_uri())
    drawn = opened.eval_on_selector_all("#rules .token", "all => all.map((e) => [e.textContent, e.className])")
    scores = opened.evaluate("scores.map((score) => named(score.name))")
    assert [text for text, _ in drawn][: len(scores)] == scores
    assert [name for _, name in drawn][: len(scores)] == [f"token rule-{i % 6}" for i in range(len(scores))]
    assert (drawn[-1] == ["several", "token rules"]) == (len(scores) > 1)
    colours = "all => all.map((e) => getComputedStyle(e).borderBottomColor)"
    assert "rgba(0, 0, 0, 0)" not in opened.eval_on_selector_all("#rules .token", colours)
    opened.close()


def test_words_of_several_tokens_read_from_right_to_left(browser, three):
    """In scripts that do; the token's elements do not change the order of letters."""
    opened = browser.new_page()
    opened.goto(three.as_uri())
    script = """(parts) => {
      const text = document.querySelector(".document");
      const spans = parts.map((part) => make("span", {class: "token"}, part));
      text.replaceChildren(...spans);
      return spans.map((span) => span.getBoundingClientRect().left);
    }"""
    places = opened.evaluate(script, ["مر", "حبا", "·", "بال", "عالم"])
    assert places == sorted(places, reverse=True)
    places = opened.evaluate(script, ["one", "·", "two"])
    assert places == sorted(places)
    opened.close()


@pytest.mark.parametrize("width", [360, 320])
def test_large_numbers_and_long_names_fit_a_phone(browser, three, tmp_path, width):
    text = three.read_text().replace('"completion_tokens":', '"completion_tokens":98765432,"was":')
    (tmp_path / "large.html").write_text(
        text.replace('"knowledge_novelty":{"fired":', '"knowledge_novelty":{"fired":8765432,"w":')
    )
    context = browser.new_context(viewport={"width": width, "height": 800})
    opened = context.new_page()
    opened.goto((tmp_path / "large.html").as_uri())
    assert "8,765,432" in opened.inner_text("#totals"), "the numbers did not arrive"
    assert opened.evaluate("document.documentElement.scrollWidth") <= width
    assert opened.eval_on_selector("#totals .scroll", "e => e.scrollWidth - e.clientWidth") <= 0
    context.close()


def test_what_cannot_be_moved_says_so(browser, tmp_path):
    """Rescoring is not in the counts; with a random control there is no slider."""
    found = {}
    for name, block in (
        ("rescored", {"selectors": {"out_of_place": {"drop": {"below": -2}}}}),
        ("control", {"preset": "paper", "control": "random"}),
    ):
        made = trainer(tmp_path / name, rows=tiny.problems(24), max_steps=1)
        attach(made, {"cache_dir": str(tmp_path / "cache"), **block})
        made.train()
        opened = browser.new_page()
        opened.goto((tmp_path / name / "out/xtf/report.html").as_uri())
        found[name] = opened.inner_text("#what-if")
        opened.close()
    assert "a run with another threshold rescores" in found["rescored"] and "Move a threshold" in found["rescored"]
    assert "No threshold of this block can be moved" in found["control"] and "draws the tokens" in found["control"]
