"""The exported score table: fixed schema, whole or not there, readable back."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from xtf_plugin import table as module
from xtf_plugin.errors import XTFUserError
from xtf_plugin.table import ScoreTableWriter, iter_documents, read_score_table

# Contract 3, written out: tools of other people rely on it.
COLUMNS = {
    "row": pa.int64(),
    "document": pa.string(),
    "position": pa.int32(),
    "token_id": pa.int32(),
    "token": pa.string(),
    "reasoning_importance": pa.float32(),
    "knowledge_novelty": pa.float32(),
    "task_relevance": pa.float32(),
    "kept": pa.bool_(),
    "reason": pa.string(),
}
METADATA = {"config": {"preset": "paper"}, "thresholds": {"fence": float("-inf"), "q": np.float32(0.5)}, "versions": {}}


def text(*values):
    return np.array(values, dtype=object)


def chunk(rows=(0, 0, 1), documents=("aa", "aa", "bb"), positions=(4, 5, 1), **changes):
    n = len(rows)
    made = {
        "row": np.array(rows, dtype=np.int64),
        "document": text(*documents),
        "position": np.array(positions, dtype=np.int32),
        "token_id": np.arange(n, dtype=np.int32),
        "token": text(*["a ", "\n", "ü", "</s>"][:n]) if n <= 4 else text(*["x"] * n),
        "reasoning_importance": np.full(n, np.nan, dtype=np.float32),
        "knowledge_novelty": np.linspace(0, 1, n, dtype=np.float32),
        "task_relevance": np.where(np.arange(n) == 0, np.nan, 0.25).astype(np.float32),
        "kept": np.arange(n) % 2 == 0,
        "reason": text(*["knowledge_novelty,protected", ""] * n)[:n],
    }
    return made | changes


def write(path, *chunks, metadata=METADATA):
    with ScoreTableWriter(path, metadata) as writer:
        for part in chunks:
            writer.write(**part)
    return path


def test_schema_and_values(tmp_path):
    path = write(tmp_path / "scores.parquet", chunk(), chunk(rows=(2,), documents=("cc",), positions=(9,)))
    plain = pq.read_table(path)
    assert dict(zip(plain.column_names, plain.schema.types, strict=True)) == COLUMNS
    assert plain.column_names == list(COLUMNS)
    assert plain.to_pylist()[0] == {
        "row": 0,
        "document": "aa",
        "position": 4,
        "token_id": 0,
        "token": "a ",
        "reasoning_importance": None,
        "knowledge_novelty": 0.0,
        "task_relevance": None,
        "kept": True,
        "reason": "knowledge_novelty,protected",
    }
    assert plain["token"].to_pylist() == ["a ", "\n", "ü", "a "]
    assert plain["task_relevance"].null_count == 2 and plain["row"].to_pylist() == [0, 0, 1, 2]


def test_metadata_is_strict_json(tmp_path):
    path = write(tmp_path / "scores.parquet", chunk())

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    found = json.loads(pq.read_schema(path).metadata[b"xtf"], parse_constant=refuse)
    assert found["config"] == {"preset": "paper"} and found["thresholds"] == {"fence": None, "q": 0.5}
    assert read_score_table(path)[1] == found


def test_keys_may_come_as_bytes(tmp_path):
    keys = np.arange(48, dtype=np.uint8).reshape(3, 16)
    table, _ = read_score_table(write(tmp_path / "s.parquet", chunk(document=keys)))
    assert table["document"].to_pylist() == [key.tobytes().hex() for key in keys]


def test_strings_are_dictionary_encoded_and_large_tables_have_few_row_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_ROW_GROUP", 1000)
    n = 250
    parts = [chunk(rows=[i] * n, documents=[f"{i:032x}"] * n, positions=range(n)) for i in range(10)]
    file = pq.ParquetFile(write(tmp_path / "s.parquet", *parts))
    assert file.metadata.num_row_groups == 3 and file.metadata.num_rows == 2500
    group = file.metadata.row_group(0)
    facts = {group.column(i).path_in_schema: group.column(i) for i in range(group.num_columns)}
    assert all("RLE_DICTIONARY" in facts[name].encodings for name in ("document", "token", "reason"))
    assert {column.compression for column in facts.values()} == {"ZSTD"}


def test_half_a_surrogate_pair_does_not_stop_a_run(tmp_path):
    table, _ = read_score_table(write(tmp_path / "s.parquet", chunk(token=text("a", "\ud83d", "c"))))
    assert table["token"].to_pylist() == ["a", "?", "c"]


def test_an_empty_table(tmp_path):
    table, _ = read_score_table(write(tmp_path / "s.parquet"))
    assert table.num_rows == 0 and list(iter_documents(table)) == []


def test_arrays_of_unequal_length_are_refused(tmp_path):
    with pytest.raises(ValueError):
        write(tmp_path / "s.parquet", chunk(kept=np.ones(2, dtype=bool)))
    assert os.listdir(tmp_path) == []


def test_an_error_leaves_the_old_table_and_nothing_else(tmp_path):
    path = write(tmp_path / "scores.parquet", chunk())
    before = path.read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(KeyError), ScoreTableWriter(path, {}) as writer:
            writer.write(**chunk())
            raise KeyError
        del writer
        gc.collect()
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["scores.parquet"]


def test_the_table_appears_only_when_it_is_whole(tmp_path):
    writer = ScoreTableWriter(tmp_path / "scores.parquet", {})
    writer.write(**chunk())
    assert not (tmp_path / "scores.parquet").exists()
    writer.close()
    writer.close()
    assert os.listdir(tmp_path) == ["scores.parquet"]


def test_a_full_disk_is_an_os_error(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write(tmp_path / "s.parquet", chunk())
    assert os.listdir(tmp_path) == []


LIMITED = """
import resource, signal, sys
from pathlib import Path
import numpy as np
from tests.test_table import chunk
from xtf_plugin.table import ScoreTableWriter

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
rows = np.random.default_rng(0).integers(0, 1 << 60, int(sys.argv[2]))
try:
    with ScoreTableWriter(Path(sys.argv[1]), {}) as writer:
        writer.write(**chunk(rows, ["a"] * len(rows), range(len(rows))))
