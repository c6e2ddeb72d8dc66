"""Scores documents that begin alike: their common beginning is read once, and its keys and values are used for all.

Splices of a document (`data.splices`) share its prompt or more. Read one by one, they would cost as much as their
number times the document. Here the beginnings of several groups are read in one forward, and the rest of every document
in a second one that attends to the part of its group's beginning that it shares. Both use transformers' public cache.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache

from ..data.documents import DocumentSet
from ..data.ragged import Floats, Ints, offsets_of
from ..store.records import Records
from .batching import is_out_of_memory, laid_out, too_little
from .reference import Reference, rotary_switch
from .self_check import CANNOT, low_precision

logger = logging.getLogger(__name__)

CACHED = 8  # keys and values may be held for this many times the tokens of a batch
CHECKED = 4  # documents that the check reads both ways
ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}


@dataclass(frozen=True)
class Batch:
    """Documents that are scored together.

    Args:
        documents: (n,) indices of documents.
        bases: (G,) indices of documents with the longest beginning of each group.
        groups: (n,) group of each document, as an index into `bases`.
    """

    documents: Ints
    bases: Ints
    groups: Ints


def can_branch(reference: Reference, documents: DocumentSet) -> bool:
    """Whether documents may share the keys and values of their beginning.

    Needs attention in all layers, and no document longer than a sliding window: a shared beginning has gaps, and
    windows are counted in places of the cache.
    """
    if documents.branches is None or reference.lockstep or not (documents.branches.lengths > 0).all():
        return False
    config, shared = reference.text_config, documents.branches.lengths
    kinds = set(getattr(config, "layer_types", None) or ATTENTION)
    window = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None)
    longest = int(shared.max()) + int((documents.lengths - shared).max())
    return kinds <= ATTENTION and rotary_switch(config) is None and (not window or longest <= window)


def agrees(documents: DocumentSet, wanted: Ints, reference: Reference) -> bool:
    """Whether a few documents get the log-probabilities that they get alone, up to rounding; tried once a reference."""
    if reference.branches is None:
        few = wanted[np.argsort(documents.lengths[wanted], kind="stable")[-CHECKED:]]
        try:
            with reference.scoring(record=False):
                found = list(score_branches(documents, few, reference, CHECKED * int(documents.lengths[few].max())))
                plain = {documents.keys[index].tobytes(): _alone(documents, int(index), reference) for index in few}
        except CANNOT as error:
            logger.info("xtf: %s reads shared beginnings again for every document: %s", reference.name, error)
            reference.branches = False
            return False
        gaps = [
            np.abs(records.logprobs[low:high] - plain[key.tobytes()])
            for records, _, _ in found
            for key, low, high in zip(records.keys, records.offsets, records.offsets[1:], strict=False)
        ]
        gap = float(np.concatenate(gaps).mean())
        reference.branches = gap <= (0.1 if low_precision(reference) else 1e-3)
        if not reference.branches:
            logger.info("xtf: %s reads shared beginnings again for every document: a gap of %.2g", reference.name, gap)
    return reference.branches


def _alone(documents: DocumentSet, index: int, reference: Reference) -> Floats:
    """Log-probabilities of a document's completion tokens, without a shared beginning."""
    rows = laid_out(documents, np.asarray([index]), reference.device)
    hidden, _ = reference.forward(rows.ids, rows.lengths, ())
    found = reference.predictions(hidden.flatten(0, 1)[rows.read], rows.ids.flatten()[rows.predicted])
    logprobs: Floats = found[0].cpu().numpy()
    return logprobs


def plan_branches(documents: DocumentSet, wanted: Ints, budget: int) -> Iterator[Batch]:
    """Batches of the `wanted` documents, those of a group side by side, within a budget of padded tokens."""
    assert documents.branches is not None
    if not len(wanted):
        return
    groups, shared, lengths = documents.branches.groups, documents.branches.lengths, documents.lengths
    order = wanted[np.lexsort((shared[wanted], groups[wanted]))]
    order = order[np.argsort(_longest(groups[order], shared[order]), kind="stable")]  # groups of like lengths together
    opens = np.append(True, groups[order[1:]] != groups[order[:-1]])
    begin = 0
    while begin < len(order):
        end, bases, prefix, rest = begin, 0, 0, 0
        while end < len(order):
            at = order[end]
            new = bases + (end == begin or bool(opens[end]))
            longest, own = max(prefix, int(shared[at])), max(rest, int(lengths[at] - shared[at]))
            rows = end + 1 - begin
            full = new * longest + rows * own > budget or rows * (longest + own) > CACHED * budget
            if end > begin and full:
                break
            bases, prefix, rest, end = new, longest, own, end + 1
        yield _batch(order[begin:end], groups, shared)
        begin = end


