"""Turns dataset rows into documents, the units that are scored once and found again by content.

A document is a maximal run of tokens that attend only to each other: a row, or one of the pieces of a packed row. Its
key is a hash of its token ids and of which of them carry a label. So it is found again after shuffling, packing,
sharding or reloading a prepared dataset, and adding rows to a dataset leaves the keys of the other documents unchanged.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from ..errors import XTFUserError
from .ragged import CHUNK_TOKENS, chunks, offsets_of

IGNORE_INDEX = -100
BLOCK = 8192  # documents whose tokens are joined at a time
INT32_MAX = 2**31 - 1
INT64_MAX = 2**63 - 1
KEY_BYTES = 16

Ids = NDArray[np.int64]
Mask = NDArray[np.bool_]


def document_key(input_ids: NDArray[Any], completion: Mask) -> bytes:
    """128-bit key of a document: `xxh3_128(int64 little-endian token ids + packed label mask)`, 16 bytes.

    Args:
        input_ids: (T,) token ids.
        completion: (T,) True where the label is not -100.
    """
    state = xxhash.xxh3_128(np.ascontiguousarray(input_ids, dtype="<i8").data)
    state.update(np.packbits(completion).data)
    return state.digest()


def split_row(row: Mapping[str, Any]) -> list[tuple[slice, Ids, Mask]]:
    """Cut a dataset row into its documents: (slice of the row, token ids, label mask) each.

    A row with `seq_lengths` is packed (TRL `bfd`, `bfd_split`); one with `position_ids` is cut where they restart at 0;
    any other row is one document. TRL's `wrapped` packing records no boundaries, so its rows are one document each.
    Tokens that `attention_mask` marks as padding belong to no document.

    Raises:
        XTFUserError: no `labels`, labels of another length, labels on padding, or `seq_lengths` that do not add up.
    """
    if row.get("labels") is None:
        raise XTFUserError(
            "the training rows carry no `labels`, so xtf cannot tell completion from prompt. Let the trainer prepare "
            "the dataset (no skip_prepare_dataset), or add a `labels` column with -100 outside the completion."
        )
    ids, labels = numbers(row, "input_ids"), numbers(row, "labels")
    if len(ids) != len(labels):
        raise XTFUserError(
            f"a training row has {len(ids)} input_ids but {len(labels)} labels; give one for each token."
        )
    completion = labels != IGNORE_INDEX
    start, end = _without_padding(row, completion)
    bounds = [start + cut for cut in _bounds(row, start, end)]
    return [(slice(a, b), ids[a:b], completion[a:b]) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]


def numbers(row: Mapping[str, Any], name: str, kinds: str = "iu") -> NDArray[Any]:
    """A column of a row as a flat array; integers as int64.

    Args:
        kinds: allowed kinds of NumPy dtypes; by default integers, as a fraction would be cut to another token id.

    Raises:
        XTFUserError: the column is missing, is not a flat list of such numbers, or has integers beyond 64 bits.
    """
    given = row.get(name)
    if given is None:
        raise XTFUserError(f"a training row has no {name}, only {', '.join(map(str, row)) or 'nothing'}. Tokenise it.")
    try:
        found = np.asarray(given)
        if found.dtype == object and found.ndim == 1:
            found = np.asarray(found.tolist())  # integers stored as objects
    except (TypeError, ValueError, OverflowError, RuntimeError):  # ragged lists; tensors that NumPy does not take
        found = np.asarray(None)
    if found.ndim == 1 and not len(found):
        return np.zeros(0, dtype=np.int64)
    whole = found.dtype.kind == "i" or (found.dtype.kind == "u" and bool((found <= INT64_MAX).all()))
    if found.ndim != 1 or found.dtype.kind not in kinds or (kinds == "iu" and not whole):
        held = f"{found.dtype} of shape {found.shape}"
        if found.dtype == object or found.dtype.kind == "u":
            held = "lists of unequal length, things that are no numbers, or numbers beyond 64 bits"
        raise XTFUserError(
            f"a training row's {name} are no flat list of {'whole ' if kinds == 'iu' else ''}numbers but "
            f"{type(given).__name__}: {held}. Tokenise the dataset again, or leave the column out if it is not needed."
        )
    return found.astype(np.int64, copy=False) if whole else found


def _without_padding(row: Mapping[str, Any], completion: Mask) -> tuple[int, int]:
    """Begin and end of a row's tokens without its padding, from its `attention_mask`."""
    if row.get("attention_mask") is None:
        return 0, len(completion)
    real = numbers(row, "attention_mask", "biuf") != 0
    where = np.flatnonzero(real)
    start, end = (int(where[0]), int(where[-1]) + 1) if len(where) else (0, 0)
    if real.shape != completion.shape or not real[start:end].all():
        raise XTFUserError(
            f"a training row has {len(completion)} tokens and an attention_mask of shape {real.shape} with "
            f"{len(where)} ones; it must be as long, with all its ones side by side and zeros for padding alone."
        )
    if (stray := int((completion & ~real).sum())) > 0:
        raise XTFUserError(
            f"a training row has labels on {stray} of its {len(real) - len(where)} padding tokens (attention_mask 0): "
            "they would be trained on. Give padding the label -100, or leave it to the collator."
        )
    return start, end


