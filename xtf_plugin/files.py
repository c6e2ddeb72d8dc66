"""Atomic file writes: a file is complete or absent, whenever the process is killed.

Data is written under a temporary name in the same folder, synced and renamed. The temporary name identifies its
process, so that files left by a killed process can be removed while another process writes.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import socket
import stat
import time
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import xxhash

STALE_SECONDS = 86_400.0
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # drawn at random when the machine starts
_TEMPORARY = re.compile(r"\.xtf-(?P<host>[0-9a-f]{16})-(?P<pid>[0-9]{1,10})-[0-9a-f]{8}\.(tmp|here)")


def digest(facts: Mapping[str, Any]) -> str:
    """Hex digest of JSON-able facts; the order of keys does not matter."""
    return xxhash.xxh3_128_hexdigest(json.dumps(facts, sort_keys=True, default=str).encode())


@lru_cache(maxsize=1)
def host_tag() -> str:
    """Hex tag of the host since it was started and, in a container, of the pid namespace.

    Process ids can be compared under one tag only: host names repeat, and so do the numbers of pid namespaces.
    """
    name = socket.gethostname()
    with contextlib.suppress(OSError):
        name += os.readlink("/proc/self/ns/pid")
    with contextlib.suppress(OSError):
        name += BOOT_ID.read_text(encoding="ascii")
    return xxhash.xxh3_64_hexdigest(name.encode())


def temporary_path(target: Path) -> Path:
    """A new name beside `target` to write under."""
    return target.with_name(f".xtf-{host_tag()}-{os.getpid()}-{secrets.token_hex(4)}.tmp")


def write_whole(target: Path, data: bytes | memoryview) -> None:
    """Atomic `target.write_bytes(data)`: a killed process leaves the old file or the new one. Raises OSError."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(target)
    try:
        with temporary.open("xb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        publish(temporary, target)
    finally:
        discard(temporary)


def publish(temporary: Path, target: Path) -> None:
    """Rename a complete, synced file and sync its folder, so that the name survives a power cut. Raises OSError."""
    os.replace(temporary, target)
    if os.name != "posix":
        return
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(folder)


def discard(temporary: Path) -> None:
    """Delete a temporary file if it exists; an error is ignored, because `remove_stale` deletes it later."""
    with contextlib.suppress(OSError):
        temporary.unlink()


def for_arrow(path: Path) -> Any:
    """A path as pyarrow can open it for reading: an open file if the name is not UTF-8."""
    import pyarrow

    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        return pyarrow.OSFile(os.fsencode(path), "rb")
    return path


def set_aside(path: Path) -> str:
    """Rename a damaged file to `<name>.damaged`; return a phrase for the log that says what was done."""
    try:
        os.replace(path, path.with_name(path.name + ".damaged"))
    except OSError as error:
        return f"ignored (it cannot be renamed: {error.strerror})"
    return f"set aside as {path.name}.damaged"


def remove_stale(folder: Path) -> None:
    """Delete the stale temporary files in `folder`, see `is_stale`. Never raises OSError."""
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            if is_stale(path):
                discard(path)


def is_stale(path: Path) -> bool:
    """Whether a file is one of our temporary files and its process has ended.

    A process of another host counts as ended if the file is older than a day.
    """
    match = _TEMPORARY.fullmatch(path.name)
    if match is None:
        return False
    try:
        status = path.lstat()
    except OSError:  # its process has just renamed it
        return False
    if not stat.S_ISREG(status.st_mode):
        return False
    if match["host"] == host_tag() and os.name == "posix":
        return not _alive(int(match["pid"]))
    return time.time() - status.st_mtime > STALE_SECONDS


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # a process of another user
        pass
    return True
