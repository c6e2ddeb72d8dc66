"""The exported score table: what was decided for every completion token, for people and their own tools.

A plain Parquet file with a fixed schema, written in pieces and put in place whole, so a reader never sees half of one.
"""

from __future__ import annotations

import base64
import contextlib
import json
import math
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from . import files
from .errors import XTFUserError

FORMAT = 1
METADATA = b"xtf"  # key of the JSON in the Parquet metadata: config, thresholds, reference, versions, format
PAGE = b"xtf_report"  # key of what its report shows: JSON, zlib, base64
_PAGE_LIMIT = 1 << 26  # bytes of JSON; the page itself is a fraction of it
SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("document", pa.string()),
        ("position", pa.int32()),
        ("token_id", pa.int32()),
        ("token", pa.string()),
        ("reasoning_importance", pa.float32()),
        ("knowledge_novelty", pa.float32()),
        ("task_relevance", pa.float32()),
        ("kept", pa.bool_()),
        ("reason", pa.string()),
    ]
)
_ADVICE = "Give a scores.parquet that `xtf score` or a training run with an `xtf:` block wrote."
_ROW_GROUP = 1 << 18  # rows; a group for each small chunk would make a file of footers
_DICTIONARY_BYTES = 1 << 23  # beyond it Parquet repeats every string in full: 36 bytes of document key for each token


