"""The hash of a Parquet footer: every flipped bit is found, other programs' files are let through."""

from __future__ import annotations

import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from xtf_plugin.report import footer

TABLE = pa.table({"a": [1, 2, 3], "b": ["x", "y", None]})


@pytest.fixture
def signed(tmp_path):
    path = tmp_path / "table.parquet"
    pq.write_table(TABLE, path)
    with path.open("r+b") as file:
        footer.sign(file)
    return path


def test_readers_of_parquet_read_it(signed):
    assert pq.read_table(signed).equals(TABLE) and not footer.is_damaged(signed)


def test_every_bit_counts(signed):
    """But in the length and the magic bytes, which pyarrow checks itself, nothing may go unnoticed."""
    data = signed.read_bytes()
    size = int.from_bytes(data[-8:-4], "little")
    for place in range(len(data) - 8 - size, len(data) - 8):
        for bit in range(8):
            changed = bytearray(data)
            changed[place] ^= 1 << bit
            signed.write_bytes(changed)
            assert footer.is_damaged(signed), (place, bit)
    for place in range(len(data) - 8, len(data)):
        for bit in range(8):
            changed = bytearray(data)
            changed[place] ^= 1 << bit
            signed.write_bytes(changed)
            with pytest.raises((OSError, pa.ArrowException)):
                pq.read_table(signed)


def test_files_of_others_are_let_through(tmp_path):
    path = tmp_path / "other.parquet"
    pq.write_table(TABLE, path)
    assert not footer.is_damaged(path)
    for data in (b"", b"PAR1", b"a,b\n1,2\n", path.read_bytes()[-30:]):
        path.write_bytes(data)
        assert not footer.is_damaged(path)


def test_a_file_that_is_not_parquet_is_not_read():
    """Its last bytes are not a length."""

    class Long(io.BytesIO):
        def seek(self, place, whence=0):
            return 1 << 40 if whence == 2 else 0

        def read(self, size=-1):
            return b"0000 1,2"

    assert footer._footer(Long()) == b""
