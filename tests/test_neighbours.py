"""Processes that score the same documents into one cache: each begins elsewhere and leaves out what others stored."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from tests import tiny
from tests.test_scorer import rows
from tests.test_store import REFERENCE, shard_files
from xtf_plugin import files, neighbours, scorer
from xtf_plugin.documents import collect
from xtf_plugin.neighbours import Neighbours
from xtf_plugin.passes import stored_scores
from xtf_plugin.reference import Reference
from xtf_plugin.store import ScoreStore


@pytest.fixture
def documents():
    return collect(rows(sizes=range(20, 60)))


def stores(root, count=2):
    return [ScoreStore(root, REFERENCE, "1", shard_tokens=60) for _ in range(count)]


def beside(store, documents):
    return Neighbours(store, documents.keys, np.diff(documents.completion_offsets))


def score(documents, store, others, after=lambda done: None):
    """The pass of one process; `after` is called with the number of documents scored, behind each batch."""
    done = 0

    def sink(records):
        nonlocal done
        store.add(records)
        done += len(records.keys)
        after(done)

    wanted, reference = np.arange(len(documents)), Reference(tiny.model(), "tiny")
    scorer.score(documents, wanted, reference, (1,), sink, batch_tokens=150, progress=False, beside=others)
    store.flush()
    return done


def test_two_processes_share_the_documents_without_knowing_of_each_other(tmp_path, documents):
    """The second one begins while the first is at work, and both go on in turns."""
    first, second = stores(tmp_path)
    with beside(first, documents) as one:
        seconds = []

        def now_the_other(done):
            if not seconds and done > 8:
                with beside(second, documents) as other:
                    assert other.begin == 0.5
                    seconds.append(score(documents, second, other))

        firsts = score(documents, first, one, now_the_other)
    in_flight = 2 * (60 + 150) // 10
    assert len(documents) <= firsts + seconds[0] <= len(documents) + in_flight
    assert firsts < len(documents) / 2
    found = ScoreStore(tmp_path, REFERENCE, "1").load(documents.keys, np.diff(documents.completion_offsets))
    assert found.found.all()


def test_a_pass_beside_nobody_is_the_usual_one(tmp_path, documents):
    (store,) = stores(tmp_path, 1)
    with beside(store, documents) as nobody:
        assert nobody.begin == 0.0
        assert score(documents, store, nobody) == len(documents)
        assert not nobody.stored(np.arange(len(documents))).any(), "what it wrote itself counts as another's"
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path not in shard_files(tmp_path)]


def test_each_begins_where_the_others_do_not(tmp_path, documents):
    opened = [beside(store, documents).__enter__() for store in stores(tmp_path, 5)]
    assert [one.begin for one in opened] == [0, 0.5, 0.25, 0.75, 0.125]
    opened[0].__exit__(None, None, None)
    (late,) = stores(tmp_path, 1)
    with beside(late, documents) as one:
        assert one.begin == 0.125  # four are there


def test_the_sign_of_a_dead_process_counts_for_nothing(tmp_path, documents):
    (store,) = stores(tmp_path, 1)
    store.directory.mkdir(parents=True)
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    dead = files.presence_path(store.directory)
    dead = dead.with_name(dead.name.replace(f"-{os.getpid()}-", f"-{child.pid}-"))
    dead.touch()
    with beside(store, documents) as one:
        assert one.begin == 0.0
    assert dead.exists()
    stores(tmp_path, 1)
    assert not dead.exists()


def test_a_damaged_shard_of_another_is_set_aside_and_scored(tmp_path, documents):
    first, second = stores(tmp_path)
    with beside(first, documents) as one:
        score(documents, second, None)
        bad = shard_files(tmp_path)[0]
        bad.write_bytes(bad.read_bytes()[:-3])
        known = one.stored(np.arange(len(documents)))
        assert known.any() and not known.all() and not bad.exists()
        assert score(documents, first, one) == int((~known).sum())


def test_a_folder_that_cannot_be_written_is_nobodys(tmp_path, documents):
    (tmp_path / "file").write_text("")
    store = ScoreStore(tmp_path / "file" / "cache", REFERENCE, "1")
    with beside(store, documents) as one:
        assert one.begin == 0.0 and not one.stored(np.arange(3)).any()


def test_the_sign_stays_young(tmp_path, documents, monkeypatch):
    """On another host nothing but its age tells whether its process is still at work."""
    (store,) = stores(tmp_path, 1)
    with beside(store, documents) as one:
        (sign,) = tmp_path.rglob("*.here")
        os.utime(sign, (1, 1))
        one.stored(np.arange(3))
        assert sign.stat().st_mtime == 1, "touched before every batch"
        monkeypatch.setattr(neighbours, "RENEW_SECONDS", 0.0)
        one.stored(np.arange(3))
        assert sign.stat().st_mtime > 1


def plan_of(store, documents, reference):
    return stored_scores(store, documents, reference, (1,), batch_tokens=150, progress=False)


def test_what_is_stored_while_the_reference_is_opened_is_not_scored_again(tmp_path, documents):
    first, second = stores(tmp_path)

    def opened():
        half = np.arange(len(documents) // 2)
        reference = Reference(tiny.model(), "tiny")
        scorer.score(documents, half, reference, (1,), second.add, batch_tokens=150, progress=False)
        second.flush()
        return reference

    found, stats, _ = plan_of(first, documents, opened)
    assert found.found.all() and stats.documents == len(documents) - len(documents) // 2


def test_scores_of_another_that_vanish_are_made_again(tmp_path, documents, caplog):
    """They were left out because they were there; the model is still open when they are missed."""
    first, second = stores(tmp_path)
    whole, _, _ = plan_of(
        ScoreStore(tmp_path / "other", REFERENCE, "1"), documents, lambda: Reference(tiny.model(), "t")
    )

    def opened():
        score(documents, second, None)
        return Reference(tiny.model(), "tiny")

    add, gone = first.flush, []

    def flush():
        add()
        gone.extend(shard_files(tmp_path)[:2])
        for path in gone:
            path.unlink(missing_ok=True)

    first.flush = flush
    found, stats, reused = plan_of(first, documents, opened)
    assert (
        gone
        and found.found.all()
        and 0 < stats.documents < len(documents)
        and reused + stats.documents == len(documents)
    )
    np.testing.assert_allclose(found.logprobs, whole.logprobs, atol=1e-4)
    assert ["kept in memory" in message for message in caplog.messages] == [True]


def test_who_catches_up_goes_on_elsewhere(tmp_path, documents):
    """The first comes to the middle, where the second has begun: it leaves that one's next batches alone."""
    first, second = stores(tmp_path)
    with beside(first, documents) as one, beside(second, documents) as other:
        order = [batch for batch in scorer.plan_batches(documents.lengths, 150)]
        assert (one.begin, one.inside, other.begin, other.inside) == (0.0, 0.5, 0.5, 0.25)
        half = scorer.begun_at(order, documents.lengths, 0.5)
        front = half[:2]  # what the second has stored of its half
        reference = Reference(tiny.model(), "tiny")
        scorer.score(documents, np.concatenate(front), reference, (1,), second.add, batch_tokens=150, progress=False)
        second.flush()
        seen = []

        def sink(records):
            first.add(records)
            seen.extend(key.tobytes() for key in records.keys)

        wanted = np.arange(len(documents))
        scorer.score(documents, wanted, reference, (1,), sink, batch_tokens=150, progress=False, beside=one)
        keys = [documents.keys[index].tobytes() for index in np.concatenate(half[2:4])]
        assert set(seen) | {documents.keys[i].tobytes() for i in np.concatenate(front)} == {
            key.tobytes() for key in documents.keys
        }
        assert min(seen.index(key) for key in keys) > len(seen) * 0.7, "it went on behind the other"
