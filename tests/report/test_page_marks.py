"""Marks and the block to paste, in a browser: a run with the pasted block keeps and drops what was marked."""

from __future__ import annotations

import re

import numpy as np
import pytest
import yaml

from tests import tiny
from tests.browsing import browser, put, selected, shown  # noqa: F401 (a fixture)
from tests.report.tables import page_of, plan_of, table_of
from xtf_plugin.config.block import XTFConfig
from xtf_plugin.report.page.shortest_block import minimal

PHRASE = "Sure, happy to help!"
BLOCK = {"preset": "none", "knowledge_novelty": {"unit": "sentence", "drop": {"unknown_below": 0.9}}}
STRANGE = 'Odd (really) "quoted" \\d+ \u202e\x1b[1m 漢字 😀 tab\there, 100 % · ↵ {x}: #1!'


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("marks")
    plan = plan_of(folder, beginning(STRANGE), **BLOCK)
    return plan, page_of(table_of(plan), folder / "xtf/report.html")


def beginning(line) -> list[dict[str, list[int]]]:
    """Documents whose answers begin with a line."""
    documents = []
    for row in tiny.problems(12):
        prompt, ids = (tiny.tokenizer()(text).input_ids for text in (row["prompt"], f" {line}\n{row['completion']}"))
        documents.append({"input_ids": prompt + ids, "labels": [-100] * len(prompt) + ids})
    return documents


@pytest.fixture
def page(browser, made):
    opened = browser.new_page(viewport={"width": 1280, "height": 900})
    errors = []
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.goto(made[1].as_uri())
    yield opened
    assert not errors
    opened.close()


def pasted(page) -> XTFConfig:
    """The block of the page, as a run reads it from a recipe."""
    return XTFConfig.parse(yaml.safe_load(page.text_content("#yaml"))["xtf"])


def kept_of(plan, config, text) -> set[bool]:
    """Whether the tokens of a text are kept in a run with a block, wherever it stands."""
    keep, found = selected(plan, config).keep, set()
    for low, high in zip(plan.scores.offsets, plan.scores.offsets[1:], strict=False):
        ids = plan.scores.token_ids[low:high].tolist()
        lengths = [len(tiny.tokenizer().decode(ids[:n])) for n in range(len(ids) + 1)]
        for match in re.finditer(re.escape(text), tiny.tokenizer().decode(ids)):
            inside = [n for n in range(len(ids)) if lengths[n + 1] > match.start() and lengths[n] < match.end()]
            found |= {bool(keep[low + n]) for n in inside}
    return found


def hold(page, text) -> None:
    """Click the first token of a text that begins a sentence in the first document that has it."""
    script = """text => {
      for (const box of document.querySelectorAll(".document")) {
        const at = box.doc.text.indexOf(text);
        if (at < 0) continue;
        const token = box.doc.ends.findIndex((end) => end > at + 1);
        box.querySelectorAll(".token")[token].click();
        box.focus();
        return true;
      }
      return false;
    }"""
    assert page.evaluate(script, text)


@pytest.mark.parametrize("text", [PHRASE, STRANGE])
def test_a_sentence_marked_keep_is_kept_by_a_run(made, page, text):
    plan, _ = made
    assert False in kept_of(plan, plan.config, text)
    hold(page, text[:10])
    page.keyboard.press("k")
    config = pasted(page)
    assert len(config.protect.patterns) == 1 and config.protect.patterns[0].isprintable()
    assert kept_of(plan, config, text) == {True}
    assert page.locator(".document >> nth=0 >> .marked-keep").count() > 3
    assert shown(page) is None and "xtf score" in page.text_content("#change")
    page.keyboard.press("u")
    assert pasted(page) == plan.config and shown(page) is not None


def test_a_sentence_marked_drop_is_dropped_by_a_run(made, page):
    plan, _ = made
    text = "The answer is"
    hold(page, text)
    page.keyboard.press("x")
    config = pasted(page)
    (pattern,) = config.force_drop
    number = re.search(r"\d+", pattern).group()
    assert kept_of(plan, config, f"The answer is {number}.") == {False}
    page.keyboard.press("x")
    assert pasted(page) == plan.config, "the same key again takes the mark back"


def counts(page) -> dict[int, str]:
    """What the page says of the kept tokens of each answer, by its row."""
    script = """() => Array.from(document.querySelectorAll(".document"), (box) =>
      [box.doc.row, box.parentElement.querySelector(".kept-count").textContent])"""
    return dict(page.evaluate(script))


