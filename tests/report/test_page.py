"""report.html in a real Chromium: it loads nothing and logs nothing, its numbers are those of summary.json and the
table, and its sliders count what `select` computes for their thresholds.
"""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from tests import tiny
from tests.browsing import browser, dropped, is_moved, put, selected, shown, values  # noqa: F401 (a fixture)
from tests.training.test_callback import trainer
from xtf_plugin import attach, cli
from xtf_plugin.config.block import XTFConfig

HOSTILE = (
    ' <script>document.title="owned"</script> <img src=x onerror=alert(1)> "quotes" \'single\' & </script> '
    "\u202eevil\u202c \x1b[31m 😀 漢字 $data $script \u2028 " + "x" * 3_000
)
BLOCK = {
    "preset": "paper",
    "reasoning_importance": {"layers": "all", "drop": {"quantile": 0.1}},
    "knowledge_novelty": {"drop": {"known_above": 0.005, "unknown_below": 0.0001}},
    "task_relevance": {"drop": {"cluster": 2, "of": 4}},
    "protect": {"special_tokens": True, "patterns": ["answer is \\d+"]},
    "force_drop": ["happy"],
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with a little of everything: its plan and folder."""
    folder = tmp_path_factory.mktemp("run")
    rows = tiny.problems(120)
    rows[3]["completion"] = HOSTILE + rows[3]["completion"]
    rows[5] = rows[4]
    made = trainer(folder, rows=rows, max_steps=1, max_length=None)
    attach(made, {"cache_dir": str(folder / "cache"), **BLOCK})
    made.train()
    return made._xtf_hooks.on_batch.__self__.plan, folder / "out/xtf"


@pytest.fixture
def page(browser, run):
    """The report, opened; it must log nothing and load nothing."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    opened = context.new_page()
    noise = []
    opened.on("console", lambda message: noise.append(message.text))
    opened.on("pageerror", lambda error: noise.append(str(error)))
    opened.on("request", lambda request: noise.append(request.url))
    opened.goto((run[1] / "report.html").as_uri())
    yield opened
    assert noise == [(run[1] / "report.html").as_uri(), "data:,"] or noise == [(run[1] / "report.html").as_uri()]
    context.close()


def test_it_is_one_small_file(run):
    text = (run[1] / "report.html").read_text()
    assert len(text) < 3 << 20
    assert "http://" not in text.replace("http://www.w3.org/2000/svg", "") and "https://" not in text
    assert "</script> \u202e" not in text and "<img" not in text


def test_totals_are_those_of_summary_and_table(run, page):
    plan, folder = run
    totals = json.loads((folder / "summary.json").read_text())["totals"]
    kept = np.asarray(pq.read_table(folder / "scores.parquet").column("kept").to_pylist())
    lost = int((~kept).sum())
    assert shown(page) == (lost, lost) and lost == totals["dropped_tokens"] == dropped(plan, plan.selection.keep)
    facts = page.text_content("#facts")
    assert f"{totals['completion_tokens']:,}" in facts and f"{lost:,}" in facts
    assert page.text_content("#headline").startswith(f"{100 * totals['kept_fraction']:.1f} %")
    assert not page.is_visible("#bar")


SLIDERS = (
    ("reasoning_importance", "quantile"),
    ("knowledge_novelty", "known_above"),
    ("knowledge_novelty", "unknown_below"),
    ("task_relevance", "cluster"),
)


def pasted(page):
    """The block that the page offers, as a run reads it."""
    return XTFConfig.parse(yaml.safe_load(page.text_content("#yaml"))["xtf"])


@pytest.mark.parametrize(("score", "key"), SLIDERS)
def test_any_number_counts_what_a_run_with_the_pasted_block_selects(run, page, score, key):
    """Between the two bounds, which are equal at the page's own places but for characters that are kept whole."""
    plan, _ = run
    seen, exact = set(), 0
    for value in (None, *values(page, score, key, 20)):
        put(page, score, key, value)
        if page.is_visible("#illegal"):
            with pytest.raises(ValueError):
                pasted(page)
            assert shown(page) is None
            continue
        config = pasted(page)
        assert value is None or getattr(config, score).drop.model_dump()[key] == value
        least, most = shown(page)
        number = dropped(plan, selected(plan, config).keep)
        assert least <= number <= most, (value, config)
        exact += most - least <= page.evaluate(
            "counted().dropped[1] && count(sliders.map((s, i) => placesOf(s, state.values[i])[0])).loose"
        )
        seen.add(number)
    assert len(seen) > 2 and exact > 2


def test_a_number_beyond_what_the_page_knows_is_not_counted(page):
    put(page, "reasoning_importance", "quantile", 0.9)
    assert shown(page) is None and "xtf score" in page.text_content("#change")
    put(page, "reasoning_importance", "quantile", 1.5)
    assert page.is_visible("#illegal") and "between 0 and 1" in page.text_content("#illegal")


@pytest.mark.parametrize(("score", "key"), SLIDERS)
def test_line_and_thumb_are_at_the_threshold(run, page, score, key):
    """Of a run with this number; at the median, with a note, where every document has its own."""
    plan, folder = run
    edges = json.loads((folder / "summary.json").read_text())["distributions"][score]["edges"]
    checked = 0
    for value in page.evaluate(f"sliders.find((s) => s.score === '{score}' && s.key === '{key}').places").copy()[1:4]:
        line = page.evaluate(f"sliders.find((s) => s.score === '{score}' && s.key === '{key}').line")
        put(page, score, key, (value - line[0]) / line[1] if line else value)
        if page.is_visible("#illegal"):
            continue
        drops = selected(plan, pasted(page)).thresholds[score]["drops"]
        numbers = [each["median"] if isinstance(each, dict) else each for each in drops.values() if each is not None]
        places = [100 * (number - edges[0]) / (edges[-1] - edges[0]) for number in numbers]
        drawn = page.eval_on_selector_all(
            f"#histogram-{score} line", "all => all.map((e) => Number(e.getAttribute('x1')))"
        )
        assert sorted(drawn) == pytest.approx(sorted(min(100, max(0, place)) for place in places), abs=0.1)
        note = page.locator(f"section:has(> #histogram-{score})").inner_text()
        assert ("each document has its own threshold" in note) == (key == "quantile")
        if key != "cluster":
            assert thumb(page, score, key) == pytest.approx(line_of(page, score, key), abs=1)
        checked += 1
    put(page, score, key, None)
    assert checked and page.locator(f"#histogram-{score} line").count() == (1 if score == "knowledge_novelty" else 0)


def thumb(page, score, key) -> float:
    """Where the middle of a slider's thumb is, in pixels: it moves between 8 px from both ends."""
    script = """input => { const box = input.getBoundingClientRect();
      return box.left + 8 + (box.width - 16) * (input.value - input.min) / (input.max - input.min); }"""
    return float(page.eval_on_selector(f"input[type=range][data-score={score}][data-key={key}]", script))


def line_of(page, score, key) -> float:
    """The line of a rule; of two rules of one score the one at its own threshold."""
    lines = page.eval_on_selector_all(
        f"#histogram-{score} line", "all => all.map((e) => e.getBoundingClientRect().left)"
    )
    return float(min(lines, key=lambda place: abs(place - thumb(page, score, key))))


def test_a_slider_is_dragged_to_a_short_number(page):
    place = "input[type=range][data-score=knowledge_novelty][data-key=known_above]"
    page.locator(place).scroll_into_view_if_needed()
    box = page.locator(place).bounding_box()
    page.mouse.click(box["x"] + box["width"] * 0.4, box["y"] + box["height"] / 2)
    value = page.input_value("input[type=number][data-score=knowledge_novelty][data-key=known_above]")
    assert value in page.text_content("#yaml") and len(value) < 9 and is_moved(page)
    assert thumb(page, "knowledge_novelty", "known_above") == pytest.approx(box["x"] + box["width"] * 0.4, abs=3)
    page.focus(place)
    page.keyboard.press("ArrowRight")
    assert page.input_value("input[type=number][data-score=knowledge_novelty][data-key=known_above]") != value


@pytest.mark.parametrize("combine", ["majority", "intersection"])
def test_combine_and_several_sliders_at_once(run, page, combine):
    plan, _ = run
    page.select_option("#combine", json.dumps(combine, separators=(",", ":")))
    put(page, "reasoning_importance", "quantile", 0.3)
    put(page, "task_relevance", "cluster", 2)
    assert page.is_visible("#bar")
    config = pasted(page)
    assert config.combine == combine
    least, most = shown(page)
    assert least <= dropped(plan, selected(plan, config).keep) <= most
    page.click("#reset")
    assert page.text_content("#change") == "as in the run" and shown(page) == (dropped(plan, plan.selection.keep),) * 2
    assert not page.is_visible("#bar")


def test_documents_are_shaded_as_a_run_would_decide(run, page):
    """Token by token: at the start, and again after a slider has moved."""
    plan, _ = run
    assert page.evaluate("documents.length") >= 100
    keys = {bytes(key).hex(): index for index, key in enumerate(plan.documents.keys)}
    keep = plan.selection.keep
    page.check("[name=group][value=random]", force=True)
    for place in (None, 0.05):
        if place is not None:
            put(page, "reasoning_importance", "quantile", place)
            keep = selected(plan, pasted(page)).keep
        script = "documents.map((d) => [d.key, decide(d).map((t) => t.kept)])"
        for key, kept in page.evaluate(script):
            index = keys[key]
            assert kept == keep[plan.scores.offsets[index] : plan.scores.offsets[index + 1]].tolist()
        drawn = page.eval_on_selector_all(".document .token", "all => all.map((e) => e.classList.contains('dropped'))")
        first = page.evaluate("view.list.slice(0, view.shown).map((d) => d.key)")
        parts = [keep[plan.scores.offsets[keys[key]] : plan.scores.offsets[keys[key] + 1]] for key in first]
        assert drawn == (~np.concatenate(parts)).tolist()


def test_the_tip_describes_a_tokens_scores(run, page):
    plan, _ = run
    page.hover(".document .token >> nth=2")
    tip = page.inner_text("#tip")
    key = page.evaluate("view.list[0].key")
    at = int(plan.scores.offsets[[bytes(k).hex() for k in plan.documents.keys].index(key)]) + 2
    probability = 1 - float(plan.selection.seen["knowledge_novelty"][at])
    said = float(tip.split("the model gives it ")[1].split(" %")[0])
    assert said == pytest.approx(100 * probability, abs=0.02)  # two digits
    assert ("dropped:" in tip) == (not plan.selection.keep[at])
    assert "of uniform" in tip or "times uniform attention" in tip or "about uniform attention" in tip
    words = {0.1: "about a tenth of uniform attention", 0.52: "about half of uniform attention", 3.4: "3.4 times"}
    for value, text in words.items():
        assert text in page.evaluate("attention", value)
    assert page.evaluate("percent", 0.98) == "98 %" and page.evaluate("percent", 1e-9) == "less than 0.01 %"


def test_keys_move_from_token_to_token(page):
    page.focus(".document >> nth=0")
    assert page.is_visible("#tip")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.eval_on_selector(".current", "e => e.dataset.token") == "2"
    page.keyboard.press("d")
    assert "dropped" in page.get_attribute(".current", "class")
    page.keyboard.press("End")
    page.keyboard.press("Escape")
    assert not page.is_visible("#tip")


def test_a_mouse_at_rest_does_not_change_the_token(page):
    """Tokens that scroll beneath it are ignored. A moving mouse selects, until it leaves the documents."""
    box = page.locator(".document >> nth=1").bounding_box()
    page.evaluate("y => scrollTo(0, y)", box["y"] - 300)
    box = page.locator(".document >> nth=1").bounding_box()
    page.mouse.move(box["x"] + 60, box["y"] + 20)
    page.focus(".document >> nth=0")
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    held = page.query_selector(".current")
    for _ in range(4):  # documents pass beneath the mouse
        page.evaluate("scrollBy(0, 90)")
        page.wait_for_timeout(150)
    assert page.evaluate("held => view.current === held && held.dataset.token === '1'", held)
    page.hover(".document >> nth=2 >> .token >> nth=5")
    assert page.evaluate("held => view.current !== held", held)
    page.mouse.move(3, 3)
    assert page.evaluate("held => view.current === held", held) and page.is_visible("#tip")
    page.keyboard.press("ArrowRight")
    assert page.eval_on_selector(".current", "e => e.dataset.token") == "2"
    page.focus("#search")
    assert not page.is_visible("#tip")


def test_filters_and_search(page):
    page.check("[name=group][value=random]", force=True)
    everything = page.locator("article").count()
    page.select_option("#reason", "rule:task_relevance")
    assert page.evaluate("view.list.length") > 0
    assert page.evaluate("view.list.every((d) => decide(d).some((t) => t.bits >> 2 & 1))")
    page.select_option("#reason", "")
    page.fill("#search", "evil")
    assert page.evaluate("view.list.length") == 1 and page.locator("article").count() == 1
    page.fill("#search", "the answer is")
    assert page.evaluate("view.list.length") > 50
    page.click("#more")
    assert page.locator("article").count() == 2 * everything


def test_groups_hold_what_their_names_say(run, page):
    page.check("[name=group][value=most]", force=True)
    shares = page.evaluate("view.list.map((d) => decide(d).filter((t) => !t.kept).length / d.flags.length)")
    assert len(shares) > 3 and shares == sorted(shares, reverse=True) and shares[-1] > 0
    page.check("[name=group][value=near]", force=True)
    shares = page.evaluate("view.list.map((d) => d.flags.filter((flags) => flags & NEAR).length / d.flags.length)")
    assert shares and shares == sorted(shares, reverse=True) and page.locator(".document .near").count()
    page.check("[name=group][value=format]", force=True)
    assert page.evaluate("view.list.length")
    assert page.evaluate("view.list.every((d) => d.text.toLowerCase().includes(d.suspect.split(' ')[0]))")


def test_a_run_that_drops_nothing_opens_on_answers(browser, tmp_path):  # noqa: F811
    """The first group, "dropped most", is empty then."""
    made = trainer(tmp_path, rows=tiny.problems(12), max_steps=1, max_length=None)
    attach(
        made, {"cache_dir": str(tmp_path / "cache"), **{**BLOCK, "force_drop": []}, "protect": {"patterns": ["(?s).*"]}}
    )
    made.train()
    page = browser.new_page()
    page.goto((tmp_path / "out/xtf/report.html").as_uri())
    assert page.text_content("#reasons") == "Nothing is dropped." and page.text_content("#about-kinds") == ""
    assert page.locator("article").count() > 5
    page.close()


def test_charts_draw_the_tokens_of_each_place(run, page):
    """Kept above dropped, in other colours; heights are shares of the largest bar."""
    plan, _ = run
    titles = page.locator("#charts figure >> nth=0 >> rect.lost title").all_text_contents()
    counted = [title.split(": ")[1].split(" tokens")[0].replace(",", "").split(" of ") for title in titles]
    assert sum(int(lost) for lost, _ in counted) == dropped(plan, plan.selection.keep)
    assert sum(int(every) for _, every in counted) == int(plan.weights.sum())
    script = "all => all.map((e) => Number(e.getAttribute('height')))"
    lost, kept = (
        page.eval_on_selector_all(f"#charts figure >> nth=0 >> rect.{kind}", script) for kind in ("lost", "kept")
    )
    tallest = max(int(every) for _, every in counted)
    for part, rest, (number, every) in zip(lost, kept, counted, strict=True):
        assert part / max(map(sum, zip(lost, kept, strict=True))) == pytest.approx(int(number) / tallest)
        assert part + rest == pytest.approx(max(map(sum, zip(lost, kept, strict=True))) * int(every) / tallest)
    colours = [page.eval_on_selector(f"rect.{kind}", "e => getComputedStyle(e).fill") for kind in ("lost", "kept")]
    assert colours[0] != colours[1]


def test_whitespace_is_plain_and_shown_on_demand(run, page):
    plan, _ = run
    text, key = page.evaluate("[view.list[0].text, view.list[0].key]")
    at = [bytes(k).hex() for k in plan.documents.keys].index(key)
    assert text == tiny.tokenizer().decode(plan.scores.token_ids[slice(*plan.scores.offsets[at : at + 2])])
    drawn = "all => all.map((e) => e.textContent).join('')"
    assert page.eval_on_selector_all(".document >> nth=0 >> .token", drawn) == text and " " in text
    page.check("#whitespace")
    marked = page.eval_on_selector_all(".document >> nth=0 >> .token", drawn)
    assert marked == text.replace(" ", "·").replace("\n", "↵\n") != text


def test_untrusted_tokens_are_text(run, page):
    page.fill("#search", "evil")
    text = page.inner_text(".document")
    assert "<script>" in text and "</script>" in text and '"quotes"' in text and "onerror" in text
    assert "\\u202e" in text and "\\x1b" in text and "\u202e" not in text and "😀" in text and "漢" in text
    page.fill("#search", "漢字")
    assert page.evaluate("view.list.length") == 1
    assert page.title().startswith("xtf report") and page.locator("main img").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 800, 360])
