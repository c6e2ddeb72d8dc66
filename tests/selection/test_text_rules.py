"""What a block's patterns match, against a count over the text of each document."""

from __future__ import annotations

import numpy as np

from tests import tiny
from xtf_plugin.data.documents import collect
from xtf_plugin.selection.text_rules import Match


def test_matches_are_counted_by_document():
    """A document with two answers that match is one; one that the dataset has twice is two; without answers, none."""
    tokenizer = tiny.tokenizer()
    texts = (" Sure, happy to help!", " 4 + 5 = 9.")
    yes, no = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)
    two = {"input_ids": yes + no + yes, "labels": yes + [-100] * len(no) + yes}
    one = {"input_ids": no + yes, "labels": no + yes}
    none = {"input_ids": no + no, "labels": [-100] * len(no) + no}
    unlabelled = {"input_ids": yes, "labels": [-100] * len(yes)}
    documents = collect([unlabelled, two, one, none, one, unlabelled])
    marks, (whole, absent) = Match.find("force_drop", [" Sure, happy to help!", "Sure thing"], documents, tokenizer)
    assert (whole.key, whole.pattern) == ("force_drop", " Sure, happy to help!")
    assert (whole.documents, whole.tokens, whole.most) == (3, 4 * len(yes), 2 * len(yes))
    assert (absent.documents, absent.tokens, absent.most) == (0, 0, 0)
    np.testing.assert_array_equal(documents.completion_ids[marks], yes * 3)


def test_without_patterns_nothing_is_marked():
    documents = collect([{"input_ids": [5, 6], "labels": [-100, 6]}])
    marks, found = Match.find("force_drop", [], documents, tiny.tokenizer())
    assert not marks.any() and list(found) == []
