"""The format of a dataset: marks that open lines or sentences in many documents, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from tests import tiny
from tests.test_plan import plan  # noqa: F401, a fixture
from xtf_plugin.config.block import XTFConfig
from xtf_plugin.data.documents import collect
from xtf_plugin.data.formats import format_tokens
from xtf_plugin.selection.text_rules import TextRules, segment_starts

WORDS = "apples books coins pens shells stamps".split()


def row(text, prompt="How many?"):
    fast = tiny.tokenizer()
    before, own = fast(prompt)["input_ids"], fast(text)["input_ids"]
    return {"input_ids": before + own, "labels": [-100] * len(before) + own}


def formats_of(texts, share=0.5, counts=None):
    """What is format in some completions: the text of each document's format tokens, and the shares by opening."""
    data = [row(text) for text in texts for _ in range(1 if counts is None else counts[texts.index(text)])]
    documents, fast = collect(data), tiny.tokenizer()
    starts = segment_starts(documents, fast, "sentence")
    found, shares = format_tokens(documents, starts, share, fast)
    ids = documents.input_ids[documents.completion]
    bounds = documents.completion_offsets
    kept = [ids[low:high][found[low:high]] for low, high in zip(bounds[:-1], bounds[1:], strict=True)]
    return [fast.decode(each) for each in kept], shares


def texts_with(opening, end="", n=5):
    """Completions with one sentence each that begins with `opening`."""
    return [f"{WORDS[i]} are {i + 2}.\n{opening}{i + 3}{end}" for i in range(n)]


@pytest.mark.parametrize(
    ("opening", "end"),
    [
        ("#### ", ""),
        ("<think>\n", "\nno.\n</think>"),
        ('{"count": ', "}"),
        ("Answer: ", ""),
        ("- [ ] ", ""),
        ("```\n", "\n```"),
    ],
)
def test_a_mark_that_many_documents_share_is_format(opening, end):
    texts = texts_with(opening, end)
    found, shares = formats_of(texts)
    mark = opening.strip()
    for text, kept in zip(texts, found, strict=True):
        assert mark in kept, f"{kept!r} of {text!r}"
        assert text.split("\n")[0] not in kept, "a sentence of words is no format"
    assert any(mark.startswith(name.strip()) or name.strip().startswith(mark) for name in shares)
    assert set(shares.values()) == {1.0}


@pytest.mark.parametrize(
    "sentence",
    [
        "I hope this helps!",
        "Sure, happy to help!",
        'He said "no", (or "yes").',
        "It's a well-known fact…",
        "2.",
    ],
)
def test_a_sentence_of_words_is_no_format_however_frequent(sentence):
    texts = [f"{word} are {i}.\n{sentence}" for i, word in enumerate(WORDS)]
    found, shares = formats_of(texts)
    assert found == [""] * len(texts) and shares == {}


def test_fewer_than_three_documents_have_no_format():
    for n, some in ((1, False), (2, False), (3, True), (4, True)):
        found, shares = formats_of(texts_with("#### ", n=n), share=0.01)
        assert bool(shares) == some and all(("####" in kept) == some for kept in found)


def test_the_share_is_of_all_documents():
    texts = [*texts_with("#### ", n=3), *(f"{word} are few." for word in WORDS[:3])]
    assert formats_of(texts, share=0.5)[1] and not formats_of(texts, share=0.51)[1]
    assert list(formats_of(texts, share=0.5)[1].values()) == [0.5]


def test_documents_count_as_often_as_they_occur():
    texts = [texts_with("#### ", n=1)[0], *(f"{word} are few." for word in WORDS)]
    assert not formats_of(texts, share=0.2)[1], "one document of seven"
    found, shares = formats_of(texts, share=0.2, counts=[4, 1, 1, 1, 1, 1, 1])
    assert "####" in found[0] and list(shares.values()) == [0.4]


def test_an_opening_counts_once_a_document():
    texts = ["\n".join(f"- {word}" for word in WORDS), *(f"{word} are few." for word in WORDS)]
    assert not formats_of(texts, share=0.2)[1]


