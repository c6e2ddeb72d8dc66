"""A disk that fails at any file operation of a run: the run finishes with the same masks and warns once.

Errors are raised by the plugin's own file operations, one after the other. Where the system allows it, a disk is full
or the size of files is limited.
"""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa
import pytest

from tests import tiny
from tests.reliability import LONG, amount, record, scoring, whole
from xtf_plugin.report import writer

pytestmark = [
    pytest.mark.skipif(os.name != "posix", reason="file systems as POSIX has them"),
    pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning"),
]

WHEN = {False: "once", True: "from then on"}  # by whether an error lasts
ERRORS = [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.EFBIG]


class Disk:
    """The file operations below a folder, counted; at the n-th, and if it `lasts` each later one, `act` is called."""

    def __init__(self, folder: Path, at: int, act: Callable[[], None], lasts: bool = True) -> None:
        self.folder, self.at, self.act, self.lasts, self.done = str(folder), at, act, lasts, 0
        self.acting, self.first = False, ""

    def operation(self, name: str, path: Any) -> None:
        if self.acting or not str(path).startswith(self.folder):
            return
        self.done += 1
        if self.done == self.at or (self.lasts and self.done > self.at):
            self.acting, self.first = True, self.first or name
            try:
                self.act()
            finally:
                self.acting = False

    def before(self, where: Any, name: str) -> Any:
        """The function of that name is an operation on the path that is its first argument."""
        function = getattr(where, name)

        def called(path: Any, *rest: Any, **options: Any) -> Any:
            self.operation(name, path)
            return function(path, *rest, **options)

        return mock.patch.object(where, name, called)

    def opened(self, path: Path, *rest: Any, **options: Any) -> Any:
        self.operation("read" if {*rest, *options.values()} & {"r", "rb"} else "open", path)
        return _File(open(path, *rest, **options), path, self)

    @contextmanager
    def at_work(self) -> Iterator[Disk]:
        """Inside it, the plugin works on this disk."""
        with ExitStack() as stack:
            for name in ("iterdir", "stat", "lstat", "mkdir", "touch", "unlink"):
                stack.enter_context(self.before(Path, name))
            for name in ("replace", "open"):
                stack.enter_context(self.before(os, name))
            stack.enter_context(mock.patch.object(Path, "open", lambda path, *rest, **o: self.opened(path, *rest, **o)))
            stack.enter_context(mock.patch.object(os, "fsync", lambda descriptor: self.operation("fsync", self.folder)))
            sink = lambda path, mode: pa.PythonFile(self.opened(Path(os.fsdecode(path)), mode), "w")  # noqa: E731
            stack.enter_context(mock.patch.object(pa, "OSFile", sink))
            yield self


class _File:
    """An open file of a disk: half of what is written arrives before it fails."""

    def __init__(self, file: Any, path: Path, disk: Disk) -> None:
        self._file, self._path, self._disk = file, path, disk

    def write(self, data: Any) -> int:
        half = len(data) // 2
        self._file.write(data[:half])
        self._disk.operation("write", self._path)
        return half + self._file.write(data[half:])

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def failing(number: int) -> Callable[[], None]:
    def fail() -> None:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The results of a run on a good disk, and the number of its file operations in the cache."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with Disk(folder / "cache", 0, lambda: None, lasts=False).at_work() as disk:
        outcome = whole.run(folder / "cache", folder / "table.parquet")
    assert len(outcome.scored) == whole.DOCUMENTS and not outcome.warnings and disk.done > 50
    return outcome, disk.done


@pytest.fixture
def run(tmp_path, undisturbed):
    """Runs on a bad disk: what one came to, always the same with each warning once; and the shards before."""
    cache, table = tmp_path / "cache", tmp_path / "table.parquet"

    def run(at: int, act: Callable[[], None], lasts: bool) -> tuple[whole.Outcome, dict[Path, set[bytes]]]:
        whole.remove(cache)
        before: list[dict] = []

        def noted() -> None:
            before.append({} if before else whole.shards(cache))
            act()

        with Disk(cache, at, noted, lasts).at_work():
            outcome = whole.run(cache, table)
        assert before and outcome.bytes == undisturbed[0].bytes
        assert sorted(outcome.scored) == sorted(undisturbed[0].scored)
        assert len(outcome.warnings) == len(set(outcome.warnings)), outcome.warnings
        assert not [name for name in open_files() if name.startswith(str(cache))], "a file is left open"
        return outcome, before[0]

    run.cache, run.table = cache, table
    return run


