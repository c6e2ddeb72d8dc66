"""A hash of a Parquet file's footer: Parquet has checksums of its pages, and none of what says where and what they are.

A flipped bit in a footer can rename a column, so that its values are missing, or end the process inside of pyarrow. The
hash stands directly before the footer, where no reader of Parquet looks.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

import xxhash

_MARK = b"xtf footer hash "
_HASH, _END = 16, 8  # bytes of the hash; of the footer's length and Parquet's magic bytes behind it


def sign(file: BinaryIO) -> None:
    """Insert the hash into a complete file, which is open for reading and writing."""
    footer = _footer(file)
    file.seek(-len(footer), os.SEEK_END)
    file.write(_MARK + _hash(footer) + footer)


def is_damaged(path: Path) -> bool:
    """Whether the footer differs from what its hash says; a file without a hash is of another program.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        footer = _footer(file)
        before = len(footer) + len(_MARK) + _HASH
        if file.seek(0, os.SEEK_END) < before:
            return False
        file.seek(-before, os.SEEK_END)
        return file.read(len(_MARK)) == _MARK and file.read(_HASH) != _hash(footer)


def _footer(file: BinaryIO) -> bytes:
    """The footer with its length and the magic bytes; empty if the file is no Parquet file, or too short for it."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _END))
    end = file.read()
    length = _END + int.from_bytes(end[:4], "little")
    if not end.endswith(b"PAR1") or length > size:
        return b""
    file.seek(size - length)
    return file.read()


def _hash(footer: bytes) -> bytes:
    return xxhash.xxh3_128_digest(footer)
