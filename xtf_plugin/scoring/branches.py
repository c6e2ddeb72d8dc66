"""Scores documents that begin alike: their common beginning is read once, and its keys and values are used for all.

Documents that begin alike form a group: the splices of one document (`data.splices`), which share its prompt or more.
The document itself may be in its group; it is the beginning then, with nothing after it. A batch has rows, each of one
group, and takes two forwards. The first one reads the beginnings. The second one reads what the documents have after
them, side by side in their row: each document attends to itself and to the part of the beginning that it shares. Both
use public interfaces of transformers: a cache, and masks of four dimensions.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache

from ..data.documents import Branches, DocumentSet
from ..data.ragged import Floats, Ints, offsets_of, stretches
from ..errors import XTFError
from ..store.records import Records
from .batching import (
    ScoringStats,
    cheapest,
    halved_budget,
    is_out_of_memory,
    laid_out,
    whole_batches_first,
    within_memory,
)
from .distributed import share_out
from .reference import Reference, rotary_switch
from .self_check import CANNOT, low_precision

# How many tokens may follow a beginning in its row: as many as the beginning has, but at least NARROW and at most WIDE.
# Each attends to its whole row, so a long row takes time, and memory for its mask. With short rows, beginnings are read
# more often.
NARROW, WIDE = 512, 4_096
MASKED = 1 << 26  # largest mask of a row: after a very long beginning, rows are short
CHECKED = 4  # documents that the check reads both ways
ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}

Row = Ints  # indices of documents of a group; the first has the longest beginning


def can_branch(reference: Reference, documents: DocumentSet) -> bool:
    """Whether documents may share the keys and values of their beginning.

    Needs attention in all layers, and no document longer than the chunks of chunked attention.
    """
    scored = np.diff(documents.completion_offsets) > 0
    if documents.branches is None or reference.lockstep or not (documents.branches.lengths[scored] > 0).all():
        return False
    config = reference.text_config
    kinds = set(getattr(config, "layer_types", None) or ATTENTION)
    chunk = getattr(config, "attention_chunk_size", None)
    fits = not chunk or int(documents.lengths.max()) <= chunk
    return kinds <= ATTENTION and rotary_switch(config) is None and fits


def agrees(documents: DocumentSet, wanted: Ints, reference: Reference) -> bool:
    """Whether a few documents get the log-probabilities that they get alone, up to rounding; tried once a reference.

    If not, or if the decoder fails on them, the reference gets a warning.
    """
    if reference.branches is None:
        beyond = wanted[documents.lengths[wanted] > _branches(documents).lengths[wanted]]
        few = beyond[np.argsort(documents.lengths[beyond], kind="stable")[-CHECKED:]]
        if not len(few):  # none has tokens after its beginning, so all are read as they are alone
            return True
        why = _difference(documents, few, reference)
        reference.branches = why is None
        if why is not None:
            plain = int(documents.lengths[wanted].sum())
            shared = int(_tokens(documents, plan_rows(documents, wanted, plain)).sum())
            reference.warnings.append(
                f"{why}: so what the sentences of a document have in common is read again for each of them, "
                f"{plain / shared:.1f} times the tokens in all"
            )
    return reference.branches


def _difference(documents: DocumentSet, few: Ints, reference: Reference) -> str | None:
    """What is wrong with the log-probabilities of a few documents; None: nothing."""
    try:
        with reference.scoring(record=False, masked=True):
            found = list(score_branches(documents, few, reference, int(documents.lengths[few].sum()), ScoringStats()))
    except XTFError as error:
        return str(error).rstrip(".")
    with reference.scoring(record=False):
        plain = {documents.keys[index].tobytes(): _alone(documents, int(index), reference) for index in few}
    gaps = [
        np.abs(records.logprobs[low:high] - plain[key.tobytes()])
        for records in found
        for key, low, high in zip(records.keys, records.offsets, records.offsets[1:], strict=False)
    ]
    gap = float(np.concatenate(gaps).mean())
    if gap <= (0.1 if low_precision(reference) else 1e-3):
        return None
    return f"{reference.name} gives documents that share a beginning other log-probabilities, by {gap:.2g} nats"


def _alone(documents: DocumentSet, index: int, reference: Reference) -> Floats:
    """Log-probabilities of a document's completion tokens, without a shared beginning."""
    rows = laid_out(documents, np.asarray([index]), reference.device)
    hidden, _ = reference.forward(rows.ids, rows.lengths, ())
    found = reference.predictions(hidden.flatten(0, 1)[rows.read], rows.ids.flatten()[rows.predicted])
    logprobs: Floats = found[0].cpu().numpy()
    return logprobs


