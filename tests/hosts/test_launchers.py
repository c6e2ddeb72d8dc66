"""Two processes through the stock launchers: what each trains on is what one process trains on, token by token."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests import tiny
from tests.hosts.test_end_to_end import BIN, command, recipe
from tests.made_scores import DROPS
from tests.training.test_columns import CRITIC, NOISE, problems

ROOT = Path(__file__).parents[2]
RECORDER = ROOT / "tests/recorder"
PROGRAM = ["-m", "trl.scripts.sft"]
TWO = ["--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]  # accelerate's words; gloo with use_cpu
LAUNCHERS = {
    "trl sft": [BIN / "trl", "sft", *TWO],
    "accelerate launch": [BIN / "accelerate", "launch", *TWO, *PROGRAM],
    "torchrun": [BIN / "torchrun", "--standalone", "--nproc_per_node", "2", *PROGRAM],
}
ONE = [sys.executable, *PROGRAM]
EPOCH = {"max_steps": 6, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "save_strategy": "no"}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny.save_base(folder / "model")
    tiny.save_rows(folder / "data/train.jsonl", tiny.problems(24))
    return folder


def run(words, base: Path, out: Path, cache: Path, *, ok=True, pretend=None, **changes):
    """One epoch of 24 rows over two ranks, half of one in a single process; what each step was given, by rank."""
    path = recipe(base, out, **{**EPOCH, "xtf": DROPS, **changes})
    folders = os.pathsep.join([str(RECORDER), str(Path(__file__).parents[2])])
    environment = {"PYTHONPATH": folders, "RECORD": str(out.parent / f"{out.name}.seen"), "OMP_NUM_THREADS": "1"}
    environment |= {"PRETEND": pretend} if pretend else {}
    result = command(*words, "--config", path, cache=cache, **environment)
    if ok:
        assert result.returncode == 0, result.stderr[-4000:]
    return result


def seen(out: Path) -> list[list[tuple]]:
    """What every rank trained on: (token ids, positions with a label) of each document, in order of steps."""
    ranks = []
    for rank in range(2):
        path = out.parent / f"{out.name}.seen.{rank}"
        if path.exists():
            rows = map(json.loads, path.read_text().splitlines())
            ranks.append([(tuple(row["ids"]), tuple(row["kept"])) for row in rows])
    return ranks


@pytest.fixture(scope="module")
def one(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    run(ONE, base, folder / "out", folder / "cache", max_steps=12)
    return folder


@pytest.fixture(scope="module", params=LAUNCHERS)
def two(request, base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    run(LAUNCHERS[request.param], base, folder / "out", folder / "cache")
    return folder


def test_two_ranks_train_on_the_masks_of_one(one, two):
    (alone,), (first, second) = seen(one / "out"), seen(two / "out")
    expected = dict(alone)
    assert len(expected) == 24 and len(alone) == 24
    assert len(first) == len(second) == 12 and len({ids for ids, _ in first + second}) == 24
    for ids, kept in first + second:
        assert kept == expected[ids]
    assert sum(map(len, expected.values())) < sum(len(ids) for ids in expected)


def test_table_and_summary_are_those_of_one_process(one, two):
    tables = [pq.read_table(folder / "out/xtf/scores.parquet").to_pydict() for folder in (one, two)]
    for name in ("row", "document", "position", "token_id", "kept", "reason"):
        assert tables[0][name] == tables[1][name]
    facts = [json.loads((folder / "out/xtf/summary.json").read_text()) for folder in (one, two)]
    assert facts[0]["totals"] == facts[1]["totals"]
    assert facts[1]["scoring"]["scored_documents"] == 24


@pytest.mark.parametrize("options", [{}, {"packing": True, "max_length": 200}], ids=["rows", "packed"])
def test_two_ranks_read_the_marks_of_a_column(base, tmp_path, options):
    """Each rank reads the column where its rows still have their text; a text that is marked is trained on by none."""
    tiny.save_rows(tmp_path / "data/train.jsonl", problems(24))
    whole = {"max_steps": -1, "num_train_epochs": 1, "dataset_name": str(tmp_path / "data"), "xtf": CRITIC, **options}
    run(ONE, base, tmp_path / "one", tmp_path / "cache", **whole)
    run(LAUNCHERS["torchrun"], base, tmp_path / "two", tmp_path / "other cache", **whole)
    (alone,), ranks = seen(tmp_path / "one"), seen(tmp_path / "two")
    expected = dict(alone)
    assert len(ranks) == 2 and all(ranks) and {ids for rank in ranks for ids, _ in rank} == expected.keys()
    assert all(kept == expected[ids] for rank in ranks for ids, kept in rank)
    for out in ("one", "two"):
        table = pq.read_table(tmp_path / out / "xtf/scores.parquet").to_pandas()
        dropped = table[~table.kept].groupby("document").token.apply("".join)
        assert dropped.tolist() == [f" {NOISE}"] * 12 and set(table[~table.kept].reason) == {"critic"}


def test_scored_by_two_workers_and_trained_elsewhere(base, one, tmp_path):
    """`xtf score` on two workers, the cache copied to another place: training scores nothing, with the same masks."""
    path = recipe(base, tmp_path / "scored", **{**EPOCH, "xtf": DROPS})
    result = command(BIN / "xtf", "score", path, "--", *TWO, cache=tmp_path / "cache", OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr[-4000:]
    assert not list((tmp_path / "scored").glob("checkpoint*"))
    shutil.copytree(tmp_path / "cache", tmp_path / "copied")
    run(LAUNCHERS["torchrun"], base, tmp_path / "out", tmp_path / "copied")
    assert json.loads((tmp_path / "out/xtf/summary.json").read_text())["scoring"]["scored_documents"] == 0
    expected = dict(seen(one / "out")[0])
    for ids, kept in itertools.chain.from_iterable(seen(tmp_path / "out")):
        assert kept == expected[ids]


def test_a_users_error_ends_all_ranks(base, tmp_path):
    everything = {"preset": "none", "force_drop": ["(?s).*"], "min_kept": 0, "protect": {"special_tokens": False}}
    result = run(LAUNCHERS["trl sft"], base, tmp_path / "out", tmp_path / "cache", ok=False, xtf=everything)
    assert result.returncode == 1, result.stderr[-4000:]  # of the launcher, whose ranks ended with 2
    assert "xtf: error: the rules drop every one of" in result.stderr
    assert not list((tmp_path / "out").glob("**/*.safetensors"))


def test_a_trl_newer_than_any_tested_gets_a_warning_and_the_same_masks(base, one, tmp_path):
    out = tmp_path / "out"
    result = run([BIN / "trl", "sft"], base, out, tmp_path / "cache", max_steps=12, pretend="trl==1.99.0")
    assert "TRL 1.99.0 is newer than the newest tested release" in result.stderr
    assert seen(out) == seen(one / "out")
    facts = json.loads((out / "xtf/summary.json").read_text())
    assert facts["versions"]["trl"] == "1.99.0" and facts["totals"]["dropped_tokens"] > 0
    result = run([BIN / "trl", "sft"], base, out, tmp_path / "cache", ok=False, pretend="trl==1.8.0")
    assert result.returncode == 2 and "needs trl>=1.9" in result.stderr
