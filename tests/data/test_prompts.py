"""The text before each answer, against decoding the tokens before each run one by one."""

from __future__ import annotations

import numpy as np
import pytest

from tests import tiny
from xtf_plugin.data import prompts
from xtf_plugin.data.documents import collect


def naive(documents, tokenizer, limit):
    """The tokens before each run, back to the run or the document's begin, of which the last `limit`, as text."""
    found, at = {}, 0
    for index in range(len(documents)):
        ids, completion = documents.document(index)
        before: list[int] = []
        for token, own, previous in zip(ids.tolist(), completion, [False, *completion], strict=False):
            if own and not previous:
                found[at] = tokenizer.decode(before[-limit:])
                before = []
            before = [] if own else [*before, token]
            at += own
    return found


@pytest.mark.parametrize("limit", [1, 3, 64])
def test_equals_decoding_what_is_before_each_run(monkeypatch, limit):
    """Several turns, no prompt, a prompt alone, a document twice, and documents that follow one another."""
    monkeypatch.setattr(prompts, "TOKENS", limit)
    rng, rows, tokenizer = np.random.default_rng(1), [], tiny.tokenizer()
    words = tokenizer("Dev has 4 pens and buys 18 more. Sure, happy to help!", add_special_tokens=False)["input_ids"]
    for _ in range(40):
        ids = rng.choice(words, rng.integers(1, 30)).tolist()
        labels = [token if keep else -100 for token, keep in zip(ids, rng.random(len(ids)) < 0.4, strict=True)]
        rows.append({"input_ids": ids, "labels": labels})
    rows += [{"input_ids": words, "labels": words}, {"input_ids": words, "labels": [-100] * len(words)}, rows[0]]
    documents = collect(rows)
    expected = naive(documents, tokenizer, limit)
    opens = documents.completion_runs[:-1]
    assert opens.tolist() == list(expected)
    assert prompts.Prompts(documents, tokenizer).before(opens) == list(expected.values())
    some = opens[[5, 2]]
    assert prompts.Prompts(documents, tokenizer).before(some) == [expected[int(at)] for at in some]


def test_a_character_that_is_cut_is_replaced(monkeypatch):
    monkeypatch.setattr(prompts, "TOKENS", 1)
    tokenizer = tiny.tokenizer()
    ids = tokenizer("\N{SNOWMAN}a", add_special_tokens=False)["input_ids"]
    assert len(ids) > 2, "one token for each byte"
    documents = collect([{"input_ids": ids, "labels": [-100] * (len(ids) - 1) + ids[-1:]}])
    assert prompts.Prompts(documents, tokenizer).before(np.asarray([0])) == ["\ufffd"]
