"""summary.json and the report's data against the score table of the same run, counted by other means."""

from __future__ import annotations

import base64
import dataclasses
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from tests import tiny
from tests.report.tables import plan_of, table_of
from tests.selection.test_select import REASONING, config, from_bits
from tests.training.test_callback import trainer
from xtf_plugin import attach
from xtf_plugin.report import summary, terminal, whatif
from xtf_plugin.report.page import render as page
from xtf_plugin.report.page import sample
from xtf_plugin.report.summary import Verdicts
from xtf_plugin.selection.select import select

ROOT = Path(__file__).parents[2]
BLOCK = {
    "preset": "none",
    "reasoning_importance": {"drop": {"quantile": 0.1}},
    "knowledge_novelty": {"drop": {"known_above": 0.005}},
    "selectors": {"odd": {"scorer": "typicality", "drop": {"below": -2}}},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    made = trainer(folder, rows=[*tiny.problems(60), tiny.problems(1)[0]], max_steps=1, max_length=40)
    attach(made, {"cache_dir": str(folder / "cache"), **BLOCK})
    made.train()
    xtf = folder / "out/xtf"
    table = pq.read_table(xtf / "scores.parquet").to_pylist()
    return made._xtf_hooks.on_batch.__self__.plan, json.loads((xtf / "summary.json").read_text()), table


def test_every_key_is_documented(run):
    _, summary, _ = run
    documented = set(re.findall(r"`([\w.<>]+)`", (ROOT / "docs/output-files.md").read_text(encoding="utf-8")))
    found = set(summary) | {f"totals.{key}" for key in summary["totals"]}
    for key in found - {"totals"}:
        assert {key, f"{key}.<score>"} & documented, key
    assert set(next(iter(summary["totals"]["scores"].values()))) <= documented
    assert (
        {"edges", "tokens", "median", "undefined"} == set(next(iter(summary["distributions"].values()))) <= documented
    )


def plan_text(plan):
    return tiny.tokenizer().decode(plan.documents.input_ids)


def test_texts_of_a_plan_are_reported(tmp_path):
    """Openings that are kept as format, and texts that recur; the same in the table's metadata."""
    rows = [
        {**row, "completion": f"# Work\n{row['completion']} I hope \u202e this helps."} for row in tiny.problems(20)
    ]
    made = trainer(tmp_path, rows=rows, max_steps=1, max_length=None)
    attach(made, {"cache_dir": str(tmp_path / "cache"), **BLOCK, "task_relevance": {"unit": "sentence"}})
    made.train()
    plan, found = made._xtf_hooks.on_batch.__self__.plan, json.loads((tmp_path / "out/xtf/summary.json").read_text())
    assert found["formats"] == [{"text": "# Work", "share": 1.0}]
    texts = {entry["text"]: entry for entry in found["recurring"]}
    assert texts["# Work"]["why"] == ["format"] and texts["# Work"]["documents"] == 20
    setting = texts["I hope \\u202e this helps."]["setting"]
    assert setting.isprintable()
    (pattern,) = re.findall(r'\["(.*)"\]', setting)
    assert re.search(json.loads(f'"{pattern}"'), plan_text(plan)).group().strip() == "I hope \u202e this helps."
    assert table_of(plan).about["recurring"] == found["recurring"]


def test_a_text_that_rules_drop_in_many_documents_is_a_warning(tmp_path):
    block = {"preset": "none", "knowledge_novelty": {"unit": "sentence", "drop": {"unknown_below": 0.9}}}
    plan = plan_of(tmp_path, **block)
    text = next(each for each in plan.recurring if each.text == "Sure, happy to help!")
    assert text.dropped and text.documents == 12
    assert any(text.setting in warning and warning.startswith("knowledge_novelty: drops") for warning in plan.warnings)
    fixed = plan_of(tmp_path, **block, **yaml.safe_load(text.setting))
    assert not any(text.setting in warning for warning in fixed.warnings)


def test_the_matches_of_patterns_are_printed(tmp_path, capsys):
    """A pattern that takes more than is meant, or nothing, shows at once."""
    block = {"force_drop": ["Sure.*", "Sure thing", r"<\|endoftext\|>"], "protect": {"patterns": ["22"]}}
    plan = plan_of(tmp_path, **BLOCK, **block)
    protected, dropped, absent, special = summary.summary(plan, tiny.tokenizer())["patterns"]
    assert special["special"] and dropped["special"] and not (special["tokens"] or absent["special"])
    assert [each["key"] for each in (protected, dropped, absent)] == ["protect.patterns", "force_drop", "force_drop"]
    assert dropped["documents"] == 12 and dropped["tokens"] == int(plan.weights[plan.text.forced].sum())
    assert dropped["tokens"] <= 12 * dropped["most"] and absent["documents"] == 0
    summary.show(plan, [])
    said = capsys.readouterr().err
    figures = f"{dropped['tokens']} tokens in 12 of the documents, at most {dropped['most']} in one"
    assert f"xtf: force_drop 'Sure.*': {figures}" in said and "'Sure thing': 0" not in said
    assert "xtf: warning: force_drop: 'Sure thing' matches nothing in the dataset" in said
    assert "matches only special tokens, which protect.special_tokens keeps" in said


def test_combinations_add_up(run):
    _, summary, table = run
    own = Counter(tuple(n for n in row["reason"].split(",") if n and n != "protected") for row in table)
    reported = {tuple(entry["rules"]): entry["tokens"] for entry in summary["combinations"]}
    assert reported == own and len(reported) > 3
    assert summary["combinations"][-1]["rules"] == []


def test_distributions_hold_every_token(run):
    plan, summary, table = run
    for shown in summary["distributions"].values():
        assert sum(shown["tokens"]) + shown["undefined"] == len(table)
        assert len(shown["edges"]) == 41 and shown["edges"] == sorted(shown["edges"])
    values = np.asarray([np.nan if row["odd"] is None else row["odd"] for row in table])
    assert summary["distributions"]["odd"]["undefined"] == int(np.isnan(values).sum())
    assert summary["distributions"]["odd"]["median"] == pytest.approx(np.nanmedian(values), rel=0.05)
    novelty = [row["knowledge_novelty"] for row in table if row["knowledge_novelty"] is not None]
    assert summary["distributions"]["knowledge_novelty"]["median"] == pytest.approx(np.median(novelty), rel=0.1)


def test_borderline_text_is_near_a_threshold(run):
    """At most 2 % of the scored tokens on each side; those of equal score with them."""
    plan, _, _ = run
    table = table_of(plan)
    moved = whatif.build(table)
    near = sample.near_threshold(table, replace_sliders(moved, "odd"))
    values, limit = table.scores["odd"], -2.0
    assert 0 < near.sum() < 0.06 * len(near)
    for side in (values < limit, values >= limit):
        outside = np.abs(values[side & ~near & ~np.isnan(values)] - limit)
        assert not (side & near).any() or np.abs(values[side & near] - limit).max() <= outside.min()
    assert not near[np.isnan(values)].any()


def replace_sliders(moved, score):
    return dataclasses.replace(moved, sliders=[slider for slider in moved.sliders if slider.score == score])


def test_endings_count_documents_that_were_cut_off(run):
    _, summary, table = run
    last = {}
    for row in table:
        last[row["row"]] = row["token"]
    cut = sum(token != "<|endoftext|>" for token in last.values())
    assert 0 < cut < len(last) and summary["endings"]["documents_ending_without_one"] == cut
    (eos,) = summary["endings"]["special_tokens"]
    assert eos["token"] == "<|endoftext|>" and eos["labelled"] == len(last) - cut and eos["dropped"] == 0


def test_a_line_break_after_the_end_of_a_turn_is_no_cut(tmp_path):
    """ChatML's turns end in one; here all of the conversation has labels."""
    made = trainer(tmp_path, rows=tiny.conversations(6), max_steps=1, max_length=None)
    attach(made, {"cache_dir": str(tmp_path / "cache"), **BLOCK})
    made.train()
    plan = made._xtf_hooks.on_batch.__self__.plan
    assert {plan.documents.document(i)[0][-1] for i in range(6)} != {tiny.tokenizer().eos_token_id}
    found = json.loads((tmp_path / "out/xtf/summary.json").read_text())["endings"]
    assert found["documents_ending_without_one"] == 0 and "<|im_end|>" in {e["token"] for e in found["special_tokens"]}


@pytest.mark.parametrize(
    ("piece", "shown"),
    [
        (b" a\n\tb", "·a↵\n⇥b"),
        (b"\xf0\x9f", "⟨f0 9f⟩"),
        ("\u202e\u200b\x1b".encode(), "\\u202e\\u200b\\x1b"),
        ("漢🙂".encode(), "漢🙂"),
        (b"<script>", "<script>"),
        (b"", ""),
    ],
)
def test_tokens_are_shown_safely(piece, shown):
    assert terminal.text_of(piece) == shown


def test_a_token_of_100000_characters_is_shown_by_its_beginning():
    shown = terminal.text_of(b"x" * 100_000)
    assert shown == "x" * terminal.LONGEST_TEXT + "…⟨100,000·characters⟩"


def test_characters_over_several_tokens_are_put_together():
    pieces = [b"a", b"\xf0\x9f", b"\x98", b"\x80", b"b", b"\xff", "漢".encode()[:2], "漢".encode()[2:]]
    assert sample._joined(pieces) == [(1, 3, "😀", "😀"), (6, 2, "漢", "漢")]


@pytest.mark.parametrize(
    ("piece", "found"),
    [
        (b" a\n\tb.", None),
        ("·".encode(), ("·", "·")),
        (b"\xf0\x9f", ("⟨f0 9f⟩", None)),
        ("\u202e. \n".encode(), ("\\u202e. \n", "\\u202e\\. \n")),
        (b"\\x1b", None),
        (b"x" * 1_000, (terminal.text_of(b"x" * 1_000), None)),
    ],
)
def test_tokens_that_are_not_what_they_seem_say_so(piece, found):
    """Shown with plain whitespace, and the regular expression that matches them."""
    assert sample.odd(piece) == found


def test_the_sample_is_bounded_and_the_same_for_the_same_data(run, monkeypatch):
    table = table_of(run[0])
    data = page.page_data(table)
    first = data["documents"]
    assert data == page.page_data(table) and all(data["groups"][name] for name in sample.GROUPS)
    assert {at for group in data["groups"].values() for at in group} == set(range(len(first)))
    assert all(len(set(group)) == len(group) for group in data["groups"].values())
    assert [bool(each["suspect"]) for each in first] == [at in data["groups"]["format"] for at in range(len(first))]
    monkeypatch.setattr(sample, "room_for", lambda scores, sliders: 500)
    fewer = page.page_data(table)["documents"]
    assert 0 < len(fewer) < len(first) and sum(document["length"] for document in fewer) <= 500
    monkeypatch.setattr(sample, "LONGEST", 5)
    for document in page.page_data(table)["documents"]:
        assert len(base64.b64decode(document["flags"])) == min(5, document["length"])


def test_totals_are_those_of_the_table(run):
    """Of every rule alone and of pairs, counted row by row."""
    plan, summary, table = run
    reasons = [set(row["reason"].split(",")) for row in table]
    dropped = [not row["kept"] for row in table]
    rules = set(list(plan.config.scores))
    found = Verdicts(plan.config, plan.selection, plan.weights).totals()
    assert found.items() <= summary["totals"].items() and found["dropped_tokens"] == sum(dropped)
    for name, counts in found["scores"].items():
        assert counts["fired"] == sum(name in reason for reason in reasons)
        assert counts["dropped"] == sum(name in reason and lost for reason, lost in zip(reasons, dropped, strict=True))
        alone = sum(reason & rules == {name} and lost for reason, lost in zip(reasons, dropped, strict=True))
        assert counts["dropped_alone"] == alone
    first, second = list(plan.config.scores)[:2]
    assert found["scores"][first]["dropped_alone"] > 0
    both = sum({first, second} <= reason for reason in reasons)
    smaller = min(found["scores"][name]["fired"] for name in (first, second))
    assert found["overlap_of_the_smaller_set"][f"{first} & {second}"] == both / smaller
    assert found["decided_by"]["protected"] == sum("protected" in reason for reason in reasons)


def test_nothing_of_the_data_ends_the_script_element():
    data = {"a": "</script><!--\u2028 $title $data ${script} $$", "b": "\ud800"}
    made = page.render(data, "<title> & $data")
    assert made.count("</script>") == 2 and "<!--" not in made and "\u2028" not in made
    text = made.split('id="data">')[1].split("</script>")[0]
    assert json.loads(text)["a"] == data["a"]
    assert "<title>&lt;title&gt; &amp; $data</title>" in made


def test_numbers_that_json_lacks_do_not_stop_a_run(run):
    odd = dataclasses.replace(run[0], reference={"name": float("nan"), "source": float("inf")})
    data = page.page_data(table_of(odd))
    assert data["summary"]["reference"] == {"name": None, "source": None}
    assert "NaN" not in page.render(data, "odd").split('id="data">')[1].split("</script>")[0]


def test_a_token_that_protection_keeps_is_fired_on_and_not_dropped():
    protected = np.asarray([False, True, False])
    block = config(min_kept=0)
    found = select(from_bits(REASONING, REASONING, 0), block, protected)
    counts = Verdicts(block, found, np.asarray([3, 5, 7])).totals()
    score = counts["scores"]["reasoning_importance"]
    assert (score["fired"], score["dropped"], score["dropped_alone"]) == (8, 3, 3)
    assert counts["dropped_tokens"] == 3 and counts["decided_by"]["protected"] == 5
