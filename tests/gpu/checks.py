"""Runs the tests of a file that are marked `gpu`, several at a time, and accepts no skipped one on a GPU.

    python -m tests.gpu.checks tests/gpu/test_gpu.py [--smoke]

A test is skipped where something is missing: a package, a newer GPU. That is no pass. Compiling Triton's kernels takes
most of the time and one core each, so tests run in up to eight processes. `--smoke` only shows that the tests can be
collected and run.
"""

from __future__ import annotations

import os
import sys
import tempfile

import pytest


class Outcomes:
    """A pytest plugin that counts how tests ended, and prints failures as they come."""

    def __init__(self) -> None:
        self.passed = 0
        self.skipped: set[str] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Called for each phase of each test, also of those in other processes."""
        self.passed += report.when == "call" and report.passed
        if report.failed:  # pytest's own account comes at the end, which a process that is ended does not reach
            print(f"\n{report.nodeid}\n{report.longreprtext}", flush=True)
        if report.skipped:
            self.skipped.add(str(report.longrepr[-1]) if isinstance(report.longrepr, tuple) else str(report.longrepr))


def main(given: list[str]) -> int:
    """Run the tests; the exit code."""
    smoke, files = "--smoke" in given, [word for word in given if word != "--smoke"]
    processes = max(1, min(8, (os.cpu_count() or 1) // 2))
    os.environ["OMP_NUM_THREADS"] = "1"  # of each process: threads of all would wait for each other
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # some tests ask for the same bits twice
    words = ["-m", "gpu", "-vv", "--tb=short", "-o", "addopts=", "-p", "no:cacheprovider", "-p", "tests.gpu.plugin"]
    outcomes = Outcomes()
    with tempfile.TemporaryDirectory() as cache:
        # Tiles that are timed while processes share the GPU must not be those that benchmarks find in the cache.
        os.environ["TRITON_CACHE_DIR"] = cache
        code = pytest.main([*words, *(["-n", str(processes)] if processes > 1 else []), *files], plugins=[outcomes])
    if code or smoke:
        return int(code)
    for reason in sorted(outcomes.skipped):
        print(f"skipped, which is no pass: {reason}")
    return int(bool(outcomes.skipped) or not outcomes.passed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
