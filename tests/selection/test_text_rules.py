"""What a block's patterns match, against a count over the text of each document."""

from __future__ import annotations

import numpy as np

from tests import tiny
from xtf_plugin.config.block import XTFConfig
from xtf_plugin.data.documents import collect
from xtf_plugin.selection.text_rules import Match, TextRules


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


def test_a_pattern_leaves_special_tokens_alone():
    """`.*` means the text: the end of a turn is protected anyway, and not to be counted or reported."""
    tokenizer = tiny.tokenizer()
    ids = [*tokenizer(" Sure thing", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    documents = collect([{"input_ids": ids, "labels": ids}])
    for part in ({"force_drop": ["Sure.*"]}, {"protect": {"patterns": ["Sure.*"], "formats": None}}):
        block = {"preset": "none", "knowledge_novelty": True, "protect": {"formats": None}, **part}
        found = TextRules.find(XTFConfig(**block), documents, tokenizer)
        assert found.matches[0].tokens == len(ids) - 1
        assert found.protected[-1] and (found.forced is None or not found.forced[-1])
    kept = {"preset": "none", "force_drop": ["Sure.*"], "protect": {"special_tokens": False, "formats": None}}
    assert TextRules.find(XTFConfig(**kept), documents, tokenizer).forced.all()


def test_without_patterns_nothing_is_marked():
    documents = collect([{"input_ids": [5, 6], "labels": [-100, 6]}])
    marks, found = Match.find("force_drop", [], documents, tiny.tokenizer())
    assert not marks.any() and list(found) == []
