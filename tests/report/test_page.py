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
from tests.browsing import browser, is_moved, put, selected, shown, weigh  # noqa: F401 (a fixture)
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
    "min_kept": 20,
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
    assert shown(page) == {"kept": totals["kept_tokens"], "dropped": totals["dropped_tokens"]}
    assert shown(page) == {"kept": int(kept.sum()), "dropped": int((~kept).sum())} == weigh(plan, plan.selection.keep)
    facts = page.text_content("#facts")
    assert f"{totals['completion_tokens']:,}" in facts and f"{totals['dropped_tokens']:,}" in facts


def test_the_page_counts_its_start_as_the_run_did(run, page):
    """The page's own count leaves out the floor."""
    plan, _ = run
    counted, without = page.evaluate("count(start, S.config.combine)"), selected(plan, plan.config)
    counts = {"kept": counted["tokens"] - counted["dropped"], "dropped": counted["dropped"]}
    assert counts == weigh(plan, without.keep) != weigh(plan, plan.selection.keep)
    assert counted["fired"] == plan.selection.fired
    assert "without the tokens that only min_kept keeps" in page.text_content("#promise")


SLIDERS = (
    ("reasoning_importance", "quantile"),
    ("knowledge_novelty", "known_above"),
    ("knowledge_novelty", "unknown_below"),
    ("task_relevance", "cluster"),
)


@pytest.mark.parametrize(("score", "key"), SLIDERS)
def test_every_stop_counts_what_a_run_with_the_pasted_block_selects(run, page, score, key):
    plan, _ = run
    number_of_stops = int(page.get_attribute(f"input[data-score={score}][data-key={key}]", "max")) + 1
    seen = set()
    for place in range(number_of_stops):
        put(page, score, key, place)
        block = yaml.safe_load(page.text_content("#yaml"))["xtf"]
        if page.is_visible("#illegal"):
            with pytest.raises(ValueError):
                XTFConfig.parse(block)
            continue
        choice = selected(plan, XTFConfig.parse(block))
        assert shown(page) == weigh(plan, choice.keep if is_moved(page) else plan.selection.keep), block
        seen.add(shown(page)["kept"])
    assert len(seen) > 2


@pytest.mark.parametrize(("score", "key"), SLIDERS)
def test_the_line_is_at_the_threshold_of_each_stop(run, page, score, key):
    """At the threshold of a run with this stop; at the median, with a note, where every document has its own."""
    plan, folder = run
    edges = json.loads((folder / "summary.json").read_text())["distributions"][score]["edges"]
    for place in range(1, 4):
        put(page, score, key, place)
        drops = selected(plan, XTFConfig.parse(yaml.safe_load(page.text_content("#yaml"))["xtf"])).thresholds[score][
            "drops"
        ]
        numbers = [
            value["median"] if isinstance(value, dict) else value for value in drops.values() if value is not None
        ]
        places = [320 * (number - edges[0]) / (edges[-1] - edges[0]) for number in numbers]
        drawn = page.eval_on_selector_all(
            f"#histogram-{score} line", "all => all.map((e) => Number(e.getAttribute('x1')))"
        )
        assert sorted(drawn) == pytest.approx(sorted(min(319, max(1, place)) for place in places), abs=0.1)
        assert ("each document has its own threshold" in page.inner_text(f"#histogram-{score}")) == (key == "quantile")
    put(page, score, key, 0)
    assert page.locator(f"#histogram-{score} line").count() == (1 if score == "knowledge_novelty" else 0)


@pytest.mark.parametrize("combine", ["majority", "intersection"])
def test_combine_and_several_sliders_at_once(run, page, combine):
    plan, _ = run
    page.select_option("#combine", json.dumps(combine, separators=(",", ":")))
    put(page, "reasoning_importance", "quantile", 9)
    put(page, "task_relevance", "cluster", 1)
    config = XTFConfig.parse(yaml.safe_load(page.text_content("#yaml"))["xtf"])
    assert config.combine == combine
    assert shown(page) == weigh(plan, selected(plan, config).keep)
    page.click("#reset")
    assert page.text_content("#change") == "as in the run" and shown(page) == weigh(plan, plan.selection.keep)


def test_documents_are_shaded_as_a_run_would_decide(run, page):
    """Token by token: at the start, and again after a slider has moved."""
    plan, _ = run
    assert page.evaluate("documents.length") >= 100
    keys = {bytes(key).hex(): index for index, key in enumerate(plan.documents.keys)}
    keep = plan.selection.keep
    for place in (None, 4):
        if place is not None:
            put(page, "reasoning_importance", "quantile", place)
            keep = selected(plan, XTFConfig.parse(yaml.safe_load(page.text_content("#yaml"))["xtf"])).keep
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
    everything = page.locator("article").count()
    page.select_option("#reason", "rule:task_relevance")
    assert page.evaluate("view.list.length") > 0
    assert page.evaluate("view.list.every((d) => decide(d).some((t) => t.bits >> 2 & 1))")
    page.select_option("#reason", "")
    page.fill("#search", "evil")
    assert page.evaluate("view.list.length") == 1 and page.locator("article").count() == 1
    page.fill("#search", "the answer is")
    assert page.evaluate("view.list.length") > 50
    page.select_option("#order", "most")
    shares = page.evaluate("view.list.map(lost)")
    assert shares == sorted(shares, reverse=True)
    page.click("#more")
    assert page.locator("article").count() == 2 * everything


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
    assert opened.eval_on_selector("#totals .scroll", "e => e.scrollWidth - e.clientWidth") == 0
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


def test_a_prompt_is_shown_by_its_length(run, page):
    plan, _ = run
    prompts = page.locator(".document .prompt").all_inner_texts()
    lengths = {int((~plan.documents.document(i)[1]).sum()) for i in range(len(plan.documents))}
    assert len(prompts) == page.locator(".document").count()
    assert {int(text.split(": ")[1].split(" ")[0]) for text in prompts} <= lengths
