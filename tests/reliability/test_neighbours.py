"""Two and more processes on one cache: nothing is corrupted, and nothing is done twice but what was in flight."""

from __future__ import annotations

import os
import signal
import time

import pytest

from tests.reliability import amount, record, scoring
from tests.reliability.test_kills import IN_FLIGHT, undisturbed  # noqa: F401 (a fixture)

PAUSE = 0.03  # seconds for each forward: long enough to hear of one another


@pytest.mark.parametrize("processes", [2, *amount((), (3, 5))])
def test_what_is_done_twice_was_in_flight(tmp_path, undisturbed, processes):  # noqa: F811
    expected, _ = undisturbed
    cache, folders = tmp_path / "cache", [tmp_path / f"run-{i}" for i in range(processes)]
    started = [scoring.start(folder, cache, pause=PAUSE) for folder in folders]
    facts = [scoring.finish(*both) for both in zip(started, folders, strict=True)]
    assert {(fact["masks"], fact["table"]) for fact in facts} == {(expected["masks"], expected["table"])}
    done = sum(fact["scored"] for fact in facts)
    assert scoring.DOCUMENTS <= done <= scoring.DOCUMENTS + (processes - 1) * 2 * IN_FLIGHT
    assert not [name for folder in folders for name in scoring.strays(cache, folder)]
    record("neighbours", processes=processes, documents=scoring.DOCUMENTS, scored=done)


def test_without_looking_everything_is_done_twice(tmp_path):
    """Otherwise the test above would hold whatever processes know of one another."""
    cache, folders = tmp_path / "cache", [tmp_path / "one", tmp_path / "two"]
    started = [scoring.start(folder, cache, pause=PAUSE, alone=True) for folder in folders]
    done = sum(scoring.finish(*both)["scored"] for both in zip(started, folders, strict=True))
    assert done > 1.5 * scoring.DOCUMENTS


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is a POSIX signal")
def test_a_neighbour_that_is_killed_stops_nobody(tmp_path, undisturbed):  # noqa: F811
    expected, seconds = undisturbed
    for attempt in range(amount(1, 20)):
        cache, folders = tmp_path / f"cache-{attempt}", [tmp_path / f"{name}-{attempt}" for name in ("dies", "lives")]
        dies, lives = [scoring.start(folder, cache, pause=PAUSE) for folder in folders]
        time.sleep(seconds * (0.3 + 0.05 * attempt))
        os.kill(dies.pid, signal.SIGKILL)
        dies.join()
        facts = scoring.finish(lives, folders[1])
        assert (facts["masks"], facts["table"]) == (expected["masks"], expected["table"])
        again = scoring.finish(scoring.start(folders[0], cache), folders[0])  # the next one tidies up
        assert (again["masks"], again["scored"]) == (expected["masks"], 0)
        assert not scoring.strays(cache, folders[0])
