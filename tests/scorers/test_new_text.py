"""What a sentence repeats of the text before it, against a loop over all pairs of places."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from tests import tiny
from tests.test_plan import plan  # noqa: F401, a fixture
from xtf_plugin.config.block import XTFConfig
from xtf_plugin.data.documents import collect
from xtf_plugin.scorers import new_text
from xtf_plugin.scorers.base import ScoringContext
from xtf_plugin.selection.text_rules import segment_starts


def text_of(index):
    """Some tokens are white space, and some are another one with a space."""
    if index % 17 == 16:
        return " " * (index % 3) + "\n"
    return f"w{index}" if index % 5 else f" w{index + 1}"


TOKENIZER = SimpleNamespace(decode=lambda ids, **_: text_of(int(ids[0])))
PLAIN = SimpleNamespace(decode=lambda ids, **_: f"w{int(ids[0])}")


def words_of(documents, tokenizer, starts, sizes):
    vocabulary = new_text._Vocabulary.of(tokenizer, documents.input_ids)
    return new_text._Words.of(documents, slice(0, len(documents)), vocabulary, starts, sizes)


def naive(documents, starts, shortest):
    """Every run of every unit, compared with every place before the unit in its document, prompt included."""
    flat = np.flatnonzero(documents.completion)
    scores = np.full(len(flat), np.nan, dtype=np.float32)
    words = [text_of(index).strip() for index in documents.input_ids.tolist()]
    for start, end in zip(starts, [*starts[1:], len(flat)], strict=True):
        index = np.searchsorted(documents.offsets, flat[start], side="right") - 1
        past = [word for word in words[documents.offsets[index] : flat[start]] if word]
        own = [word for word in words[flat[start] : flat[end - 1] + 1] if word]
        if len(own) < shortest:
            continue
        pairs = [(common(own[i:], past[j:]), i, j) for i in range(len(own)) for j in range(len(past))]
        longest = max((size for size, *_ in pairs), default=0)
        more = [sides(own, past, i, j, size) for size, i, j in pairs if size == longest]
        if longest >= max(2, shortest // 2):
            scores[start:end] = 1 - (longest + max(more)) / len(own)
        else:
            scores[start:end] = 1
    return scores


def sides(own, past, i, j, size):
    """Words on either side of a run that some words of the past spell, too."""
    head, tail = own[:i], own[i + size :]
    before = any("".join(past[at:j]) == "".join(head) for at in range(j + 1))
    behind = any("".join(past[j + size : at]) == "".join(tail) for at in range(j + size, len(past) + 1))
    return before * len(head) + behind * len(tail)


def common(one, other):
    """Length of the common beginning."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def score(documents, starts, tokenizer=PLAIN, **part):
    context = ScoringContext(documents, tokenizer, SimpleNamespace(segments=lambda _: starts))
    return new_text.new_text.score(context, new_text.NewTextConfig(scorer="new_text", **part))


def sizes_of(documents, starts):
    return np.diff(starts, append=int(documents.completion.sum()))


