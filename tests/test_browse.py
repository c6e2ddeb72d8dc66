"""`xtf show` finds documents wherever they lie in a table; `xtf report` makes the page again."""

from __future__ import annotations

import base64
import itertools
import json
import zlib

import pyarrow.parquet as pq
import pytest

from tests.test_cli import TABLE, score_table
from xtf_plugin import browse, cli
from xtf_plugin.errors import XTFUserError

KEYS = ["aa00", "bb11", "aa22", "cc33"]


@pytest.fixture
def file(tmp_path):
    """Four documents of five tokens, in row groups that cut them: rows 0, 0, 1, 2."""
    tokens = [f" w{i}" for i in range(20)]
    tokens[7] = " needle"
    wide = score_table(
        row=[0] * 10 + [1] * 5 + [2] * 5,
        document=list(itertools.chain.from_iterable([key] * 5 for key in KEYS)),
        position=list(range(5)) * 4,
        token=tokens,
        kept=[i != 12 for i in range(20)],
        reason=["task_relevance" if i == 12 else "knowledge_novelty,protected" if i == 19 else "" for i in range(20)],
    )
    pq.write_table(wide, tmp_path / "scores.parquet", row_group_size=3)
    return pq.ParquetFile(tmp_path / "scores.parquet")


def keys(file, n=9, **wanted):
    given = {"row": None, "document": None, "grep": None, "reason": None, **wanted}
    return [document.key for document in browse.find(file, browse.Wanted.parse(**given), n)]


def test_documents_are_whole_across_batches(file, monkeypatch):
    batches = file.iter_batches

    class Small:
        schema_arrow = file.schema_arrow

        def iter_batches(self, columns):
            return batches(batch_size=2, columns=columns)

    given = browse.Wanted()
    for source in (file, Small()):
        found = list(browse.find(source, given, 9))
        assert [document.key for document in found] == KEYS
        assert [len(document.tokens) for document in found] == [5] * 4


def test_what_is_wanted(file):
    assert keys(file) == KEYS and keys(file, n=2) == KEYS[:2]
    assert keys(file, row=0) == KEYS[:2] and keys(file, row=0, n=1) == KEYS[:2]
    assert keys(file, document="AA") == ["aa00", "aa22"] and keys(file, document="bb1", n=1) == ["bb11"]
    assert keys(file, grep=r"w6 needle w8") == ["bb11"] and keys(file, grep="absent") == []
    assert keys(file, reason="task_relevance") == ["aa22"] and keys(file, reason="protected") == ["cc33"]
    assert keys(file, reason="protected", row=0) == []


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"document": "xyz"}, "no document key"),
        ({"grep": "("}, "no regular expression"),
        ({"reason": "novelty"}, "Legal: reasoning_importance, knowledge_novelty"),
    ],
)
def test_what_is_refused(file, wanted, message):
    with pytest.raises(XTFUserError, match=message):
        keys(file, **wanted)


def test_the_report_of_a_table(file, tmp_path):
    assert "this table holds none" in browse.write_report(tmp_path / "scores.parquet", None)


def packed(data):
    return base64.b64encode(zlib.compress(json.dumps(data).encode()))


WHATIF = {"sliders": [], "cells": "", "flags": "", "weights": [], "floored": [], "lasting": "", "lasting_tokens": ""}
PAGE = {"format": 2, "summary": {}, "block": {}, "preset_selectors": [], "reasons": {}, "tokens": [], "documents": []}
WHOLE = {**PAGE, "whatif": {**WHATIF, "complete": True}}
ODD = {
    "no base64": (b"no base64!", "is damaged"),
    "no zlib": (base64.b64encode(b"abc"), "is damaged"),
    "cut": (base64.b64encode(base64.b64decode(packed(WHOLE))[:-30]), "is damaged"),
    "no number": (packed({**WHOLE, "summary": {"median": float("nan")}}), "NaN is no JSON"),
    "nested": (base64.b64encode(zlib.compress(b"[" * 200_000)), "is damaged"),
    "no mapping": (packed([1]), "is no mapping"),
    "earlier": (packed({**WHOLE, "format": 1}), "has the format 1, and this xtf-plugin shows 2"),
    "no format": (packed({}), "has the format None"),
    "parts missing": (packed(PAGE), "lacks whatif, whatif.sliders"),
    "other parts": (packed({**WHOLE, "tokens": {}}), "lacks tokens."),
    "parts of parts missing": (packed({**PAGE, "whatif": WHATIF}), "lacks whatif.complete."),
}


@pytest.mark.parametrize("name", ODD)
def test_what_is_no_report_is_told_in_one_line(tmp_path, name, capsys):
    held, message = ODD[name]
    pq.write_table(TABLE.replace_schema_metadata({b"xtf_report": held}), tmp_path / "odd.parquet")
    with pytest.raises(SystemExit, match="2"):
        cli.main(["report", str(tmp_path / "odd.parquet")])
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith(f"xtf: error: the report that {tmp_path / 'odd.parquet'} holds ")
    assert message in told and told.endswith("Make table and report again: xtf score RECIPE")
    assert not (tmp_path / "report.html").exists()


def test_a_report_with_all_its_parts_is_written(tmp_path):
    pq.write_table(TABLE.replace_schema_metadata({b"xtf_report": packed(WHOLE)}), tmp_path / "scores.parquet")
    assert browse.write_report(tmp_path / "scores.parquet", None) == f"report: {tmp_path / 'report.html'}"
