"""The score table: fixed columns, never partial, read back unchanged, and enough to select again."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests import forked, tiny
from tests.report.tables import plan_of, saved, table_of
from tests.test_plan import ATTRIBUTES_ON, rows
from xtf_plugin.config.block import XTFConfig
from xtf_plugin.errors import XTFUserError
from xtf_plugin.report import score_table
from xtf_plugin.report.whatif import reselect
from xtf_plugin.selection.select import FLOOR, select

# Written out: other tools read these columns.
COLUMNS = {
    "row": pa.int64(),
    "document": pa.string(),
    "position": pa.int32(),
    "token_id": pa.int32(),
    "token": pa.string(),
    "prompt": pa.string(),
    "reasoning_importance": pa.float32(),
    "knowledge_novelty": pa.float32(),
    "task_relevance": pa.float32(),
    "kept": pa.bool_(),
    "reason": pa.string(),
    "protected": pa.bool_(),
    "forced": pa.bool_(),
    "log_probability": pa.float32(),
}
TYPICAL = {"scorer": "typicality", "drop": {"below": -1}}
BLOCK = {
    **ATTRIBUTES_ON,
    "reasoning_importance": {"drop": {"quantile": 0.1}, "window": 3},
    "selectors": {"odd": {**TYPICAL, "unit": "sentence"}},
    "protect": {"patterns": ["answer is \\d+"]},
    "force_drop": ["happy"],
    "min_kept": 15,
}


def data():
    """Some documents occur several times, one of them twice in a row."""
    made = rows()
    return [*made, made[3], made[3], *rows(2, seed=5), made[0]]


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    return plan_of(tmp_path_factory.mktemp("plan"), data(), **BLOCK)


@pytest.fixture
def path(plan, tmp_path):
    return saved(plan, tmp_path / "scores.parquet")


def test_columns_and_values(plan, path):
    held = pq.read_table(path)
    assert dict(zip(held.column_names, held.schema.types, strict=True)) == {**COLUMNS, "odd": pa.float32()}
    documents, scores, selection = plan.documents, plan.scores, plan.selection
    spots = [
        (row, document, at)
        for row, document in enumerate(documents.row_documents)  # a document a row
        for at in range(scores.offsets[document], scores.offsets[document + 1])
    ]
    where = np.asarray([at for _, _, at in spots])
    assert held["row"].to_pylist() == [row for row, _, _ in spots]
    assert held["document"].to_pylist() == [documents.keys[document].tobytes().hex() for _, document, _ in spots]
    seen = {"kept": selection.keep, "position": scores.positions, "token_id": scores.token_ids, **selection.seen}
    for name, values in {**seen, "log_probability": scores.logprobs, "protected": plan.text.protected}.items():
        np.testing.assert_array_equal(held[name].to_numpy(), values[where], err_msg=name)
    assert held["reasoning_importance"].null_count == np.isnan(selection.seen["reasoning_importance"][where]).sum() > 0
    first = where == scores.offsets[[document for _, document, _ in spots]]  # a document has one answer
    assert [text is not None for text in held["prompt"].to_pylist()] == first.tolist()
    given = [plan.documents.document(document) for _, document, _ in np.asarray(spots)[first].tolist()]
    whole = [tiny.tokenizer().decode(ids[: completion.argmax()]) for ids, completion in given]
    shown = [text for text in held["prompt"].to_pylist() if text is not None]
    assert all(text in prompt and len(text) > 5 for text, prompt in zip(shown, whole, strict=True))
    names = {name for text in held["reason"].to_pylist() for name in text.split(",")}
    assert {"floor", "protected", "forced", "odd"} <= names
    assert held["token"].to_pylist() == [tiny.tokenizer().decode([token]) for token in held["token_id"].to_pylist()]


def test_what_is_off_is_null(tmp_path):
    held = pq.read_table(saved(plan_of(tmp_path, preset="none", task_relevance=True), tmp_path / "scores.parquet"))
    empty = {name for name in held.column_names if held[name].null_count == held.num_rows}
    assert empty == {"reasoning_importance", "knowledge_novelty", "log_probability"}


def test_metadata_is_the_summary_in_strict_json(plan, path):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    odd = dataclasses.replace(table_of(plan), about={"reference": {"a": float("inf"), "b": np.float32(0.5)}})
    score_table.write(odd, plan.documents, path.with_name("odd.parquet"))
    found = json.loads(pq.read_schema(path.with_name("odd.parquet")).metadata[b"xtf"], parse_constant=refuse)
    assert found["reference"] == {"a": None, "b": 0.5} and found["format"] == 3
    found = json.loads(pq.read_schema(path).metadata[b"xtf"])
    assert found.items() >= {**table_of(plan).about, "format": 3, "bytes": {}}.items()
    assert found["totals"]["kept_tokens"] == sum(pq.read_table(path)["kept"].to_pylist())


def same(found, expected):
    """Two tables hold the same, whatever the order of their documents."""
    order = [found.keys.tolist().index(key) for key in expected.keys.tolist()]
    where = np.concatenate([np.arange(*found.offsets[at : at + 2]) for at in order])
    for field in dataclasses.fields(found):
        ours, theirs = getattr(found, field.name), getattr(expected, field.name)
        if field.name in ("keys", "counts", "rows"):
            assert ours[order].tolist() == theirs.tolist(), field.name
        elif field.name == "scores":
            assert ours.keys() == theirs.keys()
            for name in ours:
                np.testing.assert_array_equal(ours[name][where], theirs[name], err_msg=name)
        elif field.name == "offsets":
            assert np.diff(ours)[order].tolist() == np.diff(theirs).tolist()
        elif isinstance(theirs, np.ndarray):
            np.testing.assert_array_equal(ours[where], theirs, err_msg=field.name)
            assert ours.dtype == theirs.dtype
        elif field.name not in ("about", "before"):
            assert ours == theirs, field.name
    opens = np.flatnonzero(expected.opens)
    assert found.before(where[opens]) == expected.before(opens) and any(expected.before(opens))
    return where


def test_a_file_reads_back_as_the_run_had_it(plan, path):
    same(score_table.read(path), table_of(plan))


def test_tokens_that_are_no_text_read_back(tmp_path):
    ids = tiny.tokenizer()("Then smile: 😀 and שלום.")["input_ids"]
    plan = plan_of(tmp_path, [{"input_ids": ids, "labels": ids}], preset="paper")
    found = score_table.read(saved(plan, tmp_path / "scores.parquet"))
    assert found.pieces == table_of(plan).pieces and b"\xf0" in found.pieces.values()


RELEVANT = {"drop": {"quantile": 0.5}, "window": 5}
PRESETS = {
    "default": {},
    "default, dropping much": {"selectors": {"odd": {**TYPICAL, "unit": "sentence"}}, "min_kept": 9},
    "paper": {"preset": "paper"},
    "official": {"preset": "official"},
    "a floor": {"preset": "paper", "knowledge_novelty": {"drop": {"known_above": 0.001}}, "min_kept": 9},
    "a floor by relevance": {"preset": "none", "task_relevance": RELEVANT, "min_kept": 20},
    "all of it": BLOCK,
    "at random": {**BLOCK, "control": "random", "seed": 3},
}


@pytest.mark.parametrize("name", PRESETS)
def test_the_same_block_selects_the_same(tmp_path, name):
    plan = plan_of(tmp_path, data(), **PRESETS[name])
    found = score_table.read(saved(plan, tmp_path / "scores.parquet"))
    again = reselect(found, found.config)
    where = same(found, table_of(plan))
    np.testing.assert_array_equal(again.keep[where], plan.selection.keep)
    np.testing.assert_array_equal(again.reasons[where], plan.selection.reasons)
    assert again.thresholds == plan.selection.thresholds
    assert not plan.selection.keep.all() or name in ("default", "official")
    assert (plan.selection.reasons & FLOOR).any() == (plan.config.min_kept > 1 and plan.config.control is None)


@pytest.mark.parametrize(
    "changed",
    [
        {"reasoning_importance": {"drop": {"fence": 0.5}, "scope": "dataset", "window": 3}},
        {"knowledge_novelty": {"drop": {"unknown_below": 0.01}, "max_fraction": 0.2}, "min_kept": 3},
        {"selectors": {"odd": {**TYPICAL, "unit": "sentence", "drop": {"quantile": 0.4}}}, "combine": "majority"},
        {"task_relevance": False, "selectors": {}},
    ],
)
def test_other_thresholds_select_as_a_run_with_them(plan, path, changed):
    config, found = XTFConfig.parse({**BLOCK, **changed}), score_table.read(path)
    expected = select(plan.scores, config, plan.text.protected, plan.text.forced, plan.text.segments)
    where = same(found, table_of(plan))
    again = reselect(found, config)
    assert (expected.reasons != plan.selection.reasons).any()
    np.testing.assert_array_equal(again.keep[where], expected.keep)
    np.testing.assert_array_equal(again.reasons[where], expected.reasons)


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({"reasoning_importance": {"drop": {"quantile": 0.1}, "window": 5}}, "reasoning_importance"),
        ({"selectors": {"odd": {**TYPICAL, "unit": "line"}}}, "odd"),
        ({"selectors": {"new": TYPICAL}}, "new"),
        ({"force_drop": []}, "force_drop"),
        ({"protect": {"patterns": []}}, "protect"),
    ],
)
def test_other_scores_are_refused(path, changed, name):
    with pytest.raises(XTFUserError, match=f"`{name}` of the block changed .* Run `xtf score`"):
        reselect(score_table.read(path), XTFConfig.parse({**BLOCK, **changed}))


def test_strings_are_dictionary_encoded_and_large_tables_have_few_row_groups(plan, path, monkeypatch):
    monkeypatch.setattr(score_table, "_ROW_GROUP", 100)
    monkeypatch.setattr(score_table, "CHUNK_TOKENS", 150)
    small = saved(plan, path.with_name("small.parquet"))
    file = pq.ParquetFile(small)
    assert 3 < file.metadata.num_row_groups < 20 and pq.read_table(small).equals(pq.read_table(path))
    group = pq.ParquetFile(path).metadata.row_group(0)
    facts = {group.column(i).path_in_schema: group.column(i) for i in range(group.num_columns)}
    assert all("RLE_DICTIONARY" in facts[name].encodings for name in ("document", "token", "reason"))
    assert {column.compression for column in facts.values()} == {"ZSTD"}


def test_a_full_disk_leaves_the_old_table_and_nothing_else(plan, path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    before = path.read_bytes()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        saved(plan, path)
    assert path.read_bytes() == before and os.listdir(path.parent) == ["scores.parquet"]


LIMITED = """
import resource, signal, sys
from pathlib import Path
from tests.report.tables import plan_of, saved
from tests.test_plan import rows
from xtf_plugin.report import score_table

