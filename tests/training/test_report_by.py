"""`report_by` in a real SFTTrainer: what is dropped for each value of a column, also where TRL drops the column."""

from __future__ import annotations

import json

import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from tests.training.test_columns import NOISE, SHAPES, block, dropped, patched, problems, sft  # noqa: F401 (a fixture)
from xtf_plugin import XTFConfig, XTFDryRun, XTFUserError, attach, cli
from xtf_plugin.data.column_values import NONE, UNKNOWN, Values
from xtf_plugin.data.documents import collect

BY = {**block(), "report_by": "source"}


def mixed(n=12):
    """Rows of `web` are marked as noise, others are not; every fourth row has no source."""
    return [{**row, "source": [None, "web", "book", "web"][place % 4]} for place, row in enumerate(problems(n))]


def written(tmp_path):
    return json.loads((tmp_path / "out/xtf/summary.json").read_text())


@pytest.mark.parametrize("shape", SHAPES)
def test_drops_are_counted_by_value(tmp_path, patched, shape):  # noqa: F811
    dropped(tmp_path, sft(tmp_path, mixed(), BY, **SHAPES[shape]))
    table = pq.read_table(tmp_path / "out/xtf/scores.parquet").to_pandas()
    found = {each["value"]: each for each in written(tmp_path)["by"]["source"]}
    assert list(found)[0] == "web" and set(found) == {"web", "book", NONE}
    for value, each in found.items():
        part = table[table["by:source"] == value]
        assert each["documents"] == part.document.nunique() == (6 if value == "web" else 3)
        assert each["tokens"] == len(part) and each["dropped_tokens"] == int((~part.kept).sum())
        assert (each["dropped_tokens"] > 0) == (value == "web")
        assert each["dropped_fraction"] == each["dropped_tokens"] / each["tokens"]
    texts = table.groupby(["row", "document"]).agg({"token": "".join, "by:source": "first"})
    rows = {row["completion"]: row["source"] or NONE for row in mixed()}
    assert {text.removesuffix("<|endoftext|>"): value for text, value in texts.to_numpy()} == rows


def test_several_columns_without_a_score_that_reads_marks(tmp_path, patched):  # noqa: F811
    given = {"preset": "none", "force_drop": [NOISE], "dry_run": True, "report_by": ["source", "place"]}
    rows = [{**row, "place": at % 3} for at, row in enumerate(mixed())]
    with pytest.raises(XTFDryRun):
        sft(tmp_path, rows, given, packing=True, max_length=160).train()
    by = written(tmp_path)["by"]
    assert list(by) == ["source", "place"] and sorted(each["value"] for each in by["place"]) == ["0", "1", "2"]
    totals = written(tmp_path)["totals"]
    for values in by.values():
        assert sum(each["tokens"] for each in values) == totals["completion_tokens"]
        assert sum(each["dropped_tokens"] for each in values) == totals["dropped_tokens"] > 0


def test_attached_rows_must_have_the_column(tmp_path):
    dropped(tmp_path, sft(tmp_path, mixed()), BY)
    assert {each["value"] for each in written(tmp_path)["by"]["source"]} == {"web", "book", NONE}
    attach(made := sft(tmp_path, problems()), BY)
    with pytest.raises(XTFUserError, match="no column 'source'"):
        made.train()


def test_a_missing_column_is_refused_before_the_model_is_loaded(tmp_path, patched, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setattr("tests.tiny.model", lambda: str(tmp_path / "no model here"))
    with pytest.raises(SystemExit) as ended:
        sft(tmp_path, mixed(), {**BY, "report_by": "sauce"})
    message = capsys.readouterr().err
    assert ended.value.code == 2 and "no column 'sauce' (it has [" in message and "Did you mean source?" in message


def test_streams_are_refused(tmp_path):
    made = sft(tmp_path, mixed())
    made.train_dataset = Dataset.from_list(mixed()).to_iterable_dataset()
    with pytest.raises(XTFUserError, match="streamed, so no column is read for report_by"):
        attach(made, {"preset": "default", "report_by": ["source"]})


def test_equal_documents_of_several_values_and_unread_ones():
    rows = [{"input_ids": [1, at], "labels": [-100, at]} for at in range(4)]
    values, others = Values("source"), Values("source")
    documents = collect(rows)
    for place, value in ((0, "b"), (0, "a"), (1, "a"), (2, None), (2, "c")):
        ids, completion = documents.input_ids[2 * place : 2 * place + 2], documents.completion[:2]
        (values if place else others).add(ids, completion, value)
    values.add(documents.input_ids[:2], documents.completion[:2], "c")
    values.join(others)
    names, codes = values.of(documents)
    assert [names[code] for code in codes] == ["a + b + c", "a", f"{NONE} + c", UNKNOWN]


def test_rows_that_are_not_among_those_that_were_read_are_said(tmp_path, patched):  # noqa: F811
    made = sft(tmp_path, mixed(), {"preset": "none", "force_drop": [NOISE], "dry_run": True, "report_by": "source"})
    made.train_dataset = made.train_dataset.map(
        lambda row, at: {"input_ids": [7, *row["input_ids"][1:]] if at < 2 else row["input_ids"]}, with_indices=True
    )
    with pytest.raises(XTFDryRun):
        made.train()
    found = written(tmp_path)
    assert {each["value"]: each["documents"] for each in found["by"]["source"]}[UNKNOWN] == 2
    assert any(
        "report_by: 2 documents are not among the rows that source was read from" in w for w in found["warnings"]
    )


def test_the_terminal_shows_the_values(tmp_path, patched, capsys):  # noqa: F811
    dropped(tmp_path, sft(tmp_path, mixed(), BY))
    assert "by source" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["report", str(tmp_path / "out/xtf/scores.parquet")])
    shown = capsys.readouterr().out
    lines = [line for line in shown.splitlines() if "│ web" in line or "│ book" in line]
    assert "by source" in shown and "web" in lines[0] and "book" in lines[1] and "0.00 %" in lines[1]


def test_one_name_or_a_list():
    assert XTFConfig(report_by="a").report_columns == ["a"] and XTFConfig().report_columns == []
    with pytest.raises(XTFUserError, match="report_by.*twice"):
        XTFConfig(report_by=["a", "a"])
