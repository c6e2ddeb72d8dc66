"""The text before each answer, against decoding the tokens before each run one by one."""

from __future__ import annotations

import numpy as np
import pytest

from tests import tiny
from xtf_plugin.data import prompts
from xtf_plugin.data.documents import collect

NONE = np.zeros(0, dtype=np.int64)


def common(one, other):
    """Length of the common beginning of two lists."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def naive(documents, tokenizer, limit, special):
    """What is before each run, in full and since the run before; cut, and without what all have in common."""
    found, at = {}, 0
    for index in range(len(documents)):
        ids, completion = (values.tolist() for values in documents.document(index))
        since = 0
        for place, own in enumerate(completion):
            if own and not (place and completion[place - 1]):
                found[at] = (ids[:place], since, place)
            since = place + 1 if own else since
            at += own
    full = [before for before, *_ in found.values() if before]
    back = min(common(full[0][::-1], each[::-1]) for each in full)
    tail = full[0][len(full[0]) - back :]
    begins = [index for index in range(back) if tail[index] in special or tokenizer.decode(tail[index])[:1] == "\n"]
    back -= min(begins, default=back)

    def front_of(texts):
        alike = min((common(texts[0], each) for each in texts), default=0)
        room = min((len(each) - back for each in texts), default=0)
        feeds = alike < room  # else a whole message is shared
        ends = [
            at
            for at in range(min(alike, room))
            if texts[0][at] in special or (feeds and tokenizer.decode(texts[0][at])[-1:] == "\n")
        ]
        return max(ends, default=-1) + 1

    front = front_of(full)
    front_later = front_of([before[since:place] for before, since, place in found.values() if 0 < since < place])
    texts = {}
    for at, (before, since, place) in found.items():
        ids = before[since:place]
        ids = ids[front_later if since else front :]
        ids = ids[: max(0, len(ids) - back)]
        text = tokenizer.decode(ids[-limit:]).strip() if ids else ""
        texts[at] = ("… " + text).strip() if len(ids) > limit or (since and not text) else text
    return texts


@pytest.mark.parametrize("limit", [1, 3, 64])
@pytest.mark.parametrize(("begin", "end"), [("", ""), ("Dev has", " help!")])
def test_equals_decoding_what_is_before_each_run(monkeypatch, limit, begin, end):
    """Several turns, no prompt, a prompt alone, a document twice, and documents that follow one another."""
    monkeypatch.setattr(prompts, "TOKENS", limit)
    rng, rows, tokenizer = np.random.default_rng(1), [], tiny.tokenizer()
    words = tokenizer("Dev has 4 pens and buys 18 more. Sure, happy to help!", add_special_tokens=False)["input_ids"]
    front, back = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (begin, end))
    for _ in range(40):
        ids = rng.choice(words, rng.integers(1, 30)).tolist()
        labels = [token if keep else -100 for token, keep in zip(ids, rng.random(len(ids)) < 0.4, strict=True)]
        if begin:
            ids = [*front, *ids, *back, *words]
            labels = [-100] * (len(ids) - len(words)) + words
        rows.append({"input_ids": ids, "labels": labels})
    rows += [{"input_ids": words, "labels": words}, {"input_ids": words, "labels": [-100] * len(words)}, rows[0]]
    documents = collect(rows)
    special = np.asarray([*front[-1:], *back[:1]], dtype=np.int64)
    expected = naive(documents, tokenizer, limit, special.tolist())
    opens = documents.completion_runs[:-1]
    assert opens.tolist() == list(expected)
    assert prompts.Prompts(documents, tokenizer, special).before(opens) == list(expected.values())
    some = opens[[5, 2]]
    assert prompts.Prompts(documents, tokenizer, special).before(some) == [expected[int(at)] for at in some]
    assert (min(prompts.Prompts(documents, tokenizer, special)._frame[::2]) > 0) == bool(begin)


def test_a_character_that_is_cut_is_replaced(monkeypatch):
    monkeypatch.setattr(prompts, "TOKENS", 1)
    tokenizer = tiny.tokenizer()
    ids = tokenizer("\N{SNOWMAN}a", add_special_tokens=False)["input_ids"]
    assert len(ids) > 2, "one token for each byte"
    documents = collect([{"input_ids": ids, "labels": [-100] * (len(ids) - 1) + ids[-1:]}])
    assert prompts.Prompts(documents, tokenizer, NONE).before(np.asarray([0])) == ["… \ufffd"]


def test_what_all_prompts_share_is_left_out_unless_it_is_all():
    """Up to a special token or a line break: the question mark that all questions end with is theirs."""
    tokenizer = tiny.tokenizer()
    texts = ["System.\nThe Dev?", "System.\nThe Eli?"]
    questions = [[3, *tokenizer(text, add_special_tokens=False)["input_ids"], 4] for text in texts]
    made = [{"input_ids": ids + [7], "labels": [-100] * len(ids) + [7]} for ids in questions]
    documents, special = collect(made), np.asarray([3, 4])
    found = prompts.Prompts(documents, tokenizer, special).before(documents.completion_runs[:-1])
    assert found == ["The Dev?", "The Eli?"]
    alone = collect(made[:1])
    assert prompts.Prompts(alone, tokenizer, special).before(np.asarray([0])) == [
        tokenizer.decode(questions[0]).strip()
    ]


def test_the_same_first_question_everywhere_is_shown():
    """What all conversations begin with is a frame only up to what their shortest prompt says itself."""
    tokenizer = tiny.tokenizer()

    def turns(*texts):
        ids, labels = [], []
        for text in texts:
            own = [3, *tokenizer(text, add_special_tokens=False)["input_ids"], 4, 5]
            ids, labels = [*ids, *own, 7, 6], [*labels, *[-100] * len(own), 7, 6]
        return {"input_ids": ids, "labels": labels}

    documents = collect([turns("Dev has", "Eli has 4"), turns("Dev has", "pens and")])
    shown = prompts.Prompts(documents, tokenizer, np.asarray([3, 4, 5, 6]))
    assert shown.before(documents.completion_runs[:-1]) == ["Dev has", "Eli has 4", "Dev has", "pens and"]


def test_no_line_of_a_message_that_all_share_is_left_out():
    tokenizer = tiny.tokenizer()
    first, second = ("Sum:\nitem one\nitem two", "Now:\nitem three\nitem four")

    def turns(*texts):
        ids, labels = [], []
        for text in texts:
            own = [3, *tokenizer(text, add_special_tokens=False)["input_ids"], 4]
            ids, labels = [*ids, *own, 7, 6], [*labels, *[-100] * len(own), 7, 6]
        return {"input_ids": ids, "labels": labels}

    for rows in ([turns(first, second)], [turns(first, second), turns(first, "Dev has")], [turns("Eli has", second)]):
        documents = collect(rows)
        found = prompts.Prompts(documents, tokenizer, np.asarray([3, 4, 6])).before(documents.completion_runs[:-1])
        assert set(found) <= {first, second, "Dev has", "Eli has"}
