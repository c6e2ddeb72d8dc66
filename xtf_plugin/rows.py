"""A batch of documents as the reference reads it: rows with right padding, or one row of documents packed in it.

Which tokens are meant travels as indices that are worked out here: a mask on a GPU would have to be counted there
first, and everything would wait for the number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .data.documents import DocumentSet
from .packing import Packed


@dataclass(frozen=True)
class Rows:
    """Documents on the reference's device; M completion tokens, of which P are predicted by something.

    Args:
        ids: (B, T) token ids; packed: (1, T).
        lengths: (n,) tokens of each document.
        completion: (M,) where completion tokens are in the flattened rows.
        predicted: (P,) where those are that something predicts: not a document's first token.
        start: the first column of attention received that is wanted, of all rows.
        offsets: (n + 1,) of the documents among the M completion tokens; places: (P,) of the predicted ones among
            them. Both on the CPU.
        packed: where the documents of a packed row are.
    """

    ids: Tensor
    lengths: Tensor
    completion: Tensor
    predicted: Tensor
    start: int
    offsets: NDArray[np.int64]
    places: NDArray[np.int64]
    packed: Packed | None = None

    @property
    def read(self) -> Tensor:
        """Where the states are that predict: each one token before, (P,)."""
        return self.predicted - 1


def laid_out(documents: DocumentSet, batch: NDArray[np.int64], device: torch.device, *, packed: bool = False) -> Rows:
    """The documents `batch` (n,), in that order, as rows for one forward."""
    lengths = documents.lengths[batch]
    shape = (1, int(lengths.sum())) if packed else (len(batch), int(lengths.max()))
    ids, mask = np.zeros(shape[0] * shape[1], dtype=np.int64), np.zeros(shape[0] * shape[1], dtype=bool)
    begins = np.cumsum(lengths) - lengths if packed else np.arange(len(batch)) * shape[1]
    starts, sizes = np.zeros(len(batch), dtype=np.int64), np.zeros(len(batch), dtype=np.int64)
    for row, index in enumerate(batch):
        tokens, completion = documents.document(int(index))
        here = slice(int(begins[row]), int(begins[row]) + len(tokens))
        ids[here], mask[here] = tokens, completion
        starts[row], sizes[row] = np.argmax(completion) if completion.any() else len(tokens), completion.sum()
    bounds = np.append(begins, shape[1])
    at = np.flatnonzero(mask)
    places = np.flatnonzero(~np.isin(at, begins))  # nothing predicts a document's first token

    def there(array: NDArray[Any]) -> Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)

    return Rows(
        ids=there(ids.reshape(shape)),
        lengths=there(lengths),
        completion=there(at),
        predicted=there(at[places]),
        start=0 if packed else min(int(starts.min()), shape[1] - 1),
        offsets=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
        places=places,
        packed=Packed(there(bounds), there(starts), bounds) if packed else None,
    )