def _bounds(row: Mapping[str, Any], start: int, end: int) -> list[int]:
    """Offsets, counted from `start`, of the documents between `start` and `end` of a row."""
    length = end - start
    if row.get("seq_lengths") is not None:
        lengths = numbers(row, "seq_lengths")
        if ((lengths < 1) | (lengths > length)).any() or int(lengths.sum()) != length:
            raise XTFUserError(
                f"a packed row has {length} tokens but seq_lengths {lengths.tolist()[:8]} that add up to "
                f"{sum(lengths.tolist())}. Let the trainer pack the dataset again."
            )
        return [0, *np.cumsum(lengths).tolist()]
    if row.get("position_ids") is not None:
        places = numbers(row, "position_ids", "iuf")
        if len(places) != len(row["labels"]):
            raise XTFUserError(
                f"a training row has {len(row['labels'])} tokens but {len(places)} position_ids; give one for each "
                "token, or leave the column out."
            )
        starts = np.flatnonzero(places[start:end] == 0).tolist()
        return [*(starts if starts[:1] == [0] else [0, *starts]), length]
    return [0, length]


@dataclass(frozen=True)
class Branches:
    """Documents that begin with the same tokens, so that their common beginning is read once.

    Args:
        groups: (N,) the documents of a group begin with the same tokens, as far as their beginnings reach.
        lengths: (N,) tokens of each document that belong to the common beginning; 0: none.
    """

    groups: NDArray[np.int64]
    lengths: NDArray[np.int64]


@dataclass(frozen=True)
class DocumentSet:
    """The distinct documents of a dataset in flat arrays, and the documents of each row.

    Args:
        keys: (N, 16) uint8.
        counts: (N,) int64, how often each document occurs.
        offsets: (N + 1,) int64 into `input_ids` and `completion`.
        input_ids: flat int32 token ids; completion: flat bool label mask.
        row_offsets: (R + 1,) int64 into `row_documents`; row_documents: int64 document indices, row by row.
        branches: common beginnings; None: none are known.
    """

    keys: NDArray[np.uint8]
    counts: NDArray[np.int64]
    offsets: NDArray[np.int64]
    input_ids: NDArray[np.int32]
    completion: Mask
    row_offsets: NDArray[np.int64]
    row_documents: NDArray[np.int64]
    branches: Branches | None = None

    def __len__(self) -> int:
        return len(self.keys)

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens per document, (N,)."""
        return np.diff(self.offsets)

    @cached_property
    def completion_flat(self) -> NDArray[Any]:
        """Index of every completion token in `input_ids`, (M,); of 32 bits where these are enough, as it is kept."""
        small, parts = len(self.completion) <= np.iinfo(np.int32).max, []
        for part in chunks(len(self.completion), CHUNK_TOKENS):
            found = np.flatnonzero(self.completion[part]) + part.start
            parts.append(found.astype(np.int32) if small else found)
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)

    @cached_property
    def completion_offsets(self) -> NDArray[np.int64]:
        """(N + 1,) offsets of each document's completion tokens among all completion tokens."""
        flat = self.completion_flat  # an array of another type would be copied
        return np.searchsorted(flat, self.offsets.astype(flat.dtype)).astype(np.int64)

    @cached_property
    def completion_runs(self) -> NDArray[np.int64]:
        """Offsets of runs of adjacent completion tokens (an answer, a turn) among all completion tokens, (R + 1,)."""
        breaks = np.zeros(len(self.completion_flat), dtype=bool)
        breaks[1:] = self.completion_flat[1:] - self.completion_flat[:-1] > 1
        starts = self.completion_offsets
        breaks[starts[:-1][np.diff(starts) > 0]] = True  # a document's first completion token opens a run
        return np.append(np.flatnonzero(breaks), len(breaks))

    @cached_property
    def completion_positions(self) -> NDArray[np.int32]:
        """Position of every completion token within its document, (M,)."""
        starts = np.repeat(self.offsets[:-1].astype(self.completion_flat.dtype), np.diff(self.completion_offsets))
        np.subtract(self.completion_flat, starts, out=starts)
        positions: NDArray[np.int32] = starts.astype(np.int32, copy=False)
        return positions

    def document(self, index: int) -> tuple[NDArray[np.int32], Mask]:
        """Token ids and label mask of one document."""
        where = slice(self.offsets[index], self.offsets[index + 1])
        return self.input_ids[where], self.completion[where]


