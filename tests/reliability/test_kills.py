"""A scoring process that is killed at any time loses at most the shard being written."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import time

import pytest

from tests import forked, tiny
from tests.hosts.test_end_to_end import BIN, recipe
from tests.reliability import LONG, amount, record, scoring
from xtf_plugin.scoring.batching import plan_batches

pytestmark = pytest.mark.skipif(os.name != "posix", reason="SIGKILL is a POSIX signal")

KILLS = amount(6, 120)
IN_A_RUN = 40  # kills; on a machine that has become slow no run would ever end otherwise
UNSYNCED = not LONG  # a kill loses nothing of what the system was given; only syncing takes longer than all the rest
PAUSE = 0.01  # seconds for each forward: a run of half a second, most of it scoring


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """What a run gives that nobody disturbs, and how long it takes."""
    folder = tmp_path_factory.mktemp("undisturbed")
    scoring.finish(scoring.start(folder / "first", folder / "warm", pause=PAUSE, unsynced=UNSYNCED), folder / "first")
    begun = time.monotonic()
    facts = scoring.finish(
        scoring.start(folder / "run", folder / "cache", pause=PAUSE, unsynced=UNSYNCED), folder / "run"
    )
    return facts, time.monotonic() - begun


def kill(process) -> bool:
    """Whether the process was still there to be killed."""
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


def in_flight(batches, stored):
    """What of the batches of a killed process was not stored; at most a shard that was not full and one batch more.

    A shard is due as soon as enough tokens have come in, so that all batches but the last had fewer. The batch that was
    being scored is none of these; on a CPU there is one at a time.
    """
    lost = [[key for key in batch if key not in stored] for batch in batches]
    before = scoring.tokens(key for batch in lost[:-1] for key in batch)
    assert before < scoring.SHARD_TOKENS, f"a kill lost {before} tokens and the batch that came last"
    return sum(map(len, lost))


def test_other_batches_give_other_scores(tmp_path, undisturbed):
    """Otherwise the tests below would not see that documents are scored again in other company; masks are the same."""
    other = scoring.start(tmp_path / "run", tmp_path / "cache", block={"batch_tokens": 2 * scoring.BATCH_TOKENS})
    facts, expected = scoring.finish(other, tmp_path / "run"), undisturbed[0]
    assert facts["masks"] == expected["masks"] and facts["table"] != expected["table"]


def killed_once(folder, cache, wait, found):
    """A run is killed after that time, having done nothing twice, and what it lost counted; or returned if it ended."""
    before, kept = len(scoring.batches(folder)), scoring.stored(cache)
    process = scoring.start(folder, cache, pause=PAUSE, unsynced=UNSYNCED)
    process.join(wait)
    if not kill(process):
        return process
    did, now = scoring.batches(folder)[before:], scoring.stored(cache)
    lost, again = in_flight(did, now), kept & {key for batch in did for key in batch}
    found["kills"] += 1
    found["in_scoring"] += bool(did) and len(now) < scoring.DOCUMENTS
    found["lost_when_stored"] += len(kept - now)
    found["scored_when_stored"] += len(again)
    found["rescored"] += lost
    assert not again, "a document was scored again whose scores were stored"
    assert kept <= now, "stored scores are gone"
    return None


def test_a_kill_at_any_instant_loses_only_the_shard_in_flight(tmp_path, undisturbed):
    expected, seconds = undisturbed
    rng = random.Random(amount(0, 1))
    found = dict.fromkeys(("kills", "in_scoring", "lost_when_stored", "scored_when_stored", "rescored", "runs"), 0)
    while found["kills"] < KILLS:
        folder, cache = tmp_path / "run", tmp_path / "cache"
        for trial in range(IN_A_RUN + 1):
            wait = rng.uniform(0, 1.1 * seconds) if trial < IN_A_RUN else 120
            if ended := killed_once(folder, cache, wait, found):
                break
        facts = scoring.finish(ended, folder)
        found["runs"] += 1
        assert (facts["masks"], facts["table"]) == (expected["masks"], expected["table"])
        assert not scoring.strays(cache, folder)
        shutil.rmtree(folder), shutil.rmtree(cache)
    assert found["in_scoring"] > KILLS // 4, "hardly a kill hit the scoring itself"
    record("kills", **found)


def killed_together(started, folders, cache, wanted=1):
    """How many were killed as they scored, with so many documents stored; how many they lost; and what is stored."""
    while len(scoring.stored(cache)) < wanted and any(process.exitcode is None for process in started):
        time.sleep(0.005)
    killed = sum([kill(process) for process in started])
    now = scoring.stored(cache)
    lost = sum(in_flight(scoring.batches(folder), now) for folder in folders)
    return killed if len(now) < scoring.DOCUMENTS else 0, lost, now


@pytest.mark.parametrize("killed", [False, True], ids=["both end", "one is killed"])
def test_two_processes_score_the_same_documents_into_one_cache(tmp_path, undisturbed, killed):
    """Both may do the same work. Each that ends has the right masks, and the cache is whole afterwards."""
    expected, seconds = undisturbed
    cache, folders = tmp_path / "cache", [tmp_path / "first", tmp_path / "second"]
    started = [scoring.start(folder, cache, pause=PAUSE, unsynced=UNSYNCED) for folder in folders]
    if killed:
        time.sleep(0.6 * seconds)
        kill(started.pop(0))
    for process, folder in zip(started, folders[killed:], strict=True):
        facts = scoring.finish(process, folder)
        assert (facts["masks"], facts["table"]) == (expected["masks"], expected["table"])
    assert len(scoring.stored(cache)) == scoring.DOCUMENTS
    again = scoring.finish(scoring.start(tmp_path / "third", cache), tmp_path / "third")
    assert (again["masks"], again["table"]) == (expected["masks"], expected["table"]) and again["scored"] == 0
    assert not [name for folder in folders[killed:] for name in scoring.strays(cache, folder)]


def test_documents_that_are_stored_leave_the_batches_of_the_others_as_they_would_have_been(tmp_path, undisturbed):
    """As after a run over fewer documents: only what shared a batch with a stored one comes into other company."""
    data, folder, cache = scoring.documents(), tmp_path / "run", tmp_path / "cache"
    plan = list(plan_batches(data.lengths, scoring.BATCH_TOKENS))
    broken = [plan[2], plan[7]]
    few = [int(batch[0]) for batch in broken]
    scoring.finish(scoring.start(tmp_path / "few", cache, only=few, unsynced=UNSYNCED), tmp_path / "few")
    facts = scoring.finish(scoring.start(folder, cache, unsynced=UNSYNCED), folder)
    pairs = zip(facts["documents"], undisturbed[0]["documents"], strict=True)
    other = {index for index, (one, two) in enumerate(pairs) if one != two}
    assert facts["scored"] == scoring.DOCUMENTS - len(few) and facts["masks"] == undisturbed[0]["masks"]
    assert other and other <= {int(index) for batch in broken for index in batch}


def started_ranks(place, cache, name, **options):
    """The folders and processes of a run of two ranks."""
    folders = [place / f"{name}-{rank}" for rank in range(2)]
    meet = str(place / f"{name}.meeting")
    return folders, [
        scoring.start(f, cache, rank=(rank, 2, meet), unsynced=UNSYNCED, **options) for rank, f in enumerate(folders)
    ]


def test_a_killed_run_of_two_ranks_goes_on(tmp_path, undisturbed):
    """Ranks share out anew what is missing, so that batches may be others; masks are the same."""
    rng, kills, tries, lost, gone = random.Random(4), 0, 0, 0, 0
    while kills < amount(2, 40):
        cache = tmp_path / f"cache-{tries}"
        folders, started = started_ranks(tmp_path, cache, f"run-{tries}", pause=2 * PAUSE)
        killed, in_flight_, stored = killed_together(started, folders, cache, rng.randint(1, scoring.DOCUMENTS // 2))
        tries += 1
        assert tries < 10 * amount(2, 40), "hardly a kill hit both ranks"
        if killed < 2:
            continue
        folders, started = started_ranks(tmp_path, cache, f"again-{tries}")
        facts = [scoring.finish(*both) for both in zip(started, folders, strict=True)]
        kills, lost, gone = kills + killed, lost + in_flight_, gone + len(stored - scoring.stored(cache))
        assert {fact["masks"] for fact in facts} == {undisturbed[0]["masks"]}
        assert [fact["scored"] for fact in facts] == [scoring.DOCUMENTS - len(stored)] * 2 and not gone
        assert not [name for folder in folders for name in scoring.strays(cache, folder)]
    record("kills of both of two ranks", kills=kills, resumed=kills // 2, rescored=lost, lost_when_stored=gone)


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """A recipe of which scoring takes a while, and what the stock command makes of it undisturbed."""
    folder = tmp_path_factory.mktemp("stock")
    tiny.save_base(folder / "model")
    tiny.save_rows(folder / "data/train.jsonl", tiny.problems(500))
    block = {"preset": "paper", "batch_tokens": 64}

    def words(name):
        changes = {"max_steps": 1, "save_strategy": "no", "gradient_accumulation_steps": 1, "disable_tqdm": False}
        return [str(BIN / "trl"), "sft", "--config", str(recipe(folder, folder / name, xtf=block, **changes))]

    def environment(cache):
        return {**os.environ, "XTF_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

    def start(name, cache):
        """A real command in a group of its own: the process that scores is one that a launcher has started."""
        with (folder / f"{name}.log").open("w") as log:
            together = {"stdout": log, "stderr": log, "start_new_session": True}
            return subprocess.Popen(words(name), env=environment(cache), **together)

    def finish(name, cache):
        """To its end, without the seconds that its imports take."""
        ended = forked.run(words(name), env=environment(cache), timeout=300)
        assert ended.returncode == 0, ended.stderr[-3000:]

    finish("undisturbed", folder / "cache")
    return folder, start, finish


def killed_while_scoring(process, log, cache, wait):
    """Whether the process was killed, so long after it had begun to score, and before it had stored the scores."""
    while "xtf: scoring" not in log.read_text() and process.poll() is None:
        time.sleep(0.005)
    time.sleep(wait)
    with contextlib.suppress(ProcessLookupError):  # it has ended
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait() == -signal.SIGKILL and not scoring.stored(cache)


@pytest.mark.parametrize("attempt", range(amount(1, 10)))
def test_the_stock_command_is_killed_while_it_scores(stock, attempt):
    folder, start, finish = stock
    wait, killed = random.Random(attempt).uniform(0, 1.5), False
    for trial in range(6):
        name, cache = f"run-{attempt}-{trial}", folder / f"cache-{attempt}-{trial}"
        process = start(name, cache)
        killed = killed_while_scoring(process, folder / f"{name}.log", cache, wait / 2**trial)
        if killed:
            break
        assert process.returncode in (0, -signal.SIGKILL), (folder / f"{name}.log").read_text()[-3000:]
    assert killed, "it always ended, or had scored, before it was killed"
    assert not (folder / name / "xtf/scores.parquet").exists()
    finish(name, cache)
    tables = [scoring.table_hash(folder / run / "xtf/scores.parquet") for run in (name, "undisturbed")]
    assert tables[0] == tables[1]
    assert not scoring.strays(cache, folder / name)
    record("stock kills", kills=int(killed), tries=trial + 1)