except OSError as error:
    print("told:", error)
"""


@pytest.mark.skipif(os.name != "posix", reason="file size limits are POSIX")
@pytest.mark.parametrize("rows", [3, 5000], ids=["in the footer", "in the data"])
def test_a_disk_that_fills_while_writing_is_told_once_and_left_clean(tmp_path, rows):
    command = [sys.executable, "-c", LIMITED, str(tmp_path / "s.parquet"), str(rows)]
    repository = str(Path(__file__).resolve().parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([repository, os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.startswith("told:") and done.stderr == ""
    assert os.listdir(tmp_path) == []


def test_what_is_no_score_table_is_named(tmp_path):
    for name in ("missing", "folder", "text", "other", "foreign", "later", "columns", "cut"):
        path = tmp_path / f"{name}.parquet"
        if name == "folder":
            path.mkdir()
        elif name == "text":
            path.write_text("row,document")
        elif name == "other":
            pq.write_table(pa.table({"row": [1]}), path)
        elif name == "foreign":
            pq.write_table(pa.table({"row": [1]}).replace_schema_metadata({b"xtf": b"[]"}), path)
        elif name == "columns":
            pq.write_table(pa.table({"row": [1]}).replace_schema_metadata({b"xtf": b'{"format": 1}'}), path)
        elif name == "later":
            pq.write_table(pa.table({"row": [1]}).replace_schema_metadata({b"xtf": b'{"format": 2}'}), path)
        elif name == "cut":
            path.write_bytes(write(tmp_path / "good.parquet", chunk()).read_bytes()[:-20])
        with pytest.raises(XTFUserError, match=name) as error:
            read_score_table(path)
        assert ("Upgrade" if name == "later" else "xtf score") in str(error.value)


def test_documents_end_where_row_key_or_position_say_so(tmp_path):
    rows = (0, 0, 0, 0, 0, 1, 1)
    documents = ("a", "a", "a", "b", "b", "b", "b")
    positions = (1, 2, 1, 2, 5, 6, 7)  # a packed row with the document a twice, then b; the next row is b again
    table, _ = read_score_table(write(tmp_path / "s.parquet", chunk(rows, documents, positions)))
    found = [(row, key, part["token_id"].to_pylist()) for row, key, part in iter_documents(table)]
    assert found == [(0, "a", [0, 1]), (0, "a", [2]), (0, "b", [3, 4]), (1, "b", [5, 6])]


def test_documents_across_row_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_ROW_GROUP", 3)
    parts = [chunk(rows=[i // 2] * 4, documents=[f"{i:02x}"] * 4, positions=range(4)) for i in range(5)]
    table, _ = read_score_table(write(tmp_path / "s.parquet", *parts))
    assert [(row, key, part.num_rows) for row, key, part in iter_documents(table)] == [
        (i // 2, f"{i:02x}", 4) for i in range(5)
    ]
