"""A column of marks through `axolotl train`: Axolotl drops the column, and prepared datasets never hold it."""

from __future__ import annotations

import json
import shutil

import pyarrow.parquet as pq
import pytest

from tests import tiny
from tests.axolotl import stock
from tests.axolotl.test_masks import PACKED

CUT = 180  # tokens; chats are longer, and their second answers end before
NOISE = "Sure, happy to help!"


def block(**more):
    return {"preset": "none", "selectors": {"critic": {"scorer": "column", "column": "noise", **more}}}


def marked(rows, field):
    """Every second row marks its noise: in the second of a chat's answers, or in its text."""
    for place, row in enumerate(rows):
        row["noise"] = None
        if place % 2:
            answers = (
                [part["content"] for part in row["messages"] if part["role"] == "assistant"] if field is None else []
            )
            text = answers[1] if field is None else row[field]
            span = [text.index(NOISE), text.index(NOISE) + len(NOISE)]
            row["noise"] = [[], [span], []] if field is None else [span]
    return rows


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("columns")
    tiny.save_base(folder / "model")
    tiny.save_rows(folder / "chat.jsonl", marked(stock.conversations(), None))
    tiny.save_rows(folder / "alpaca.jsonl", marked(stock.instructions(), "output"))
    texts = [{"text": row["prompt"] + row["completion"]} for row in tiny.problems(stock.ROWS)]
    tiny.save_rows(folder / "text.jsonl", marked(texts, "text"))
    return folder


def dropped(out):
    """The dropped text of each document, in the order of the table; what trained is what the table says."""
    table = pq.read_table(out / "xtf/scores.parquet").to_pandas()
    kept = sum(len(places) for _, places in stock.seen(out))
    assert kept == int((table.kept & (table.position > 0)).sum())
    assert set(table[~table.kept].reason) == {"critic"}
    return sorted("".join(group[~group.kept].token).strip() for _, group in table.groupby("document"))


CASES = {
    "chat": ("chat", {}),
    "chat, packed": ("chat", PACKED),
    "chat, users too": ("chat", {"train_on_inputs": True}),
    "alpaca": ("alpaca", {}),
    "text": ("text", {}),
    "chat, cut": ("chat", {"sequence_len": CUT, "excess_length_strategy": "truncate"}),
}


@pytest.mark.parametrize("case", CASES)
def test_marked_text_is_dropped(base, tmp_path, case):
    kind, changes = CASES[case]
    path = stock.write(base, tmp_path / "out", kind, xtf=block(), **changes)
    stock.train(path, tmp_path / "out", tmp_path / "cache")
    half, longest = stock.ROWS // 2, pq.read_table(tmp_path / "out/xtf/scores.parquet")["position"].to_numpy().max()
    assert longest == CUT - 1 if "sequence_len" in changes else longest > CUT or kind != "chat"
    assert dropped(tmp_path / "out") == [""] * half + [NOISE] * half


def test_a_prepared_dataset(base, tmp_path):
    """The second run finds the rows prepared, and still the marks."""
    path = stock.write(base, tmp_path / "out", "chat", xtf=block())
    first = stock.command(stock.BIN / "axolotl", "preprocess", path, cache=tmp_path / "cache")
    assert first.returncode == 0 and list((tmp_path / "prepared").iterdir()), first.stderr[-3000:]
    stock.train(path, tmp_path / "out", tmp_path / "cache")
    assert NOISE in dropped(tmp_path / "out")


def test_a_mark_that_does_not_fit_is_refused_by_row(base, tmp_path):
    rows = marked(stock.conversations(), None)
    rows[3]["noise"] = [[[0, 900]], [], []]
    tiny.save_rows(tmp_path / "wrong.jsonl", rows)
    entry = {"path": str(tmp_path / "wrong.jsonl"), "ds_type": "json", "type": "chat_template"}
    path = stock.write(base, tmp_path / "out", "chat", xtf=block(), datasets=[entry])
    result = stock.train(path, tmp_path / "out", tmp_path / "cache", ok=False)
    assert result.returncode == 2
    assert f"row 3 of the dataset {entry['path']}, column noise: the span [0, 900] does not fit" in result.stderr
    assert not list(tmp_path.glob("out.seen*"))


@pytest.mark.parametrize("options", [{}, PACKED], ids=["rows", "packed"])
def test_drops_are_counted_by_source_and_by_dataset(base, tmp_path, options):
    """Two datasets: one has sources, the other a null in the column; only the first has marks."""
    marks = marked(stock.conversations(), None)
    first = [{**row, "source": "web" if row["noise"] else "book"} for row in marks]
    others = [{**row, "noise": None, "source": None} for row in tiny.conversations(4, turns=2, seed=3)]
    entries = []
    for name, rows in (("first", first), ("others", others)):
        tiny.save_rows(tmp_path / f"{name}.jsonl", rows)
        entries.append({"path": str(tmp_path / f"{name}.jsonl"), "ds_type": "json", "type": "chat_template"})
    given = {**block(), "report_by": ["source", "dataset"]}
    path = stock.write(base, tmp_path / "out", "chat", xtf=given, datasets=entries, **options)
    stock.train(path, tmp_path / "out", tmp_path / "cache")
    by = json.loads((tmp_path / "out/xtf/summary.json").read_text())["by"]
    half = stock.ROWS // 2
    assert {each["value"]: each["documents"] for each in by["source"]} == {"web": half, "book": half, "(no value)": 4}
    assert [each["value"] for each in by["source"] if each["dropped_tokens"]] == ["web"]
    assert [(each["value"], each["documents"]) for each in by["dataset"]] == [
        (entries[0]["path"], stock.ROWS),
        (entries[1]["path"], 4),
    ]
    assert by["dataset"][0]["dropped_tokens"] == by["source"][0]["dropped_tokens"]


def test_a_missing_column_is_refused_before_the_model_is_loaded(base, tmp_path):
    shutil.copytree(base / "model", tmp_path / "model")
    (tmp_path / "model/model.safetensors").unlink()
    changes = {"base_model": str(tmp_path / "model"), "xtf": {"preset": "default", "report_by": "source"}}
    path = stock.write(base, tmp_path / "out", "chat", **changes)
    result = stock.train(path, tmp_path / "out", tmp_path / "cache", ok=False)
    assert result.returncode == 2
    assert f"the dataset {base / 'chat.jsonl'} has no column 'source' (it has [" in result.stderr
    checked = stock.command(stock.BIN / "xtf", "check", path, cache=tmp_path / "cache")
    assert checked.returncode == 2 and "no column 'source' for report_by, only messages, noise" in checked.stderr
