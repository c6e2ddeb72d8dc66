"""Statistics of a score table: totals, spread of scores, combinations of rules, tokens that go or hardly stay.

Counts are occurrences in the dataset. Examples are taken from the first document, by key, that has one, so they do not
depend on the order of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..config.block import XTFConfig
from ..data.documents import DocumentSet
from ..data.ragged import Bools, Floats, Ints, Layout, dataset_quantiles
from ..selection.select import DECISIONS, Selection, rule_bits
from ..data.token_text import SPREAD, characters
from .score_table import ScoreTable
from .terminal import text_of
from .whatif import Slider

BINS = 40
TOP = 25
AROUND = 6  # tokens of context on each side of an example
_ENDS = 0.002  # shares of the scores beyond the outermost bins' edges


def share(part: float, whole: float) -> float:
    """A part of a whole; 0 of nothing."""
    return float(part) / float(whole) if whole else 0.0


class Verdicts:
    """How many tokens of the dataset met each verdict: all counts of fired rules and dropped tokens are sums over it.

    Args:
        config: the block.
        reasons: (M,) bits; keep: (M,).
        weights: (M,) occurrences in the dataset.
    """

    def __init__(self, config: XTFConfig, selection: Selection | ScoreTable, weights: Ints) -> None:
        """Count each pair of reason and keep flag once."""
        self.bits = rule_bits(config)
        sums = np.bincount(selection.reasons.astype(np.int64) * 2 + selection.keep, weights)
        self.found = [(at >> 1, bool(at & 1), int(sums[at])) for at in np.flatnonzero(sums).tolist()]
        self.rules = sum(self.bits.values())

    def count(self, all_of: int = 0, none_of: int = 0, kept: bool | None = None) -> int:
        """Tokens whose reason has all of some bits and none of others; None: kept and dropped ones."""
        return sum(
            tokens
            for reason, flag, tokens in self.found
            if reason & all_of == all_of and not reason & none_of and kept in (None, flag)
        )

    def totals(self) -> dict[str, Any]:
        """Completion tokens: kept, dropped, by attribute or selector, by decision; overlaps."""
        tokens, kept = self.count(), self.count(kept=True)
        fired = {name: self.count(bit) for name, bit in self.bits.items()}
        dropped = {name: self.count(bit, kept=False) for name, bit in self.bits.items()}
        return {
            "completion_tokens": tokens,
            "kept_tokens": kept,
            "dropped_tokens": tokens - kept,
            "kept_fraction": share(kept, tokens),
            "attributes": {
                name: {
                    "fired": fired[name],
                    "dropped": dropped[name],
                    "dropped_alone": self.count(bit, self.rules - bit, kept=False),
                    "fired_fraction": share(fired[name], tokens),
                    "dropped_fraction": share(dropped[name], tokens),
                }
                for name, bit in self.bits.items()
            },
            "decided_by": {name: self.count(bit) for name, bit in DECISIONS.items()},
            "overlap_of_the_smaller_set": {
                f"{first} & {second}": share(self.count(a | b), min(fired[first], fired[second]))
                for (first, a), (second, b) in combinations(self.bits.items(), 2)
            },
        }

    def combinations(self) -> list[dict[str, Any]]:
        """How many tokens each combination of rules fired on, the largest first; those of no rule are last."""
        sums: dict[int, int] = {}
        for reason, _, tokens in self.found:
            sums[reason & self.rules] = sums.get(reason & self.rules, 0) + tokens
        found = [
            {"rules": [name for name, bit in self.bits.items() if value & bit], "tokens": tokens}
            for value, tokens in sums.items()
        ]
        return sorted(found, key=lambda each: (not each["rules"], -each["tokens"]))


def distributions(table: ScoreTable) -> dict[str, Any]:
    """A histogram of each score, as its rule saw it. The outermost bins hold everything beyond them, too."""
    return {name: _histogram(values, table.layout, table.weights) for name, values in table.scores.items()}


def _histogram(values: Floats, layout: Layout, weights: Ints) -> dict[str, Any]:
    low, middle, high = (float(v) for v in dataset_quantiles(values, layout, [_ENDS, 0.5, 1 - _ENDS]))
    undefined = int(weights[np.isnan(values)].sum())
    if not np.isfinite([low, high]).all():
        return {"edges": [], "tokens": [], "undefined": undefined, "median": None}
    if high <= low:
        high = low + max(abs(low), 1.0) * 1e-3
    edges = np.linspace(low, high, BINS + 1)
    known = ~np.isnan(values)
    places = np.clip(np.searchsorted(edges, values[known], side="right") - 1, 0, BINS - 1)
    counts = np.bincount(places, weights=weights[known], minlength=BINS)
    return {
        "edges": [float(f"{edge:.5g}") for edge in edges],
        "tokens": [int(count) for count in counts],
        "undefined": undefined,
        "median": float(f"{middle:.5g}"),
    }


def token_tables(table: ScoreTable, sliders: Sequence[Slider]) -> dict[str, list[dict[str, Any]]]:
    """Which tokens are dropped most often, and which kept ones lie nearest to a threshold.

    A kept token is on the border if its rule fires on it within the slider's next two stops. Classes (`cluster`) are
    not stops of one threshold, so that slider counts for nothing here.
    """
    border = np.zeros(len(table.keep), dtype=bool)
    for slider in (each for each in sliders if each.key != "cluster"):
        border |= slider.patterns[slider.codes, slider.at + 1 : slider.at + 3].any(axis=1)
    return {"most_dropped": _most(table, ~table.keep), "borderline_kept": _most(table, table.keep & border)}


def _most(table: ScoreTable, marks: Bools) -> list[dict[str, Any]]:
    ids, weights = table.token_ids, table.weights
    distinct, places = np.unique(ids, return_inverse=True)
    places = places.reshape(-1)
    marked = np.bincount(places[marks], weights=weights[marks], minlength=len(distinct)).astype(np.int64)
    everywhere = np.bincount(places, weights=weights, minlength=len(distinct)).astype(np.int64)
    order = np.lexsort((distinct, -marked))[:TOP]
    order = order[marked[order] > 0]
    where = np.flatnonzero(marks & np.isin(ids, distinct[order]))
    by_key = where[np.lexsort((where, _rank_of_documents(table)[where]))]
    firsts = {int(ids[at]): int(at) for at in by_key[::-1]}
    return [
        {
            "token_id": int(distinct[place]),
            "token": text_of(table.pieces[int(distinct[place])]),
            "tokens": int(marked[place]),
            "of": int(everywhere[place]),
            "example": _example(table, firsts[int(distinct[place])]),
        }
        for place in order.tolist()
    ]


def by_key(table: ScoreTable) -> Ints:
    """The documents in the order of their keys, which are hashes: chance, and the same for the same data."""
    return np.argsort(np.ascontiguousarray(table.keys).view("S16").reshape(-1), kind="stable")


def _rank_of_documents(table: ScoreTable) -> Ints:
    """For each completion token, the place of its document among all by key."""
    ranks = np.empty(len(table.keys), dtype=np.int64)
    ranks[by_key(table)] = np.arange(len(ranks))
    return table.layout.spread(ranks)


def _example(table: ScoreTable, at: int) -> dict[str, Any]:
    """A token with the completion tokens around it, all within its document; of a character that is spread over several
    tokens, the whole.
    """
    document = int(np.searchsorted(table.offsets, at, side="right")) - 1
    reach = AROUND + SPREAD
    low, high = max(int(table.offsets[document]), at - reach), min(int(table.offsets[document + 1]), at + reach + 1)
    texts = {"before": "", "token": "", "after": ""}
    for first, number, text in characters([table.pieces[int(i)] for i in table.token_ids[low:high]]):
        begin, end = low + first, low + first + number
        if end > at - AROUND and begin <= at + AROUND:
            texts["before" if end <= at else "after" if begin > at else "token"] += text_of(text)
    return {"document": table.key(document), **texts}


def endings(table: ScoreTable, documents: DocumentSet, special: NDArray[np.int64]) -> dict[str, Any]:
    """Special tokens among the completions, kept and dropped, and documents whose last token is none.

    A document that does not end in one was cut off (`max_length`, `sequence_len`), or its template writes none. White
    space behind the last token does not count: many templates end a turn with a line break.
    """
    ids, weights, found = table.token_ids, table.weights, []
    for token in np.intersect1d(ids, special).tolist():
        marks = ids == token
        total, gone = int(weights[marks].sum()), int(weights[marks & ~table.keep].sum())
        found.append({"token_id": token, "token": text_of(table.pieces[token]), "labelled": total, "dropped": gone})
    blank = np.asarray([i for i, piece in table.pieces.items() if piece and not piece.strip()], dtype=np.int64)
    starts, ends = documents.offsets[:-1], documents.offsets[1:].copy()
    while True:
        trailing = (ends > starts) & np.isin(documents.input_ids[np.maximum(ends - 1, 0)], blank)
        if not trailing.any():
            break
        ends[trailing] -= 1
    last = np.maximum(ends - 1, 0)
    open_end = (ends > starts) & documents.completion[last] & ~np.isin(documents.input_ids[last], special)
    return {"special_tokens": found, "documents_ending_without_one": int(documents.counts[open_end].sum())}