def test_answers_are_counted_as_a_run_counts_them_or_not_at_all(browser, tmp_path):  # noqa: F811
    """`min_kept` brings back tokens of short answers; no count of the page may leave that out."""
    plan = plan_of(tmp_path, beginning("Odd"), **{**BLOCK, "min_kept": 10})
    page = browser.new_page()
    page.goto(page_of(table_of(plan), tmp_path / "xtf/report.html").as_uri())
    rows, offsets = {}, plan.scores.offsets

    def kept(config):
        keep = selected(plan, config).keep
        return {row: int(keep[offsets[row] : offsets[row + 1]].sum()) for row in rows}

    page.check("input[name=group][value=random]")
    rows = counts(page)
    assert {row: int(text.split()[1]) for row, text in rows.items()} == kept(plan.config)
    hidden = set()
    for value in (0.5, 0.99, 1e-9):
        put(page, "knowledge_novelty", "unknown_below", value)
        shown_, wanted = counts(page), kept(pasted(page))
        assert all(int(text.split()[1]) == wanted[row] for row, text in shown_.items() if text.startswith("kept"))
        hidden |= {text.startswith("kept") for text in shown_.values()}
    assert hidden == {True, False}, "the thresholds must show both"
    page.click("#reset")
    hold(page, "Odd")
    page.keyboard.press("x")
    assert all("not counted" in text for text in counts(page).values())
    page.close()


GUARDED = {**BLOCK, "min_kept": 0, "protect": {"patterns": ["The answer is.*"], "formats": 0.2}}


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """A run whose block protects the last sentence, and `# Work` as format."""
    folder = tmp_path_factory.mktemp("guarded")
    plan = plan_of(folder, beginning("# Work"), **GUARDED)
    assert plan.text.formatted.any()
    return plan, page_of(table_of(plan), folder / "xtf/report.html")


def kept_on(page) -> dict[str, list[bool]]:
    """What the page keeps, by document."""
    return page.evaluate(
        "Object.fromEntries(documents.map((doc) => [doc.key, decide(doc).map((token) => token.kept)]))"
    )


def kept_in(plan, config) -> dict[str, list[bool]]:
    """What a run keeps, by document."""
    parts = np.split(selected(plan, config).keep, plan.scores.offsets[1:-1])
    return {key.tobytes().hex(): part.tolist() for key, part in zip(plan.scores.keys, parts, strict=True)}


@pytest.fixture
def guard(guarded, browser):
    opened = browser.new_page()
    opened.goto(guarded[1].as_uri())
    yield opened
    opened.close()


def test_a_drop_mark_spares_what_the_block_protects(guarded, guard):
    before = kept_on(guard)
    hold(guard, "The answer is")
    guard.keyboard.press("x")
    config = pasted(guard)
    assert len(config.force_drop) == 1 and kept_on(guard) == kept_in(guarded[0], config) == before
    assert "protected" in guard.inner_text("#tip")


def test_a_drop_mark_beats_a_format(guarded, guard):
    before = kept_on(guard)
    hold(guard, "# Work")
    guard.keyboard.press("x")
    assert kept_on(guard) == kept_in(guarded[0], pasted(guard)) != before


def test_a_keep_mark_beats_a_later_drop_mark(guarded, guard):
    hold(guard, PHRASE)
    guard.keyboard.press("k")
    before = kept_on(guard)
    guard.keyboard.press("ArrowRight")
    guard.keyboard.press("Shift+X")
    config = pasted(guard)
    assert len(config.force_drop) == 1 and len(config.protect.patterns) == 2
    assert kept_on(guard) == kept_in(guarded[0], config) == before


@pytest.mark.parametrize(
    "pattern",
    [
        "\\bНапример:",
        "(?i:\\bШАГ\\s+\\d+\\b)",
        "\\bстр\\b",
        "\\\\d\\.",
        "\\bcafé\\b",
        "(?i:\\b\\d+\\b)",
    ],
)
def test_the_page_matches_patterns_as_python_does(page, pattern):
    text = "Например: шаг 1, Шаг\xa0٣; строка стр. \\d. cafés café x9 99 _8"
    script = """([text, pattern]) => {
      const begins = Array.from(text, (_, i) => i);
      return matched({spelling: text, begins, ends: begins.map((i) => i + 1)}, {pattern});
    }"""
    expected = [i for match in re.finditer(pattern, text) for i in range(*match.span())]
    assert expected and page.evaluate(script, [text, pattern]) == expected


def test_a_word_is_marked_as_a_whole_word(made, page):
    plan, _ = made
    hold(page, "happy to help!")
    page.keyboard.press("Shift+K")
    (pattern,) = pasted(page).protect.patterns
    assert pattern.startswith("\\b") and pattern.endswith("\\b")
    assert not re.search(pattern, "unhappyness")