folder, number = Path(sys.argv[1]), int(sys.argv[2])
plan = plan_of(folder / "plan", rows(number), preset="paper")
score_table._ROW_GROUP = 500
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
try:
    saved(plan, folder / "out" / "s.parquet")
except OSError as error:
    print("raised:", error)
"""


@pytest.mark.skipif(os.name != "posix", reason="file size limits are POSIX")
@pytest.mark.parametrize("documents", [1, 60], ids=["in the footer", "in the data"])
def test_a_disk_that_fills_while_writing_raises_once_and_leaves_no_file(tmp_path, documents):
    command = [sys.executable, "-c", LIMITED, str(tmp_path), str(documents)]
    repository = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([repository, os.environ.get("PYTHONPATH", "")])}
    done = forked.run(command, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("raised:") and "Exception" not in done.stderr and "Traceback" not in done.stderr
    assert os.listdir(tmp_path / "out") == []


def about(path, **changes):
    held = json.loads(pq.read_schema(path).metadata[b"xtf"])
    return {b"xtf": json.dumps({**held, **changes}).encode()}


ODD = {
    "missing": (lambda table, path: None, "cannot read"),
    "other": (lambda table, path: pa.table({"row": [1]}), "no score table"),
    "foreign": (lambda table, path: table.replace_schema_metadata({b"xtf": b"[]"}), "no score table"),
    "earlier": (lambda table, path: table.replace_schema_metadata(about(path, format=1)), "format 1; .*xtf score"),
    "later": (lambda table, path: table.replace_schema_metadata(about(path, format=4)), "format 4; .*Upgrade"),
    "columns": (lambda table, path: table.drop_columns(["forced"]), "no column forced"),
    "selector": (lambda table, path: table.drop_columns(["odd"]), "no column odd"),
    "kept": (lambda table, path: changed(table, "kept", pa.nulls(table.num_rows, pa.bool_())), "rows without kept"),
    "reason": (lambda table, path: changed(table, "reason", pa.array(["x"] * table.num_rows)), "'x'"),
    "key": (lambda table, path: changed(table, "document", pa.array(["abc"] * table.num_rows)), "xtf score RECIPE"),
    "row": (lambda table, path: changed(table, "row", pa.array([["a"]] * table.num_rows)), "cannot be read"),
    "block": (lambda table, path: table.replace_schema_metadata(about(path, config={"preset": "x"})), "xtf.preset"),
    "bytes": (lambda table, path: table.replace_schema_metadata(about(path, bytes=[])), "not what this"),
    "empty": (lambda table, path: table.replace_schema_metadata({b"xtf": b'{"format": 3}'}), "not what this"),
    "number": (lambda table, path: table.replace_schema_metadata(about(path, config={"seed": 1e999})), "xtf.seed"),
    "damaged": (
        lambda table, path: table.replace_schema_metadata({**table.schema.metadata, b"xtf": b'{"format": 3}'}),
        "damaged",
    ),
}


def changed(table, name, values):
    return table.set_column(table.schema.get_field_index(name), name, values)


@pytest.mark.parametrize("name", ODD)
def test_what_is_no_score_table_is_named(path, name):
    make, message = ODD[name]
    made = make(pq.read_table(path), path)
    if made is not None:
        pq.write_table(made, path.with_name(f"{name}.parquet"))
    with pytest.raises(XTFUserError, match=message):
        score_table.read(path.with_name(f"{name}.parquet"))


def test_a_cut_file_and_an_empty_one(plan, path):
    path.with_name("cut.parquet").write_bytes(path.read_bytes()[:-20])
    with pytest.raises(XTFUserError, match="cannot read"):
        score_table.read(path.with_name("cut.parquet"))
    pq.write_table(pq.read_table(path).slice(0, 0), path)
    assert len(score_table.read(path).keys) == 0


def rows_of(path, **columns):
    nothing = [None] * len(columns["row"])
    arrays = [pa.array(columns.get(field.name, nothing), field.type) for field in score_table.SCHEMA]
    pq.write_table(pa.table(arrays, score_table.SCHEMA), path, row_group_size=3)
    return pq.read_table(path)


def test_documents_end_where_row_key_or_position_say_so(tmp_path):
    held = rows_of(
        tmp_path / "scores.parquet",
        row=[0, 0, 0, 0, 0, 1, 1],
        document=["a", "a", "a", "b", "b", "b", "b"],
        position=[1, 2, 1, 2, 5, 6, 7],  # a packed row with the document a twice, then b; the next row is b again
        token_id=list(range(7)),
    )
    found = [(row, key, part["token_id"].to_pylist()) for row, key, part in score_table.iter_documents(held)]
    assert found == [(0, "a", [0, 1]), (0, "a", [2]), (0, "b", [3, 4]), (1, "b", [5, 6])]
    assert list(score_table.iter_documents(held.slice(0, 0))) == []


def test_a_renamed_column_in_the_footer_is_found(tmp_path):
    """pyarrow would read it as a column without values, with no error."""
    path = saved(plan_of(tmp_path), tmp_path / "scores.parquet")
    data = bytearray(path.read_bytes())
    data[data.index(b"document", len(data) - int.from_bytes(data[-8:-4], "little"))] ^= 0x20
    path.write_bytes(data)
    with pytest.raises(XTFUserError, match="its footer is damaged"):
        score_table.read(path)
