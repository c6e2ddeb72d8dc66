"""Texts that several documents share: what is listed, and that the line beside each does what it says."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import yaml

from tests import tiny
from xtf_plugin.config.block import XTFConfig
from xtf_plugin.data.documents import collect
from xtf_plugin.data.sentences import segment_starts
from xtf_plugin.plan import scores_of
from xtf_plugin.selection.recurring import LONGEST, MOST, WARNED, pattern_of, recurring, warnings_of
from xtf_plugin.selection.select import select
from xtf_plugin.selection.text_rules import TextRules, special_ids

SCORE = {"scorer": "log_probability", "unit": "sentence", "drop": {"below": 0}}
FILLER = "Let us take it step by step!"


def answers(number=10):
    """Answers with a format, a phrase that is dropped, one that is kept, and a sentence of their own."""
    return [f"# case {at}\n{FILLER} The sum is {at}.\nI hope this helps you a lot.\nDone." for at in range(number)]


def run(texts=None, until=99, said=(FILLER,), part=lambda size: size, **block):
    """What a rule selects that fires on some texts in the first `until` documents, and the texts that recur.

    It fires on the first `part(size)` tokens of a unit that holds one of the texts. A text of a row may be token ids.
    """
    fast, rows = tiny.tokenizer(), []
    for text in texts or answers():
        ids = (fast(text)["input_ids"] if isinstance(text, str) else text) + [fast.eos_token_id]
        rows.append({"input_ids": [1, *ids], "labels": [-100, *ids]})
    documents = collect(rows)
    config = XTFConfig.parse({"preset": "none", "selectors": {"mine": SCORE}, "min_kept": 0, **block})
    ids, runs = documents.input_ids[documents.completion], documents.completion_runs
    starts = segment_starts("sentence", fast, ids, runs, special_ids(fast))
    values = np.ones(len(ids), dtype=np.float32)
    for low, high in zip(starts, np.append(starts[1:], len(ids)), strict=True):
        if (
            any(text in fast.decode(ids[low:high]) for text in said)
            and low < documents.completion_offsets[min(until, len(documents))]
        ):
            values[low : low + part(high - low)] = -1
    text = TextRules.find(config, documents, fast)
    made = select(scores_of(documents, None, {"mine": values}), config, text.protected, text.forced, text.segments)
    return documents, made, recurring(config, documents, text, made, fast)


def kept_text(documents, selection):
    ids = documents.input_ids[documents.completion]
    return tiny.tokenizer().decode(ids[selection.keep]), tiny.tokenizer().decode(ids[~selection.keep])


def test_what_is_listed():
    _, _, found = run()
    listed = {each.text: (each.documents, each.dropped_in, each.dropped, each.why) for each in found}
    assert listed[FILLER] == (10, 10, True, ["mine"])
    assert listed["I hope this helps you a lot."] == (10, 0, False, [])
    assert "Done." not in listed, "a text of one word says nothing about itself"
    assert not any("<|" in text for text in listed) and "" not in listed
    assert found[0].text == FILLER, "dropped ones come first"


def test_a_format_is_listed_once_it_recurs_and_counts_documents():
    texts = [f"# yes\nThe sum is {at}.\n# yes" for at in range(6)] + answers(4)
    documents, _, found = run([*texts, texts[0]])
    (entry,) = [each for each in found if each.text == "# yes"]
    assert (entry.documents, entry.why, entry.dropped) == (7, ["format"], False)
    assert int(documents.counts.sum()) == 11


def test_the_line_of_a_dropped_text_keeps_it():
    _, _, found = run()
    block = yaml.safe_load(found[0].setting)
    before, after = run(), run(**block)
    assert FILLER in kept_text(*before[:2])[1] and FILLER not in kept_text(*before[:2])[0]
    assert kept_text(*after[:2])[0].count(FILLER) == 10
    assert FILLER not in [each.text for each in after[2]], "the user has decided"


@pytest.mark.parametrize("text", ["I hope this helps you a lot.", "# yes"])
def test_the_line_of_a_kept_text_drops_it(text):
    """Even one that is protected as format."""
    texts = [f"# yes\n{answer}" for answer in answers()]
    before = run(texts)
    (entry,) = [each for each in before[2] if each.text == text]
    assert not entry.dropped and kept_text(*before[:2])[0].count(text) == 10
    after = run(texts, **yaml.safe_load(entry.setting))
    kept, dropped = kept_text(*after[:2])
    assert text not in kept and dropped.count(text) == 10
    assert "# case 3" in kept and f"{text}\n" in dropped, "the line break belongs to it"


def test_three_documents_are_needed():
    texts = answers(2) + [f"The sum is {at}." for at in range(8)]
    assert FILLER not in [each.text for each in run(texts)[2]]
    assert FILLER in [each.text for each in run(answers(3) + texts[2:])[2]]


@pytest.mark.parametrize(
    ("having", "documents", "listed"), [(3, 30, True), (2, 30, False), (3, 300, True), (3, 301, False)]
)
def test_a_kept_text_that_nothing_protects_is_listed_from_three_documents_and_a_hundredth_of_all(
    having, documents, listed
):
    help_ = "I hope this helps!"
    texts = [f"The sum is {at}. {help_ if at < having else ''}" for at in range(documents)]
    found = [each for each in run(texts)[2] if each.text == help_]
    assert [(each.documents, each.dropped, each.why) for each in found] == [(having, False, [])] * listed
    assert all(yaml.safe_load(each.setting) == {"force_drop": [help_]} for each in found)


@pytest.mark.parametrize(("until", "dropped"), [(2, False), (3, True)])
def test_a_text_that_is_dropped_in_some_documents_only(until, dropped):
    (entry,) = [each for each in run(until=until)[2] if each.text == FILLER]
    assert (entry.documents, entry.dropped_in, entry.dropped) == (10, until, dropped)
    assert entry.setting.startswith("protect" if dropped else "force_drop")


def test_what_the_user_or_a_control_decides_is_not_listed():
    assert FILLER not in [each.text for each in run(force_drop=[re.escape(FILLER)])[2]]
    assert run(control="random")[2] == []


def test_lists_are_short():
    lines = "".join(f"Phrase number {at} is here.\n" for at in range(3 * MOST))
    found = run([f"{lines}{at}" for at in range(5)])[2]
    assert [each.dropped for each in found] == [False] * MOST


BY_TOKEN = {"selectors": {"mine": {**SCORE, "unit": "token"}}}


@pytest.mark.parametrize("more", [0, 1])
def test_a_text_is_dropped_where_more_than_half_of_its_tokens_are(more):
    fast = tiny.tokenizer()
    text = next(
        text for text in (FILLER, f"{FILLER}!", f"{FILLER[:-1]}, yes!") if len(fast(text)["input_ids"]) % 2 == 0
    )
    sizes = []

    def part(size):
        sizes.append(size)
        return size // 2 + more

    texts = [answer.replace(FILLER, text) for answer in answers()]
    (entry,) = [each for each in run(texts, said=(text,), part=part, **BY_TOKEN)[2] if each.text == text]
    assert sizes == [sizes[0]] * 10 and sizes[0] % 2 == 0, "the case must drop exactly a half"
    assert (entry.dropped_in, entry.dropped) == ((10, True) if more else (0, False))


def test_few_texts_are_warned_of():
    phrases = [f"Phrase number {at} is here." for at in range(WARNED + 2)]
    documents, _, found = run(["\n".join(phrases) + f"\n{at}" for at in range(5)], said=phrases)
    assert sum(each.dropped for each in found) == len(phrases)
    assert len(warnings_of(found, int(documents.counts.sum()))) == WARNED


def test_texts_that_are_long_or_no_text_are_not_listed_and_hide_no_other():
    """Though there are many of them, in more documents."""
    fast = tiny.tokenizer()
    long = [f"Number {at} goes on" + " and on" * (LONGEST // 7) + "." for at in range(MOST + 2)]
    cut = fast("I hope this helps é")["input_ids"][:-1]
    assert "\ufffd" in fast.decode(cut)
    rows = [fast("\n".join(long) + f"\n{at}\n")["input_ids"] + cut for at in range(6)]
    rows += [fast(f"The sum is {at}.\nI hope this helps you a lot.")["input_ids"] for at in range(4)]
    listed = [each.text for each in run(rows)[2]]
    assert "I hope this helps you a lot." in listed
    assert not any(len(text) > LONGEST or "\ufffd" in text for text in listed)


def test_a_dropped_text_is_listed_among_many_that_are_kept():
    lines = "".join(f"Phrase number {at} is here.\n" for at in range(4 * MOST))
    found = run([f"{lines}{at}" + f"\n{FILLER}" * (at < 3) for at in range(8)])[2]
    assert [each.text for each in found if each.dropped] == [FILLER]


def test_special_tokens_are_not_listed():
    found = run(said=("<|endoftext|>",), protect={"special_tokens": False})[2]
    assert found and not any("<|" in each.text for each in found)


@pytest.mark.parametrize(("documents", "warned"), [(10, 1), (14, 1), (16, 0)])
def test_a_dropped_text_of_a_fifth_of_the_documents_is_warned_of(documents, warned):
    texts = answers(3) + [f"The sum is {at}." for at in range(documents - 3)]
    made, _, found = run(texts)
    warnings = warnings_of(found, int(made.counts.sum()))
    assert len(warnings) == warned
    if warned:
        assert f'mine: drops "{FILLER}" in 3 of the 3 documents' in warnings[0]
        assert yaml.safe_load(warnings[0].split("block: ")[1]) == {"protect": {"patterns": [FILLER]}}


@pytest.mark.parametrize(
    "text",
    [
        "a.b*c (d) [e] {f} ^$ | \\ + ?",
        "Sure!",
        "9",
        "naïve 漢字 🙂",
        "say \"no\" and 'yes'",
        "tab\there",
        "\u202ebidi\u200b x",
        "#### 9",
    ],
)
def test_patterns_match_their_text_and_survive_yaml(text):
    pattern = pattern_of(text)
    assert re.search(pattern, f" {text} \n").group() == text
    assert yaml.safe_load(f"force_drop: {json.dumps([pattern], ensure_ascii=False)}") == {"force_drop": [pattern]}
    assert all(char.isprintable() for char in pattern)


def test_short_texts_match_whole_words_alone():
    assert not re.search(pattern_of("9"), "19") and re.search(pattern_of("9"), "= 9.")
    assert re.search(pattern_of("Well then", ends_line=True), "Well then\n\nx").group() == "Well then\n\n"
