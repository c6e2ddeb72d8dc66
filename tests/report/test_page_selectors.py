"""The report of blocks with selectors: every stop gives a block that a run accepts, or the page says why not."""

from __future__ import annotations

import json

import pytest
import yaml

from tests import tiny
from tests.browsing import browser, dropped, is_moved, put, selected, shown, values  # noqa: F401 (a fixture)
from tests.training.test_callback import trainer
from xtf_plugin import attach
from xtf_plugin.config.block import XTFConfig

OWN = {"scorer": "typicality", "drop": {"below": -1.5}}
# The default's scorers, with rules that drop something of these texts and this model.
DEFAULT = {"reasoning_importance": {"among": None}, "knowledge_novelty": {"drop": {"below": 0.9}}}
BLOCKS = {
    "the preset's alone": DEFAULT,
    "one score asks about another": {"knowledge_novelty": DEFAULT["knowledge_novelty"]},
    "one's own beside it": {**DEFAULT, "selectors": {"mine": OWN}},
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
def test_any_number_gives_the_block_that_is_counted(browser, tmp_path, name):
    made = trainer(tmp_path, rows=tiny.problems(40), max_steps=1)
    attach(made, {"cache_dir": str(tmp_path / "cache"), **BLOCKS[name]})
    made.train()
    plan = made._xtf_hooks.on_batch.__self__.plan
    opened = browser.new_page()
    opened.goto((tmp_path / "out/xtf/report.html").as_uri())
    legal, refused, exact, uncounted = set(), 0, 0, set()
    for score in plan.config.scores:
        (key,) = plan.config.scores[score].drop.model_dump(mode="json", exclude_none=True)
        for value in (None, *values(opened, score, key)):
            put(opened, score, key, value)
            block = yaml.safe_load(opened.text_content("#yaml"))["xtf"]
            if opened.is_visible("#illegal"):
                with pytest.raises(ValueError):
                    XTFConfig.parse(block)
                refused += 1
                continue
            config = XTFConfig.parse(block)
            legal.add(len(config.scores))
            if shown(opened) is None:
                uncounted.add(score)
                continue
            least, most = shown(opened)
            assert least <= dropped(plan, selected(plan, config).keep) <= most, block
            exact += least == most
        opened.click("#reset")
    assert len(legal) == (1 if name == "at least two" else 2) and exact > 2
    assert refused >= {"one score asks about another": 1, "at least two": 2}.get(name, 0)
    assert uncounted <= {score for score, part in plan.config.scores.items() if part.scorer == "explained"}
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
        opened.check("[name=group][value=random]", force=True)
        opened.select_option("#reason", f"rule:{name}")
        fired = opened.evaluate("view.list.map((doc) => doc.key)")
        script = (
            "place => D.groups.random.map((i) => documents[i]).filter((d) => own(d).some((t) => t.bits >> place & 1))"
            ".map((doc) => doc.key)"
        )
        assert fired and fired == opened.evaluate(script, place)
    opened.select_option("#reason", "dropped")
    assert opened.evaluate("view.list.every((doc) => own(doc).some((token) => !token.kept))")
    opened.select_option("#reason", "")
    opened.hover(".document .token >> nth=3")
    assert all(f" {name}: " in opened.inner_text("#tip") for name in names)
    put(opened, "constructor", "below", -3.21)
    part = yaml.safe_load(opened.text_content("#yaml"))["xtf"]["selectors"]["constructor"]
    assert part == {"scorer": "typicality", "drop": {"below": -3.21}} and not errors
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
    put(opened, "knowledge_novelty", "quantile", 0.02)
    assert not opened.is_visible("#illegal") and is_moved(opened)
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
    (tmp_path / "large.html").write_text(text.replace('"dropped_tokens":', '"dropped_tokens":8765432,"w":'))
    context = browser.new_context(viewport={"width": width, "height": 800})
    opened = context.new_page()
    opened.goto((tmp_path / "large.html").as_uri())
    assert "8,765,432" in opened.inner_text("#facts"), "the numbers did not arrive"
    opened.eval_on_selector("details:has(#totals)", "e => { e.open = true; }")
    assert opened.evaluate("document.documentElement.scrollWidth") <= width
    context.close()


def test_what_cannot_be_counted_says_so(browser, tmp_path):
    """Scores that depend on what is dropped; with a random control there is no slider."""
    for name, block, moved in (
        ("default", {}, ("task_relevance", "of_median", 0.5)),
        ("control", {"preset": "paper", "control": "random"}, None),
    ):
        made = trainer(tmp_path / name, rows=tiny.problems(24), max_steps=1)
        attach(made, {"cache_dir": str(tmp_path / "cache"), **block})
        made.train()
        opened = browser.new_page()
        opened.goto((tmp_path / name / "out/xtf/report.html").as_uri())
        if moved is None:
            text = opened.inner_text("#what-if")
            assert "No threshold of this block can be moved" in text and "draws the tokens" in text
        elif opened.locator(f"[type=number][data-score={moved[0]}]").count():
            put(opened, *moved)
            assert shown(opened) is None and "changes the scores themselves" in opened.text_content("#change")
            assert "xtf score" in opened.text_content("#change")
        opened.close()


def test_words_of_the_defaults_scorers(browser, tmp_path):
    """They say why a sentence is dropped."""
    made = trainer(tmp_path, rows=tiny.problems(12), max_steps=1)
    attach(made, {"cache_dir": str(tmp_path / "cache"), "knowledge_novelty": {"unit": "line"}})
    made.train()
    opened = browser.new_page()
    opened.goto((tmp_path / "out/xtf/report.html").as_uri())

    def said(score, value):
        return opened.evaluate("([score, value]) => inWords(score, value)", [score, value])

    text = "its prompt and the text before it explain 2 % of this sentence"
    assert said("task_relevance", 0.02) == text, "no score of this model is defined, so there is no median"
    opened.evaluate("S.distributions.task_relevance.median = 0.38")
    assert said("task_relevance", 0.02) == f"{text}; the median is 38 %"
    less = "its prompt and the text before it make this sentence less probable (−8 % explained); the median is 38 %"
    assert said("task_relevance", -0.08) == less
    assert said("reasoning_importance", -0.3) == "without this sentence, the text after it is 0.3 nats easier in total"
    assert said("reasoning_importance", 0.3) == "without this sentence, the text after it is 0.3 nats harder in total"
    assert (
        said("reasoning_importance", -0.01) == "this sentence does not help to predict the text after it (-0.01 nats)"
    )
    assert said("knowledge_novelty", 0.08) == "92 % of this line repeats earlier text"
    assert said("knowledge_novelty", 1) == "this line repeats no earlier text"
    assert opened.evaluate("inWords('knowledge_novelty', NaN)") == "not asked, fewer than 6 tokens"
    asked = opened.evaluate("inWords('reasoning_importance', NaN)")
    assert asked == "not asked: task relevance leaves no doubt, or too little text follows"
    assert opened.evaluate("scores.map((score) => averaged(score.name))") == ["", "", ""]
    notes = opened.locator(".score > .note:last-child").all_inner_texts()
    assert notes[0] == "The score: how much it helps to predict the text after it." and len(set(notes)) == 3
    assert opened.evaluate("kindTitle('knowledge_novelty')") == "Repeats earlier text"
    part = {"scorer": "column", "column": "bad", "unit": "line"}
    opened.evaluate("part => { S.config.selectors = {mine: part}; }", part)
    assert (said("mine", 0), said("mine", 1)) == (
        "column bad marks most of this line",
        "column bad does not mark most of this line",
    )
    opened.close()


def test_texts_are_grouped_at_the_top_and_formats_are_listed(browser, tmp_path):
    """Texts are untrusted, as tokens are."""
    rows = tiny.problems(24)
    for row in rows:
        row["completion"] = f"# Work\n{row['completion']} <b>I hope this helps</b> a lot!"
    made = trainer(tmp_path, rows=rows, max_steps=1, max_length=None)
    part = {"scorer": "novelty", "unit": "sentence", "drop": {"unknown_below": 0.02}}
    attach(made, {"cache_dir": str(tmp_path / "cache"), "preset": "none", "selectors": {"mine": part}})
    made.train()
    summary = json.loads((tmp_path / "out/xtf/summary.json").read_text())
    opened, errors = browser.new_page(viewport={"width": 1280, "height": 900}), []
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.goto((tmp_path / "out/xtf/report.html").as_uri())
    assert opened.evaluate("document.querySelector('main').firstElementChild.id") == "kinds"
    card = opened.locator(".card >> nth=0")
    assert "100 %" in card.inner_text() and "Very improbable for the model" in card.inner_text()
    lines = card.locator("li").all_inner_texts()
    assert any("this helps</b> a lot!" in line and "×24" in line for line in lines) and not errors, lines
    assert opened.locator(".said b").count() == 0
    kept = opened.locator("#repeated tbody tr").all_inner_texts()
    assert any("# Work" in line and "24 (100 %)" in line and "format" in line for line in kept)
    warned = [text for text in summary["warnings"] if "add to the block: " in text]
    assert warned and opened.locator("#warnings code.line").all_inner_texts() == [
        text.split("add to the block: ")[1] for text in warned
    ]
    assert opened.inner_text("#advice") == summary["familiarity"]["advice"]
    opened.evaluate("S.recurring = S.formats = undefined; showFormats()")
    assert not opened.is_visible("#formats")
    opened.close()
