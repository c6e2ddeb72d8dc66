"""Turns dataset rows into documents, the units that are scored once and found again by content.

A document is a maximal run of tokens that attend only to each other: a row, or one of the pieces of a packed row. Its
key is a hash of its token ids and of which of them carry a label. So it is found again after shuffling, packing,
sharding or reloading a prepared dataset, and adding rows to a dataset leaves the keys of the other documents unchanged.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import XTFUserError
from .distinct import Distinct
from .ragged import CHUNK_TOKENS, chunks, offsets_of

IGNORE_INDEX = -100
INT64_MAX = 2**63 - 1

Ids = NDArray[np.int64]
Mask = NDArray[np.bool_]


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
            held = "lists of unequal length, values that are not numbers, or numbers beyond 64 bits"
        raise XTFUserError(
            f"a training row's {name} are not a flat list of {'whole ' if kinds == 'iu' else ''}numbers but "
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
        """Index of every completion token in `input_ids`, (M,); int32 if the indices fit, since the array is cached."""
        small, parts = len(self.completion) <= np.iinfo(np.int32).max, []
        for part in chunks(len(self.completion), CHUNK_TOKENS):
            found = np.flatnonzero(self.completion[part]) + part.start
            parts.append(found.astype(np.int32) if small else found)
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)

    @cached_property
    def completion_ids(self) -> NDArray[np.int32]:
        """Token ids of all completion tokens, (M,)."""
        return self.input_ids[self.completion]

    @cached_property
    def completion_offsets(self) -> NDArray[np.int64]:
        """(N + 1,) offsets of each document's completion tokens among all completion tokens."""
        flat = self.completion_flat  # an array of another type would be copied
        return np.searchsorted(flat, self.offsets.astype(flat.dtype)).astype(np.int64)

    @cached_property
    def completion_runs(self) -> NDArray[np.int64]:
        """Offsets of runs of adjacent completion tokens (an answer, a turn) among all of them, (runs + 1,)."""
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


@dataclass(frozen=True)
class PlainRows:
    """Rows that are one document each, as flat arrays, so that a large dataset is not read row by row.

    Args:
        input_ids: flat integer token ids; labels: flat, -100 where nothing is trained.
        lengths: (n,) tokens of each row.
    """

    input_ids: NDArray[Any]
    labels: NDArray[Any]
    lengths: NDArray[np.int64]


def collect(rows: Iterable[Mapping[str, Any] | PlainRows]) -> DocumentSet:
    """Collect the distinct documents of a dataset in order of first appearance.

    Raises:
        XTFUserError: as in `split_row`; a token id is negative, or `distinct.TOKEN_IDS` or more; no completion token is
            predicted.
    """
    found, sizes = Distinct(), list[int]()
    for row in rows:
        if isinstance(row, PlainRows):
            found.extend(row.input_ids, row.labels != IGNORE_INDEX, row.lengths)
            sizes += [1] * len(row.lengths)
            continue
        documents = split_row(row)
        sizes.append(len(documents))
        for _, tokens, completion in documents:
            found.add(tokens, completion)
    made = _documents(found, np.asarray(sizes, dtype=np.int64))
    if not found.predicts:
        raise XTFUserError(
            f"none of the {len(sizes)} training rows has a completion token that is predicted (a label other than "
            "-100 after a document's first token): there is nothing to score or to train on. Check "
            "completion_only_loss / assistant_only_loss, the chat template and max_length."
        )
    return made


def _documents(found: Distinct, row_sizes: NDArray[np.int64]) -> DocumentSet:
    """The distinct documents that were found, given how many documents each row has."""
    found.finish()
    return DocumentSet(
        keys=found.keys,
        counts=np.bincount(found.which, minlength=len(found.keys)).astype(np.int64),
        offsets=offsets_of(found.lengths),
        input_ids=found.input_ids,
        completion=found.completion,
        row_offsets=offsets_of(row_sizes),
        row_documents=found.which,
    )


def from_blocks(blocks: Iterable[tuple[NDArray[np.int32], Mask, NDArray[np.int64]]], branches: Branches) -> DocumentSet:
    """The distinct documents among those of some blocks; row `i` is document `i` of the input.

    Args:
        blocks: token ids and label masks, flat, and the lengths of the documents.
        branches: common beginnings of the input.
    """
    found = Distinct()
    for ids, completion, lengths in blocks:
        found.extend(ids, completion, lengths)
    made = _documents(found, np.ones(found.added, dtype=np.int64))
    firsts = np.empty(len(made), dtype=np.int64)
    firsts[found.which[::-1]] = np.arange(found.added)[::-1]  # the first of equal ones is written last
    return replace(made, branches=Branches(branches.groups[firsts], branches.lengths[firsts]))


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