def test_short_lines_are_format_as_a_whole_and_of_long_ones_the_opening():
    long = " and ".join(WORDS)
    assert len(tiny.tokenizer()(f"Answer: {long}")["input_ids"]) > 12
    found, _ = formats_of(texts_with("Answer: "))
    assert [kept.strip() for kept in found] == [f"Answer: {i + 3}" for i in range(5)]
    found, _ = formats_of(texts_with("Answer: ", f" {long}"))
    assert all("Answer:" in kept and "books" not in kept for kept in found)


def test_the_opening_is_the_longest_that_enough_documents_share():
    """All share `#### `; three of five go on alike."""
    texts = [f"so.\n#### {'yes or no' if i < 3 else WORDS[i]} {WORDS[i]} {' and '.join(WORDS)}" for i in range(5)]
    _, of_all = formats_of(texts, share=1.0)
    _, of_some = formats_of(texts, share=0.6)
    assert len(of_all) == 1 and next(iter(of_all)).strip() == "####"
    (one, all_of_them), (longer, some) = of_some.items()
    assert (all_of_them, some) == (1.0, 0.6) and one.strip() == "####" and longer.strip() == "#### y"


def test_the_openings_equal_a_loop_over_units():
    """The longest common opening of at most six tokens, by counting each opening's documents."""
    rng, fast = np.random.default_rng(0), tiny.tokenizer()
    pieces = ["#### ", "- ", "Answer: ", "the ", "12 ", "<a>", "is "]
    texts = ["\n".join("".join(rng.choice(pieces, rng.integers(1, 6))) for _ in range(4)) for _ in range(12)]
    documents = collect([row(text) for text in [*texts, texts[0], texts[0]]])
    starts = segment_starts(documents, fast, "sentence")
    found, shares = format_tokens(documents, starts, 0.3, fast)
    ids = documents.input_ids[documents.completion]
    owner = np.searchsorted(documents.completion_offsets, starts, side="right") - 1
    units = [unit.tolist() for unit in np.split(ids, starts[1:])]
    expected, named = np.zeros(len(ids), dtype=bool), {}
    for start, unit in zip(starts, units, strict=True):
        best = 0
        for size in range(1, min(6, len(unit)) + 1):
            having = {o for o, other in zip(owner, units, strict=True) if other[:size] == unit[:size]}
            number = int(documents.counts[list(having)].sum())
            if number >= max(3, 0.3 * 14):
                best, share = size, number / 14
        text = fast.decode(unit[:best])
        if any(sign in text for sign in "#:<>"):
            named[text] = share
            expected[start : start + (len(unit) if len(unit) <= 12 else best)] = True
    np.testing.assert_array_equal(found, expected)
    assert shares == pytest.approx(named) and 0 < expected.sum() < len(expected) and len(named) > 3


def test_the_block_protects_formats_from_every_rule():
    texts = texts_with("#### ")
    documents, fast = collect([row(text) for text in texts]), tiny.tokenizer()
    rule = {"preset": "none", "knowledge_novelty": True}
    on = TextRules.find(XTFConfig.parse(rule), documents, fast)
    off = TextRules.find(XTFConfig.parse({**rule, "protect": {"formats": None}}), documents, fast)
    high = TextRules.find(XTFConfig.parse({**rule, "protect": {"formats": 1}}), documents, fast)
    assert not off.protected.any() and off.formats == {}
    assert on.protected.any() and np.array_equal(on.protected, high.protected) and on.formats


def test_a_plan_keeps_the_format_and_names_it(plan):  # noqa: F811
    everything = {"knowledge_novelty": {"drop": {"unknown_below": 1.0}}, "min_kept": 0}
    block = {**everything, "reasoning_importance": False, "task_relevance": False}
    data = [row(text) for text in texts_with("#### ")]
    made = plan(block, data=data)
    kept = tiny.tokenizer().decode(made.scores.token_ids[made.selection.keep])
    assert kept.count("####") == 5 and "are" not in kept
    assert [name.strip() for name in made.text.formats] == ["####"]
    without = plan({**block, "protect": {"formats": None}}, data=data)
    assert not without.selection.keep.any() and not without.text.formats
