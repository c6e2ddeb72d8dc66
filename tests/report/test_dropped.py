"""What is dropped, grouped and placed, against the same counted token by token."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from tests import tiny
from tests.report.tables import plan_of, table_of
from xtf_plugin.report import dropped
from xtf_plugin.selection.text_rules import segment_starts

BLOCK = {"preset": "none", "knowledge_novelty": {"unit": "sentence", "drop": {"unknown_below": 0.9}}}
PHRASE = "Sure, happy to help!"  # in every row of `tiny.problems`


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    plan = plan_of(tmp_path_factory.mktemp("plan"), **BLOCK)
    return plan, table_of(plan)


def text_of(table, start, end):
    return b"".join(table.pieces[i] for i in table.token_ids[start:end].tolist()).decode(errors="replace")


def with_dropped(table, marks, **changes):
    """The table with other keep flags; `mine` fired on what is dropped."""
    bit = next(iter(dropped.rule_bits(table.config).values()))
    reasons = np.where(marks, bit, 0).astype(table.reasons.dtype)
    return replace(table, keep=~marks, reasons=reasons, **changes)


def test_units_are_those_of_the_run(made):
    plan, table = made
    np.testing.assert_array_equal(
        dropped.unit_starts(table), segment_starts(plan.documents, tiny.tokenizer(), "sentence")
    )


def test_units_are_lines_if_rules_judge_lines(tmp_path):
    plan = plan_of(tmp_path, preset="none", knowledge_novelty={"unit": "line", "drop": {"unknown_below": 0.9}})
    np.testing.assert_array_equal(
        dropped.unit_starts(table_of(plan)), segment_starts(plan.documents, tiny.tokenizer(), "line")
    )


def test_pieces_are_what_is_dropped_of_each_unit(made):
    _, table = made
    rng = np.random.default_rng(0)
    table = with_dropped(table, rng.random(len(table.keep)) < 0.5)
    starts = set(dropped.unit_starts(table).tolist())
    found = dropped.pieces(table, np.asarray(sorted(starts)))
    covered = np.zeros(len(table.keep), dtype=int)
    for start, end, document in zip(found.starts, found.ends, found.documents, strict=True):
        covered[start:end] += 1
        assert start in starts or table.keep[start - 1], "a piece begins with its unit or after a kept token"
        assert end == len(table.keep) or end in starts or table.keep[end], "and ends so"
        assert table.offsets[document] <= start < end <= table.offsets[document + 1]
    np.testing.assert_array_equal(covered, ~table.keep)


def test_kinds_count_the_tokens_and_pieces_of_the_dataset(made):
    plan, table = made
    kinds = dropped.kinds(table, dropped.pieces(table, dropped.unit_starts(table)))
    assert [kind["why"] for kind in kinds] == ["knowledge_novelty"]
    assert kinds[0]["tokens"] == int(plan.weights[~plan.selection.keep].sum())
    assert sum(text["tokens"] for text in kinds[0]["listed"]) <= kinds[0]["tokens"]
    numbers = [text["number"] for text in kinds[0]["listed"]]
    assert numbers == sorted(numbers, reverse=True)
    phrase = next(text for text in kinds[0]["listed"] if text["text"] == PHRASE)
    assert phrase["number"] == int(plan.documents.counts.sum())


def test_texts_beyond_what_is_read_are_counted(made, monkeypatch):
    _, table = made
    starts = dropped.unit_starts(table)
    (every,) = dropped.kinds(table, dropped.pieces(table, starts))
    monkeypatch.setattr(dropped, "READ", 3)
    (some,) = dropped.kinds(table, dropped.pieces(table, starts))
    assert (some["pieces"], some["tokens"]) == (every["pieces"], every["tokens"])
    assert len(some["listed"]) <= 3 and every["texts"] <= some["texts"] <= every["pieces"]
    assert PHRASE in {text["text"] for text in some["listed"]}


def test_texts_that_differ_in_digits_and_capitals_are_one(made):
    _, table = made
    starts = dropped.unit_starts(table)
    first = [at for at in starts.tolist() if re.match(r"The answer is \d+", text_of(table, at, at + 8).strip())]
    ends = [int(np.append(starts, len(table.keep))[np.searchsorted(starts, at) + 1]) for at in first]
    marks = np.zeros(len(table.keep), dtype=bool)
    for start, end in zip(first, ends, strict=True):
        marks[start:end] = True
    changed = with_dropped(table, marks)
    (kind,) = dropped.kinds(changed, dropped.pieces(changed, starts))
    (text,) = kind["listed"]
    owners = np.searchsorted(table.offsets, first, side="right") - 1
    assert text["number"] == int(table.counts[owners].sum()) and kind["texts"] == 1 < text["spellings"]
    texts = {text_of(table, start, end) for start, end in zip(first, ends, strict=True)}
    assert len(texts) > 3 and all(re.search(text["pattern"], each) for each in texts)


@pytest.mark.parametrize(
    ("texts", "matches", "misses"),
    [
        (["I hope (this) helps!\n"], "I hope (this) helps!\n\n", "I hope this helps!"),
        (["Posted May 4, 2017", "Posted May 5, 2018"], "Posted May 31, 1999", "Posted May, 1999"),
        (["Have a nice day", "HAVE A NICE DAY"], "have A nice day", "have a day"),
        (["Yes."], "Yes.", "Yes, "),
        (["9"], " 9 ", "19"),
        (["a\u202eb \x1b c d"], "a\u202eb \x1b c d", "ab c d"),
        (["\\d+ is a pattern"], "\\d+ is a pattern", "1 is a pattern"),
        (["Step 1: go on.", "step 2: go on."], "STEP 31: go on.", "Step: go on."),
        (["Foo  bar is 1.", "Foo bar is 2.", "Foo\nbar is 3."], "Foo \t bar\xa0is 4.", "Foobar is 1."),
        (["Foo\tbar is it", "Foo bar is it", "Foo\xa0bar is it"], "Foo\nbar is it", "FOO bar is it"),
        (["1", "22"], "see 333 here", "a4"),
        (["Step 1", "Step 22"], "Step 3", "Steps 3"),
        (["a \ue000 b c 1", "a \ue000 b c 2"], "a \ue000 b c 3", "a 5 b c 1"),
    ],
)
def test_patterns_match_all_spellings_and_nothing_else(texts, matches, misses):
    found = dropped.pattern(texts[0], Counter(texts))
    assert found.isprintable() and all(re.search(found, text) for text in texts)
    assert re.search(found, matches) and not re.search(found, misses)


def test_spellings_that_one_expression_matches_are_one_text():
    assert dropped.folded("Step\xa01:  GO") == dropped.folded("step 22: go")
    assert dropped.folded("Die Straße") != dropped.folded("Die STRASSE"), "(?i:ß) does not match SS"


def test_no_pattern_for_blank_long_or_broken_text():
    for text in (" \n", "x" * 5_000, "a\ufffdb"):
        assert dropped.pattern(text, Counter([text])) is None


def test_reasons_are_told_apart(made):
    _, table = made
    bit = next(iter(dropped.rule_bits(table.config).values()))
    starts = dropped.unit_starts(table)
    marks = np.zeros(len(table.keep), dtype=bool)
    marks[starts[0] : starts[3]] = True
    changed = with_dropped(table, marks)
    changed.reasons[starts[0] : starts[1]] = dropped.FORCED
    changed.reasons[starts[1] : starts[2]] = bit | dropped.CONTROL
    kinds = dropped.kinds(changed, dropped.pieces(changed, starts))
    assert {kind["why"] for kind in kinds} == {"forced", "control", "knowledge_novelty"}
    assert dropped._why(3, {"one": 1, "other": 2}) == "+"


def test_places_add_up_to_the_dataset(made):
    plan, table = made
    found = dropped.by_place(table)
    kept = int(plan.weights[plan.selection.keep].sum())
    for bars in (found["tenths"], found["lengths"]):
        assert sum(bar["kept"] for bar in bars) == kept
        assert sum(bar["kept"] + bar["dropped"] for bar in bars) == int(plan.weights.sum())
    assert len(found["tenths"]) == 10 and sum(bar["documents"] for bar in found["lengths"]) == int(table.counts.sum())
    lengths = np.diff(table.offsets)
    for bar in found["lengths"]:
        here = (lengths >= bar["from"]) & (lengths <= bar["to"])
        assert bar["documents"] == int(table.counts[here].sum()) > 0
    touched = [not keep.all() for keep in np.split(table.keep, table.offsets[1:-1])]
    assert found["touched"] == int(table.counts[np.asarray(touched)].sum())


def test_the_first_tokens_of_answers_are_in_the_first_tenth(made):
    _, table = made
    marks = np.zeros(len(table.keep), dtype=bool)
    marks[table.offsets[:-1]] = True
    bars = dropped.by_place(with_dropped(table, marks))["tenths"]
    assert bars[0]["dropped"] == int(table.counts.sum()) and sum(bar["dropped"] for bar in bars[1:]) == 0


def test_what_recurs_at_one_place_is_a_suspected_format(made):
    """And what recurs anywhere, or in two documents, is not."""
    _, table = made
    starts = dropped.unit_starts(table)
    marks = np.zeros(len(table.keep), dtype=bool)
    for start, end in zip(starts, np.append(starts[1:], len(table.keep)), strict=True):
        marks[start:end] = text_of(table, start, end).strip() == PHRASE
    changed = with_dropped(table, marks)
    ((text, documents),) = dropped.suspects(changed, dropped.pieces(changed, starts))
    assert text == "sure, happy" and len(documents) == len(table.keys)
    marks[table.offsets[2] :] = False
    few = with_dropped(table, marks, counts=np.ones_like(table.counts))
    assert dropped.suspects(few, dropped.pieces(few, starts)) == []


def test_nothing_dropped_is_nothing_listed(made):
    _, table = made
    changed = with_dropped(table, np.zeros(len(table.keep), dtype=bool))
    none = dropped.pieces(changed, dropped.unit_starts(changed))
    assert dropped.kinds(changed, none) == dropped.suspects(changed, none) == [] and not len(none.starts)
