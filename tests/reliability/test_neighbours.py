"""Several processes on one cache: nothing is corrupted, and two do nothing twice but what was in flight."""

from __future__ import annotations

import os
import time

import pytest

from tests.reliability import amount, record, scoring
from tests.reliability.test_kills import kill, undisturbed  # noqa: F401 (a fixture)

# Seconds for each forward: long enough to hear of one another, as nobody waits for a busy disk (`unsynced`).
PAUSE = 0.03


def in_flight() -> int:
    """Completion tokens that a process holds back, at most: a shard that is not full, and the batch that fills it."""
    return scoring.SHARD_TOKENS + scoring.largest_batch()


def most_twice(processes: int) -> int:
    """Completion tokens that may be scored more than once: whenever two meet, each may do what the other holds back."""
    return 2 * (processes - 1) * in_flight()


@pytest.mark.parametrize("processes", [2, *amount((), (3, 5))])
def test_what_is_done_twice_was_in_flight(tmp_path, undisturbed, processes):  # noqa: F811
    expected, _ = undisturbed
    cache, folders = tmp_path / "cache", [tmp_path / f"run-{i}" for i in range(processes)]
    started = [scoring.start(folder, cache, pause=PAUSE, unsynced=True) for folder in folders]
    facts = [scoring.finish(*both) for both in zip(started, folders, strict=True)]
    assert {(fact["masks"], fact["table"]) for fact in facts} == {(expected["masks"], expected["table"])}
    once, done = scoring.documents().keys, [key for folder in folders for key in scoring.scored(folder)]
    assert len(done) == sum(fact["scored"] for fact in facts) and len(set(done)) == scoring.DOCUMENTS
    twice = scoring.tokens(done) - scoring.tokens(map(bytes, once))
    assert 0 <= twice <= most_twice(processes)
    assert not [name for folder in folders for name in scoring.strays(cache, folder)]
    record(f"{processes} processes on one cache", runs=1, documents=scoring.DOCUMENTS, scored=len(done))


def test_without_looking_everything_is_done_twice(tmp_path):
    """Otherwise the test above would hold whatever processes know of one another."""
    cache, folders = tmp_path / "cache", [tmp_path / "one", tmp_path / "two"]
    started = [scoring.start(folder, cache, pause=PAUSE, unsynced=True, alone=True) for folder in folders]
    done = sum(scoring.finish(*both)["scored"] for both in zip(started, folders, strict=True))
    assert done > 1.5 * scoring.DOCUMENTS


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is a POSIX signal")
def test_a_neighbour_that_is_killed_stops_nobody(tmp_path, undisturbed):  # noqa: F811
    expected, seconds = undisturbed
    kills = tries = 0
    while kills < amount(1, 20):
        cache, folders = tmp_path / f"cache-{tries}", [tmp_path / f"{name}-{tries}" for name in ("dies", "lives")]
        dies, lives = [scoring.start(folder, cache, pause=PAUSE, unsynced=True) for folder in folders]
        time.sleep(seconds * (0.3 + 0.05 * kills) * 0.8 ** (tries - kills))  # less, each time it had ended before
        tries += 1
        assert tries < 10 + amount(1, 20), "it always ended before it was killed"
        killed = kill(dies)
        kills += killed
        facts = scoring.finish(lives, folders[1])
        assert (facts["masks"], facts["table"]) == (expected["masks"], expected["table"])
        if not killed:
            continue
        again = scoring.finish(scoring.start(folders[0], cache), folders[0])  # the next one tidies up
        assert (again["masks"], again["table"]) == (expected["masks"], expected["table"]) and again["scored"] == 0
        assert not scoring.strays(cache, folders[0])
    record("neighbours killed", kills=kills)