def plan_rows(documents: DocumentSet, wanted: Ints, budget: int) -> list[Row]:
    """The `wanted` documents in rows, each of one group; `budget` limits the tokens of rows of several documents."""
    groups, shared = _branches(documents).groups, _branches(documents).lengths
    order = wanted[np.lexsort((wanted, -shared[wanted], groups[wanted]))]
    rows: list[Row] = []
    for group in np.split(order, 1 + np.flatnonzero(np.diff(groups[order]))) if len(order) else []:
        longest, sizes = int(shared[group[0]]), documents.lengths[group] - shared[group]
        masked = MASKED // (longest + WIDE)
        room = max(1, min(max(longest, NARROW), WIDE, masked, max(budget - longest, budget // 2)))
        number = max(1, -(-int(sizes.sum()) // room))
        even = -(-int(sizes.sum()) // number)
        room = min(room, even + int(sizes.max()) - 1)  # so that the last row is as full as the others
        opens, filled = [], 0
        for place, size in enumerate(sizes.tolist()):
            if place and filled + size > room:
                opens.append(place)
                filled = 0
            filled += size
        rows += np.split(group, opens)
    return rows


def _branches(documents: DocumentSet) -> Branches:
    assert documents.branches is not None
    return documents.branches


def _tokens(documents: DocumentSet, rows: list[Row]) -> Ints:
    """Tokens of the beginning of each row, and of the rest of its documents, (2, G)."""
    shared = _branches(documents).lengths
    found = [(shared[row[0]], (documents.lengths[row] - shared[row]).sum()) for row in rows]
    tokens: Ints = np.asarray(found, dtype=np.int64).reshape(-1, 2).T
    return tokens


def plan_branches(documents: DocumentSet, wanted: Ints, budget: int) -> list[list[Row]]:
    """Batches of rows of similar lengths, the longest first. A batch of several rows stays within the token budget."""
    rows = plan_rows(documents, wanted, budget)
    begins, rests = _tokens(documents, rows)
    # sorted by classes of similar beginnings, and within a class by the rest: down in one class, up in the next
    alike = (8 * np.log2(begins)).astype(np.int64)
    order = np.lexsort((np.where(alike % 2, rests, -rests), -alike))
    split = cheapest(np.stack([begins, rests], axis=1)[order], budget)
    return [[rows[place] for place in order[batch]] for batch in split]


def share_out_rows(documents: DocumentSet, wanted: Ints, size: int, budget: int) -> Ints:
    """The rank of each wanted document, (n,): those of a row are on one rank, and ranks read about as many tokens."""
    rows = plan_rows(documents, wanted, budget)
    rank_of = np.zeros(len(documents), dtype=np.int64)
    for row, rank in zip(rows, share_out(_tokens(documents, rows).sum(axis=0), size), strict=True):
        rank_of[row] = rank
    return rank_of[wanted]


def score_branches(
    documents: DocumentSet,
    wanted: Ints,
    reference: Reference,
    budget: int,
    stats: ScoringStats,
    *,
    planned: Ints | None = None,
) -> Iterator[Records]:
    """Scores of the `wanted` documents, a batch at a time.

    Equals the scores of the documents one by one, up to rounding. A batch that does not fit into memory is split, and
    so are larger ones after it.

    Args:
        documents, wanted, reference: inside `reference.scoring(record=False, masked=True)`.
        budget: padded tokens of a batch.
        stats: tokens, padded tokens, batches and halvings are added to it.
        planned: documents of the whole pass, `wanted` among them; see `whole_batches_first`. None: `wanted`.

    Raises:
        XTFError: the decoder failed; a single document does not fit into memory.
    """
    plan = partial(plan_branches, documents, budget=budget)
    pending = whole_batches_first(plan, wanted, wanted if planned is None else planned)[::-1]
    fits = None  # padded tokens, once memory ran out
    while pending:
        batch = pending.pop()
        begins, rests = _tokens(documents, batch)
        number, padded = sum(map(len, batch)), len(batch) * int(begins.max() + rests.max())
        if fits is None or padded <= fits or number == 1:
            records, problem = within_memory(partial(_scores, documents, batch, reference))
            if records is not None:
                stats.tokens += int(begins.sum() + rests.sum())
                stats.padded_tokens += padded
                stats.batches += 1
                yield records
                continue
            longest = int(documents.lengths[np.concatenate(batch)].max())
            fits = halved_budget(number, longest, padded, reference.device, problem)
            stats.halvings += 1
        pending += _halves(batch)[::-1]


def _halves(batch: list[Row]) -> list[list[Row]]:
    """A batch of several documents in two: half of the rows each, or half of the documents of its only row."""
    if len(batch) == 1:
        return [[half] for half in np.array_split(batch[0], 2)]
    return [batch[: len(batch) // 2], batch[len(batch) // 2 :]]


def _scores(documents: DocumentSet, batch: list[Row], reference: Reference) -> Records:
    """Scores of the documents of a batch; NaN where nothing stands before a token."""
    chosen, row = np.concatenate(batch), np.repeat(np.arange(len(batch)), [len(part) for part in batch])
    lengths = _branches(documents).lengths
    beginnings = _padded([documents.document(part[0])[0][: lengths[part[0]]] for part in batch])
    rest = _Rest.of(documents, chosen, row)
    states = _read(reference, beginnings, rest)
    offsets = documents.completion_offsets
    sizes = offsets[chosen + 1] - offsets[chosen]
    at = stretches(offsets[chosen], sizes)  # the completion tokens
    owner = np.repeat(np.arange(len(chosen)), sizes)
    before = documents.completion_positions[at].astype(np.int64) - 1  # of the token that predicts each
    beyond = before - lengths[chosen][owner]
    of_rest = beginnings.size + row[owner] * rest.ids.shape[1] + rest.columns[owner] + beyond
    place = np.where(beyond < 0, row[owner] * beginnings.shape[1] + before, of_rest)
    known = before >= 0
    targets = documents.input_ids[documents.completion_flat[at[known]]].astype(np.int64)
    columns = np.full((3, len(at)), np.nan, dtype=np.float32)
    chosen_states = states[_there(place[known], reference).to(states.device)]
    columns[:, known] = reference.predictions(chosen_states, _there(targets, reference)).cpu().numpy()
    logprobs, entropy, deviation = columns
    return Records(logprobs, entropy, deviation, keys=documents.keys[chosen], offsets=offsets_of(sizes))


@dataclass(frozen=True)
class _Rest:
    """What the documents of G rows have after their shared beginnings, side by side.

    Args:
        ids, positions: (G, R) token ids, and the position of each in its document; 0: padding.
        owner: (G, R) document of each token, as an index into those of the batch; -1: padding.
        reach: (G, R) tokens of the row's beginning that each sees.
        columns: (n,) where each document begins in its row.
    """

    ids: Ints
    positions: Ints
    owner: Ints
    reach: Ints
    columns: Ints

    @classmethod
    def of(cls, documents: DocumentSet, chosen: Ints, row: Ints) -> _Rest:
        """Lay out the documents `chosen` (n,) of the rows `row` (n,), ascending."""
        shared = _branches(documents).lengths[chosen]
        sizes = documents.lengths[chosen] - shared
        before = np.cumsum(sizes) - sizes  # rests of earlier documents of the batch
        columns = before - before[np.searchsorted(row, row)]
        shape = int(row[-1]) + 1, int((columns + sizes).max())
        owner = np.repeat(np.arange(len(chosen)), sizes)
        inside = np.arange(len(owner)) - before[owner]
        positions = shared[owner] + inside
        ids = documents.input_ids[documents.offsets[chosen][owner] + positions]

        def spread(values: NDArray[Any], fill: int) -> Ints:
            array = np.full(shape, fill, dtype=np.int64)
            array[row[owner], columns[owner] + inside] = values
            return array

        return cls(spread(ids, 0), spread(positions, 0), spread(owner, -1), spread(shared[owner], 0), columns)


def _read(reference: Reference, beginnings: Ints, rest: _Rest) -> Tensor:
    """Last hidden states of beginnings (G, W) and then of the rest (G, R), flat: (G W + G R, D)."""
    cache = DynamicCache()
    states = _states(reference, _there(beginnings, reference), cache).flatten(0, 1)
    if not rest.ids.size:
        return states
    given = {
        "attention_mask": _masks(reference, rest, beginnings.shape[1]),
        "position_ids": _there(rest.positions, reference),
    }
    return torch.cat([states, _states(reference, _there(rest.ids, reference), cache, **given).flatten(0, 1)])


def _masks(reference: Reference, rest: _Rest, width: int) -> Any:
    """What the rest sees of beginnings (G, width) and of itself, (G, 1, R, width + R); a dict by kind of layer."""
    config, device = reference.text_config, reference.device
    owner, reach, positions = (_there(part, reference).int() for part in (rest.owner, rest.reach, rest.positions))
    places = torch.arange(width, dtype=torch.int32, device=device)
    itself = (owner[:, :, None] == owner[:, None, :]).tril()  # padding sees padding: of nothing, softmax would be NaN
    seen = torch.cat([places < reach[:, :, None], itself], dim=2)
    near, window = seen, getattr(config, "sliding_window", None)
    if window:
        keys = torch.cat([places.expand(len(positions), -1), positions], dim=1)
        near = seen & (positions[:, :, None] - keys[:, None, :] < window)
    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention"])
    masks = {kind: (near if kind == "sliding_attention" else seen)[:, None] for kind in kinds}
    if config._attn_implementation == "eager":  # it adds the mask to its scores
        dtype = reference.embeddings.weight.dtype
        lowest = torch.finfo(dtype).min
        masks = {kind: torch.where(mask, 0.0, lowest).to(dtype) for kind, mask in masks.items()}
    return masks if len(masks) > 1 else masks.popitem()[1]


def _states(reference: Reference, ids: Tensor, cache: Any, **given: Any) -> Tensor:
    name = "cache" if "cache" in inspect.signature(reference.decoder.forward).parameters else "past_key_values"
    try:
        found: Tensor = reference.decoder(input_ids=ids, use_cache=True, **{name: cache}, **given).last_hidden_state
    except CANNOT as error:
        if is_out_of_memory(error):
            raise
        problem = f"{type(error).__name__}: {error}"
        raise XTFError(f"{reference.name} fails on documents that share a beginning ({problem})") from error
    return found


def _there(array: NDArray[Any], reference: Reference) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(reference.device)


def _padded(rows: list[NDArray[Any]]) -> Ints:
    """Rows with zeros on the right, (n, longest)."""
    result = np.zeros((len(rows), max(map(len, rows))), dtype=np.int64)
    for row, ids in zip(result, rows, strict=True):
        row[: len(ids)] = ids
    return result
