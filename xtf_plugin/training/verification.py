"""Checks that a batch that reaches the model carries the planned labels, independently of the collator.

Documents are found by their tokens alone, since their keys depend on the labels that are checked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np
import xxhash
from numpy.typing import NDArray

from ..data.documents import IGNORE_INDEX, DocumentSet
from ..data.ragged import Bools
from ..errors import XTFError

Ids = NDArray[np.integer[Any]]
Candidate = tuple[Bools, Bools]

CHECKED = 64  # the first 64 batches are checked, then every 64th: clean data may have almost nothing to drop


class Planned(Protocol):
    """Documents with their keep flags."""

    def find(self, ids: Ids) -> Iterator[Candidate]:
        """Completion mask (T,) and keep flags of the completion tokens of every document with the tokens `ids` (T,)."""


def token_hash(ids: Ids) -> int:
    """64-bit hash of a document's token ids (T,), whatever its labels."""
    return xxhash.xxh3_64_intdigest(np.ascontiguousarray(ids, dtype="<i4").data)


@dataclass(frozen=True)
class PlannedDocuments:
    """Implements `Planned` for a dataset; `keep` (M,) are the flags of its completion tokens."""

    documents: DocumentSet
    keep: Bools

    def find(self, ids: Ids) -> Iterator[Candidate]:
        """See `Planned`; compares the documents with the same hash."""
        hashes, order = self._index
        wanted, offsets = np.uint64(token_hash(ids)), self.documents.completion_offsets
        for index in order[slice(*(np.searchsorted(hashes, wanted, side=side) for side in ("left", "right")))]:
            tokens, completion = self.documents.document(int(index))
            if np.array_equal(tokens, ids):
                yield completion, self.keep[offsets[index] : offsets[index + 1]]

    @cached_property
    def _index(self) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        """Sorted hashes of all documents' tokens (N,), and the documents' indices in that order (N,)."""
        tokens = np.ascontiguousarray(self.documents.input_ids, dtype="<i4").view(np.uint8).data
        bounds = (4 * self.documents.offsets).tolist()
        found = (xxhash.xxh3_64_intdigest(tokens[a:b]) for a, b in zip(bounds[:-1], bounds[1:], strict=True))
        hashes = np.fromiter(found, dtype=np.uint64, count=len(self.documents))
        order = np.argsort(hashes, kind="stable")
        return hashes[order], order


@dataclass
class LabelVerifier:
    """Checks the first 64 batches, then every 64th, until one has shown that labels are dropped."""

    planned: Planned
    batches: int = 0  # number of batches seen
    proven: bool = False  # whether a checked batch had labels to drop, and they were dropped

    def check(self, inputs: Mapping[str, Any]) -> None:
        """Count a batch, and call `verify_batch` if it is due."""
        due = self.batches < CHECKED or self.batches % CHECKED == 0
        self.batches += 1
        if due and not self.proven:
            self.proven = verify_batch(self.planned, inputs) > 0


def verify_batch(planned: Planned, inputs: Mapping[str, Any]) -> int:
    """Check that a batch carries exactly the planned labels.

    Args:
        planned: documents with their keep flags.
        inputs: the batch as the model gets it: `input_ids` and `labels` (B, T), and `attention_mask` and
            `position_ids` (B, T) if there are any.

    Returns:
        the number of trainable labels in the batch that the plan drops; 0 if it would be the same without masks.

    Raises:
        XTFError: a document's labels are not the planned ones, or no planned document is in the batch.
    """
    found = dropped = 0
    padded = not any(
        inputs.get(name) is not None and inputs[name].ndim == 2 for name in ("attention_mask", "position_ids")
    )
    pieces = documents_of(inputs)
    only_one = sum(int((labels[1:] != IGNORE_INDEX).sum()) for _, labels in pieces) == 1
    for ids, labels in pieces:
        verdict = _matches(planned, ids, labels)
        if verdict is None and padded:
            verdict = _matches_prefix(planned, ids, labels)
        if verdict is None:
            if (labels != IGNORE_INDEX).any():
                raise XTFError(
                    f"a training batch holds a document of {len(ids)} tokens that xtf did not plan (token ids "
                    f"{ids[:8].tolist()}…). Something changes the rows between the dataset and the model; remove it, "
                    "or train without the `xtf:` block."
                )
            continue
        found += 1
        dropped += verdict.dropped
        if verdict.kind == "differs" or (verdict.kind == "one more" and not only_one):
            raise XTFError(
                f"a training batch does not carry the planned labels: a document of {len(ids)} tokens arrived "
                f"with {int((labels != IGNORE_INDEX).sum())} labels. A collator or a callback rebuilds labels; "
                "remove it, or train without the `xtf:` block."
            )
    if not found:
        raise XTFError("a training batch holds no planned document, so nothing shows that the masks are applied.")
    return dropped


