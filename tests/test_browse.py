"""`xtf show` finds documents wherever they lie in a table; `xtf report` makes the page again."""

from __future__ import annotations

import base64
import itertools
import json
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests import tiny
from tests.test_cli import TABLE, score_table
from tests.test_pipeline import Provider
from xtf_plugin import browse, cli, output
from xtf_plugin.config.block import XTFConfig
from xtf_plugin.data.documents import collect
from xtf_plugin.errors import XTFUserError
from xtf_plugin.plan import make_plan

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


def show(path):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["show", str(path)])


class TestText:
    """Texts that tokens share, and tokens that are long."""

    @pytest.fixture
    def split(self, tmp_path):
        """Two documents of "a😀b" in five tokens, of which the emoji takes three; in the second its tokens part."""
        smile = "😀".encode()
        pieces = {11: smile[:2], 12: smile[2:3], 13: smile[3:]}
        wide = score_table(
            row=[0] * 5 + [1] * 5,
            document=["aa00"] * 5 + ["bb11"] * 5,
            position=list(range(5)) * 2,
            token_id=[10, 11, 12, 13, 14] * 2,
            token=["a", "\ufffd", "\ufffd", "\ufffd", "b"] * 2,
            kept=[True] * 5 + [True, False, True, True, True],
            reason=[""] * 5 + ["", "knowledge_novelty", "", "", ""],
        )
        about = json.dumps({"format": 1, "bytes": {str(i): piece.hex() for i, piece in pieces.items()}})
        path = tmp_path / "scores.parquet"
        pq.write_table(wide.replace_schema_metadata({b"xtf": about.encode()}), path)
        return path

    def test_characters_are_whole(self, split, capsys):
        show(split)
        printed = capsys.readouterr().out
        assert "a😀b" in printed and "a[-😀|KN-]◌b" in printed and "\ufffd" not in printed

    def test_and_are_found(self, split):
        file = pq.ParquetFile(split)
        assert keys(file, grep="^a😀b$") == ["aa00", "bb11"]

    def test_a_run_writes_the_bytes(self, tmp_path):
        """Through a plan of the tiny tokenizer, which has no token for an emoji."""
        tokenizer, config = tiny.tokenizer(), XTFConfig.parse({"preset": "paper", "cache_dir": str(tmp_path)})
        ids = np.asarray(tokenizer("Then smile: 😀 and שלום.")["input_ids"])
        plan = make_plan(config, collect([{"input_ids": ids, "labels": ids}]), Provider(), tokenizer, progress=False)
        output.write_table(plan, tokenizer, tmp_path / "scores.parquet")
        (found,) = browse.find(pq.ParquetFile(tmp_path / "scores.parquet"), browse.Wanted(), 9)
        assert "😀 and שלום" in found.text and "😀" in "".join(token.text for token in found.tokens)

    def test_a_long_token_is_cut_and_searched_whole(self, tmp_path, capsys):
        token = "x" * 100_000 + "y"
        wide = score_table(row=[0], document=["aa00"], position=[0], token=[token], kept=[True], reason=[""])
        pq.write_table(wide, tmp_path / "scores.parquet")
        assert keys(pq.ParquetFile(tmp_path / "scores.parquet"), grep="xy$") == ["aa00"]
        show(tmp_path / "scores.parquet")
        printed = capsys.readouterr().out
        assert "100,001·characters" in printed and len(printed) < 2_000


def test_reasons_as_documents_are_marked(file):
    assert keys(file, reason="TR") == keys(file, reason="task_relevance") == ["aa22"]


BROKEN = {
    "row as text": ({"row": ["0"]}, "row holds string"),
    "no row": ({"row": pa.array([None], pa.int64())}, "rows without row"),
    "no document": ({"document": pa.array([None], pa.string())}, "rows without document"),
    "token in bytes": ({"token": pa.array([b"a"])}, "token holds binary"),
    "reason as list": ({"reason": pa.array([["a"]])}, "reason holds list"),
    "kept as number": ({"kept": [1]}, "kept holds int64"),
}


@pytest.mark.parametrize("command", ["show", "report"])
@pytest.mark.parametrize("name", BROKEN)
def test_tables_of_other_hands_are_told_in_one_line(tmp_path, name, command, capsys):
    changed, message = BROKEN[name]
    columns = {"row": [0], "document": ["aa00"], "position": [0], "token": ["a"], "kept": [True], "reason": [""]}
    wide = score_table(**columns)
    for column, values in changed.items():
        wide = wide.set_column(wide.schema.get_field_index(column), column, pa.array(values))
    pq.write_table(wide, tmp_path / "scores.parquet")
    with pytest.raises(SystemExit, match="2"):
        cli.main([command, str(tmp_path / "scores.parquet")])
    told = capsys.readouterr().err
    assert message in told and "Traceback" not in told
