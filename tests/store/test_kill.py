"""A killed writer loses at most the shard being written; its temporary files are deleted; two writers lose nothing."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.store.test_store import REFERENCE, fill, shard_files
from xtf_plugin import files
from xtf_plugin.store.records import Records
from xtf_plugin.store.store import ScoreStore

LENGTH = 50
WRITER = f"""
import itertools, os, signal, sys
from pathlib import Path
from tests.store.test_kill import document
from xtf_plugin.store.store import ScoreStore

store = ScoreStore(Path(sys.argv[1]), "{REFERENCE}", "0", shard_tokens=1)
start, count = int(sys.argv[2]), int(sys.argv[3])
real = os.replace
if sys.argv[4] == "die":
    os.replace = lambda *names: os.kill(os.getpid(), signal.SIGKILL) if counter > 4 else real(*names)
for counter in itertools.count(start) if count < 0 else range(start, start + count):
    store.add(document(counter))
    print(counter, flush=True)
"""


def document(index):
    """One document and its scores, made from its number."""
    key = np.frombuffer(index.to_bytes(16, "little"), dtype=np.uint8).reshape(1, 16)
    values = np.arange(LENGTH, dtype=np.float32) + index
    return Records(-values, values, values, values, keys=key, offsets=np.array([0, LENGTH]))


def start_writer(root, start=0, count=-1, fate="live"):
    command = [sys.executable, "-c", WRITER, str(root), str(start), str(count), fate]
    repository = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([repository, os.environ.get("PYTHONPATH", "")])}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def check_all_there(root, count):
    keys = np.concatenate([document(index).keys for index in range(count)])
    found = ScoreStore(root, REFERENCE, "0").lookup(keys, np.full(count, LENGTH))
    assert found.found.all()
    expected = np.concatenate([document(index).attention for index in range(count)])
    np.testing.assert_array_equal(found.columns["attention"], expected)
    np.testing.assert_array_equal(found.columns["logprobs"], -expected)


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is a POSIX signal")
def test_a_kill_at_any_instant_loses_only_the_shard_in_flight(tmp_path, caplog):
    rng = random.Random(0)
    for attempt in range(4):
        root = tmp_path / str(attempt)
        writer = start_writer(root)
        first = writer.stdout.readline()
        assert first == "0\n"
        time.sleep(rng.uniform(0.0, 0.1))
        writer.send_signal(signal.SIGKILL)
        rest = writer.stdout.read()
        assert writer.wait() == -signal.SIGKILL
        completed = len((first + rest).splitlines())
        check_all_there(root, completed)
        assert completed <= len(shard_files(root)) <= completed + 1
        assert not list(root.rglob("*.tmp"))
    assert not caplog.messages  # no shard was found damaged


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is a POSIX signal")
def test_a_kill_between_writing_and_naming(tmp_path):
    writer = start_writer(tmp_path, fate="die")
    completed = len(writer.communicate()[0].splitlines())
    assert completed == 5
    (left,) = tmp_path.rglob("*.tmp")
    assert left.stat().st_size > 0
    check_all_there(tmp_path, completed)
    assert not left.exists()


def test_two_writers_lose_nothing(tmp_path):
    writers = [start_writer(tmp_path, start, 40) for start in (0, 20)]
    assert [len(w.communicate()[0].splitlines()) for w in writers] == [40, 40]
    assert [w.returncode for w in writers] == [0, 0]
    check_all_there(tmp_path, 60)
    assert len(shard_files(tmp_path)) == 60  # what both wrote has one name


def temporary(folder, host=None, pid=None, age=0.0):
    path = folder / f".xtf-{host or files.host_tag()}-{os.getpid() if pid is None else pid}-0123abcd.tmp"
    path.write_bytes(b"half a shard")
    os.utime(path, (time.time() - age,) * 2)
    return path


@pytest.fixture
def folder(tmp_path):
    fill(tmp_path)
    return shard_files(tmp_path)[0].parent


def reopen(folder):
    ScoreStore(folder.parents[2], REFERENCE, "5")  # whichever layers: all of the reference's folders are tidied


def test_a_live_process_keeps_its_file_however_old(folder):
    own, parent = temporary(folder, age=1e6), temporary(folder, pid=os.getppid(), age=1e6)
    reopen(folder)
    assert own.exists() and parent.exists()


@pytest.mark.skipif(os.name != "posix", reason="only POSIX tells whether a process lives")
def test_a_dead_process_leaves_nothing(folder):
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    dead, impossible = temporary(folder, pid=child.pid), temporary(folder, pid=2**33)
    reopen(folder)
    assert not dead.exists() and not impossible.exists()


def test_another_host_has_a_day(folder):
    new, old = temporary(folder, host="0" * 16, age=3600), temporary(folder, host="1" * 16, age=90_000)
    reopen(folder)
    assert new.exists() and not old.exists()


def test_another_machine_of_the_same_name_is_another_host(tmp_path, monkeypatch):
    """Outside containers all first pid namespaces have one number, and host names repeat."""
    boot, tags = tmp_path / "boot_id", []
    for drawn in ("one", "another", None):
        boot.write_text(drawn) if drawn else boot.unlink()
        monkeypatch.setattr(files, "BOOT_ID", boot)
        files.host_tag.cache_clear()
        tags.append(files.host_tag())
    monkeypatch.undo()
    files.host_tag.cache_clear()
    assert len(set(tags)) == 3 and all(len(tag) == 16 for tag in tags)


def test_files_with_other_names_are_not_tidied(folder):
    strangers = [folder / ".xtf-notes.tmp", folder / "x.tmp"]
    for path in strangers:
        path.write_bytes(b"")
        os.utime(path, (0, 0))
    reopen(folder)
    assert all(path.exists() for path in strangers)
