"""A scoring process that is killed at any instant loses the shard in flight and nothing else."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time

import pytest

from tests import tiny
from tests.reliability import amount, record, scoring
from tests.test_end_to_end import BIN, recipe

pytestmark = pytest.mark.skipif(os.name != "posix", reason="SIGKILL is a POSIX signal")

KILLS = amount(6, 120)
# documents: those of a shard that is due, and of the batch that made it so
IN_FLIGHT = (scoring.SHARD_TOKENS + scoring.BATCH_TOKENS) // 15
PAUSE = 0.01  # seconds for each forward: a run of half a second, most of it scoring


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """What a run gives that nobody disturbs, and how long it takes."""
    folder = tmp_path_factory.mktemp("undisturbed")
    scoring.finish(scoring.start(folder / "first", folder / "warm", pause=PAUSE), folder / "first")
    begun = time.monotonic()
    facts = scoring.finish(scoring.start(folder / "run", folder / "cache", pause=PAUSE), folder / "run")
    return facts, time.monotonic() - begun


def test_a_kill_at_any_instant_loses_only_the_shard_in_flight(tmp_path, undisturbed):
    expected, seconds = undisturbed
    rng = random.Random(amount(0, 1))
    kills = rescored = finished = in_scoring = 0
    most = 0
    while kills < KILLS:
        folder, cache = tmp_path / "run", tmp_path / "cache"
        while True:
            before, kept = len(scoring.scored(folder)), scoring.stored(cache)
            process = scoring.start(folder, cache, pause=PAUSE)
            process.join(rng.uniform(0, 1.1 * seconds))
            if process.exitcode is not None:
                break
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            kills += process.exitcode == -signal.SIGKILL
            did, now = scoring.scored(folder)[before:], scoring.stored(cache)
            assert not kept & set(did), "a document was scored again whose scores were stored"
            assert kept <= now, "stored scores are gone"
            lost = len(set(did) - now)
            in_scoring += 0 < len(did) and len(now) < scoring.DOCUMENTS
            most, rescored = max(most, lost), rescored + lost
        facts = scoring.finish(process, folder)
        finished += 1
        assert (facts["masks"], facts["table"]) == (expected["masks"], expected["table"])
        assert not scoring.strays(cache, folder)
        shutil.rmtree(folder), shutil.rmtree(cache)
    assert in_scoring > KILLS // 4, "hardly a kill hit the scoring itself"
    assert most <= IN_FLIGHT, f"a kill lost {most} documents"
    record("kills", kills=kills, runs=finished, in_scoring=in_scoring, rescored=rescored, most=most)


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """A recipe of which scoring takes a while, and what the stock command makes of it undisturbed."""
    folder = tmp_path_factory.mktemp("stock")
    tiny.save_base(folder / "model")
    tiny.save_rows(folder / "data/train.jsonl", tiny.problems(300))
    block = {"preset": "paper", "batch_tokens": 128}

    def train(name, cache):
        path = recipe(folder, folder / name, xtf=block, max_steps=1, save_strategy="no", gradient_accumulation_steps=1)
        words = [str(BIN / "trl"), "sft", "--config", str(path)]
        environment = {**os.environ, "XTF_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        with (folder / f"{name}.log").open("w") as log:
            return subprocess.Popen(words, env=environment, stdout=log, stderr=log)

    assert train("undisturbed", folder / "cache").wait(300) == 0, (folder / "undisturbed.log").read_text()[-3000:]
    return folder, train


@pytest.mark.parametrize("attempt", range(amount(1, 10)))
def test_the_stock_command_is_killed_while_it_scores(stock, attempt):
    folder, train = stock
    name, cache = f"run-{attempt}", folder / f"cache-{attempt}"
    process = train(name, cache)
    while not list(cache.rglob("*.here")):  # a sign that scoring has begun
        assert process.poll() is None, (folder / f"{name}.log").read_text()[-3000:]
        time.sleep(0.01)
    time.sleep(random.Random(attempt).uniform(0, 1.5))
    process.kill()
    killed = process.wait() == -signal.SIGKILL
    assert train(name, cache).wait(300) == 0, (folder / f"{name}.log").read_text()[-3000:]
    tables = [scoring.table_hash(folder / run / "xtf/scores.parquet") for run in (name, "undisturbed")]
    assert tables[0] == tables[1]
    assert not scoring.strays(cache, folder / name)
    record("stock kills", kills=int(killed))
