"""Sets labels of dropped tokens to -100 as batches are built; runs no model, since it is pickled into workers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from ..data.documents import IGNORE_INDEX, numbers, split_row
from ..data.keys import document_key
from ..errors import XTFError

MAX_WORKERS = 256
USE_STREAM = (
    "Rows that change whenever they are read need a stream, whose rows are scored as they are read: "
    "dataset.to_iterable_dataset().map(...)."
)


class Masks(Protocol):
    """Keep flags by document: the table of a dataset (`MaskTable`), or the known part of a stream (`LiveMasks`)."""

    def lookup(self, key: bytes) -> tuple[NDArray[np.bool_], int] | None:
        """See `MaskTable.lookup`."""


class XTFDataCollator:
    """Wrap a data collator so that dropped tokens reach the loss with label -100.

    Equals, for each row: split it into documents, look up the keep flags of each, set the labels of dropped tokens to
    -100, then call `inner` on the changed copies. The given rows and all other columns are not changed. If no label of
    a batch is left, one is restored: its loss would be 0/0.

    Args:
        inner: the trainer's collator.
        masks: the plan's keep flags, from `XTFCallback` or `MaskTable.build`.
        ignored: columns of the rows that `inner` does not read, see `boundaries.Boundaries`.

    Raises (when called):
        XTFError: a row holds a document that is not in the plan, or `inner` returned labels other than planned.

    Example:
        >>> collator = XTFDataCollator(trainer.data_collator, masks)
        >>> collator([{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}])["labels"]  # the plan drops token 2
        tensor([[-100, -100,    3]])
    """

    def __init__(
        self, inner: Callable[[list[Any]], Any], masks: Masks | None = None, ignored: Collection[str] = ()
    ) -> None:
        self.inner = inner
        self.masks = masks
        self.ignored = ignored
        # Batches, and batches with a restored label; a row per dataloader worker (0: main process). In shared memory,
        # since workers have copies of the collator.
        self.counters = torch.zeros(MAX_WORKERS + 1, 2, dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]

    def __call__(self, features: list[Any]) -> Any:
        """Collate `features` with dropped labels set to -100."""
        if self.masks is None:
            raise XTFError("XTFDataCollator has no masks: training started before scoring. Attach XTFCallback too.")
        nested = bool(features) and isinstance(features[0], list)  # by a multipack sampler
        groups = [[self._masked(row) for row in group] for group in (features if nested else [features])]
        rows = [row for group in groups for row in group]
        restored = _restore_one(rows)
        masked = [[row.features for row in group] for group in groups]
        batch = self.inner(masked if nested else masked[0])
        self._verify(batch, rows)
        worker = torch.utils.data.get_worker_info()
        counts = self.counters[0 if worker is None else 1 + worker.id % MAX_WORKERS]
        counts += torch.tensor([1, int(restored)])
        return batch

    def _masked(self, row: Mapping[str, Any]) -> _Row:
        """A copy of `row` with the labels of dropped tokens at -100."""
        assert self.masks is not None
        result = _Row({}, original=row)
        labels = numbers(row, "labels").copy()
        read = {name: value for name, value in row.items() if name not in self.ignored} if self.ignored else row
        for where, ids, completion in split_row(read):
            keep, best = self.masks.lookup(document_key(ids, completion)) or (None, -1)
            if keep is None or len(keep) != int(completion.sum()):
                raise XTFError(
                    f"a training row holds a document of {len(ids)} tokens ({int(completion.sum())} with labels) that "
                    "was not scored: the dataset or its preparation changed after xtf read it. Attach xtf after the "
                    f"last change to trainer.train_dataset. {USE_STREAM}"
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
        """Raise XTFError if `inner` has built labels of its own, which would undo the masks."""
        if "labels" not in batch:
            raise XTFError(
                f"{type(self.inner).__name__} returns no labels: xtf masks labels and cannot mask this loss."
            )
        kept = int((batch["labels"] != IGNORE_INDEX).sum())
        planned, firsts = sum(row.trainable for row in rows), sum(row.firsts for row in rows)
        if not planned <= kept <= planned + firsts:  # padding-free collators blank each document's first label
            raise XTFError(
                f"{type(self.inner).__name__} returned {kept} labels where xtf planned {planned}: this collator builds "
                "labels of its own. Use the trainer's default collator or one that keeps the `labels` column."
            )


def _as_before(given: Any, labels: NDArray[np.int64]) -> Any:
    """Labels as the kind of sequence that the row had: the trainer's collator may expect tensors."""
    if isinstance(given, torch.Tensor):
        return torch.from_numpy(labels).to(given.dtype if given.dtype.is_signed else torch.int64)
    if isinstance(given, np.ndarray):
        return labels.astype(np.int64 if given.dtype.kind == "u" else given.dtype)  # no -100 in unsigned
    return labels.tolist()


@dataclass
class _Row:
    features: dict[str, Any]
    original: Mapping[str, Any]
    spare: int = -1  # position of the label to restore if the batch has none; -1: none
    trainable: int = 0  # kept labels that are predicted
    firsts: int = 0  # kept labels of first tokens, which nothing predicts


def _restore_one(rows: list[_Row]) -> bool:
    """If no label of the batch trains, restore the best one of the first document; return whether it was restored."""
    spare = next((row for row in rows if row.spare >= 0), None)
    if spare is None or any(row.trainable for row in rows):
        return False
    spare.features["labels"][spare.spare] = int(spare.original["labels"][spare.spare])
    spare.trainable += 1
    return True
