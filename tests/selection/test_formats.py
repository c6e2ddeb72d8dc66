"""The format of a dataset: which openings of lines are protected, and what they are called."""

from __future__ import annotations

import pytest

from tests import tiny
from xtf_plugin.config.block import XTFConfig
from xtf_plugin.data.documents import collect
from xtf_plugin.selection.text_rules import TextRules


def found(texts, **block):
    fast, rows = tiny.tokenizer(), []
    for text in texts:
        ids = fast(text)["input_ids"]
        rows.append({"input_ids": [1, *ids], "labels": [-100, *ids]})
    documents = collect(rows)
    rule = {"scorer": "log_probability", "unit": "line", "drop": {"quantile": 0.1}}
    config = XTFConfig.parse({"preset": "none", "selectors": {"mine": rule}, **block})
    return documents, TextRules.find(config, documents, fast)


def protected_text(documents, text):
    return tiny.tokenizer().decode(documents.input_ids[documents.completion][text.formatted])


TEXTS = [f"The sum is {at}.\n# {at}<|im_end|>" for at in range(8)]


def test_an_opening_that_documents_share_is_format():
    documents, text = found([*TEXTS, *(f"{at} and nothing else" for at in range(2))])
    assert text.formats == {"#": 0.8}
    assert protected_text(documents, text) == "".join(f"# {at}" for at in range(8))


@pytest.mark.parametrize("special_tokens", [True, False])
def test_special_tokens_are_no_format(special_tokens):
    """They have a protection of their own, which `special_tokens: false` takes away."""
    documents, text = found(TEXTS, protect={"special_tokens": special_tokens})
    assert not any("<|" in opening for opening in text.formats) and text.formats
    ends = documents.input_ids[documents.completion] == tiny.tokenizer().convert_tokens_to_ids("<|im_end|>")
    assert text.protected[ends].all() == special_tokens and not text.formatted[ends].any()


def test_what_is_forced_out_is_no_format():
    documents, text = found(TEXTS, force_drop=["# [0-3]"])
    assert protected_text(documents, text) == "".join(f"# {at}" for at in range(4, 8))
    assert not (text.protected & text.forced).any()
