"""Tables over the vocabulary, kept beside the scores of a reference, so that a second run needs no model for them."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from numpy.typing import NDArray

from ..files import digest, for_arrow, set_aside, write_whole

logger = logging.getLogger(__name__)


def cached_table(path: Path, reference: str) -> NDArray[np.float32] | None:
    """A table stored by `store_table` for this reference and name; None and a warning: missing, damaged or foreign."""
    try:
        if not path.is_file():
            if os.path.lexists(path):
                logger.warning("xtf: %s: no regular file; %s; it is computed again", path, set_aside(path))
            return None
        table = pq.read_table(for_arrow(path), memory_map=False)
        values: NDArray[np.float32] = table.column("relevance").to_numpy().astype(np.float32)
        checksum = (table.schema.metadata or {}).get(b"checksum", b"").decode()
    except (OSError, pa.ArrowException, KeyError, ValueError, TypeError) as error:
        logger.warning("xtf: %s cannot be read (%s); it is computed again", path, error)
        return None
    if checksum != _checksum(path, reference, values):
        logger.warning("xtf: %s does not match its checksum; it is computed again", path)
        return None
    return values


def store_table(path: Path, reference: str, values: NDArray[np.float32]) -> None:
    """Keep a table for the next run; a folder that cannot be written is warned of, not fatal."""
    metadata = {"checksum": _checksum(path, reference, values)}
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.table({"relevance": values}).replace_schema_metadata(metadata), buffer)
    try:
        write_whole(path, memoryview(buffer.getvalue()))
    except OSError as error:
        logger.warning("xtf: %s cannot be written (%s); it will be computed again next time", path, error)


def _checksum(path: Path, reference: str, values: NDArray[np.float32]) -> str:
    """Over the values, the name and the reference, so that a table copied from elsewhere does not pass."""
    return digest({"table": path.name, "reference": reference, "values": xxhash.xxh3_128_hexdigest(values.tobytes())})


def table_name(key: str) -> str:
    """File name of a stored table; `key` is hex."""
    if not re.fullmatch(r"[0-9a-f]{32}", key):
        raise ValueError(f"not a table key: {key!r}")
    return f"relevance-{key}.parquet"