def open_files() -> list[str]:
    """Names of this process's open files; one that another thread closes meanwhile is left out."""
    found = []
    for descriptor in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            found.append(os.readlink(f"/proc/self/fd/{descriptor}"))
    return found


def check_later(run: Any, expected: whole.Outcome) -> int:
    """A later run on a good disk scores what is not stored and has the same results; return how many it scored."""
    whole.ended(run.cache)
    stored = set().union(*whole.shards(run.cache).values())
    later = whole.run(run.cache, run.table)
    assert later.bytes == expected.bytes and not later.warnings
    assert sorted(later.scored) == sorted(set(expected.scored) - stored)
    assert not list(run.cache.rglob(".xtf-*")) and not list(run.cache.rglob("*.damaged"))
    return len(later.scored)


@pytest.mark.parametrize("lasts", [False, True], ids=WHEN.get)
def test_the_disk_of_the_cache_fails(run, undisturbed, lasts):
    expected, operations = undisturbed
    again = tried = 0
    for at in range(1, operations + 1, amount(5, 1)):
        for number in amount([ERRORS[at // 5 % len(ERRORS)]], ERRORS):
            outcome, before = run(at, failing(number), lasts)
            after = whole.shards(run.cache)
            assert before.items() <= after.items(), "stored scores are gone"
            unwritten = [text for text in outcome.warnings if f"scores cannot be written to {run.cache}" in text]
            kept = set(expected.scored) <= set().union(*after.values())
            assert len(unwritten) == 1 or (kept and not unwritten), outcome.warnings
            tried, again = tried + 1, again + check_later(run, expected)
    record(f"disk: the cache fails {WHEN[lasts]}", tried=tried, documents_a_later_run_scored=again)


@pytest.fixture(scope="module")
def plans(undisturbed, tmp_path_factory):
    """Plans of two runs that write to one output folder after each other."""
    folder = tmp_path_factory.mktemp("plans")
    return [whole.plan(folder, [], model=model) for model in (0, 1)]


@pytest.mark.parametrize("lasts", WHEN, ids=WHEN.get)
def test_the_disk_of_the_output_folder_fails(tmp_path, plans, monkeypatch, lasts):
    folder, tried = tmp_path / "out", 0
    made = [writer._table_and_page(plan, tiny.tokenizer(), folder / "report.html") for plan in plans]
    monkeypatch.setattr(writer, "_table_and_page", lambda plan, tokenizer, path: made[plan is plans[1]])
    whole.write(plans[1], folder)
    new = whole.contents(folder)
    whole.write(plans[0], folder)
    old = whole.contents(folder)
    with Disk(folder, 0, lambda: None, lasts=False).at_work() as disk:
        assert len(whole.write(plans[1], folder)) == 3
    for at in range(1, disk.done + 1, amount(4, 1)):
        number = ERRORS[at % len(ERRORS)]
        whole.write(plans[0], folder)
        with whole.recorded_warnings() as warnings, Disk(folder, at, failing(number), lasts).at_work():
            written = whole.write(plans[1], folder)
        tried += 1
        whole.ended(folder)
        assert len(warnings) == (len(written) < 3), warnings
        assert not warnings or (str(folder) in warnings[0] and os.strerror(number) in warnings[0])
        found = {name: what for name, what in whole.contents(folder).items() if not name.startswith(".xtf-")}
        assert found.keys() == new.keys() and all(found[path.name] == new[path.name] for path in written)
        assert all(found[name] in (old[name], new[name]) for name in found), "half a file"
        whole.write(plans[1], folder)
        assert whole.contents(folder) == new
    record(f"disk: the output folder fails {WHEN[lasts]}", tried=tried)


@pytest.mark.parametrize("level", range(4))
def test_a_folder_that_vanishes(run, undisturbed, level):
    """With all that was stored in it: the cache, or what is below it."""
    expected, operations = undisturbed
    lost = tried = 0

    def vanish() -> None:
        places = [run.cache, *sorted(run.cache.glob("v2")), *sorted(run.cache.glob("v2/*")), *run.cache.glob("v2/*/l*")]
        shutil.rmtree(places[min(level, len(places) - 1)], ignore_errors=True)

    for at in range(1 + level, operations + 1, amount(16, 1)):
        _, before = run(at, vanish, lasts=False)
        tried, lost = tried + 1, lost + bool(before)
        check_later(run, expected)
    assert lost, "nothing stored vanished"
    record("disk: a folder vanishes", tried=tried, with_scores_in_it=lost)


def test_a_slow_folder(run, undisturbed):
    wait, begun = amount(0.002, 0.05), time.monotonic()
    outcome, _ = run(1, lambda: time.sleep(wait), lasts=True)
    assert outcome == undisturbed[0] and time.monotonic() - begun > wait * undisturbed[1] / 2
    check_later(run, undisturbed[0])
    record("disk: a slow folder", tried=1, operations=undisturbed[1], seconds_for_each=wait)


def check_place(place: Path, facts: dict[str, Any], expected: whole.Outcome) -> None:
    """A run there warned of what it could not write; a later run on a good disk writes the rest."""
    missing = whole.DOCUMENTS - len(set().union(*whole.shards(place / "cache").values()))
    assert facts["masks"] == expected.masks and facts["scored"] == whole.DOCUMENTS
    assert len(facts["warnings"]) == len(set(facts["warnings"])) <= 3
    assert sum("scores cannot be written" in text for text in facts["warnings"]) == (missing > 0), facts["warnings"]
    assert sum("without a report" in text for text in facts["warnings"]) == (facts["written"] < 3), facts["warnings"]
    later = whole.run_in(place)
    assert later == {"masks": expected.masks, "scored": missing, "warnings": [], "written": 3}
    assert scoring.table_hash(place / "out" / "scores.parquet") == expected.table
    assert not list(place.rglob(".xtf-*"))


def limited(place: str, size: int) -> None:
    """In a process of its own: a run none of whose files may grow beyond `size` bytes."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    facts = whole.run_in(Path(place))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    Path(place, "facts.json").write_text(json.dumps(facts))


def test_files_that_may_not_grow(tmp_path, undisturbed):
    sizes = amount([0, 7_125], [*range(0, 8_000, 800), *range(8_000, 160_000, 16_000)])
    for size in sizes:
        place = tmp_path / str(size)
        place.mkdir()
        process = multiprocessing.get_context("forkserver").Process(target=limited, args=(str(place), size))
        process.start()
        process.join(120)
        assert process.exitcode == 0
        facts = json.loads((place / "facts.json").read_text())
        assert size > 30_000 or facts["warnings"]
        check_place(place, facts, undisturbed[0])
    record("disk: a limit to the size of files", tried=len(sizes))


def test_a_disk_that_is_really_full(tmp_path, undisturbed):
    sizes = amount([16, 64], range(4, 400, 12))  # KiB
    for size in sizes:
        options = [f"size={size}k", "tmpfs", str(tmp_path)]
        if not shutil.which("mount") or subprocess.run(["mount", "-t", "tmpfs", "-o", *options]).returncode:
            assert not LONG or os.geteuid(), "root may mount one: the figures would lack this test"
            pytest.skip("this user may mount no file system")
        try:
            facts = whole.run_in(tmp_path)
            assert size > 64 or facts["warnings"]
            subprocess.run(["mount", "-o", "remount,size=16m", str(tmp_path)], check=True)
            check_place(tmp_path, facts, undisturbed[0])
        finally:
            subprocess.run(["umount", "-l", str(tmp_path)], check=True)
    record("disk: really full", tried=len(sizes))
