"""`xtf show` finds documents wherever they lie in a table; `xtf report` makes the page again."""

from __future__ import annotations

import itertools

import pyarrow.parquet as pq
import pytest

from tests.test_cli import TABLE, score_table
from xtf_plugin import browse
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
    pq.write_table(TABLE.replace_schema_metadata({b"xtf_report": b"no base64!"}), tmp_path / "odd.parquet")
    assert "this table holds none" in browse.write_report(tmp_path / "odd.parquet", None)
