"""Vectorised arithmetic on flat per-token arrays that are cut into documents.

No result of a document depends on other documents, and no result on their order.
Sums over tokens are therefore integers, or taken over a fixed pattern of neighbours, and never differences of a running
floating-point sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

CHUNK_TOKENS = 1 << 17  # temporaries fit the processor's cache; larger ones take up to half as long again
UNDEFINED_KEY = np.uint32(0xFFFFFFFF)

Bools = NDArray[np.bool_]
Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Ints = NDArray[np.int64]
Keys = NDArray[np.uint32]
Hashes = NDArray[np.uint64]
T = TypeVar("T", bound=np.generic)
Scale = Callable[[Doubles], Doubles]


def chunks(total: int, size: int) -> Iterator[slice]:
    """Slices of `size` items that cover `total` items in order; the last one may be shorter."""
    return (slice(low, min(low + size, total)) for low in range(0, total, size))


def offsets_of(lengths: Ints) -> Ints:
    """Where documents of these lengths (N,) begin and end in a flat array, (N + 1,)."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def runs(offsets: Ints, size: int) -> Iterator[slice]:
    """Slices of consecutive documents with at most `size` tokens together; a longer document is alone."""
    low = 0
    while low < len(offsets) - 1:
        high = max(low + 1, int(np.searchsorted(offsets, offsets[low] + size, side="right")) - 1)
        yield slice(low, high)
        low = high


def identity(values: Doubles) -> Doubles:
    """The linear scale."""
    return values


@dataclass(frozen=True)
class Layout:
    """The documents of a flat array of M tokens, and how often each occurs in the dataset.

    Args:
        offsets: (N + 1,) int64; document `i` is the tokens `offsets[i]` up to `offsets[i + 1]`, possibly none.
        counts: (N,) int64, the weight of each document in statistics over the dataset.
    """

    offsets: Ints
    counts: Ints

    @property
    def lengths(self) -> Ints:
        """Tokens per document, (N,)."""
        return np.diff(self.offsets)

    def chunks(self, padding: int = 0) -> Iterator[tuple[slice, slice, Layout]]:
        """Group consecutive documents into runs of about 131,000 tokens: (tokens, documents, layout of the run) each.

        Args:
            padding: tokens that each document counts for beyond its own.
        """
        for run in runs(self.offsets + padding * np.arange(len(self.offsets)), CHUNK_TOKENS):
            bounds = self.offsets[run.start : run.stop + 1]
            yield slice(int(bounds[0]), int(bounds[-1])), run, Layout(bounds - bounds[0], self.counts[run])

    def spread(self, per_document: NDArray[T]) -> NDArray[T]:
        """Repeat one value per document over its tokens, (N,) -> (M,)."""
        return np.repeat(per_document, self.lengths)

    def count(self, flags: Bools) -> Ints:
        """Number of marked tokens per document, (M,) -> (N,)."""
        return np.diff(np.searchsorted(np.flatnonzero(flags), self.offsets))

    def occurrences(self, flags: Bools) -> int:
        """Number of marked tokens in the dataset; each document counts as often as it occurs."""
        return sum(int(part.count(flags[tokens]) @ part.counts) for tokens, _, part in self.chunks())


def sort_keys(scores: Floats) -> Keys:
    """Integers that sort like the scores, (M,) uint32; NaN sorts last, as `UNDEFINED_KEY`."""
    bits = (scores + np.float32(0)).view(np.uint32)  # -0.0 + 0 is 0.0; -0.0 would sort below it
    keys: Keys = np.where(bits >> 31, ~bits, bits | np.uint32(0x80000000))
    keys[np.isnan(scores)] = UNDEFINED_KEY
    return keys


def from_sort_keys(keys: Keys) -> Doubles:
    """Inverse of `sort_keys`, in float64."""
    bits = np.where(keys >> 31, keys & np.uint32(0x7FFFFFFF), ~keys).astype(np.uint32)
    scores = bits.view(np.float32).astype(np.float64)
    scores[keys == UNDEFINED_KEY] = np.nan
    return scores


def windowed(scores: Floats, layout: Layout, window: int) -> Floats:
    """Average every defined score with its neighbours within the document, (M,) -> (M,).

    Equals `np.nanmean(document[max(0, i - window // 2) : i + window // 2 + 1])` for each `i` that is not NaN itself.
    """
    if window == 1:
        return scores
    result = np.empty_like(scores)
    half = window // 2
    for tokens, _, part in layout.chunks(padding=half):
        # `half` zeros around every document keep their sums apart; a window then starts at `first`
        first = np.arange(int(part.offsets[-1])) + part.spread(np.arange(len(part.counts)) * half)
        size = int(part.offsets[-1]) + (len(part.counts) + 1) * half
        values, defined = np.zeros(size), np.zeros(size)
        known = ~np.isnan(scores[tokens])
        values[first + half] = np.where(known, scores[tokens], 0)
        defined[first + half] = known
        total, number = _sliding_sum(values, window)[first], _sliding_sum(defined, window)[first]
        result[tokens] = np.where(known, total / np.maximum(number, 1), np.nan)
    return result


