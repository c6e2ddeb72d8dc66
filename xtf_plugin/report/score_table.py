"""The score table: scores and decision of every completion token, as arrays in memory and as a Parquet file.

The report and a selection with other thresholds need these arrays alone, no model or tokenizer; a run has them, and its
file gives them back. The file has a fixed schema. A write that fails leaves no partial file.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from .. import files
from ..config.block import XTFConfig
from ..data import token_text
from ..data.column_values import Grouping
from ..data.prompts import Prompts
from ..data.ragged import Bools, Floats, Ints, Layout, offsets_of, runs, stretches
from ..errors import XTFUserError, reason
from ..selection.select import DECISIONS, Reasons, reason_text, rule_bits
from ..selection.text_rules import special_ids
from . import footer

if TYPE_CHECKING:
    from ..data.documents import DocumentSet
    from ..plan import Plan

FORMAT = 3
METADATA = b"xtf"  # key in the Parquet metadata; its JSON holds all of summary.json, `format` and `bytes`

SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("document", pa.string()),
        ("position", pa.int32()),
        ("token_id", pa.int32()),
        ("token", pa.string()),
        ("prompt", pa.string()),
        ("reasoning_importance", pa.float32()),
        ("knowledge_novelty", pa.float32()),
        ("task_relevance", pa.float32()),
        ("kept", pa.bool_()),
        ("reason", pa.string()),
        ("protected", pa.bool_()),
        ("forced", pa.bool_()),
        ("log_probability", pa.float32()),
    ]
)
CHUNK_TOKENS = 500_000
ADVICE = "Make it again: xtf score RECIPE"
BY = "by:"  # before the name of a column of the dataset, which no score's name can begin with
_REQUIRED = ("row", "document", "position", "token_id", "kept", "protected", "forced")  # never null
_ROW_GROUP = 1 << 18
_DICTIONARY_BYTES = 1 << 23  # beyond it Parquet writes every string in full: 36 bytes of document key for each token


@dataclass(frozen=True)
class ScoreTable:
    """N distinct documents, their M completion tokens, and the decision for each token.

    Args:
        about: the content of summary.json.
        config: the block.
        keys: (N, 16) uint8, document keys.
        offsets: (N + 1,) document `i` holds the tokens `offsets[i]` up to `offsets[i + 1]`.
        counts: (N,) how often each document occurs in the dataset.
        rows: (N,) first dataset row of each document.
        token_ids: (M,); positions: (M,) place within the document, prompt included.
        scores: (M,) float32 by name, as the rule saw them: after unit and window; NaN: undefined.
        logprobs: (M,) float32 natural-log probabilities; None: not scored.
        keep: (M,); reasons: (M,) bits, see `selection.select.rule_bits`; protected, forced: (M,).
        pieces: bytes of each token id.
        groups: what drops are counted by, by column.
        before: the text before runs of completion tokens, given the places of their first ones; see `Prompts.before`.
    """

    about: Mapping[str, Any]
    config: XTFConfig
    keys: NDArray[np.uint8]
    offsets: Ints
    counts: Ints
    rows: Ints
    token_ids: NDArray[np.int32]
    positions: NDArray[np.int32]
    scores: Mapping[str, Floats]
    logprobs: Floats | None
    keep: Bools
    reasons: Reasons
    protected: Bools
    forced: Bools
    pieces: Mapping[int, bytes]
    groups: Mapping[str, Grouping] = field(default_factory=dict)
    before: Callable[[Ints], list[str]] = lambda opens: [""] * len(opens)

    @classmethod
    def of_plan(cls, plan: Plan, tokenizer: Any) -> ScoreTable:
        """The arrays of a run, without `about`."""
        scores, selection, documents, text = plan.scores, plan.selection, plan.documents, plan.text
        ids = np.unique(scores.token_ids).tolist()
        first = np.unique(documents.row_documents, return_index=True)[1]
        return cls(
            about={},
            config=plan.config,
            keys=scores.keys,
            offsets=scores.offsets,
            counts=scores.counts,
            rows=np.searchsorted(documents.row_offsets, first, side="right") - 1,
            token_ids=scores.token_ids,
            positions=scores.positions,
            scores=selection.seen,
            logprobs=scores.logprobs,
            keep=selection.keep,
            reasons=selection.reasons,
            protected=text.protected,
            forced=np.zeros_like(text.protected) if text.forced is None else text.forced,
            pieces=dict(zip(ids, token_text.token_bytes(tokenizer, ids), strict=True)),
            groups=plan.groups,
            before=Prompts(documents, tokenizer, special_ids(tokenizer)).before,
        )

    @property
    def layout(self) -> Layout:
        """Offsets and counts of the documents."""
        return Layout(self.offsets, self.counts)

    @property
    def opens(self) -> Bools:
        """Completion tokens that begin a document or follow a gap, (M,)."""
        opens = np.append(True, np.diff(self.positions) != 1)[: len(self.positions)]
        opens[self.offsets[:-1][np.diff(self.offsets) > 0]] = True
        return opens

    @property
    def weights(self) -> Ints:
        """How often each completion token occurs in the dataset, (M,)."""
        return self.layout.spread(self.counts)

    def prompts(self, where: slice) -> dict[int, str]:
        """The text before each answer of the document with the completion tokens `where`, by the answer's first token.

        Tokens are counted from the first of `where`.
        """
        opens = np.flatnonzero(np.diff(self.positions[where], prepend=-2) != 1)
        return dict(zip(opens.tolist(), self.before(opens + where.start), strict=True))

    def key(self, document: int) -> str:
        """A document's key in hex."""
        return str(self.keys[document].tobytes().hex())