class ScoreTableWriter:
    """Equals collecting the chunks and one `pyarrow.parquet.write_table`, without holding the table in memory.

    A context manager: the file appears when the block ends well, and not at all if it ends with an error.

    Args:
        path: the Parquet file; one that is there stays until the new one is whole.
        metadata: JSON-able facts (config, thresholds, reference, versions); numbers that JSON lacks become null.
        selectors: names of the selectors, whose scores get a column each behind the fixed ones.
        page: what the table's report shows, kept in the file; None: nothing.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(
        self,
        path: Path,
        metadata: Mapping[str, Any],
        selectors: Sequence[str] = (),
        page: Mapping[str, Any] | None = None,
    ) -> None:
        """Open a temporary file beside `path`."""
        self.path, self.selectors = Path(path), tuple(selectors)
        about = {METADATA: json.dumps(plain({**metadata, "format": FORMAT})).encode()}
        if page is not None:
            about[PAGE] = base64.b64encode(zlib.compress(json.dumps(page).encode()))
        self.schema = with_selectors(self.selectors).with_metadata(about)
        self._chunks: list[Any] = []
        self._rows = 0
        files.remove_stale(self.path.parent)
        self._temporary, self._closed = files.temporary_path(self.path), False
        self._sink = pa.OSFile(os.fsencode(self._temporary), "wb")
        try:
            self._writer = pq.ParquetWriter(
                self._sink,
                self.schema,
                compression="zstd",
                use_dictionary=["document", "token", "reason"],
                dictionary_pagesize_limit=_DICTIONARY_BYTES,
                write_page_checksum=True,  # else some flipped bits would be shown as scores
            )
        except BaseException:
            files.discard(self._temporary)
            raise

    def __enter__(self) -> ScoreTableWriter:
        """Return the writer itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Put the file in place, or leave no trace of it after an error."""
        if kind is None:
            self.close()
        else:
            self.abort()

    def write(
        self,
        *,
        row: NDArray[np.int64],
        document: NDArray[Any],
        position: NDArray[np.int32],
        token_id: NDArray[np.int32],
        token: NDArray[np.object_],
        reasoning_importance: NDArray[np.float32],
        knowledge_novelty: NDArray[np.float32],
        task_relevance: NDArray[np.float32],
        kept: NDArray[np.bool_],
        reason: NDArray[np.object_],
        selectors: Mapping[str, NDArray[np.float32]] | None = None,
    ) -> None:
        """Append one row per completion token; all arrays (n,), in dataset order.

        Args:
            document: hex strings, or the keys themselves, uint8 (n, 16).
            reasoning_importance: attention received, 1.0 = uniform. This and the other two scores: NaN becomes null.
            knowledge_novelty: in [0, 1].
            task_relevance: in [0, 1].
            selectors: scores by selector, NaN becomes null; exactly for the names that the writer was made with.

        Raises:
            ValueError: names of other selectors, arrays of unequal length, or numbers that do not fit the column.
            OSError: the disk is full.
        """
        scores = [reasoning_importance, knowledge_novelty, task_relevance]
        own = selectors or {}
        if set(own) != set(self.selectors):
            raise ValueError(f"scores of the selectors {list(own)}, but the table has {list(self.selectors)}")
        columns = [
            pa.array(np.asarray(row), pa.int64()),
            _strings(_hex(np.asarray(document))),
            pa.array(np.asarray(position), pa.int32()),
            pa.array(np.asarray(token_id), pa.int32()),
            _strings(np.asarray(token)),
            *map(_floats, scores),
            pa.array(np.asarray(kept), pa.bool_()),
            _strings(np.asarray(reason)),
            *(_floats(own[name]) for name in self.selectors),
        ]
        self._chunks.append(pa.Table.from_arrays(columns, schema=self.schema))
        self._rows += len(columns[0])
        if self._rows >= _ROW_GROUP:
            self._write_chunks()

    def close(self) -> None:
        """Write what is left, sync, and put the file in place; nothing once it is closed."""
        if self._closed:
            return
        try:
            self._write_chunks()
            self._writer.close()
            self._sink.close()
            with self._temporary.open("r+b") as handle:
                os.fsync(handle.fileno())
            files.publish(self._temporary, self.path)
        finally:
            self.abort()

    def abort(self) -> None:
        """Drop what was written; a file that was there before stays as it was."""
        self._closed = True
        with contextlib.suppress(OSError, ValueError):
            self._writer.close()
        with contextlib.suppress(OSError):
            self._sink.close()
        files.discard(self._temporary)

    def _write_chunks(self) -> None:
        if self._chunks:
            self._writer.write_table(pa.concat_tables(self._chunks).combine_chunks(), row_group_size=_ROW_GROUP)
        self._chunks, self._rows = [], 0


def read_score_table(path: Path) -> tuple[Any, dict[str, Any]]:
    """Read a score table: the pyarrow.Table, and its metadata as written.

    Raises:
        XTFUserError: no such file, no Parquet file, no score table, or one of a later format.
    """
    try:
        table = pq.ParquetFile(files.for_arrow(path), page_checksum_verification=True).read()
    except (OSError, pa.ArrowException) as error:
        raise XTFUserError(f"cannot read the score table {path}: {error}. {_ADVICE}") from error
    try:
        metadata = json.loads((table.schema.metadata or {})[METADATA])
        version = int(metadata["format"])
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise XTFUserError(f"{path} is a Parquet file, but no score table of xtf. {_ADVICE}") from error
    if version > FORMAT:
        raise XTFUserError(f"{path} is a score table of format {version}; this xtf-plugin reads {FORMAT}. Upgrade it.")
    if not table.schema.equals(with_selectors(selector_columns(table.schema.names))):
        wrong = [field.name for field in SCHEMA if field not in list(table.schema)] or table.schema.names
        raise XTFUserError(f"{path} has other columns than a score table of xtf; look at {', '.join(wrong)}. {_ADVICE}")
    return table, metadata


def with_selectors(names: Sequence[str]) -> Any:
    """The schema of a table with these selectors: the fixed columns, then a float32 column for each."""
    return pa.schema([*SCHEMA, *((name, pa.float32()) for name in names)])


def selector_columns(names: Sequence[str]) -> list[str]:
    """The selectors among a table's columns: those behind the fixed ones."""
    return list(names[len(SCHEMA.names) :])


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata of a score table without its rows; empty if the file is none."""
    try:
        metadata = json.loads((pq.read_schema(files.for_arrow(path)).metadata or {})[METADATA])
    except (OSError, pa.ArrowException, KeyError, ValueError, RecursionError):
        return {}
    return metadata if isinstance(metadata, dict) else {}


def read_page(path: Path) -> Any:
    """What the report of a score table shows, as it was written; None if the table holds nothing of the kind.

    Raises:
        XTFUserError: no score table, or what it holds cannot be unpacked.
    """
    try:
        held = (pq.read_schema(files.for_arrow(path)).metadata or {}).get(PAGE)
    except (OSError, pa.ArrowException) as error:
        raise XTFUserError(f"cannot read the score table {path}: {error}. {_ADVICE}") from error
    if held is None:
        return None
    try:
        text = zlib.decompressobj().decompress(base64.b64decode(held, validate=True), _PAGE_LIMIT)
        return json.loads(text, parse_constant=_finite, parse_float=_finite)
    except (ValueError, zlib.error, RecursionError) as error:
        raise XTFUserError(
            f"the report that {path} holds is damaged ({error}). Make table and report again: xtf score RECIPE"
        ) from error


def _finite(digits: str) -> float:
    if not math.isfinite(number := float(digits)):  # such as 1e999
        raise ValueError(f"{digits} is no JSON")
    return number


def iter_documents(table: Any) -> Iterator[tuple[int, str, Any]]:
    """Yield (dataset row, document key in hex, slice of the table) for each document, in order.

    A document ends where the row or the key changes, or the position does not grow: a packed row may hold the same
    document twice in a row. The slices share the table's memory.
    """
    if not table.num_rows:
        return
    rows, positions = table["row"].to_numpy(), table["position"].to_numpy()
    codes = table["document"].dictionary_encode().unify_dictionaries()
    keys = np.concatenate([chunk.indices.to_numpy() for chunk in codes.chunks])
    begins = (np.diff(rows) != 0) | (np.diff(keys) != 0) | (np.diff(positions) <= 0)
    bounds = [0, *(np.flatnonzero(begins) + 1).tolist(), table.num_rows]
    for low, high in zip(bounds[:-1], bounds[1:], strict=True):
        yield int(rows[low]), table["document"][low].as_py(), table.slice(low, high - low)


def _hex(document: NDArray[Any]) -> NDArray[Any]:
    if document.dtype != np.uint8:
        return document
    digits = np.frombuffer(np.ascontiguousarray(document).tobytes().hex().encode(), dtype=f"S{2 * document.shape[1]}")
    return digits.astype(str)


def _floats(values: NDArray[np.float32]) -> Any:
    return pa.array(np.asarray(values, dtype=np.float32), pa.float32(), mask=np.isnan(values))


def _strings(values: NDArray[Any]) -> Any:
    try:
        return pa.array(values, pa.string())
    except UnicodeEncodeError:  # half a surrogate pair, which some byte-level tokenizers hand out, is no UTF-8
        return pa.array([str(value).encode("utf-8", "replace").decode() for value in values], pa.string())


def plain(value: Any) -> Any:
    """`value` with only what JSON knows in it."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, (np.ndarray, np.generic)):
        return plain(value.tolist())
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)