def segment_means(scores: Floats, layout: Layout, starts: Ints) -> Floats:
    """Replace every defined score by the mean of its segment's defined scores, (M,) -> (M,).

    Equals `np.nanmean(scores[starts[s] : starts[s + 1]])` for each token of segment `s` that is not NaN itself.

    Args:
        starts: (S,) strictly ascending first tokens of the segments; every non-empty document begins one.

    Returns:
        `scores` itself if it has one value in each segment, as scorers of sentences give it.
    """
    if _one_value_each(scores, starts):
        return scores
    result = np.empty_like(scores)
    for tokens, _, _ in layout.chunks():
        if tokens.start == tokens.stop:
            continue
        low, high = np.searchsorted(starts, [tokens.start, tokens.stop])
        first = starts[low:high] - tokens.start
        known = ~np.isnan(scores[tokens])
        total = np.add.reduceat(np.where(known, scores[tokens], 0).astype(np.float64), first)
        number = np.add.reduceat(known.astype(np.int64), first)
        lengths = np.diff(first, append=tokens.stop - tokens.start)
        means = np.repeat(total / np.maximum(number, 1), lengths)
        result[tokens] = np.where(known, means, np.nan)
    return result


def _one_value_each(scores: Floats, starts: Ints) -> bool:
    """Whether all scores of each segment have the same bits."""
    bits, first = scores.view(np.uint32), np.zeros(len(scores), dtype=bool)
    first[starts] = True
    here = (slice(part.start, part.stop + 1) for part in chunks(len(scores) - 1, CHUNK_TOKENS))
    return not any(((bits[at][1:] != bits[at][:-1]) & ~first[at][1:]).any() for at in here)


def _sliding_sum(values: Doubles, window: int) -> Doubles:
    """`values[i : i + window].sum()` at every i by doubling, which adds in the same order everywhere."""
    total, power, done, width = np.zeros_like(values), values, 0, 1
    while width <= window:
        if window & width:
            total += _shifted(power, done)
            done += width
        power = power + _shifted(power, width)
        width *= 2
    return total


def _shifted(values: Doubles, by: int) -> Doubles:
    result = np.zeros_like(values)
    result[: max(0, len(values) - by)] = values[by:]
    return result


def lowest(keys: Keys, layout: Layout, number: Ints) -> tuple[Bools, Keys]:
    """Mark the `number[i]` smallest keys of document `i`: `np.argsort(keys_of_document, kind="stable")[:number[i]]`.

    Returns:
        the marks, (M,), and the largest marked key of each document, (N,); `UNDEFINED_KEY` where none is marked.
    """
    limits = np.full(len(number), UNDEFINED_KEY, dtype=np.uint32)
    some = number > 0
    marks = np.zeros(len(keys), dtype=bool)
    if not some.any():
        return marks, limits
    wanted = layout.spread(some)
    inner = Layout(offsets_of(layout.lengths[some]), layout.counts[some])
    keys, number = keys[wanted], number[some]
    limits[some] = sorted_keys(keys, inner)[inner.offsets[:-1] + number - 1]
    limit = inner.spread(limits[some])
    below, ties = keys < limit, keys == limit
    equal = np.flatnonzero(ties)
    document = np.searchsorted(inner.offsets, equal, side="right") - 1
    place = np.arange(len(equal)) - np.searchsorted(equal, inner.offsets)[document]  # among its document's ties
    below[equal[place < (number - inner.count(below))[document]]] = True
    marks[wanted] = below
    return marks, limits


def sorted_keys(keys: Keys, layout: Layout) -> Keys:
    """Sort the keys within each document, (M,) -> (M,)."""
    packed: NDArray[np.uint64] = layout.spread(np.arange(len(layout.counts), dtype=np.uint64) << np.uint64(32)) | keys
    packed.sort()  # lexsort or argsort takes five times as long
    return packed.astype(np.uint32)  # the lower half


def document_quantiles(scores: Floats, layout: Layout, q: Sequence[float], scale: Scale = identity) -> Doubles:
    """Quantiles of each document's defined scores, (len(q), N); NaN for a document without any.

    Equals `np.quantile(scale(scores_of_document), q)` for an increasing `scale`.
    """
    keys = sorted_keys(sort_keys(scores), layout)
    number = layout.count(~np.isnan(scores))
    some = number > 0
    result = np.full((len(q), len(number)), np.nan)
    for row, share in zip(result, q, strict=True):
        at = (number[some] - 1) * share
        low = np.floor(at).astype(np.int64)
        high = np.minimum(low + 1, number[some] - 1)
        start = layout.offsets[:-1][some]
        row[some] = _between(
            scale(from_sort_keys(keys[start + low])), scale(from_sort_keys(keys[start + high])), at - low
        )
    return result