def test_marks_collect_and_are_taken_back_one_by_one(made, page):
    plan, _ = made
    card = page.locator(".card >> nth=0 >> li", has_text=PHRASE).locator(".marker")
    card.click()
    assert card.get_attribute("aria-pressed") == "true"
    hold(page, "The answer is")
    page.locator("#tip button", has_text="drop sentence").click()
    config = pasted(page)
    assert len(config.protect.patterns) == len(config.force_drop) == 1
    assert kept_of(plan, config, PHRASE) == {True}
    assert page.locator("#marks li").count() == 2 and "2 marks" in page.inner_text("#bar")
    page.locator("#marks button >> nth=0").click()
    assert pasted(page).protect.patterns == [] and card.get_attribute("aria-pressed") == "false"
    page.click("#reset")
    assert pasted(page) == plan.config and page.locator("#marks li").count() == 0


def test_a_mark_on_every_listed_text_keeps_it(made, page):
    """The patterns that Python writes for the page, all at once."""
    plan, _ = made
    page.eval_on_selector_all(".card .marker", "all => all.forEach((button) => button.click())")
    config = pasted(page)
    assert len(config.protect.patterns) > 5
    left = plan.scores.token_ids[~selected(plan, config).keep]
    assert not tiny.tokenizer().decode(left).strip(), "only whitespace around the texts"


def test_marks_and_thresholds_stand_in_one_block(made, page):
    put(page, "knowledge_novelty", "unknown_below", 0.00001)
    hold(page, PHRASE)
    page.keyboard.press("k")
    config = pasted(page)
    assert config.knowledge_novelty.drop.unknown_below == 0.00001 and len(config.protect.patterns) == 1
    lines = page.text_content("#yaml").splitlines()
    assert lines[:4] == ["xtf:", "  preset: none", "  knowledge_novelty:", "    scorer: novelty"] and len(lines) < 12


OWN = {"scorer": "typicality", "drop": {"below": -1.5}}
BLOCKS = [
    {},
    {"task_relevance": {"drop": {"of_median": 0.3}}},
    {"knowledge_novelty": False, "min_kept": 3},
    {"reasoning_importance": {"scorer": "attention_received", "layers": [0, 1], "drop": {"fence": 1.5}}},
    {"preset": "paper"},
    {"preset": "paper", "task_relevance": {"drop": {"cluster": 1, "of": 4}}, "protect": {"special_tokens": True}},
    {"preset": "official", "knowledge_novelty": {"drop": {"known_above": 0.9, "unknown_below": 1e-7}}},
    {
        "preset": "none",
        "selectors": {"on": OWN, "null": {**OWN, "window": 3}, "y": {"scorer": "column", "column": "b: #d"}},
    },
    {"force_drop": ['it\'s "quoted"', "\u202e\x7f\u0085\ufeff", "yes", "- a: b #c", "\\d+|{x}", "😀", "a\nb\t"]},
    {"protect": {"formats": None, "patterns": ["no", "####.*"]}, "combine": {"at_least": 2}, "control": "random"},
    {"reference": {"model": "some/model", "revision": "1e5"}, "cache_dir": "/tmp/a b", "report": False, "seed": 7},
]


@pytest.mark.parametrize("block", BLOCKS)
def test_the_short_block_is_the_same_block(block):
    config = XTFConfig.parse(block)
    short = minimal(config)
    assert XTFConfig.parse(short).to_dict() == config.to_dict()
    assert short.keys() <= {"preset", *block}
    given = block.get("task_relevance", block.get("knowledge_novelty"))
    if isinstance(given, dict) and "preset" not in block:
        assert short == {"preset": "default", **block}


@pytest.mark.parametrize("block", BLOCKS)
def test_the_page_writes_the_short_block_as_yaml(made, page, block):
    config = XTFConfig.parse(block)
    page.evaluate("block => { D.block = block; }", minimal(config))
    text = page.evaluate("block()")
    assert XTFConfig.parse(yaml.safe_load(text)["xtf"]).to_dict() == config.to_dict()
    assert "{}" not in text and "[]" not in text


def test_an_answer_has_its_own_direction_below_a_prompt_of_another(browser, tmp_path):  # noqa: F811
    spell = tiny.tokenizer()
    prompt, ids = (spell(text, add_special_tokens=False)["input_ids"] for text in ("Say it in Hebrew.\n", "שלום לכולם"))
    path = page_of(
        table_of(
            plan_of(tmp_path, [{"input_ids": prompt + ids, "labels": [-100] * len(prompt) + ids}], preset="paper")
        ),
        tmp_path / "report.html",
    )
    page = browser.new_page()
    page.goto(path.as_uri())
    directions = page.evaluate(
        "['.document', '.document .prompt'].map((each) => getComputedStyle(document.querySelector(each)).direction)"
    )
    page.close()
    assert directions == ["rtl", "ltr"]
