"""Whether a batch that reaches the model carries the planned labels; independent of the collator that should see to it.

Documents are found by their tokens alone: the labels, of which their keys are made as well, are what is in question.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from .data.documents import IGNORE_INDEX, DocumentSet
from .errors import XTFError

Bools = NDArray[np.bool_]
Candidate = tuple[NDArray[np.int32], Bools, Bools]

CLOSELY = 64  # batches; clean data may have next to nothing to drop, and each look costs a search


class Planned(Protocol):
    """Documents and what is planned for them."""

    def lengths(self) -> set[int]:
        """All lengths in tokens that a planned document has."""

    def of_length(self, length: int) -> Iterator[Candidate]:
        """Token ids (T,), completion mask (T,) and keep flags of the completion tokens of all documents of a length."""


@dataclass(frozen=True)
class PlannedDocuments:
    """A set of documents with the keep flags (M,) of their completion tokens."""

    documents: DocumentSet
    keep: Bools

    def lengths(self) -> set[int]:
        """See `Planned`."""
        return set(np.unique(self.documents.lengths).tolist())

    def of_length(self, length: int) -> Iterator[Candidate]:
        """See `Planned`."""
        for index in np.flatnonzero(self.documents.lengths == length):
            tokens, completion = self.documents.document(int(index))
            yield tokens, completion, self.keep[self._offsets[index] : self._offsets[index + 1]]

    @cached_property
    def _offsets(self) -> NDArray[np.int64]:
        return self.documents.completion_offsets


@dataclass
class Watch:
    """Holds batches against the plan until one has shown that labels are lost: each of the first 64, then every 64th.

    Args:
        planned: documents and what is planned for them.

    Attributes:
        batches: how many have come by.
        proven: whether one had labels to lose, and had lost them.
    """

    planned: Planned
    batches: int = 0
    proven: bool = False

    def look(self, inputs: Mapping[str, Any]) -> None:
        """Take notice of the next batch, see `verify_batch`."""
        due = self.batches < CLOSELY or self.batches % CLOSELY == 0
        self.batches += 1
        if due and not self.proven:
            self.proven = verify_batch(self.planned, inputs) > 0


def verify_batch(planned: Planned, inputs: Mapping[str, Any]) -> int:
    """Check that a batch carries exactly the planned labels.

    It sees what reaches the model, after every other piece of the host's pipeline.

    Returns:
        how many labels that would train the plan drops in it: a batch without any looks the same whether or not masks
        are applied, and so does one that was given its only label back.

    Raises:
        XTFError: a document's labels are not the planned ones, or no planned document is in the batch.
    """
    found = dropped = 0
    padded = "attention_mask" not in inputs and "position_ids" not in inputs
    pieces = _pieces(inputs)
    only_one = sum(int((labels[1:] != IGNORE_INDEX).sum()) for _, labels in pieces) == 1
    for ids, labels in pieces:
        verdict = _matches(planned, ids, labels)
        if verdict is None and padded:
            verdict = _matches_prefix(planned, ids, labels)
        if verdict is None:
            if (labels != IGNORE_INDEX).any():
                raise XTFError(
                    f"a training batch holds a document of {len(ids)} tokens that xtf did not plan (token ids "
                    f"{ids[:8].tolist()}…). Something changes the rows between the dataset and the model; xtf will "
                    "not guess."
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
        raise XTFError("a training batch holds no planned document: no sign that the masks are applied.")
    return dropped


def _pieces(inputs: Mapping[str, Any]) -> list[tuple[Any, Any]]:
    """Token ids and labels of every document in a batch, padding removed."""
    names = ("input_ids", "labels", "attention_mask", "position_ids")
    arrays = {name: inputs[name].cpu().numpy() for name in names if inputs.get(name) is not None}
    pieces = []
    for row in range(len(arrays["input_ids"])):
        ids, labels = arrays["input_ids"][row], arrays["labels"][row]
        real = np.ones(len(ids), dtype=bool)
        if "attention_mask" in arrays and arrays["attention_mask"].ndim == 2:
            real = arrays["attention_mask"][row].astype(bool)
        cuts = [0]
        if "position_ids" in arrays and arrays["position_ids"].ndim == 2:
            starts = np.flatnonzero(arrays["position_ids"][row][real] == 0).tolist()
            cuts = starts if starts[:1] == [0] else [0, *starts]
        ids, labels = ids[real], labels[real]
        pieces += [(ids[a:b], labels[a:b]) for a, b in zip(cuts, [*cuts[1:], len(ids)], strict=True)]
    return pieces


class _Verdict(NamedTuple):
    """How a document arrived: `equal`, `one more` (see `collator._revive`) or `differs`; and how many labels that would
    train it is seen to have lost."""

    kind: str
    dropped: int


def _matches(candidates: Planned, ids: Any, labels: Any) -> _Verdict | None:
    """None: no planned document has these tokens. Of several, the one that proves least: another may be what came."""
    verdict, equal = None, []
    for tokens, completion, keep in candidates.of_length(len(ids)):
        if not np.array_equal(tokens, ids):
            continue
        planned = np.zeros(len(ids), dtype=bool)
        planned[np.flatnonzero(completion)[keep]] = True
        kept = labels != IGNORE_INDEX
        if np.array_equal(kept[1:], planned[1:]):  # nothing predicts a first token, and some collators blank its label
            equal.append(int((completion & ~planned)[1:].sum()))
        elif not planned[1:].any() and kept[1:].sum() == 1 and (completion & kept)[1:].any():
            verdict = _Verdict("one more", 0)
        verdict = verdict or _Verdict("differs", 0)
    return _Verdict("equal", min(equal)) if equal else verdict


def _matches_prefix(planned: Planned, ids: Any, labels: Any) -> _Verdict | None:
    """`_matches` for a row whose padding no mask tells: the longest document that it begins with."""
    for length in sorted(planned.lengths(), reverse=True):
        if length < len(ids) and (labels[length:] == IGNORE_INDEX).all():
            verdict = _matches(planned, ids[:length], labels[:length])
            if verdict is not None:
                return verdict
    return None
