"""Statistics of a score table: totals, distributions of scores, combinations of rules, dropped and borderline tokens.

Counts are occurrences in the dataset. An example comes from the first document, by key, that has the token, so it does
not depend on the order of rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..config.block import XTFConfig
from ..data.documents import DocumentSet
from ..data.ragged import Bools, Floats, Ints, Layout, dataset_quantiles
from ..data.token_text import SPREAD, characters
from ..selection.select import DECISIONS, Selection, rule_bits
from .score_table import ScoreTable
from .terminal import text_of
from .whatif import Slider

BINS = 40
TOP = 25
AROUND = 6  # tokens of context on each side of an example
_ENDS = 0.002  # share of the scores beyond each end of a histogram


def share(part: float, total: float) -> float:
    """`part / total`; 0 if the total is 0."""
    return float(part) / float(total) if total else 0.0


class Verdicts:
    """Number of tokens by reason and keep flag; counts of fired rules and dropped tokens are sums over it.

    Args:
        config: the block.
        selection: its `reasons` and `keep`, (M,), are read.
        weights: (M,) occurrences in the dataset.
    """

    def __init__(self, config: XTFConfig, selection: Selection | ScoreTable, weights: Ints) -> None:
        """Count each pair of reason and keep flag once."""
        self.bits = rule_bits(config)
        sums = np.bincount(selection.reasons.astype(np.int64) * 2 + selection.keep, weights)
        self.found = [(at >> 1, bool(at & 1), int(sums[at])) for at in np.flatnonzero(sums).tolist()]
        self.rules = sum(self.bits.values())

    def count(self, all_of: int = 0, none_of: int = 0, kept: bool | None = None) -> int:
        """Tokens whose reason has all bits of `all_of` and none of `none_of`; `kept` None: kept and dropped tokens."""
        return sum(
            tokens
            for reason, flag, tokens in self.found
            if reason & all_of == all_of and not reason & none_of and kept in (None, flag)
        )

    def totals(self) -> dict[str, Any]:
        """Completion tokens: kept, dropped, by score, by decision; overlaps of rules."""
        tokens, kept = self.count(), self.count(kept=True)
        fired = {name: self.count(bit) for name, bit in self.bits.items()}
        dropped = {name: self.count(bit, kept=False) for name, bit in self.bits.items()}
        return {
            "completion_tokens": tokens,
            "kept_tokens": kept,
            "dropped_tokens": tokens - kept,
            "kept_fraction": share(kept, tokens),
            "scores": {
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
        """Number of tokens that each set of rules fired on, largest first; tokens without a rule come last."""
        sums = Counter[int]()
        for reason, _, tokens in self.found:
            sums[reason & self.rules] += tokens
        named = [([name for name, bit in self.bits.items() if fired & bit], count) for fired, count in sums.items()]
        named.sort(key=lambda each: (not each[0], -each[1]))
        return [{"rules": rules, "tokens": count} for rules, count in named]


def distributions(table: ScoreTable) -> dict[str, Any]:
    """A histogram of each score as its rule saw it; the outermost bins include everything beyond them."""
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
    """The tokens that are dropped most often, and the kept tokens nearest to a threshold.

    A kept token is on the border if its rule fires on it within the slider's next two stops. `cluster` is excluded: its
    stops are classes and not thresholds in order.
    """
    border = np.zeros(len(table.keep), dtype=bool)
    for slider in (each for each in sliders if each.key != "cluster"):
        border |= slider.patterns[slider.codes, slider.at + 1 : slider.at + 3].any(axis=1)
    return {"most_dropped": _most(table, ~table.keep), "borderline_kept": _most(table, table.keep & border)}


def _most(table: ScoreTable, marks: Bools) -> list[dict[str, Any]]:
    """The `TOP` token ids with the most marked occurrences."""
    ids, weights = table.token_ids, table.weights
    distinct, places = np.unique(ids, return_inverse=True)
    places = places.reshape(-1)
    marked = np.bincount(places[marks], weights=weights[marks], minlength=len(distinct)).astype(np.int64)
    everywhere = np.bincount(places, weights=weights, minlength=len(distinct)).astype(np.int64)
    order = np.lexsort((distinct, -marked))[:TOP]
    order = order[marked[order] > 0]
    where = np.flatnonzero(marks & np.isin(ids, distinct[order]))
    ranks = np.empty(len(table.keys), dtype=np.int64)
    ranks[by_key(table)] = np.arange(len(ranks))
    where = where[np.lexsort((where, table.layout.spread(ranks)[where]))]
    firsts = {int(ids[at]): int(at) for at in where[::-1]}
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
    """Indices of the documents in the order of their keys; keys are hashes, so this order is random but fixed."""
    return np.argsort(np.ascontiguousarray(table.keys).view("S16").reshape(-1), kind="stable")


def _example(table: ScoreTable, at: int) -> dict[str, Any]:
    """A token with the completion tokens around it; a character spread over several tokens is shown complete."""
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
    """Special tokens among the completions, kept and dropped, and documents whose last token is not special.

    Such a document was cut off (`max_length`, `sequence_len`), or its template writes no special token. Trailing
    whitespace is ignored: many templates end a turn with a line break.
    """
    ids, weights, found = table.token_ids, table.weights, []
    for token in np.intersect1d(ids, special).tolist():
        marks = ids == token
        total, dropped = int(weights[marks].sum()), int(weights[marks & ~table.keep].sum())
        found.append({"token_id": token, "token": text_of(table.pieces[token]), "labelled": total, "dropped": dropped})
    blank = np.asarray([i for i, piece in table.pieces.items() if piece and not piece.strip()], dtype=np.int64)
    starts, ends = documents.offsets[:-1], documents.offsets[1:].copy()
    trailing = np.ones(len(ends), dtype=bool)
    while trailing.any():
        trailing = (ends > starts) & np.isin(documents.input_ids[np.maximum(ends - 1, 0)], blank)
        ends[trailing] -= 1
    last = np.maximum(ends - 1, 0)
    cut_off = (ends > starts) & documents.completion[last] & ~np.isin(documents.input_ids[last], special)
    return {"special_tokens": found, "documents_ending_without_one": int(documents.counts[cut_off].sum())}