def collect(rows: Iterable[Mapping[str, Any]]) -> DocumentSet:
    """Collect the distinct documents of a dataset in order of first appearance.

    Raises:
        XTFUserError: as in `split_row`; a token id is negative or beyond 32 bits; no completion token is predicted.
    """
    distinct, row_sizes, row_documents = _Distinct(), [], []
    for row in rows:
        documents = split_row(row)
        row_sizes.append(len(documents))
        row_documents += [distinct.add(tokens, completion) for _, tokens, completion in documents]
    if not distinct.predicts:
        raise XTFUserError(
            f"none of the {len(row_sizes)} training rows has a completion token that is predicted (a label other than "
            "-100 after a document's first token): there is nothing to score or to train on. Check "
            "completion_only_loss / assistant_only_loss, the chat template and max_length."
        )
    return distinct.documents(row_sizes, row_documents)


def from_arrays(ids: Sequence[NDArray[np.int32]], completions: Sequence[Mask], branches: Branches) -> DocumentSet:
    """The distinct documents among some token ids and label masks; row `i` is document `i` of the input.

    Args:
        branches: common beginnings of the input.
    """
    distinct = _Distinct()
    firsts: list[int] = []
    rows: list[int] = []
    for place, (tokens, completion) in enumerate(zip(ids, completions, strict=True)):
        rows.append(distinct.add(tokens, completion))
        if rows[-1] == len(firsts):
            firsts.append(place)
    kept = Branches(branches.groups[firsts], branches.lengths[firsts])
    return replace(distinct.documents([1] * len(rows), rows), branches=kept)


def beside(documents: DocumentSet, others: DocumentSet) -> DocumentSet:
    """Some documents, and after them others that begin like them: group `i` of `others` begins like document `i`.

    A document is all beginning of its own group. The rows are those of `others`.
    """
    assert others.branches is not None
    groups, lengths = others.branches.groups, others.branches.lengths
    return DocumentSet(
        keys=np.concatenate([documents.keys, others.keys]),
        counts=np.concatenate([documents.counts, others.counts]),
        offsets=np.concatenate([documents.offsets, documents.offsets[-1] + others.offsets[1:]]),
        input_ids=np.concatenate([documents.input_ids, others.input_ids]),
        completion=np.concatenate([documents.completion, others.completion]),
        row_offsets=others.row_offsets,
        row_documents=others.row_documents + len(documents),
        branches=Branches(
            np.concatenate([np.arange(len(documents)), groups]), np.concatenate([documents.lengths, lengths])
        ),
    )


class _Distinct:
    """Collects distinct documents in order of first appearance."""

    def __init__(self) -> None:
        self.index: dict[bytes, int] = {}
        self.lengths: list[int] = []
        self.predicts = False  # whether a completion token is predicted
        self._blocks: list[tuple[NDArray[np.int32], Mask]] = []
        self._latest: list[tuple[NDArray[np.int32], Mask]] = []  # small arrays, which take twice their size

    def add(self, tokens: NDArray[Any], completion: Mask) -> int:
        """The index of a document."""
        key = document_key(tokens, completion)
        if key not in self.index:
            self.index[key] = len(self.lengths)
            self.lengths.append(len(tokens))
            self.predicts = self.predicts or bool(completion[1:].any())
            self._latest.append((_to_int32(tokens), completion))
            if len(self._latest) == BLOCK:
                self._join()
        return self.index[key]

    def _join(self) -> None:
        if self._latest:
            ids, masks = zip(*self._latest, strict=True)
            self._blocks.append((np.concatenate(ids), np.concatenate(masks)))
            self._latest = []

    def documents(self, row_sizes: Sequence[int], row_documents: Sequence[int]) -> DocumentSet:
        """The documents, and those of each row."""
        self._join()
        found, empty = np.asarray(row_documents, dtype=np.int64), (np.zeros(0, np.int32), np.zeros(0, bool))
        ids, masks = zip(*(self._blocks or [empty]), strict=True)
        return DocumentSet(
            keys=np.frombuffer(b"".join(self.index), dtype=np.uint8).reshape(-1, KEY_BYTES),
            counts=np.bincount(found).astype(np.int64),
            offsets=offsets_of(np.asarray(self.lengths, dtype=np.int64)),
            input_ids=np.concatenate(ids),
            completion=np.concatenate(masks),
            row_offsets=offsets_of(np.asarray(row_sizes, dtype=np.int64)),
            row_documents=found,
        )


def _to_int32(tokens: NDArray[Any]) -> NDArray[np.int32]:
    if tokens.dtype == np.int32:
        return tokens
    if len(tokens) and tokens.view(np.uint64).max() > INT32_MAX:  # as unsigned numbers, negative ones are large too
        bad = tokens[(tokens < 0) | (tokens > INT32_MAX)][0]
        raise XTFUserError(f"a training row holds the token id {int(bad)}, which no tokenizer gives; tokenise again.")
    return tokens.astype(np.int32)
