"""Planning runs in the test's own process, small enough to make and compare thousands of them.

A run scores into a cache and selects. Tests compare its masks, every byte of its score table's columns, the documents
it scored and its warnings. `os.fsync` is replaced except in tests about syncing.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from tests import tiny
from tests.reliability import scoring
from tests.test_plan import ATTRIBUTES_ON
from xtf_plugin import files
from xtf_plugin.config.block import XTFConfig
from xtf_plugin.data.documents import DocumentSet
from xtf_plugin.plan import Plan, make_plan
from xtf_plugin.report import score_table, summary, writer
from xtf_plugin.scoring import cached_scores
from xtf_plugin.store.records import Records
from xtf_plugin.store.store import ScoreStore

DOCUMENTS = 24
SHARD_TOKENS = 320  # three shards
NOBODY = 65534  # the user with no rights

versions = functools.cache(summary.versions)  # reads the metadata of seven packages each time


@functools.cache
def documents(seed: int = 0) -> DocumentSet:
    return scoring.ragged(DOCUMENTS, seed)


@functools.cache
def provider(seed: int = 0) -> scoring.Rounding:
    return scoring.Rounding(tiny.model(seed=seed))


@dataclass(frozen=True)
class Outcome:
    """The results of a run. `scored`: keys of the documents that it scored, in order."""

    masks: str
    table: str
    scored: tuple[bytes, ...]
    warnings: tuple[str, ...]

    @property
    def bytes(self) -> tuple[str, str]:
        """What no damage and no failing disk may change."""
        return self.masks, self.table


@contextmanager
def unprivileged() -> Iterator[None]:
    """Without root's right to read and write everything."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Fail if the body takes longer, as reading a pipe without a writer does."""

    def end(*_: object) -> None:
        raise AssertionError(f"not done after {seconds} s")  # no OSError: the code under test catches it

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class _Noted(ScoreStore):
    """A store that notes which documents were scored."""

    scored: list[bytes]

    def add(self, records: Records) -> None:
        self.scored += [key.tobytes() for key in records.keys]
        super().add(records)


@contextmanager
def recorded_warnings() -> Iterator[list[str]]:
    """The plugin's warnings, in order."""
    warnings: list[str] = []
    logger, handler = logging.getLogger("xtf_plugin"), logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(record.getMessage())
    logger.addHandler(handler)
    try:
        yield warnings
    finally:
        logger.removeHandler(handler)


@contextmanager
def unsynced() -> Iterator[None]:
    """Without syncing, which matters only for power cuts and is slow on a busy disk."""
    with mock.patch.object(os, "fsync", lambda descriptor: None):
        yield


def plan(cache: Path, scored: list[bytes], seed: int = 0, model: int = 0, **block: object) -> Plan:
    """Score what is missing of the dataset `seed` with the reference `model`, noting it in `scored`; and select."""
    keys = {**ATTRIBUTES_ON, "cache_dir": str(cache), "batch_tokens": scoring.BATCH_TOKENS, **block}
    store = type("Noted", (_Noted,), {"scored": scored})
    with mock.patch.object(cached_scores, "ScoreStore", partial(store, shard_tokens=SHARD_TOKENS)):
        return make_plan(XTFConfig.parse(keys), documents(seed), provider(model), tiny.tokenizer(), progress=False)


def run(cache: Path, table: Path, **options: object) -> Outcome:
    """`plan`, and its score table, written to `table` and deleted again."""
    scored: list[bytes] = []
    with recorded_warnings() as warnings:
        made = plan(cache, scored, **options)
    with ExitStack() as stack:
        stack.enter_context(unsynced())
        score_table.write(score_table.ScoreTable.of_plan(made, tiny.tokenizer()), made.documents, table)
    found = scoring.table_hash(table)
    table.unlink()
    return Outcome(masks_hash(made), found, tuple(scored), tuple(warnings))


def masks_hash(made: Plan) -> str:
    masks = made.masks()
    return hashlib.sha256(masks.bits.tobytes() + masks.keys.tobytes() + masks.best.tobytes()).hexdigest()


def write(made: Plan, folder: Path) -> list[Path]:
    """All that a run leaves in its output folder."""
    with mock.patch.object(summary, "versions", versions):
        return writer.write(made, tiny.tokenizer(), folder)


def run_in(place: Path) -> dict[str, Any]:
    """A run with its cache and its output in one place."""
    scored: list[bytes] = []
    with recorded_warnings() as warnings:
        made = plan(place / "cache", scored)
        written = write(made, place / "out")
    return {"masks": masks_hash(made), "scored": len(scored), "warnings": warnings, "written": len(written)}


def contents(folder: Path) -> dict[str, Any]:
    """A comparable value of each output file of a run."""
    found: dict[str, Any] = {}
    for path in folder.iterdir():
        if path.name == "scores.parquet":
            found[path.name] = scoring.table_hash(path)
        elif path.name == "summary.json":
            found[path.name] = json.loads(path.read_text())["reference"]["fingerprint"]
        else:
            found[path.name] = path.read_text() if path.name == "report.html" else "not to be left"
    return found


