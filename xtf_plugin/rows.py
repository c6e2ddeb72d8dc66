"""A batch of documents as the reference reads it: rows with right padding, or one row of documents packed in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .documents import DocumentSet
from .packing import Packed


@dataclass(frozen=True)
class Rows:
    """Documents on the reference's device.

    Args:
        ids: (B, T) token ids; packed: (1, T).
        lengths: (n,) tokens of each document.
        mask: (B, T) completion tokens.
        predicted: (B, T) those of them that something predicts: not a document's first token.
        read: (B, T) states that predict them, each one token before.
        start: the first column of attention received that is wanted, of all rows.
        offsets: (n + 1,) of the documents among all completion tokens, on the CPU.
        packed: where the documents of a packed row are.
    """

    ids: Tensor
    lengths: Tensor
    mask: Tensor
    predicted: Tensor
    read: Tensor
    start: int
    offsets: NDArray[np.int64]
    packed: Packed | None = None


def laid_out(documents: DocumentSet, batch: NDArray[np.int64], device: torch.device, *, packed: bool = False) -> Rows:
    """The documents `batch` (n,), in that order, as rows for one forward."""
    lengths = documents.lengths[batch]
    shape = (1, int(lengths.sum())) if packed else (len(batch), int(lengths.max()))
    ids, mask = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=bool)
    begins = np.cumsum(lengths) - lengths if packed else np.arange(len(batch)) * shape[1]
    starts, sizes = np.zeros(len(batch), dtype=np.int64), np.zeros(len(batch), dtype=np.int64)
    for row, index in enumerate(batch):
        tokens, completion = documents.document(int(index))
        here = slice(int(begins[row]), int(begins[row]) + len(tokens))
        ids.reshape(-1)[here], mask.reshape(-1)[here] = tokens, completion
        starts[row], sizes[row] = np.argmax(completion) if completion.any() else len(tokens), completion.sum()
    predicted = mask.copy()
    predicted.reshape(-1)[begins] = False  # nothing predicts a document's first token
    read = np.zeros_like(predicted)
    read[:, :-1] = predicted[:, 1:]
    where = None
    if packed:
        ends = torch.from_numpy(np.concatenate([begins, [shape[1]]])).to(device)
        where = Packed(ends, torch.from_numpy(starts).to(device), int(lengths.max()))

    def there(array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(device)

    return Rows(
        ids=there(ids),
        lengths=there(lengths),
        mask=there(mask),
        predicted=there(predicted),
        read=there(read),
        start=0 if packed else min(int(starts.min()), shape[1] - 1),
        offsets=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
        packed=where,
    )
