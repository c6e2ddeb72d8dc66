"""The collator that turns planned drops into -100 labels as batches are built.

It wraps the host's own collator and changes nothing but labels, and only from a value to -100. It looks documents up by
content and runs no model: it lives in dataloader workers, so its table is read-only, one bit per token, and cheap to
pickle.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from .data.documents import IGNORE_INDEX, KEY_BYTES, document_key, numbers, split_row
from .errors import XTFError

MAX_WORKERS = 256
COPIED = 1 << 20  # keep flags that are put in order at once


@dataclass(frozen=True)
class MaskTable:
    """Which completion tokens of which document are kept, looked up by document key.

    Args:
        keys: (N, 2) big-endian uint64 halves of the document keys, sorted.
        offsets: (N + 1,) first bit of each document.
        bits: packed keep flags, one bit per completion token.
        best: (N,) index among the document's completion tokens of the one to keep when a batch would lose all; -1:
            none.
    """

    keys: NDArray[np.uint64]
    offsets: NDArray[np.int64]
    bits: NDArray[np.uint8]
    best: NDArray[np.int64]

    @classmethod
    def build(
        cls, keys: NDArray[np.uint8], offsets: NDArray[np.int64], keep: NDArray[np.bool_], best: NDArray[np.int64]
    ) -> MaskTable:
        """Build from document keys (N, 16), offsets (N + 1,) into `keep` (M,), and `best` (N,)."""
        flat = np.ascontiguousarray(keys).reshape(-1, KEY_BYTES)
        halves = flat.view(">u8").reshape(-1, 2).astype(np.uint64)
        order = np.lexsort((halves[:, 1], halves[:, 0]))
        sizes = np.diff(offsets)[order]
        ends = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        flags = np.empty(ends[-1], dtype=bool)
        low = 0
        while low < len(order):  # a part at a time: an index of all tokens at once would take eight times the flags
            high = max(low + 1, int(np.searchsorted(ends, ends[low] + COPIED, side="right")) - 1)
            first = offsets[:-1][order[low:high]] - ends[low:high]
            flags[ends[low] : ends[high]] = keep[np.repeat(first, sizes[low:high]) + np.arange(ends[low], ends[high])]
            low = high
        return cls(halves[order], ends, np.packbits(flags), best[order].astype(np.int64))

    def lookup(self, key: bytes) -> tuple[NDArray[np.bool_], int] | None:
        """Keep flags of a document's completion tokens and its `best`; None: it is not in the table."""
        high, low = np.frombuffer(key, dtype=">u8").astype(np.uint64)
        left, right = (int(np.searchsorted(self.keys[:, 0], high, side=side)) for side in ("left", "right"))
        at = left + int(np.searchsorted(self.keys[left:right, 1], low))
        if at == right or self.keys[at, 1] != low:
            return None
        first, last = int(self.offsets[at]), int(self.offsets[at + 1])
        bits = np.unpackbits(self.bits[first // 8 : (last + 7) // 8])
        return bits[first % 8 : first % 8 + last - first].astype(bool), int(self.best[at])


class Masks(Protocol):
    """What the collator asks for: a whole dataset's table, or what is known of a stream so far."""

    def lookup(self, key: bytes) -> tuple[NDArray[np.bool_], int] | None:
        """See `MaskTable.lookup`."""


class XTFDataCollator:
    """Wrap a data collator so that planned tokens reach the loss with label -100.

    Equals, for each row: cut it into documents, look up each one's keep flags, set the labels of dropped tokens to
    -100, then call `inner` on the changed copies. The rows themselves, input ids and every other column stay as they
    are.

    Args:
        inner: the host's own collator.
        masks: the plan, from `XTFCallback` or `MaskTable.build`.

    Raises (when called):
        XTFError: a row holds a document that is not in the plan, or `inner` returned labels other than planned.

    Example:
        >>> collator = XTFDataCollator(trainer.data_collator, masks)
        >>> collator([{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}])["labels"]  # the plan drops token 2
        tensor([[-100, -100,    3]])
    """

    def __init__(self, inner: Callable[[list[Any]], Any], masks: Masks | None = None) -> None:
        self.inner = inner
        self.masks = masks
        # one row per dataloader worker (0: main process): batches, kept tokens, batches in which one label was brought
        # back; in shared memory, because what a worker writes to its own copy does not come back
        self.counters = torch.zeros(MAX_WORKERS + 1, 3, dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]

    def __call__(self, features: list[Any]) -> Any:
        """Collate `features` with dropped labels set to -100."""
        if self.masks is None:
            raise XTFError("XTFDataCollator has no masks: training started before scoring. Attach XTFCallback too.")
        rows = [self._masked(row) for row in _flatten(features)]
        revived = _revive(rows)
        batch = self.inner(_like(features, [row.features for row in rows]))
        self._verify(batch, rows)
        worker = torch.utils.data.get_worker_info()
        counts = self.counters[0 if worker is None else 1 + worker.id % MAX_WORKERS]
        counts += torch.tensor([1, sum(row.trainable for row in rows), int(revived)])
        return batch

    def _masked(self, row: Mapping[str, Any]) -> _Row:
        """A copy of `row` with dropped labels at -100, and what the batch needs to know about it."""
        assert self.masks is not None
        result = _Row({}, original=row)
        pieces = split_row(row)
        labels = numbers(row, "labels").copy()
        for where, ids, completion in pieces:
            keep, best = self.masks.lookup(document_key(ids, completion)) or (None, -1)
            if keep is None or len(keep) != int(completion.sum()):
                raise XTFError(
                    f"a training row holds a document of {len(ids)} tokens ({int(completion.sum())} with labels) that "
                    "was not scored: the dataset or its preparation changed after xtf read it. Attach xtf after the "
                    "last change to trainer.train_dataset."
                )
            positions = where.start + np.flatnonzero(completion)
            if result.spare < 0 and best >= 0:
                result.spare = int(positions[best])
            labels[positions[~keep]] = IGNORE_INDEX
            first = bool(len(keep)) and bool(completion[0]) and bool(keep[0])
            result.firsts += int(first)
            result.trainable += int(keep.sum()) - int(first)
        result.features = {**row, "labels": _as_before(row["labels"], labels)}
        return result

    def _verify(self, batch: Any, rows: list[_Row]) -> None:
        """Refuse a batch whose labels are not the planned ones: a collator that rebuilds labels would undo the mask."""
        if "labels" not in batch:
            raise XTFError(
                f"{type(self.inner).__name__} returns no labels; xtf masks labels and cannot mask this loss."
            )
        kept = int((batch["labels"] != IGNORE_INDEX).sum())
        planned, firsts = sum(row.trainable for row in rows), sum(row.firsts for row in rows)
        if not planned <= kept <= planned + firsts:  # padding-free collators blank each document's first label
            raise XTFError(
                f"{type(self.inner).__name__} returned {kept} labels where xtf planned {planned}: this collator builds "
                "labels of its own. Use the trainer's default collator or one that keeps the `labels` column."
            )


def _as_before(given: Any, labels: NDArray[np.int64]) -> Any:
    """Labels as the kind of sequence that the row had: a collator of the host's own may ask for tensors."""
    if isinstance(given, torch.Tensor):
        return torch.from_numpy(labels).to(given.dtype if given.dtype.is_signed else torch.int64)
    if isinstance(given, np.ndarray):
        return labels.astype(np.int64 if given.dtype.kind == "u" else given.dtype)  # unsigned ones hold no -100
    return labels.tolist()


@dataclass
class _Row:
    """A row with its planned labels."""

    features: dict[str, Any]
    original: Mapping[str, Any]
    spare: int = -1  # position of the label to restore if the batch has none; -1: none
    trainable: int = 0  # kept labels that are predicted
    firsts: int = 0  # kept labels that nothing predicts, because they stand first in a document


def _revive(rows: list[_Row]) -> bool:
    """Restore one label where a batch has none that trains: its loss would be 0/0."""
    spare = next((row for row in rows if row.spare >= 0), None)
    if spare is None or any(row.trainable for row in rows):
        return False
    spare.features["labels"][spare.spare] = int(spare.original["labels"][spare.spare])
    spare.trainable += 1
    return True


def _flatten(features: list[Any]) -> list[Mapping[str, Any]]:
    """Rows of a batch; multipack samplers hand over lists of lists."""
    if features and isinstance(features[0], list):
        return [row for group in features for row in group]
    return features


def _like(features: list[Any], rows: list[dict[str, Any]]) -> list[Any]:
    """Arrange `rows` in the nesting of `features`."""
    if not (features and isinstance(features[0], list)):
        return rows
    remaining = iter(rows)
    return [[next(remaining) for _ in group] for group in features]
