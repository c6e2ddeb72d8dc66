"""Invalid shards and folders that cannot be written: they are logged, and never give an error or a wrong score."""

from __future__ import annotations

import errno
import json
import logging
import os
import stat
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash

from tests.store.test_store import OTHER, REFERENCE, fill, records, shard_files
from xtf_plugin import files
from xtf_plugin.store import shard_format
from xtf_plugin.store.store import ScoreStore

LENGTHS = (3, 5, 1)


def forge(path: Path, change) -> Path:
    """A changed shard under the name that matches its bytes."""
    table = change(pq.read_table(path))
    path.unlink()
    pq.write_table(table, path)
    return path.rename(path.with_name(xxhash.xxh3_128_hexdigest(path.read_bytes()) + ".parquet"))


def header(**changes):
    def change(table):
        facts = json.loads(table.schema.metadata[shard_format.HEADER]) | changes
        return table.replace_schema_metadata({shard_format.HEADER: json.dumps(facts)})

    return change


def column(name, make):
    def change(table):
        values = make(table.column(name))
        return table.set_column(table.schema.get_field_index(name), table.schema.field(name), values)

    return change


def cut_first_list(values):
    lists = values.to_pylist()
    return pa.chunked_array([[lists[0][:-1], *lists[1:]]], type=values.type)


def relist(values, offsets):
    flat = values.combine_chunks().flatten()
    return pa.chunked_array([pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), flat, type=values.type)])


def blank_first(values):
    return pa.chunked_array([[None, *values.to_pylist()[1:]]], type=values.type)


FORGERIES = {
    "another reference": header(reference=OTHER),
    "other layers": header(layers="0"),
    "no layers": header(layers=None),
    "layers of no form": header(layers=["0"]),
    "layers as a number": header(layers=3),
    "an unknown old format": header(format=0),
    "the format before this": header(format=1),
    "a format of no form": header(format="x"),
    "no header": lambda table: table.replace_schema_metadata(None),
    "a header that is no JSON": lambda table: table.replace_schema_metadata({shard_format.HEADER: b"\xff{"}),
    "a header that is a list": lambda table: table.replace_schema_metadata({shard_format.HEADER: b"[1]"}),
    "a shortened list": column("logprobs", cut_first_list),
    "attention cut elsewhere": column("attention", lambda v: relist(v, [0, 2, 8, 9])),
    "entropy cut elsewhere": column("entropy", lambda v: relist(v, [0, 2, 8, 9])),
    "entropy missing": column("entropy", lambda v: pa.nulls(len(v), v.type)),
    "attention of one document missing": column("attention", blank_first),
    "attention missing": column("attention", lambda v: pa.nulls(len(v), v.type)),
    "a document without key": column("key", blank_first),
    "keys that are numbers": lambda t: t.set_column(0, "key", pa.array([np.nan] * 3)),
    "float64 scores": lambda t: t.set_column(1, "logprobs", t.column(1).cast(pa.list_(pa.float64()))),
    "a missing column": lambda table: table.drop_columns(["attention"]),
    "one more column": lambda table: table.append_column("text", pa.array(["a", "b", "c"])),
    "no documents": lambda table: table.slice(0, 0),
}