def random_documents(rng, vocabulary):
    """Documents with prompts and two turns, in which some units copy text before them; and where units begin."""
    rows = []
    for index in range(12):
        ids = rng.integers(0, vocabulary, rng.integers(1, 20)).tolist()
        labels = [-100] * len(ids)
        for _ in range(4):
            own = rng.integers(0, vocabulary, rng.integers(1, 25)).tolist()
            if rng.random() < 0.5:
                at = rng.integers(0, len(ids))
                copied = ids[at : at + rng.integers(1, 20)]
                own[len(own) // 2 : len(own) // 2] = copied
            between = rng.integers(0, vocabulary, rng.integers(0, 2)).tolist()
            ids, labels = ids + own + between, labels + own + [-100] * len(between)
        if index % 3 == 0:  # text without a prompt
            labels = list(ids)
        rows.append({"input_ids": ids, "labels": labels})
    documents = collect([*rows, rows[0]])
    runs, total = documents.completion_runs, int(documents.completion.sum())
    return documents, np.unique(np.concatenate([runs[:-1], np.flatnonzero(rng.random(total) < 0.08)]))


@pytest.mark.parametrize("shortest", [1, 2, 5, 8, 13])
@pytest.mark.parametrize("vocabulary", [3, 40, 5_000])
def test_equals_the_loop_over_pairs(shortest, vocabulary):
    rng = np.random.default_rng(shortest)
    documents, starts = random_documents(rng, vocabulary)
    expected = naive(documents, starts, shortest)
    np.testing.assert_array_equal(score(documents, starts, TOKENIZER, shortest=shortest), expected)
    assert (expected < 1).any(), "the case must hold copies"


def test_runs_that_the_hash_calls_equal_are_compared_token_by_token(monkeypatch):
    """With a factor of 0 all runs of a document have the same hash, so that nearly every unit may repeat something."""
    rng = np.random.default_rng(3)
    documents, starts = random_documents(rng, 40)
    words = words_of(documents, TOKENIZER, starts, sizes_of(documents, starts))
    few = new_text._may_repeat(words, 4).sum()
    monkeypatch.setattr(new_text, "MULTIPLIER", 0)
    assert new_text._may_repeat(words, 4).sum() > few
    np.testing.assert_array_equal(score(documents, starts, TOKENIZER, shortest=8), naive(documents, starts, 8))


def test_only_units_that_may_repeat_are_compared(monkeypatch):
    rng = np.random.default_rng(0)
    ids = rng.permutation(4_000)
    documents = collect([{"input_ids": ids[i : i + 400], "labels": ids[i : i + 400]} for i in range(0, 4_000, 400)])
    monkeypatch.setattr(new_text, "longest_copy", lambda *_: 1 / 0)
    assert (score(documents, np.arange(0, 4_000, 20)) == 1).all()


def test_the_same_text_in_another_document_is_new():
    ids = list(range(20))
    documents = collect([{"input_ids": [*ids, 50], "labels": [*ids, 50]}, {"input_ids": ids, "labels": ids}])
    assert score(documents, np.asarray([0, 10, 21, 31])).tolist() == [1] * 41


def test_a_run_may_not_reach_into_the_unit_itself():
    """`aaaaaaaa` repeats one token of itself, which stands in no earlier text."""
    documents = collect([{"input_ids": [1] * 8 + [1] * 8, "labels": [1] * 16}])
    assert score(documents, np.asarray([0, 8])).tolist() == [1] * 8 + [0] * 8


def test_a_copy_of_the_prompt_and_a_line_written_twice_are_dropped(plan):  # noqa: F811
    fast, data = tiny.tokenizer(), []
    for pair in tiny.problems(6):
        question, answer = pair["prompt"] + "\n", pair["completion"].strip() + "\n"
        prompt, own = fast(question)["input_ids"], fast(answer + question + answer)["input_ids"]
        data.append({"input_ids": prompt + own, "labels": [-100] * len(prompt) + own})
    block = {"preset": "default", "task_relevance": False, "reasoning_importance": False}
    made = plan({**block, "knowledge_novelty": {"unit": "line"}}, data=data)
    for index, pair in enumerate(tiny.problems(6)):
        here = slice(*made.scores.offsets[index : index + 2])
        kept = fast.decode(made.scores.token_ids[here][made.selection.keep[here]])
        assert kept == pair["completion"].strip() + "\n"
    assert made.provider.opened == 0, "no model is needed"


def test_white_space_is_neither_compared_nor_counted():
    """An indented line, or one that begins a text, is the same line; a unit of white space alone is not scored."""
    texts = {1: "return", 2: " a", 3: "a", 4: " +", 5: " b", 6: "b", 7: "\n    ", 8: "c", 9: "\n"}
    tokenizer = SimpleNamespace(decode=lambda ids, **_: texts[int(ids[0])])
    ids = [1, 2, 4, 5, 9, 7, 1, 3, 4, 6, 9, 9]
    documents = collect([{"input_ids": ids, "labels": ids}])
    found = score(documents, np.asarray([0, 5, 11]), tokenizer, shortest=4)
    np.testing.assert_array_equal(found, [1] * 5 + [0] * 6 + [np.nan])


def test_a_word_may_be_cut_into_other_tokens_at_either_end():
    """`Fran` after a line break is two tokens, ` Fran` one; and `up.` may be one token."""
    texts = {1: " Fran", 2: "F", 3: "ran", 4: " baked", 5: " it", 6: " up", 7: ".", 8: " up.", 9: " x"}
    tokenizer = SimpleNamespace(decode=lambda ids, **_: texts[int(ids[0])])
    past, own = [9, 1, 4, 5, 6, 7, 9], [2, 3, 4, 5, 8]
    documents = collect([{"input_ids": past + own, "labels": [-100] * 7 + own}])
    assert score(documents, np.asarray([0]), tokenizer, shortest=4).tolist() == [0] * 5
    changed = collect([{"input_ids": past + [9, *own[1:]], "labels": [-100] * 7 + [9, *own[1:]]}])
    assert score(changed, np.asarray([0]), tokenizer, shortest=4).tolist() == pytest.approx([0.4] * 5)


def test_an_escaped_line_break_is_white_space():
    """In a string of JSON `.\\` and `n` are tokens; a sentence of six words is a copy in spite of them."""
    texts = {1: "Rich", 2: " is", 3: " 9", 4: ".", 5: ".\\", 6: "n", 7: "\\n\\t", 8: " now", 9: "\n"}
    tokenizer = SimpleNamespace(decode=lambda ids, **_: texts[int(ids[0])])
    past = [1, 2, 3, 4, 9]
    for own, new in (([1, 2, 3, 5, 6], 0), ([1, 2, 3, 4, 7], 0), ([1, 2, 3, 5, 8], 0.4), ([1, 2, 3, 4, 6], 0.2)):
        documents = collect([{"input_ids": past + own, "labels": [-100] * 5 + own}])
        assert score(documents, np.asarray([0]), tokenizer, shortest=4).tolist() == pytest.approx([new] * 5)


def test_a_word_that_goes_on_is_another_word():
    """`base + rate` after `base + rates[`, and `John` after `Johnson`."""
    texts = {1: "x", 2: " =", 3: " base", 4: " +", 5: " rates", 6: "[", 7: " rate", 8: "\u00a0="}
    tokenizer = SimpleNamespace(decode=lambda ids, **_: texts[int(ids[0])])
    ids = [1, 2, 3, 4, 5, 6, 1, 2, 3, 4, 7, 1, 8, 3, 4, 7]
    documents = collect([{"input_ids": ids, "labels": ids}])
    found = score(documents, np.asarray([0, 6, 11]), tokenizer, shortest=4)
    assert found[6:11].tolist() == pytest.approx([0.2] * 5)
    assert found[11:].tolist() == [0] * 5, "white space beyond ASCII is white space"


def test_the_best_of_equally_long_runs_counts():
    texts = dict(enumerate("a b c d e f gh g h . z".split()))
    tokenizer = SimpleNamespace(decode=lambda ids, **_: texts[int(ids[0])])
    past, own = [0, 1, 2, 3, 4, 5, 10, 9, 0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5, 7, 8]
    documents = collect([{"input_ids": past + own, "labels": [-100] * len(past) + own}])
    assert score(documents, np.asarray([0]), tokenizer).tolist() == [0] * 8


def test_equally_long_runs_are_not_collected_without_end():
    rng = np.random.default_rng(0)
    past, own = rng.integers(0, 2, 4_000) * 2, np.tile([0, 1], 400)  # every 0 of `own` stands in half of `past`
    longest, ends = new_text.longest_copy(past, own)
    assert longest == 1 and len(ends) == new_text.PLACES


def test_a_line_of_code_with_another_letter_is_new():
    """`if grade == "B":` after `if grade == "A":` says something: the default keeps it."""
    lines = [[1, 2, 3, 4, letter, 5, 6, 7] for letter in (10, 11)]
    documents = collect([{"input_ids": sum(lines, []), "labels": sum(lines, [])}])
    threshold = new_text.NewTextConfig(scorer="new_text").drop.below
    assert (score(documents, np.asarray([0, 8]))[8:] > threshold).all()


def test_short_units_are_not_scored():
    documents = collect([{"input_ids": [1, 2, 3, 1, 2, 3], "labels": [1, 2, 3, 1, 2, 3]}])
    starts = np.asarray([0, 3])
    assert np.isnan(score(documents, starts)).all()
    assert score(documents, starts, shortest=3).tolist() == [1] * 3 + [0] * 3


def test_fewer_tokens_than_a_run_repeat_nothing():
    documents = collect([{"input_ids": [1, 1], "labels": [1, 1]}])
    words = words_of(documents, PLAIN, np.asarray([0]), np.asarray([2]))
    assert new_text._may_repeat(words, 4).tolist() == [False]


def test_streams_are_scored_as_a_dataset_is(plan):  # noqa: F811
    """`per_document`: each document alone has the scores that it has among others."""
    made = plan({"preset": "default", "task_relevance": False, "reasoning_importance": False})
    fast, whole = tiny.tokenizer(), made.scores.values["knowledge_novelty"]
    part = XTFConfig().knowledge_novelty
    for index in range(len(made.documents)):
        ids, mask = made.documents.document(index)
        one = collect([{"input_ids": ids, "labels": np.where(mask, ids, -100)}])
        context = ScoringContext(
            one, fast, SimpleNamespace(segments=lambda unit, one=one: segment_starts(one, fast, unit))
        )
        low, high = made.documents.completion_offsets[index : index + 2]
        np.testing.assert_array_equal(new_text.new_text.score(context, part), whole[low:high])