def ended(folder: Path) -> None:
    """Rename this process's temporary files as if their process had ended."""
    child = subprocess.Popen([sys.executable, "-S", "-c", ""])
    child.wait()
    for path in folder.rglob(f".xtf-{files.host_tag()}-{os.getpid()}-*"):
        path.rename(path.with_name(path.name.replace(f"-{os.getpid()}-", f"-{child.pid}-")))


def shards(cache: Path) -> dict[Path, set[bytes]]:
    """The intact shards of a cache, whose names match their bytes, and the keys in each."""
    found = {}
    for path in sorted(cache.rglob("*.parquet")):
        data = path.read_bytes() if path.is_file() else b""
        if data and xxhash.xxh3_128_hexdigest(data) == path.stem:
            table = pq.read_table(pa.BufferReader(data), columns=["key"])  # pyarrow closes a file when it pleases
            found[path] = set(table["key"].to_pylist())
    return found


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


Damage = Callable[[bytes, int, random.Random], bytes]


def flip(data: bytes, at: int, rng: random.Random) -> bytes:
    return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]


# Damage of a file's bytes, given a place in them.
DAMAGES: dict[str, Damage] = {
    "truncated": lambda data, at, rng: data[:at],
    "a bit flipped": flip,
    "three bits flipped": lambda data, at, rng: flip(flip(flip(data, at, rng), at // 2, rng), at // 3, rng),
    "zeros from there": lambda data, at, rng: data[:at] + bytes(len(data) - at),
    "a block of zeros": lambda data, at, rng: data[:at] + bytes(len(data[at : at + 512])) + data[at + 512 :],
    "random from there": lambda data, at, rng: data[:at] + rng.randbytes(len(data) - at),
    "a random block": lambda data, at, rng: data[:at] + rng.randbytes(len(data[at : at + 512])) + data[at + 512 :],
    "bytes missing": lambda data, at, rng: data[:at] + data[at + rng.randint(1, 64) :],
    "bytes added": lambda data, at, rng: data[:at] + rng.randbytes(rng.randint(1, 64)) + data[at:],
    "appended": lambda data, at, rng: data + rng.randbytes(at + 1),
    "turned round": lambda data, at, rng: data[at:] + data[:at],
    "emptied": lambda data, at, rng: b"",
    "other text": lambda data, at, rng: b"hello\n" * (at + 1),
}
OFTEN = ("truncated", "a bit flipped")


def damaged(kind: str, paths: list[Path], few: int, many: int) -> Iterator[tuple[Path, bytes]]:
    """Files in turn and what they become, at places spread over all of them: `many` of the kinds tried often."""
    rng, tries = random.Random(kind), 1 if kind == "emptied" else many if kind in OFTEN else few
    for index, path in itertools.product(range(tries), paths):
        data = path.read_bytes()
        at = (index * len(data) + rng.randrange(len(data))) // tries
        changed = DAMAGES[kind](data, at, rng)
        if changed != data:
            yield path, changed


class Cache:
    """A cache with all scores of a dataset, and a copy of it to damage."""

    def __init__(self, folder: Path) -> None:
        self.source, self.copy, self.table = folder / "source", folder / "copy", folder / "table.parquet"
        first, self.expected = (run(self.source, self.table) for _ in range(2))
        assert first.bytes == self.expected.bytes and not self.expected.scored
        assert not (first.warnings or self.expected.warnings)
        self.shards = {self.in_copy(path): keys for path, keys in shards(self.source).items()}
        (self.relevance,) = map(self.in_copy, self.source.rglob("relevance-*.parquet"))
        self.description = self.relevance.with_name("reference.json")
        self.layers = next(iter(self.shards)).parent
        self.tried, self.wrong = Counter(), 0

    def in_copy(self, path: Path) -> Path:
        return self.copy / path.relative_to(self.source)

    def in_source(self, path: Path) -> Path:
        return self.source / path.relative_to(self.copy)

    def renew(self) -> None:
        remove(self.copy)
        shutil.copytree(self.source, self.copy)

    def run(self, kind: str) -> Outcome:
        with within(60):
            outcome = run(self.copy, self.table)
        self.tried[kind] += 1
        self.wrong += outcome.bytes != self.expected.bytes
        assert outcome.bytes == self.expected.bytes, f"{kind}: other masks or scores"
        assert len(outcome.scored) == len(set(outcome.scored))
        assert len(outcome.warnings) == len(set(outcome.warnings)), f"{kind}: a warning twice"
        return outcome

    def check(self, kind: str, lost: Iterable[Path], named: Iterable[Path]) -> Outcome:
        """A run on the damaged copy scores what the `lost` shards held and names each of the files `named` once."""
        outcome, named = self.run(kind), list(named)
        assert set(outcome.scored) == set().union(*(self.shards[path] for path in lost)), kind
        assert [sum(path.name in text for text in outcome.warnings) for path in named] == [1] * len(named)
        assert len(outcome.warnings) == len(named), outcome.warnings
        return outcome

    def check_settled(self) -> None:
        """The next run scores nothing and warns of nothing."""
        again = self.run("afterwards")
        assert not again.scored and not again.warnings
