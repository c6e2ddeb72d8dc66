"""One shard of scores: a Parquet file that is believed only if everything in it agrees.

A shard is named after the hash of its bytes, so a damaged one is known before its scores are decoded. Its header says
what it belongs to, and a second checksum covers the decoded keys, offsets and scores. No text of the data is in it.
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

from .data.documents import KEY_BYTES
from .errors import XTFError
from .records import COLUMNS, Records

FORMAT = 2
HEADER = b"xtf_store"  # key of the JSON header in the Parquet metadata
SUFFIX = ".parquet"
LAYERS = re.compile(r"[0-9]{1,6}(,[0-9]{1,6})*")

_SCORES = pa.list_(pa.field("element", pa.float32()))
_SCHEMA = pa.schema([("key", pa.binary(KEY_BYTES)), *((name, _SCORES) for name in COLUMNS)])


class BadShard(XTFError):
    """A file in a shard's place that must not be believed; the message is the reason."""


class NewerShard(XTFError):
    """A shard of a later format: good, but not for this version."""


def checksum(records: Records, reference: str, layers: str | None) -> str:
    """xxh3-128 over what a shard says: format, reference, layers, keys, offsets, scores (little-endian)."""
    columns = records.columns
    facts = [FORMAT, reference, layers, len(records.keys), len(records.logprobs), list(columns)]
    state = xxhash.xxh3_128(json.dumps(facts).encode())
    arrays = [(records.keys, "u1"), (records.offsets, "<i8"), *((values, "<f4") for values in columns.values())]
    for array, dtype in arrays:
        state.update(np.ascontiguousarray(array, dtype=dtype).tobytes())
    return state.hexdigest()


def encode(records: Records, reference: str, layers: str | None) -> tuple[str, memoryview]:
    """File name and bytes of the shard that holds these records."""
    count = len(records.keys)
    header = {
        "format": FORMAT,
        "reference": reference,
        "layers": layers,
        "documents": count,
        "tokens": len(records.logprobs),
        "checksum": checksum(records, reference, layers),
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
        records = _records(file.read())
    except (OSError, pa.ArrowException, ValueError) as error:
        raise BadShard(f"not a readable Parquet file ({_first_line(error)})") from error
    if header["checksum"] != checksum(records, reference, header["layers"]):
        raise BadShard("its scores do not match its checksum")
    return header["layers"], records


def _header(file: Any) -> dict[str, Any]:
    try:
        header = json.loads((file.schema_arrow.metadata or {})[HEADER])
        version = int(header["format"])
        if version > FORMAT:
            raise NewerShard(f"format {version}, written by a later xtf-plugin; this one reads format {FORMAT}")
        known = {name: header[name] for name in ("reference", "layers", "checksum")}
        if not all(isinstance(value, str) for value in known.values() if value is not None):
            raise TypeError(f"{known} holds other things than text")
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise BadShard("no header of ours: not a score shard") from error
    if version != FORMAT or not (known["layers"] is None or LAYERS.fullmatch(str(known["layers"]))):
        raise BadShard(f"format {version} and layers {known['layers']}, which this xtf-plugin does not write")
    return known


def _records(table: Any) -> Records:
    """Decoded columns as numpy arrays; BadShard for no documents, nulls, and lists of unequal length."""
    if not len(table):
        raise BadShard("no documents in it")
    keys = np.concatenate([_keys(chunk) for chunk in table.column("key").chunks])
    offsets, logprobs = _flat(table.column("logprobs"))
    columns = {"logprobs": logprobs}
    for name in COLUMNS[1:]:
        if name == "attention" and table.column(name).null_count == len(table):
            continue
        own_offsets, columns[name] = _flat(table.column(name))
        if not np.array_equal(offsets, own_offsets):
            raise BadShard(f"log-probabilities and {name} of unequal length")
    return Records(keys=keys, offsets=offsets, **columns)


def _keys(chunk: Any) -> NDArray[np.uint8]:
    if chunk.null_count:
        raise BadShard("a document without a key")
    raw = np.frombuffer(chunk.buffers()[1], dtype=np.uint8)
    return raw[chunk.offset * KEY_BYTES : (chunk.offset + len(chunk)) * KEY_BYTES].reshape(-1, KEY_BYTES)


def _flat(column: Any) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Offsets and values of a list column, read from Arrow's buffers: no Python object per document."""
    lengths, values = [], []
    for chunk in column.chunks:
        flat = chunk.flatten()
        if chunk.null_count or flat.null_count:
            raise BadShard("scores missing in the middle")
        lengths.append(np.diff(chunk.offsets.to_numpy()))
        values.append(flat.to_numpy())
    offsets = np.concatenate([[0], np.cumsum(np.concatenate(lengths), dtype=np.int64)]).astype(np.int64)
    return offsets, np.concatenate(values)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
