"""Finds the format of a dataset: openings of lines and sentences that many documents share, such as `<think>`.

A new format is improbable to the reference and unexplained by any prompt, which is what noise looks like, too. What
tells them apart is form and number: a format is a mark at the beginning of a line or sentence in many documents.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .documents import DocumentSet
from .ragged import Bools, Hashes, Ints
from .token_text import token_bytes

LONGEST = 6  # tokens of an opening
SHORT = 12  # tokens of a unit that is protected as a whole; of a longer one the opening is
FEWEST = 3  # documents
# A sign that running text does without: : # < { [ | * = ` / and others.
MARK = re.compile(r"[^\w\s.,;!?'\"()\-–—’‘“”…]")


def format_tokens(
    documents: DocumentSet, starts: Ints, share: float, tokenizer: Any, special_ids: Sequence[int] | Ints = ()
) -> tuple[Bools, dict[str, float]]:
    """Completion tokens that belong to the format of a dataset, (M,), and the share of documents with each opening.

    The opening of a unit is the longest of its first 1 to 6 tokens that open units of at least `share` of all documents
    (and of three). It is format if its text contains a sign such as `:`, `#`, `<` or `{`. Units of up to 12 tokens
    that begin so are format as a whole, of longer ones the opening is. Special tokens are not format: they have a
    protection of their own.

    Args:
        documents: N documents with M completion tokens.
        starts: (S,) first completion token of each unit, ascending from 0.
        share: of the documents, in (0, 1].
        tokenizer: of the token ids.
        special_ids: ids of special tokens, each of which is a unit.
    """
    ids = documents.completion_ids
    lengths = np.diff(starts, append=len(ids))
    document = np.searchsorted(documents.completion_offsets, starts, side="right") - 1
    total = int(documents.counts.sum())
    reach, number, hashes = _common_openings(ids, starts, lengths, document, documents.counts, share * total)
    reach[np.isin(ids[starts], special_ids)] = 0
    some = np.flatnonzero(reach)
    _, first, opening = np.unique(hashes[some], return_index=True, return_inverse=True)
    first = some[first]  # a unit of each opening
    texts = _texts(ids, starts[first], reach[first], tokenizer)
    marked = np.asarray([MARK.search(text) is not None for text in texts], dtype=bool)
    reach[some[~marked[opening]]] = 0
    shares = {texts[at]: float(number[first[at]] / total) for at in np.flatnonzero(marked)}
    return _covered(starts, lengths, reach), dict(sorted(shares.items(), key=lambda i: -i[1]))


def known_format_tokens(documents: DocumentSet, starts: Ints, openings: Collection[str], tokenizer: Any) -> Bools:
    """Completion tokens that belong to a format that is known, (M,).

    A few documents of a stream do not tell what is common in it, so its calibration sample decides for all of them.

    Args:
        documents, starts, tokenizer: as in `format_tokens`.
        openings: that `format_tokens` found in the sample.
    """
    ids = documents.completion_ids
    lengths = np.diff(starts, append=len(ids))
    reach = np.zeros(len(starts), dtype=np.int64)
    for size in range(1, LONGEST + 1):
        texts = _texts(ids, starts, np.minimum(lengths, size), tokenizer)
        reach[[text in openings for text in texts]] = size
    return _covered(starts, lengths, reach)


def _covered(starts: Ints, lengths: Ints, reach: Ints) -> Bools:
    """Completion tokens of the openings of length `reach`, or of their whole units if those are short, (M,)."""
    covered = np.where((reach > 0) & (lengths <= SHORT), lengths, reach)
    some = np.flatnonzero(covered)
    change = np.zeros(int(lengths.sum()) + 1, dtype=np.int8)
    change[starts[some]] += 1
    change[starts[some] + covered[some]] -= 1  # which the next unit may begin with
    found: Bools = np.cumsum(change[:-1], dtype=np.int8) > 0
    return found


def _common_openings(
    ids: NDArray[Any], starts: Ints, lengths: Ints, document: Ints, counts: Ints, needed: float
) -> tuple[Ints, Ints, Hashes]:
    """Each unit's longest opening that enough documents share: its length, how many do, and a hash of it, (S,) each."""
    reach, shared = np.zeros(len(starts), dtype=np.int64), np.zeros(len(starts), dtype=np.int64)
    hashes, found = np.zeros(len(starts), dtype=np.uint64), np.zeros(len(starts), dtype=np.uint64)
    needed = max(FEWEST, needed)
    left = np.flatnonzero(lengths > 0)
    often = np.bincount(ids[starts[left]], counts[document[left]]) >= needed  # counts a document once per unit
    left = left[often[ids[starts[left]]]]
    for size in range(1, LONGEST + 1):
        left = left[lengths[left] >= size]
        if not len(left):
            break
        tokens = ids[starts[left] + size - 1].astype(np.uint64)
        hashes[left] = hashes[left] * np.uint64(0x9E3779B97F4A7C15) + tokens + np.uint64(1)
        number = _documents_with(hashes[left], document[left], counts)
        enough = number >= needed
        left = left[enough]  # a longer opening is at most as frequent
        reach[left], shared[left], found[left] = size, number[enough], hashes[left]
    return reach, shared, found


def _documents_with(hashes: Hashes, document: Ints, counts: Ints) -> Ints:
    """For each unit, the occurrences of documents that have a unit with the same hash; units in order of documents."""
    order = np.argsort(hashes, kind="stable")
    hashes, document = hashes[order], document[order]
    opens = np.append(True, hashes[1:] != hashes[:-1])
    fresh = opens | np.append(True, document[1:] != document[:-1])  # once per document
    number = np.add.reduceat(counts[document] * fresh, np.flatnonzero(opens))
    result = np.empty(len(order), dtype=np.int64)
    result[order] = number[np.cumsum(opens) - 1]
    return result


def _texts(ids: NDArray[Any], starts: Ints, sizes: Ints, tokenizer: Any) -> list[str]:
    """The text of the first tokens of each unit; a token is spelt once, because that reads the tokenizer."""
    openings = [tuple(ids[start : start + size].tolist()) for start, size in zip(starts, sizes, strict=True)]
    tokens = sorted({token for opening in set(openings) for token in opening})
    spelt = dict(zip(tokens, token_bytes(tokenizer, tokens), strict=True))
    return [b"".join(spelt[token] for token in opening).decode("utf-8", errors="replace") for opening in openings]
