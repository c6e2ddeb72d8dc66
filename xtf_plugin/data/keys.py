"""The key of a document, by which it is found again: a hash of its token ids and of which of them are trained.

Many keys are made, sorted and compared as arrays, because a Python object for each of a million documents takes seconds
and gigabytes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from .ragged import CHUNK_TOKENS, Bools, Hashes, Ints, offsets_of, runs, stretches

KEY_BYTES = 16


def document_key(input_ids: NDArray[Any], completion: Bools) -> bytes:
    """128-bit key of a document: `xxh3_128(int64 little-endian token ids + packed label mask)`, 16 bytes.

    Args:
        input_ids: (T,) token ids.
        completion: (T,) True where the label is not -100.
    """
    state = xxhash.xxh3_128(np.ascontiguousarray(input_ids, dtype="<i8").data)
    state.update(np.packbits(completion).data)
    return state.digest()


def document_keys(input_ids: NDArray[Any], completion: Bools, offsets: Ints) -> NDArray[np.uint8]:
    """`document_key` of N documents in flat arrays, (N, 16).

    Args:
        input_ids, completion: flat token ids and label masks.
        offsets: (N + 1,) where each document begins and ends in them.
    """
    found = [np.zeros((0, KEY_BYTES), dtype=np.uint8)]
    for part in runs(offsets, CHUNK_TOKENS):
        bounds = offsets[part.start : part.stop + 1]
        here, lengths = slice(int(bounds[0]), int(bounds[-1])), np.diff(bounds)
        # each document in whole words of 64 bits: its token ids, then its mask
        of_mask = -(-lengths // 64)
        begins, masks = offsets_of(lengths + of_mask), offsets_of(of_mask)
        words, bits = np.zeros(begins[-1], dtype="<i8"), np.zeros(64 * masks[-1], dtype=bool)
        words[stretches(begins[:-1], lengths)] = input_ids[here]
        bits[stretches(64 * masks[:-1], lengths)] = completion[here]
        words[stretches(begins[:-1] + lengths, of_mask)] = np.packbits(bits).view("<i8")
        data, starts = words.view(np.uint8).data, 8 * begins[:-1]
        spans = zip(starts.tolist(), (starts + 8 * lengths + -(-lengths // 8)).tolist(), strict=True)
        made = b"".join([xxhash.xxh3_128_digest(data[low:high]) for low, high in spans])
        found.append(np.frombuffer(made, dtype=np.uint8).reshape(-1, KEY_BYTES))
    return np.concatenate(found)


def halves(keys: NDArray[np.uint8]) -> Hashes:
    """The two big-endian halves of keys (N, 16) as numbers, (N, 2), which sort as the keys do."""
    return np.ascontiguousarray(keys).view(">u8").astype(np.uint64).reshape(-1, 2)


def key_order(numbers: Hashes) -> Ints:
    """The stable order of keys, given their `halves`, (N,)."""
    order = np.argsort(numbers[:, 0], kind="stable")
    high, low = numbers[order].T
    if ((high[1:] == high[:-1]) & (low[1:] != low[:-1])).any():  # next to never: half of two hashes is equal
        order = np.lexsort((numbers[:, 1], numbers[:, 0]))
    return order


def distinct(keys: NDArray[np.uint8]) -> tuple[Ints, Ints]:
    """The distinct ones among keys (N, 16) in order of first appearance.

    Returns:
        the place of the first of each, (n,) ascending; and which of these every key equals, (N,).
    """
    numbers = halves(keys)
    order = key_order(numbers)
    opens = np.ones(len(keys), dtype=bool)
    opens[1:] = (numbers[order[1:]] != numbers[order[:-1]]).any(axis=1)
    first = order[opens]
    by_place = np.argsort(first)
    rank = np.empty(len(first), dtype=np.int64)
    rank[by_place] = np.arange(len(first))
    which = np.empty(len(keys), dtype=np.int64)
    which[order] = rank[np.cumsum(opens) - 1]
    return first[by_place], which