def documents_of(inputs: Mapping[str, Any]) -> list[tuple[Any, Any]]:
    """Token ids and labels of every document in a batch, without padding, in order.

    Padding and the beginnings of documents come from `position_ids` (B, T) and `attention_mask`: (B, T), or of more
    dimensions, the last two of which say which tokens attend to which, as booleans or as what is added to logits.
    """
    names = ("input_ids", "labels", "attention_mask", "position_ids")
    arrays = {name: inputs[name].detach().cpu() for name in names if inputs.get(name) is not None}
    mask, positions = arrays.get("attention_mask"), arrays.get("position_ids")
    pieces = []
    for row, (ids, labels) in enumerate(zip(arrays["input_ids"].numpy(), arrays["labels"].numpy(), strict=True)):
        real, first = np.ones(len(ids), dtype=bool), np.zeros(len(ids), dtype=bool)
        if mask is not None and len(mask) in (1, len(arrays["labels"])):
            real, first = _of_mask(mask[row if len(mask) > 1 else 0], len(ids))
        if positions is not None and positions.shape == arrays["input_ids"].shape:
            first = first | (positions[row].numpy() == 0)
        ids, labels = ids[real], labels[real]
        cuts = [0, *np.flatnonzero(first[real][1:]) + 1]
        pieces += [(ids[a:b], labels[a:b]) for a, b in zip(cuts, [*cuts[1:], len(ids)], strict=True)]
    return pieces


def _of_mask(mask: Any, size: int) -> tuple[Bools, Bools]:
    """Which tokens are not padding, and which cannot see the token before them, (T,) each, from a row's mask."""
    first = np.zeros(size, dtype=bool)
    if mask.shape == (size,):
        return mask.numpy().astype(bool), first
    while mask.ndim > 2:
        mask = mask[0]  # all heads have the same
    if mask.shape != (size, size):
        return ~first, first
    seen = (mask > -1 if mask.is_floating_point() and bool((mask < 0).any()) else mask != 0).numpy()
    first[1:] = ~np.diagonal(seen, -1)
    return np.diagonal(seen), first


class _Verdict(NamedTuple):
    kind: str  # `equal`, `one more` (see `collator._restore_one`) or `differs`
    dropped: int  # number of trainable labels that are dropped


def _matches(planned: Planned, ids: Ids, labels: Any) -> _Verdict | None:
    """None if no planned document has these tokens; of several that match, the one with the fewest drops."""
    verdict, equal = None, []
    kept = labels != IGNORE_INDEX
    for completion, keep in planned.find(ids):
        wanted = np.zeros(len(ids), dtype=bool)
        wanted[np.flatnonzero(completion)[keep]] = True
        if np.array_equal(kept[1:], wanted[1:]):  # some collators set the first label, which never trains, to -100
            equal.append(int((completion & ~wanted)[1:].sum()))
        elif not wanted[1:].any() and kept[1:].sum() == 1 and (completion & kept)[1:].any():
            verdict = _Verdict("one more", 0)
        verdict = verdict or _Verdict("differs", 0)
    return _Verdict("equal", min(equal)) if equal else verdict


def _matches_prefix(planned: Planned, ids: Ids, labels: Any) -> _Verdict | None:
    """`_matches` for a row padded without attention mask: of the longest planned document that the row begins with."""
    own = np.flatnonzero((labels != IGNORE_INDEX) | (ids != ids[-1]))  # padding repeats one token
    lengths = range(len(ids) - 1, int(own[-1]) if len(own) else 0, -1)
    verdicts = (_matches(planned, ids[:length], labels[:length]) for length in lengths)
    return next((verdict for verdict in verdicts if verdict is not None), None)
