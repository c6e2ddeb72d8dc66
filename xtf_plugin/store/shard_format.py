"""One shard of scores: a Parquet file whose name is the hash of its bytes, so that any damage to it is noticed.

Its header says which reference and layers it belongs to. It holds no text of the data.
"""

from __future__ import annotations

import json
import re
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from numpy.typing import NDArray

from ..data.documents import KEY_BYTES
from ..errors import XTFError
from .records import COLUMNS, Records

FORMAT = 3
READABLE = (2, 3)  # format 2 has a checksum of its content in the header as well, which is not needed
HEADER = b"xtf_store"  # key of the JSON header in the Parquet metadata
SUFFIX = ".parquet"
LAYERS = re.compile(r"[0-9]{1,6}(,[0-9]{1,6})*")

_SCORES = pa.list_(pa.field("element", pa.float32()))
_SCHEMA = pa.schema([("key", pa.binary(KEY_BYTES)), *((name, _SCORES) for name in COLUMNS)])


class BadShard(XTFError):
    """A file in a shard's place that must not be believed; the message is the reason."""


class NewerShard(XTFError):
    """A shard of a later format: good, but not for this version."""


def encode(records: Records, reference: str, layers: str | None) -> tuple[str, memoryview]:
    """File name and bytes of the shard that holds these records."""
    count = len(records.keys)
    header = {
        "format": FORMAT,
        "reference": reference,
        "layers": layers,
        "documents": count,
        "tokens": len(records.logprobs),
    }
    offsets = pa.array(records.offsets, pa.int32())

    def lists(values: NDArray[np.float32]) -> Any:
        return pa.ListArray.from_arrays(offsets, pa.array(values, pa.float32()), type=_SCORES)

    keys = pa.py_buffer(np.ascontiguousarray(records.keys))
    scores = records.columns
    columns = [
        pa.FixedSizeBinaryArray.from_buffers(pa.binary(KEY_BYTES), count, [None, keys]),
        *(lists(scores[name]) if name in scores else pa.nulls(count, _SCORES) for name in COLUMNS),
    ]
    schema = _SCHEMA.with_metadata({HEADER: json.dumps(header)})
    sink = pa.BufferOutputStream()
    # scores are close to incompressible: dictionaries cost time and save nothing
    pq.write_table(pa.Table.from_arrays(columns, schema=schema), sink, compression="lz4", use_dictionary=False)
    data = memoryview(sink.getvalue())
    return xxhash.xxh3_128_hexdigest(data) + SUFFIX, data


def read(path: Path, reference: str) -> tuple[str | None, Records]:
    """Layers and records of a shard of `reference`.

    Raises:
        BadShard: the file must be set aside.
        NewerShard: the file must be left alone.
        OSError: the file cannot be read now; nothing is known about what it holds.
    """
    if not stat.S_ISREG(path.stat().st_mode):  # a pipe would block for ever
        raise BadShard("not a regular file")
    data = path.read_bytes()
    if not data:
        raise BadShard("an empty file")
    intact = xxhash.xxh3_128_hexdigest(data) + SUFFIX == path.name
    try:
        file = pq.ParquetFile(pa.BufferReader(data))
        header = _header(file)
        if not intact:
            raise BadShard("its content does not match its name: truncated, changed or not ours")
        if header["reference"] != reference:
            raise BadShard(f"scores of another reference, {header['reference']}")
        if not file.schema_arrow.equals(_SCHEMA):
            raise BadShard(f"columns other than key, {', '.join(COLUMNS)}, or of other types")
        return header["layers"], _records(file.read())
    except (OSError, pa.ArrowException, ValueError) as error:
        raise BadShard(f"not a readable Parquet file ({_first_line(error)})") from error


def _header(file: Any) -> dict[str, Any]:
    try:
        header = json.loads((file.schema_arrow.metadata or {})[HEADER])
        version = int(header["format"])
        if version > FORMAT:
            raise NewerShard(f"format {version}, written by a later xtf-plugin; this one reads up to format {FORMAT}")
        known = {name: header[name] for name in ("reference", "layers")}
        if not all(isinstance(value, str) for value in known.values() if value is not None):
            raise TypeError(f"{known} holds other things than text")
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise BadShard("no header of ours: not a score shard") from error
    if version not in READABLE or not (known["layers"] is None or LAYERS.fullmatch(str(known["layers"]))):
        raise BadShard(f"format {version} and layers {known['layers']}, which this xtf-plugin does not write")
    return known


def _records(table: Any) -> Records:
    """Decoded columns as numpy arrays; BadShard for no documents, nulls, and lists of unequal length."""
    if not len(table):
        raise BadShard("no documents in it")
    key = table.column("key").combine_chunks()
    if key.null_count:
        raise BadShard("a document without a key")
    raw = np.frombuffer(key.buffers()[1], dtype=np.uint8)
    keys = raw[key.offset * KEY_BYTES : (key.offset + len(key)) * KEY_BYTES].reshape(-1, KEY_BYTES)
    offsets, logprobs = _flat(table.column("logprobs"))
    columns = {"logprobs": logprobs}
    for name in COLUMNS[1:]:
        if name == "attention" and table.column(name).null_count == len(table):
            continue
        own_offsets, columns[name] = _flat(table.column(name))
        if not np.array_equal(offsets, own_offsets):
            raise BadShard(f"log-probabilities and {name} of unequal length")
    return Records(keys=keys, offsets=offsets, **columns)


def _flat(column: Any) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Offsets and values of a list column, without a Python object per document."""
    lists = column.combine_chunks()
    values = lists.flatten()
    if lists.null_count or values.null_count:
        raise BadShard("scores missing in the middle")
    lengths = lists.value_lengths().to_numpy()
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]), values.to_numpy()


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