def test_it_fits_every_width_and_scheme(browser, run, scheme, width, tmp_path):
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    opened = context.new_page()
    opened.goto((run[1] / "report.html").as_uri())
    assert opened.evaluate("document.documentElement.scrollWidth") <= width
    assert opened.eval_on_selector_all(
        ".card, figure, .score", "all => all.every((e) => e.scrollWidth <= e.clientWidth)"
    )
    dark, light = "rgb(15, 20, 25)", "rgb(255, 255, 255)"
    assert opened.evaluate("getComputedStyle(document.body).backgroundColor") == (dark if scheme == "dark" else light)
    opened.screenshot(path=tmp_path / "page.png", full_page=True)
    assert (tmp_path / "page.png").stat().st_size > 10_000
    context.close()


def test_the_policy_allows_only_the_pages_script(run):
    """The content security policy names the script by its hash, and nothing else."""
    text = (run[1] / "report.html").read_text()
    assert "default-src 'none'" in text and "script-src 'sha256-" in text and "script-src 'unsafe" not in text


def test_a_table_alone_gives_the_same_report(run, tmp_path, capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["report", str(run[1] / "scores.parquet"), "--output", str(tmp_path / "again.html")])
    bodies = [path.read_text().split("<body>")[1] for path in (tmp_path / "again.html", run[1] / "report.html")]
    assert bodies[0] == bodies[1] and len(bodies[0]) > 10_000
    printed = capsys.readouterr().out
    totals = json.loads((run[1] / "summary.json").read_text())["totals"]
    assert all(f"{totals[name]:,}" in printed for name in ("completion_tokens", "dropped_tokens"))
    assert str(tmp_path / "again.html") in printed.replace("\n", "")


def test_the_end_of_a_prompt_is_shown(run, page):
    plan, _ = run
    page.check("[name=group][value=random]", force=True)
    shown = page.locator(".document .prompt").all_inner_texts()
    assert len(shown) == page.locator(".document").count()
    given = [plan.documents.document(i) for i in range(len(plan.documents))]
    whole = [tiny.tokenizer().decode(ids[~completion]) for ids, completion in given]
    assert all(any(each.removeprefix("… ") in text for text in whole) and len(each) > 5 for each in shown)
