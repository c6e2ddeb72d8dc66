"""Plant one fault at a time in a copy of the tree, and see which test finds it.

    python -m tests.faults [NAME...] [--list] [--results FILE] [--jobs N]

Results go to a file of JSON lines; faults that have one there are left out, so that a run that was stopped goes on.
Exits with 1 if a fault was not found, or its text is no longer in the package.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.faults import Fault, commands, hooks, safety, scoring, selection, storing

ROOT = Path(__file__).parents[2]
PARTS = (selection.SELECTION, scoring.DOCUMENTS, scoring.SCORING, storing.STORE, hooks.HOOKS)
PARTS += (safety.CLOSED, safety.RANKS, safety.BLOCK, safety.REPORT, commands.COMMANDS)
FAULTS = {fault.name: fault for part in PARTS for fault in part}
LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "build", "dist")
LIMIT = 900  # seconds of a test run: a fault may also make a test hang
FAILED = re.compile(r"^(?:FAILED|ERROR) (\S+)", re.MULTILINE)
STALE, MISSED = "TEXT IS GONE", "NOT FOUND"


def place(fault: Fault, tree: Path) -> Path | None:
    """The one file of the package in which the fault's text stands, once; None: there is none, or several."""
    named = tree / fault.file
    if named.is_file() and named.read_text(encoding="utf-8").count(fault.old) == 1:
        return named
    sources = [*(tree / "xtf_plugin").rglob("*.py"), tree / "xtf_plugin_boot.py"]
    counts = {path: path.read_text(encoding="utf-8").count(fault.old) for path in sources}
    found = [path for path, count in counts.items() if count]
    return found[0] if len(found) == 1 and counts[found[0]] == 1 else None


@contextmanager
def planted(fault: Fault, path: Path) -> Iterator[None]:
    before = path.read_text(encoding="utf-8")
    path.write_text(before.replace(fault.old, fault.new), encoding="utf-8")
    try:
        yield
    finally:
        path.write_text(before, encoding="utf-8")


def located(test: str, tree: Path) -> str | None:
    """A test as pytest takes it; its file is found by name, wherever under `tests/` it lies."""
    file, _, node = test.partition("::")
    *folders, name = file.split("/")
    found = sorted((tree / "tests").rglob(name), key=lambda path: len(path.parts))
    found = [path for path in found if set(folders) <= set(path.parts)]
    return None if not found else "::".join([str(found[0].relative_to(tree)), *([node] if node else [])])


def run(test: str, tree: Path, python: list[str]) -> tuple[str | None, float]:
    """The first failing test of a file, or of one test, and the seconds of processor time that it took."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    words = [*python, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-o", "addopts=--strict-markers", test]
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(words, cwd=tree, env=environment, stdout=output, stderr=subprocess.STDOUT)
        timer = threading.Timer(LIMIT, process.kill)
        timer.start()
        _, status, used = os.wait4(process.pid, 0)
        timer.cancel()
        output.seek(0)
        text = output.read()
    code = process.returncode = os.waitstatus_to_exitcode(status)
    failed = FAILED.search(text)
    if code in (4, 5):  # no such test: its file may have it under another name
        assert "::" in test, f"{' '.join(words)} ran no test:\n{text[-2000:]}"
        return run(test.partition("::")[0], tree, python)
    name = None if code == 0 else failed[1] if failed else f"{test} (ended with {code})"
    return name, used.ru_utime + used.ru_stime


def tried(fault: Fault, tree: Path, pythons: dict[str, list[str]]) -> dict[str, Any]:
    """Plant a fault in a tree and run its tests, file by file, until one fails."""
    path = place(fault, tree)
    if path is None:
        return {"fault": fault.name, "found_by": STALE, "seconds": 0.0}
    total = 0.0
    with planted(fault, path):
        for test in fault.tests:
            where = located(test, tree)
            if where is None:
                continue
            kind = "axolotl" if "/axolotl/" in where else "trl"
            found, seconds = run(where, tree, pythons[kind])
            total += seconds
            if found:
                return {"fault": fault.name, "found_by": found, "seconds": round(total, 1)}
    return {"fault": fault.name, "found_by": MISSED, "seconds": round(total, 1)}


def copy_of(tree: Path, folder: Path) -> Path:
    copy = folder / "tree"
    shutil.copytree(tree, copy, ignore=LEFT_OUT, symlinks=True)
    for name in (".models", ".venv", ".venv-axolotl"):
        if (tree / name).exists():
            (copy / name).symlink_to((tree / name).resolve())
    return copy


def results_of(path: Path) -> dict[str, dict[str, Any]]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {result["fault"]: result for result in map(json.loads, lines)}


def show(results: dict[str, dict[str, Any]], names: list[str]) -> None:
    width = max(map(len, names))
    for name in names:
        if name in results:
            print(f"{name:{width}}  {results[name]['seconds']:6.1f} s  {results[name]['found_by']}")
    bad = [name for name in names if name in results and results[name]["found_by"] in (STALE, MISSED)]
    print(f"{len(names)} faults: {len(names) - len(bad)} found, {len(bad)} not")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="faults to plant; without names all")
    parser.add_argument("--list", action="store_true", help="name the faults, and say whether their text is there")
    parser.add_argument("--tree", type=Path, default=ROOT, help="whose code and tests; never changed")
    parser.add_argument("--python", default=sys.executable, help="command that starts an interpreter")
    parser.add_argument("--axolotl", default=".venv-axolotl/bin/python", help="the same, for the tests in Axolotl")
    parser.add_argument("--results", type=Path, default=Path(".faults.jsonl"), help="JSON lines, kept between runs")
    parser.add_argument("--jobs", type=int, default=1, help="faults at a time, each in a copy of its own")
    given = parser.parse_args()
    names = given.names or list(FAULTS)
    if unknown := sorted(set(names) - set(FAULTS)):
        parser.error(f"no such fault: {', '.join(unknown)}")
    tree = given.tree.resolve()
    if given.list:
        for name in names:
            print(f"{name}: {place(FAULTS[name], tree) or STALE}: {', '.join(FAULTS[name].tests)}")
        return 0
    pythons = {"trl": shlex.split(given.python), "axolotl": shlex.split(given.axolotl)}
    waiting = [name for name in names if name not in results_of(given.results)]
    with tempfile.TemporaryDirectory(prefix="faults-") as folder, given.results.open("a", encoding="utf-8") as kept:
        copies = [copy_of(tree, Path(folder) / str(job)) for job in range(given.jobs)]
        lock = threading.Lock()

        def work(name: str) -> None:
            with lock:
                copy = copies.pop()
            result = tried(FAULTS[name], copy, pythons)
            with lock:
                copies.append(copy)
                print(f"{name}: {result['found_by']} ({result['seconds']} s)", flush=True)
                kept.write(json.dumps(result) + "\n")
                kept.flush()

        with ThreadPoolExecutor(given.jobs) as pool:
            list(pool.map(work, waiting))
    results = results_of(given.results)
    show(results, names)
    return int(any(results[name]["found_by"] in (STALE, MISSED) for name in names))


if __name__ == "__main__":
    sys.exit(main())