def write(table: ScoreTable, documents: DocumentSet, path: Path) -> Path:
    """Write one row per completion token in dataset order, and return the path.

    Raises:
        OSError: the file cannot be written; an existing file is unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    own = {str(token): piece.hex() for token, piece in table.pieces.items() if not token_text.is_text(piece)}
    about = json.dumps(plain({**table.about, "format": FORMAT, "bytes": own})).encode()
    schema = _schema(table.config).with_metadata({METADATA: about})
    files.remove_stale(path.parent)
    temporary = files.temporary_path(path)
    try:
        with pa.OSFile(os.fsencode(temporary), "wb") as sink:
            # without page checksums some flipped bits would be read as scores
            options = {"use_dictionary": ["document", "token", "reason"], "write_page_checksum": True}
            options |= {"dictionary_pagesize_limit": _DICTIONARY_BYTES, "compression": "zstd"}
            with pq.ParquetWriter(sink, schema, **options) as writer:
                for chunk in _chunks(table, documents, schema):
                    writer.write_table(chunk, row_group_size=_ROW_GROUP)
        with temporary.open("r+b") as handle:
            footer.sign(handle)
            handle.flush()
            os.fsync(handle.fileno())
        files.publish(temporary, path)
    finally:
        files.discard(temporary)
    return path


def _chunks(table: ScoreTable, documents: DocumentSet, schema: Any) -> Iterator[Any]:
    """The rows of the file in chunks of about `CHUNK_TOKENS`."""
    distinct = np.asarray(sorted(table.pieces))
    texts = pa.array([table.pieces[token].decode(errors="replace") for token in distinct.tolist()], pa.string())
    bits = rule_bits(table.config)
    reasons = pa.array([reason_text(value, bits) for value in range(np.iinfo(table.reasons.dtype).max + 1)])
    keys = pa.array([table.key(document) for document in range(len(table.keys))], pa.string())
    off = np.full(len(table.token_ids), np.nan, dtype=np.float32)
    floats = {**table.scores, "log_probability": off if table.logprobs is None else table.logprobs}
    groups = {
        BY + column: pa.array(names, pa.string()).take(pa.array(codes))
        for column, (names, codes) in table.groups.items()
    }
    opens = table.opens
    for row, document, where in _occurrences(documents, table.offsets):
        prompts = np.full(len(where), None, dtype=object)
        prompts[opens[where]] = table.before(where[opens[where]])
        columns = {
            "prompt": pa.array(prompts, pa.string()),
            "row": row,
            "document": keys.take(pa.array(document)),
            "position": table.positions[where],
            "token_id": table.token_ids[where],
            "token": texts.take(pa.array(np.searchsorted(distinct, table.token_ids[where]))),
            "kept": table.keep[where],
            "reason": reasons.take(pa.array(table.reasons[where])),
            "protected": table.protected[where],
            "forced": table.forced[where],
            **{name: values.take(pa.array(document)) for name, values in groups.items()},
        }
        for name in set(schema.names) - columns.keys():
            columns[name] = pa.array(floats.get(name, off)[where], pa.float32(), from_pandas=True)
        yield pa.table(columns).select(schema.names).cast(schema)


def _occurrences(documents: DocumentSet, offsets: Ints) -> Iterator[tuple[Ints, Ints, Ints]]:
    """(row, document, flat index) of every completion token in dataset order, some dataset rows at a time."""
    rows = np.repeat(np.arange(len(documents.row_offsets) - 1), np.diff(documents.row_offsets))
    lengths = np.diff(offsets)[documents.row_documents]
    for run in runs(offsets_of(lengths), CHUNK_TOKENS):
        part, size = documents.row_documents[run], lengths[run]
        yield np.repeat(rows[run], size), np.repeat(part, size), stretches(offsets[part], size)


def check_format(about: Mapping[str, Any], path: Path) -> None:
    """Raise XTFUserError if a table has another format than this package reads; `about` is its metadata."""
    if (found := about.get("format")) != FORMAT:
        what = f"a score table of format {found}" if isinstance(found, int) else "no score table of xtf"
        advice = "Upgrade it." if isinstance(found, int) and found > FORMAT else ADVICE
        raise XTFUserError(f"{path} is {what}; this xtf-plugin reads format {FORMAT}. {advice}")


def read(path: Path) -> ScoreTable:
    """The arrays of a file; documents in the order of the dataset.

    Raises:
        XTFUserError: there is no such file, or it is not a score table of this format, or its parts are inconsistent.
    """
    file = open_file(path)
    about = metadata(file)
    check_format(about, path)
    try:
        config = XTFConfig.parse(about["config"])
        if config is None:
            raise ValueError("its block is off")
        schema = _schema(config)
        held = pa.concat_tables([schema.empty_table(), *batches(file, schema, path)])
        return _table(about, config, held)
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        why = str(error).removeprefix(f"{path} ")
        raise XTFUserError(f"{path} is not what this xtf-plugin writes: {why} {ADVICE}") from error


def _table(about: Mapping[str, Any], config: XTFConfig, held: Any) -> ScoreTable:
    begins = _starts(held)
    codes, keys = _codes(held["document"])
    lengths = np.diff(np.append(begins, held.num_rows))
    _, first, counts = np.unique(codes[begins], return_index=True, return_counts=True)
    order = np.argsort(first)  # distinct documents as they first occur
    first, counts = first[order], counts[order]
    offsets = offsets_of(lengths[first])
    where = stretches(begins[first], lengths[first])

    def column(name: str) -> NDArray[Any]:
        return np.asarray(held[name].to_numpy()[where])

    bits = {**rule_bits(config), **DECISIONS}
    reasons, names = _codes(held["reason"].fill_null(""))
    values = np.asarray([sum(bits[name] for name in text.split(",") if name) for text in names], dtype=np.uint16)
    distinct, at = np.unique(held["token_id"].to_numpy(), return_index=True)
    texts = held["token"].take(pa.array(at)).to_pylist()
    pieces = {token: (text or "").encode() for token, text in zip(distinct.tolist(), texts, strict=True)}
    pieces |= {int(token): bytes.fromhex(digits) for token, digits in about["bytes"].items()}
    logprobs, prompts = column("log_probability"), held["prompt"].take(pa.array(where))
    digest = b"".join(bytes.fromhex(keys[code]) for code in codes[begins[first]].tolist())
    return ScoreTable(
        about={name: value for name, value in about.items() if name != "bytes"},
        config=config,
        keys=np.frombuffer(digest, dtype=np.uint8).reshape(len(first), 16),
        offsets=offsets,
        counts=counts,
        rows=held["row"].to_numpy()[begins[first]],
        token_ids=column("token_id"),
        positions=column("position"),
        scores={name: column(name) for name in config.scores},
        logprobs=None if np.isnan(logprobs).all() else logprobs,
        keep=column("kept"),
        reasons=values[reasons][where].astype(np.uint16 if config.selectors else np.uint8),
        protected=column("protected"),
        forced=column("forced"),
        pieces=pieces,
        groups={name: _grouping(held[BY + name], begins[first]) for name in config.report_columns},
        before=lambda opens: prompts.take(pa.array(opens)).fill_null("").to_pylist(),
    )


def _grouping(values: Any, first: Ints) -> Grouping:
    codes, names = _codes(values)
    return Grouping(names, codes[first].astype(np.int64))


def open_file(path: Path) -> Any:
    """Open a Parquet file. Raises XTFUserError if it cannot be read as one."""
    try:
        if footer.is_damaged(path):
            raise OSError("its footer is damaged")
        return pq.ParquetFile(files.for_arrow(path), page_checksum_verification=True)
    except (OSError, pa.ArrowException) as error:
        raise XTFUserError(
            f"cannot read the score table {path}: {reason(error)}. Give a scores.parquet that `xtf score` or a "
            "training run with an `xtf:` block wrote."
        ) from error


def metadata(file: Any) -> dict[str, Any]:
    """The JSON in the metadata of an open file; empty if the file is not a score table."""
    held = file.schema_arrow.metadata or {}
    try:
        about = json.loads(held.get(METADATA, b""))
    except (ValueError, RecursionError):
        return {}
    return about if isinstance(about, dict) else {}


def batches(file: Any, schema: Any, path: Path) -> Iterator[Any]:
    """The columns of a schema from an open file, batch by batch.

    Raises:
        XTFUserError: a column is missing, cannot be read, has another type, or lacks values.
    """
    missing = [name for name in schema.names if name not in file.schema_arrow.names]
    if missing:
        if "format" in (about := metadata(file)):
            check_format(about, path)
        raise XTFUserError(f"{path} is not a score table of xtf: it has no column {', '.join(missing)}. {ADVICE}")
    try:
        for batch in file.iter_batches(columns=schema.names):
            piece = pa.Table.from_batches([batch]).select(schema.names).cast(schema)
            empty = [name for name in schema.names if name in _REQUIRED and piece[name].null_count]
            if empty:
                raise ValueError(f"rows without {', '.join(empty)}")
            yield piece
    except (OSError, LookupError, ValueError, pa.ArrowException) as error:
        raise XTFUserError(f"{path} cannot be read: {reason(error)}. {ADVICE}") from error


def iter_documents(held: Any) -> Iterator[tuple[int, str, Any]]:
    """Yield (dataset row, document key in hex, slice of the table) for each document of consecutive rows of a file."""
    bounds = [*_starts(held).tolist(), held.num_rows]
    for low, high in zip(bounds[:-1], bounds[1:], strict=True):
        yield held["row"][low].as_py(), held["document"][low].as_py(), held.slice(low, high - low)


def _starts(held: Any) -> Ints:
    """Where documents begin: row or key changes, or the position does not grow (a row may hold a document twice)."""
    rows, positions, keys = held["row"].to_numpy(), held["position"].to_numpy(), _codes(held["document"])[0]
    begins = (np.diff(rows) != 0) | (np.diff(keys) != 0) | (np.diff(positions) <= 0)
    return np.flatnonzero(np.concatenate([np.ones(min(1, len(rows)), dtype=bool), begins]))


def _codes(column: Any) -> tuple[NDArray[np.int32], list[str]]:
    """A column of strings as indices, and the distinct strings."""
    encoded = column.dictionary_encode().unify_dictionaries()
    indices = [np.zeros(0, dtype=np.int32), *(chunk.indices.to_numpy() for chunk in encoded.chunks)]
    return np.concatenate(indices), encoded.chunk(0).dictionary.to_pylist() if encoded.num_chunks else []


def _schema(config: XTFConfig) -> Any:
    """`SCHEMA` with a column for each selector, and for each column of `report_by`."""
    selectors = ((name, pa.float32()) for name in config.selectors)
    return pa.schema([*SCHEMA, *selectors, *((BY + name, pa.string()) for name in config.report_columns)])


def plain(value: Any) -> Any:
    """`value` as strict JSON has it: NaN and infinities become null, arrays lists, anything else strings."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, (np.ndarray, np.generic)):
        return plain(value.tolist())
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)