def dataset_quantiles(scores: Floats, layout: Layout, q: Sequence[float], scale: Scale = identity) -> Doubles:
    """Quantiles of all defined scores, each counted as often as its document occurs, (len(q),); NaN if there is none.

    Equals `np.quantile(scale(np.repeat(scores, occurrences)), q)` for an increasing `scale`. Two passes count by the
    upper and the lower half of the sort key, so the dataset is not sorted.
    """
    upper = np.zeros(1 << 16, dtype=np.int64)
    for keys, weights in _weighted_keys(scores, layout):
        upper += _tally(keys >> 16, weights, 1 << 16)
    upper[-1] = 0  # NaN
    total = int(upper.sum())
    if total == 0:
        return np.full(len(q), np.nan)
    at = (total - 1) * np.asarray(q, dtype=np.float64)
    low = np.floor(at).astype(np.int64)
    ranks = np.stack([low, np.minimum(low + 1, total - 1)])
    ends = np.cumsum(upper)
    bucket = np.searchsorted(ends, ranks, side="right")
    wanted, slots = np.unique(bucket, return_inverse=True)
    slot_of = np.full(1 << 16, -1, dtype=np.int64)
    slot_of[wanted] = np.arange(len(wanted))
    lower = np.zeros(len(wanted) << 16, dtype=np.int64)
    for keys, weights in _weighted_keys(scores, layout):
        slot = slot_of[keys >> 16]
        here = slot >= 0
        inside = (slot[here] << 16) | (keys[here] & np.uint32(0xFFFF))
        lower += _tally(inside, None if weights is None else weights[here], len(lower))
    inner = np.cumsum(lower.reshape(len(wanted), -1), axis=1)
    found = np.empty(ranks.shape, dtype=np.uint32)
    for index in np.ndindex(*ranks.shape):
        slot, rest = slots.reshape(ranks.shape)[index], ranks[index] - (ends - upper)[bucket[index]]
        found[index] = (int(bucket[index]) << 16) | int(np.searchsorted(inner[slot], rest, side="right"))
    return _between(scale(from_sort_keys(found[0])), scale(from_sort_keys(found[1])), at - low)


def _weighted_keys(scores: Floats, layout: Layout) -> Iterator[tuple[Keys, Doubles | None]]:
    for tokens, _, part in layout.chunks():
        weights = None if (part.counts == 1).all() else part.spread(part.counts).astype(np.float64)
        yield sort_keys(scores[tokens]), weights


def _tally(index: NDArray[np.generic], weights: Doubles | None, size: int) -> Ints:
    return np.bincount(index.astype(np.int64), weights=weights, minlength=size).astype(np.int64)


def _between(low: Doubles, high: Doubles, share: Doubles) -> Doubles:
    """Linear interpolation with NumPy's rounding, so that quantiles equal NumPy's to the last bit."""
    return np.where(share < 0.5, low + (high - low) * share, high - (high - low) * (1 - share))


def random_keys(documents: NDArray[np.uint8], layout: Layout, seed: int) -> Keys:
    """A random number per token, (M,): SplitMix64 seeded by `seed`, any integer, and the key of the token's document.

    Args:
        documents: (N, 16) keys of the documents of `layout`.
    """
    halves = np.ascontiguousarray(documents).view("<u8").astype(np.uint64)
    start = _mix(_mix(halves[:, 0] ^ _mix(np.asarray([seed % (1 << 64)], dtype=np.uint64))) ^ halves[:, 1])
    step = np.arange(1, layout.offsets[-1] + 1) - layout.spread(layout.offsets[:-1])
    state = layout.spread(start) + step.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    keys: Keys = (_mix(state) >> np.uint64(32)).astype(np.uint32)
    return keys


def _mix(state: Hashes) -> Hashes:
    """The output function of SplitMix64 (Steele, Lea and Flood, 2014)."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: Hashes = state ^ (state >> np.uint64(31))
    return mixed


def gathered(values: NDArray[T], starts: Ints, lengths: Ints) -> NDArray[T]:
    """`values[stretches(starts, lengths)]`, without indices of all of them at a time."""
    ends = offsets_of(lengths)
    result = np.empty(int(ends[-1]), dtype=values.dtype)
    for part in runs(ends, CHUNK_TOKENS):
        result[ends[part.start] : ends[part.stop]] = values[stretches(starts[part], lengths[part])]
    return result


def stretches(starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Concatenated `np.arange(start, start + length)` of every span."""
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(int(lengths.sum()))