def damaged(kind: str, path: Path) -> Path:
    """Replace a good shard by a bad one, at the same path if it is not a forgery."""
    data = path.read_bytes()
    if kind in FORGERIES:
        return forge(path, FORGERIES[kind])
    path.unlink()
    if kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "foreign name":
        path = path.with_name("copy-of-scores.parquet")
        path.write_bytes(data)
    else:
        content = {"zero-byte": b"", "truncated": data[:-40], "half": data[: len(data) // 2], "text": b"hello"}
        path.write_bytes(content[kind])
    return path


def test_a_forgery_that_changes_nothing_passes(tmp_path):
    """Otherwise the forgeries below could be detected by how they are written."""
    keys = fill(tmp_path, LENGTHS).keys
    forge(shard_files(tmp_path)[0], header())
    assert ScoreStore(tmp_path, REFERENCE, "0,1").lookup(keys, np.array(LENGTHS)).found.all()


@pytest.mark.parametrize(
    "kind", ["zero-byte", "truncated", "half", "text", "directory", "pipe", "foreign name", *FORGERIES]
)
def test_a_bad_file_is_logged_and_set_aside(tmp_path, caplog, kind):
    keys = fill(tmp_path, LENGTHS).keys
    (good,) = shard_files(tmp_path)
    bad = damaged(kind, good)
    store = ScoreStore(tmp_path, REFERENCE, "0,1")
    with caplog.at_level(logging.WARNING):
        found = store.lookup(keys, np.array(LENGTHS))
    assert not found.found.any() and np.isnan(found.columns["logprobs"]).all()
    (warning,) = caplog.messages
    assert bad.name in warning and "set aside" in warning
    assert not os.path.lexists(bad) and os.path.lexists(f"{bad}.damaged")
    fill(tmp_path, LENGTHS)  # scored again
    assert store.lookup(keys, np.array(LENGTHS)).found.all() and len(caplog.messages) == 1


def test_a_good_shard_in_the_folder_of_other_layers_is_not_believed(tmp_path):
    keys = fill(tmp_path / "a", LENGTHS, layers="7").keys
    (path,) = shard_files(tmp_path / "a")
    store = ScoreStore(tmp_path / "b", REFERENCE, "0,1")
    store.directory.mkdir(parents=True)
    moved = path.rename(store.directory / path.name)
    assert not store.lookup(keys, np.array(LENGTHS)).found.any() and not moved.exists()


def test_no_flipped_byte_gives_a_wrong_score(tmp_path):
    added = fill(tmp_path, LENGTHS)
    keys = added.keys
    (path,) = shard_files(tmp_path)
    data = bytearray(path.read_bytes())
    rng = np.random.default_rng(0)
    for at in rng.choice(len(data), 200, replace=False):
        changed = bytearray(data)
        changed[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(changed)
        found = ScoreStore(tmp_path, REFERENCE, "0,1").lookup(keys, np.array(LENGTHS))
        assert not found.found.any() and not path.exists()
    path.write_bytes(data)
    found = ScoreStore(tmp_path, REFERENCE, "0,1").lookup(keys, np.array(LENGTHS))
    for name, values in added.columns.items():
        np.testing.assert_array_equal(found.columns[name], values)


def test_one_bad_file_does_not_cost_the_others(tmp_path):
    bad_keys = fill(tmp_path, LENGTHS, seed=0).keys
    (path,) = shard_files(tmp_path)
    path.write_bytes(path.read_bytes()[:-1])
    good_keys = fill(tmp_path, LENGTHS, seed=1).keys
    found = ScoreStore(tmp_path, REFERENCE, "0,1").lookup(np.concatenate([bad_keys, good_keys]), np.array(LENGTHS * 2))
    assert found.found.tolist() == [False] * 3 + [True] * 3


def test_shards_of_the_format_before_this_are_read(tmp_path, caplog):
    """It differs by a checksum in the header."""
    added = fill(tmp_path, LENGTHS)
    path = forge(shard_files(tmp_path)[0], header(format=2, checksum="0" * 32))
    found = ScoreStore(tmp_path, REFERENCE, "0,1").lookup(added.keys, added.lengths)
    for name, values in added.columns.items():
        np.testing.assert_array_equal(found.columns[name], values)
    assert path.exists() and not caplog.messages


def test_a_later_format_is_left_alone(tmp_path, caplog):
    keys = fill(tmp_path, LENGTHS).keys
    path = forge(shard_files(tmp_path)[0], header(format=shard_format.FORMAT + 1))
    store = ScoreStore(tmp_path, REFERENCE, "0,1")
    for _ in range(2):
        assert not store.lookup(keys, np.array(LENGTHS)).found.any()
    assert path.exists()
    (warning,) = caplog.messages
    assert path.name in warning and f"format {shard_format.FORMAT + 1}" in warning


def test_a_file_that_cannot_be_read_now_is_left_alone(tmp_path, caplog, monkeypatch):
    """In a shared cache, another user's file without read permission is good for its owner."""
    keys = fill(tmp_path, LENGTHS).keys
    (path,) = shard_files(tmp_path)

    def refuse(self):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert not ScoreStore(tmp_path, REFERENCE, "0,1").lookup(keys, np.array(LENGTHS)).found.any()
    assert path.exists() and path.name in caplog.text and "Permission denied" in caplog.text


def test_a_bad_file_in_a_read_only_folder_is_ignored(tmp_path, caplog, monkeypatch):
    keys = fill(tmp_path, LENGTHS).keys
    (path,) = shard_files(tmp_path)
    path.write_bytes(b"")
    monkeypatch.setattr(os, "replace", full)
    assert not ScoreStore(tmp_path, REFERENCE, "0,1").lookup(keys, np.array(LENGTHS)).found.any()
    assert path.exists() and path.name in caplog.text


def full(*_args, **_kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def check_kept_in_memory(store, caplog):
    """Three additions to a folder that cannot be written: all are found, and there is one warning."""
    for seed in range(3):
        store.add(records(LENGTHS, seed))
        store.flush()
        assert not store.persistent
    for seed in range(3):
        added = records(LENGTHS, seed)
        found = store.lookup(added.keys, added.lengths)
        for name, values in added.columns.items():
            np.testing.assert_array_equal(found.columns[name], values)
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert str(store.directory) in warning and "cache_dir" in warning and "XTF_CACHE" in warning
    return warning


def test_a_cache_below_a_file(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    check_kept_in_memory(ScoreStore(tmp_path / "file" / "cache", REFERENCE, "0", shard_tokens=1), caplog)


@pytest.mark.parametrize("where", [(os, "replace"), (os, "fsync"), (Path, "open"), (shard_format.pq, "write_table")])
def test_a_full_disk(tmp_path, caplog, monkeypatch, where):
    store = ScoreStore(tmp_path, REFERENCE, "0", shard_tokens=1)
    with monkeypatch.context() as patch:
        patch.setattr(*where, full)
        assert "No space left" in check_kept_in_memory(store, caplog)
    assert not list(tmp_path.rglob("*.tmp"))
    store.flush()  # space again: the last try saves what was kept
    assert store.persistent
    added = records(LENGTHS, 2)
    assert ScoreStore(tmp_path, REFERENCE, "0").lookup(added.keys, added.lengths).found.all()


def test_a_full_disk_is_not_tried_again_for_every_batch(tmp_path, monkeypatch):
    tries = []
    monkeypatch.setattr(os, "replace", lambda *names: tries.append(names) or full())
    store = ScoreStore(tmp_path, REFERENCE, "0", shard_tokens=1)
    for seed in range(5):
        store.add(records(LENGTHS, seed))
    assert len(tries) == 1


def test_a_description_that_cannot_be_written_costs_no_scores(tmp_path):
    (tmp_path / "v2" / REFERENCE / "reference.json").mkdir(parents=True)
    keys = fill(tmp_path, LENGTHS, description={"model": "tiny"}).keys
    assert ScoreStore(tmp_path, REFERENCE, "0,1").lookup(keys, np.array(LENGTHS)).found.all()


def test_a_file_that_replaces_another_appears_whole(tmp_path, monkeypatch):
    target = tmp_path / "x.json"
    target.write_bytes(b"old")
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        files.write_whole(target, b"new")
    assert target.read_bytes() == b"old" and os.listdir(tmp_path) == ["x.json"]


def test_scores_are_readable_as_the_umask_says(tmp_path):
    """A group shares a cache: a private mode, as temporary files often have, would shut the others out."""
    before = os.umask(0o022)
    try:
        fill(tmp_path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(shard_files(tmp_path)[0].stat().st_mode) == 0o644