def _longest(groups: Ints, shared: Ints) -> Ints:
    """The longest beginning of each document's group, for documents that are sorted by group and beginning."""
    last = np.append(groups[1:] != groups[:-1], True)
    index = np.searchsorted(np.flatnonzero(last), np.arange(len(groups)))
    found: Ints = shared[np.flatnonzero(last)][index] * (1 << 32) + groups  # groups stay together
    return found


def _batch(chosen: Ints, groups: Ints, shared: Ints) -> Batch:
    own = groups[chosen]
    opens = np.append(True, own[1:] != own[:-1])
    index = np.cumsum(opens) - 1
    bases = np.asarray([part[np.argmax(shared[part])] for part in np.split(chosen, np.flatnonzero(opens)[1:])])
    return Batch(chosen, bases, index)


def score_branches(
    documents: DocumentSet, wanted: Ints, reference: Reference, budget: int, *, planned: Ints | None = None
) -> Iterator[tuple[Records, int, int]]:
    """Scores of the `wanted` documents, tokens and padded tokens read, a batch at a time.

    Equals the scores of the documents one by one, up to rounding. A batch that does not fit into memory is split.

    Args:
        documents, wanted, reference: inside `reference.scoring(record=False)`.
        budget: padded tokens of a batch.
        planned: documents that batches are planned for, `wanted` among them. Those batches of which all documents are
            wanted are kept, so that a run that resumes after a kill gets the same bits. None: `wanted`.
    """
    missing = np.zeros(len(documents), dtype=bool)
    missing[wanted] = True
    batches = list(plan_branches(documents, wanted if planned is None else planned, budget))
    whole = [batch for batch in batches if missing[batch.documents].all()]
    missing[np.concatenate([wanted[:0], *(batch.documents for batch in whole)])] = False
    pending = [*whole, *plan_branches(documents, np.flatnonzero(missing), budget)][::-1]
    while pending:
        batch = pending.pop()
        try:
            yield _scores(documents, batch, reference)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if len(batch.documents) == 1:
                raise too_little(int(documents.lengths[batch.documents[0]]), str(error)) from None
            halves = np.array_split(batch.documents, 2)
            branches = documents.branches
            assert branches is not None
            pending += [_batch(half, branches.groups, branches.lengths) for half in halves[::-1]]


def _scores(documents: DocumentSet, batch: Batch, reference: Reference) -> tuple[Records, int, int]:
    assert documents.branches is not None
    shared = documents.branches.lengths[batch.documents]
    starts = documents.branches.lengths[batch.bases]
    rows = [documents.document(index) for index in batch.documents]
    beginnings = _padded([documents.document(index)[0][:n] for index, n in zip(batch.bases, starts, strict=True)])
    rest = _padded([ids[n:] for (ids, _), n in zip(rows, shared, strict=True)])
    marked = _padded([mask[n:] for (_, mask), n in zip(rows, shared, strict=True)]) > 0
    sizes = documents.lengths[batch.documents] - shared
    width, places = beginnings.shape[1], np.arange(rest.shape[1])
    seen = np.concatenate([np.arange(width) < shared[:, None], places < sizes[:, None]], axis=1).astype(np.int64)

    def there(array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(reference.device)

    cache, groups = DynamicCache(), there(batch.groups)
    before = _states(reference, there(beginnings), cache)
    cache.batch_select_indices(groups)
    given = {"attention_mask": there(seen), "position_ids": there(shared[:, None] + places)}
    own = _states(reference, there(rest), cache, **given)
    row, column = np.nonzero(marked)
    # a token is predicted by the state before it: the first of the rest by the last of the beginning that it shares
    states = own[there(row), there(np.maximum(column - 1, 0))]
    edge = np.flatnonzero(column == 0)
    states[there(edge)] = before[groups[there(row[edge])], there(shared[row[edge]] - 1)]
    found = reference.predictions(states, there(rest[row, column])).cpu().numpy()
    records = Records(
        *found, keys=documents.keys[batch.documents], offsets=offsets_of(marked.sum(axis=1).astype(np.int64))
    )
    return records, int(starts.sum() + sizes.sum()), beginnings.size + rest.size


def _states(reference: Reference, ids: Tensor, cache: Any, **given: Any) -> Tensor:
    name = "cache" if "cache" in inspect.signature(reference.decoder.forward).parameters else "past_key_values"
    found: Tensor = reference.decoder(input_ids=ids, use_cache=True, **{name: cache}, **given).last_hidden_state
    return found


def _padded(rows: list[NDArray[Any]]) -> NDArray[np.int64]:
    """Rows with zeros on the right, (n, longest)."""
    result = np.zeros((len(rows), max(map(len, rows))), dtype=np.int64)
    for row, ids in zip(result, rows, strict=True):
        row[: len(ids)] = ids
    return result
