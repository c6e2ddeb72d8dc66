"""A shard of scores: a Parquet file that is named by the hash of its bytes, so that any damage is noticed.

Its header has the reference and the layers. It holds no text of the data.
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

from ..data.keys import KEY_BYTES
from ..data.ragged import Floats, Ints, offsets_of
from ..errors import XTFError
from .records import COLUMNS, Records

FORMAT = 3
READABLE = (2, 3)  # format 2 also has a checksum in the header, which is not needed
HEADER = b"xtf_store"  # key of the JSON header in the Parquet metadata
SUFFIX = ".parquet"
LAYERS = re.compile(r"[0-9]{1,6}(,[0-9]{1,6})*")

_SCORES = pa.list_(pa.field("element", pa.float32()))
_SCHEMA = pa.schema([("key", pa.binary(KEY_BYTES)), *((name, _SCORES) for name in COLUMNS)])


class BadShard(XTFError):
    """A file that is not a valid shard; the message is the reason."""


class NewerShard(XTFError):
    """A shard of a later format, which this version cannot read."""


def encode(records: Records, reference: str, layers: str | None) -> tuple[str, memoryview]:
    """File name and bytes of the shard that holds these records."""
    count = len(records.keys)
    header = {"format": FORMAT, "reference": reference, "layers": layers}
    header |= {"documents": count, "tokens": len(records.logprobs)}
    offsets, scores = pa.array(records.offsets, pa.int32()), records.columns

    def lists(name: str) -> Any:
        if name not in scores:
            return pa.nulls(count, _SCORES)
        return pa.ListArray.from_arrays(offsets, pa.array(scores[name], pa.float32()), type=_SCORES)

    keys = pa.py_buffer(np.ascontiguousarray(records.keys))
    columns = [pa.FixedSizeBinaryArray.from_buffers(pa.binary(KEY_BYTES), count, [None, keys]), *map(lists, COLUMNS)]
    schema = _SCHEMA.with_metadata({HEADER: json.dumps(header)})
    sink = pa.BufferOutputStream()
    # scores hardly compress: dictionaries take time and save nothing
    pq.write_table(pa.Table.from_arrays(columns, schema=schema), sink, compression="lz4", use_dictionary=False)
    data = memoryview(sink.getvalue())
    return xxhash.xxh3_128_hexdigest(data) + SUFFIX, data


def read(path: Path, reference: str) -> tuple[str | None, Records]:
    """Layers and records of a shard of `reference`.

    Raises:
        BadShard: the file is not a valid shard of this reference.
        NewerShard: the file has a later format.
        OSError: the file cannot be read now.
    """
    if not stat.S_ISREG(path.stat().st_mode):  # a pipe would block
        raise BadShard("not a regular file")
    data = path.read_bytes()
    if not data:
        raise BadShard("an empty file")
    try:
        file = pq.ParquetFile(pa.BufferReader(data))
        header = _header(file)
        if xxhash.xxh3_128_hexdigest(data) + SUFFIX != path.name:
            raise BadShard("its content does not match its name: truncated, changed or not ours")
        if header["reference"] != reference:
            raise BadShard(f"scores of another reference, {header['reference']}")
        if not file.schema_arrow.equals(_SCHEMA):
            raise BadShard(f"columns other than key, {', '.join(COLUMNS)}, or of other types")
        return header["layers"], _records(file.read())
    except (OSError, pa.ArrowException, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise BadShard(f"not a readable Parquet file ({reason})") from error


def _header(file: Any) -> dict[str, Any]:
    try:
        header = json.loads((file.schema_arrow.metadata or {})[HEADER])
        version = int(header["format"])
        if version > FORMAT:
            raise NewerShard(f"format {version}, written by a later xtf-plugin; this one reads up to format {FORMAT}")
        known = {name: header[name] for name in ("reference", "layers")}
        if not all(isinstance(value, str) for value in known.values() if value is not None):
            raise TypeError(f"{known} holds values that are not text")
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise BadShard("no header of ours: not a score shard") from error
    if version not in READABLE or not (known["layers"] is None or LAYERS.fullmatch(str(known["layers"]))):
        raise BadShard(f"format {version} and layers {known['layers']}, which this xtf-plugin does not write")
    return known


def _records(table: Any) -> Records:
    """Decoded columns; raises BadShard for no documents, nulls, and lists of unequal length."""
    if not len(table):
        raise BadShard("no documents in it")
    key = table.column("key").combine_chunks()
    if key.null_count:
        raise BadShard("a document without a key")
    raw = np.frombuffer(key.buffers()[1], dtype=np.uint8)
    keys = raw[key.offset * KEY_BYTES : (key.offset + len(key)) * KEY_BYTES].reshape(-1, KEY_BYTES)
    measured = COLUMNS if table.column(COLUMNS[-1]).null_count < len(table) else COLUMNS[:-1]
    flat = {name: _flat(table.column(name)) for name in measured}
    offsets = flat["logprobs"][0]
    for name, (own, _) in flat.items():
        if not np.array_equal(offsets, own):
            raise BadShard(f"log-probabilities and {name} of unequal length")
    return Records(keys=keys, offsets=offsets, **{name: values for name, (_, values) in flat.items()})


def _flat(column: Any) -> tuple[Ints, Floats]:
    """Offsets and values of a list column."""
    lists = column.combine_chunks()
    values = lists.flatten()
    if lists.null_count or values.null_count:
        raise BadShard("missing scores")
    return offsets_of(lists.value_lengths().to_numpy()), values.to_numpy()
