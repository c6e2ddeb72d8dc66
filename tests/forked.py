"""Commands of this environment without the seconds that their imports take: forked from a process that made them.

`run` does what `subprocess.run` does, for commands in Python. The server behind it has imported torch, transformers and
what belongs to them, but neither hosts (`trl`, `axolotl`) nor the package; a command begins in a fork of it, with its
own environment, working directory and `sitecustomize`, and with what PyTorch does at the end of `import torch`. The
Python processes that a command starts itself are forked from the same server.

What differs from a process of its own: torch is complete when the hook comes, hash seeds are equal, and `datasets`
saves without a pool of one process. So every host has some tests that start real processes, see `REAL`.
"""

from __future__ import annotations

import array
import atexit
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

SERVER = Path(__file__).with_name("forked_server.py")
REAL = "XTF_TEST_REAL_PROCESSES"  # set it to 1 and nothing is forked
# Read while a command runs, never when a package is imported: such variables may differ between commands of a server.
AT_RUN_TIME = {"PYTEST_CURRENT_TEST", "PYTHONPATH", "PWD", "RECORD", "PRETEND", "SEED", "CALLS", "RECORDER"}
AT_RUN_TIME |= {"TORCH_DEVICE_BACKEND_AUTOLOAD", "COLUMNS", "PYTEST_XDIST_WORKER"}
PREFIXES = ("XTF_", "WANDB_", "TRACKIO_", "TENSORBOARD_")  # all of whose variables are such ones


def run(
    words: Sequence[Any], *, env: Mapping[str, str] | None = None, cwd: Path | None = None, timeout: float = 600
) -> subprocess.CompletedProcess[str]:
    """Run a script of this environment, or its interpreter, to the end: exit code, stdout and stderr."""
    given = [str(word) for word in words]
    environment, folder = dict(os.environ if env is None else env), str(cwd or Path.cwd())
    if os.environ.get(REAL) == "1" or not hasattr(os, "pidfd_open"):  # Linux alone has it
        return subprocess.run(given, env=environment, cwd=folder, capture_output=True, text=True, timeout=timeout)
    fixed = {k: v for k, v in environment.items() if k not in AT_RUN_TIME and not k.startswith(PREFIXES)}
    address = _server(tuple(sorted(fixed.items())))
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err, open(os.devnull) as nothing:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(timeout)
            connection.connect(address)
            send(connection, given, environment, folder, [nothing.fileno(), out.fileno(), err.fileno()])
            try:
                code = connection.recv(64)
            except TimeoutError:
                err.seek(0)
                raise subprocess.TimeoutExpired(given, timeout, stderr=err.read().encode()) from None
        out.seek(0), err.seek(0)
        assert code, f"the server of {given} has ended"
        return subprocess.CompletedProcess(given, int(code), out.read(), err.read())


def send(connection: socket.socket, words: list[str], env: dict[str, str], cwd: str, files: list[int]) -> None:
    text = json.dumps({"words": words, "env": env, "cwd": cwd}).encode()
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", files))
    connection.sendmsg([len(text).to_bytes(8, "big")], [rights])
    connection.sendall(text)


@cache
def _server(environment: tuple[tuple[str, str], ...]) -> str:
    folder = tempfile.mkdtemp(prefix="forked-")
    address = f"{folder}/socket"
    env = dict(environment) | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    words = [sys.executable, str(SERVER), address]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    server = subprocess.Popen(words, env=env, cwd=folder, text=True, **pipes)
    assert server.stdout is not None and server.stdin is not None
    assert server.stdout.readline() == "ready\n", "the server did not start"

    def end() -> None:
        server.stdin.close()  # type: ignore[union-attr]
        server.wait(60)
        shutil.rmtree(folder, ignore_errors=True)

    atexit.register(end)
    return address
