"""What a report tells beyond totals: how scores are spread, which tokens go, which hardly stay, how documents end.

Pure functions of a plan. Counts are occurrences in the dataset; examples are taken from the first document, by key,
that has one, so they do not depend on the order of rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .config.block import KnowledgeNoveltyConfig
from .selection.rules import Segments, ready
from .selection.text_rules import special_ids
from .plan import Plan
from .sample import text_of
from .data.ragged import Layout, dataset_quantiles
from .selection.select import rule_bits
from .sliders import Slider
from .data.token_text import SPREAD, characters

BINS = 40
TOP = 25
AROUND = 6  # tokens of context on each side of an example
_ENDS = 0.002  # shares of the scores beyond the outermost bins' edges


def distributions(plan: Plan, segments: Segments | None) -> dict[str, Any]:
    """A histogram of each attribute's and selector's scores, as its rules see them (after the window).

    Units: reasoning importance 1.0 = uniform attention, knowledge novelty the probability that the reference gave,
    task relevance 0 to 1, selectors their own. The outermost bins hold everything beyond them, too.
    """
    scores, result = plan.scores, {}
    layout = Layout(scores.offsets, scores.counts)
    for voter in plan.config.voters:
        values = scores.of(voter)
        if values is None:
            continue
        part = plan.config.part(voter)
        shown, _ = ready(voter, values, scores.positions, layout, part, segments)
        if isinstance(part, KnowledgeNoveltyConfig):
            shown = np.exp(-shown)
        result[voter] = _histogram(shown, layout, plan.weights)
    return result


def _histogram(values: NDArray[np.float32], layout: Layout, weights: NDArray[np.int64]) -> dict[str, Any]:
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


def combinations(plan: Plan) -> list[dict[str, Any]]:
    """How many tokens each combination of rules fired on, the largest first; those that no rule fired on are last."""
    bits = rule_bits(plan.config)
    fired = plan.selection.reasons & np.asarray(sum(bits.values()), dtype=plan.selection.reasons.dtype)
    distinct, places = np.unique(fired, return_inverse=True)
    sums = np.bincount(places.reshape(-1), weights=plan.weights, minlength=len(distinct)).astype(np.int64)
    found = [
        {"rules": [name for name, bit in bits.items() if value & bit], "tokens": int(count)}
        for value, count in zip(distinct.tolist(), sums.tolist(), strict=True)
    ]
    return sorted(found, key=lambda each: (not each["rules"], -each["tokens"]))


def token_tables(plan: Plan, pieces: Mapping[int, bytes], sliders: list[Slider]) -> dict[str, list[dict[str, Any]]]:
    """Which tokens are dropped most often, and which kept ones lie nearest to a threshold.

    A kept token is on the border if its rule fires on it within the slider's next two stops. Classes (`cluster`) are
    not stops of one threshold, so that slider counts for nothing here. `pieces` are the bytes of each token id.
    """
    keep = plan.selection.keep
    border = np.zeros(len(keep), dtype=bool)
    for slider in (each for each in sliders if each.key != "cluster"):
        nearest = slice(slider.at + 1, slider.at + 3)
        border |= slider.patterns[slider.codes, nearest].any(axis=1)
    return {
        "most_dropped": _most(plan, pieces, ~keep),
        "borderline_kept": _most(plan, pieces, keep & border),
    }


def _most(plan: Plan, pieces: Mapping[int, bytes], marks: NDArray[np.bool_]) -> list[dict[str, Any]]:
    ids = plan.scores.token_ids
    distinct, places = np.unique(ids, return_inverse=True)
    places = places.reshape(-1)
    marked = np.bincount(places[marks], weights=plan.weights[marks], minlength=len(distinct)).astype(np.int64)
    everywhere = np.bincount(places, weights=plan.weights, minlength=len(distinct)).astype(np.int64)
    order = np.lexsort((distinct, -marked))[:TOP]
    order = order[marked[order] > 0]
    chosen = distinct[order]
    where = np.flatnonzero(marks & np.isin(ids, chosen))
    by_key = where[np.lexsort((where, _rank_of_documents(plan)[where]))]
    firsts = {int(ids[at]): int(at) for at in by_key[::-1]}
    return [
        {
            "token_id": int(distinct[place]),
            "token": text_of(pieces[int(distinct[place])]),
            "tokens": int(marked[place]),
            "of": int(everywhere[place]),
            "example": _example(plan, firsts[int(distinct[place])], pieces),
        }
        for place in order.tolist()
    ]


def _rank_of_documents(plan: Plan) -> NDArray[np.int64]:
    """For each completion token, the place of its document among all by key."""
    keys = np.ascontiguousarray(plan.scores.keys).view("S16").reshape(-1) if len(plan.scores.keys) else np.zeros(0)
    ranks = np.empty(len(keys), dtype=np.int64)
    ranks[np.argsort(keys, kind="stable")] = np.arange(len(keys))
    return np.repeat(ranks, np.diff(plan.scores.offsets))


def _example(plan: Plan, at: int, pieces: Mapping[int, bytes]) -> dict[str, Any]:
    """A token with the completion tokens around it, all within its document; of a character that is spread over several
    tokens, the whole.
    """
    offsets, ids = plan.scores.offsets, plan.scores.token_ids
    document = int(np.searchsorted(offsets, at, side="right")) - 1
    reach = AROUND + SPREAD
    low, high = max(int(offsets[document]), at - reach), min(int(offsets[document + 1]), at + reach + 1)
    texts = {"before": "", "token": "", "after": ""}
    for first, number, text in characters([pieces[int(i)] for i in ids[low:high]]):
        begin, end = low + first, low + first + number
        if end > at - AROUND and begin <= at + AROUND:
            texts["before" if end <= at else "after" if begin > at else "token"] += text_of(text)
    return {"document": plan.documents.keys[document].tobytes().hex(), **texts}


def endings(plan: Plan, tokenizer: Any, pieces: Mapping[int, bytes]) -> dict[str, Any]:
    """Special tokens among the completions, kept and dropped, and documents whose last token is none.

    A document that does not end in one was cut off (`max_length`, `sequence_len`), or its template writes none. White
    space behind the last token does not count: many templates end a turn with a line break.
    """
    ids, special = plan.scores.token_ids, special_ids(tokenizer)
    found = []
    for token in np.intersect1d(ids, special).tolist():
        marks = ids == token
        total, gone = int(plan.weights[marks].sum()), int(plan.weights[marks & ~plan.selection.keep].sum())
        found.append({"token_id": token, "token": text_of(pieces[token]), "labelled": total, "dropped": gone})
    blank = np.asarray([token for token, piece in pieces.items() if piece and not piece.strip()], dtype=np.int64)
    documents = plan.documents
    starts, ends = documents.offsets[:-1], documents.offsets[1:].copy()
    while True:
        trailing = (ends > starts) & np.isin(documents.input_ids[np.maximum(ends - 1, 0)], blank)
        if not trailing.any():
            break
        ends[trailing] -= 1
    last = np.maximum(ends - 1, 0)
    open_end = (ends > starts) & documents.completion[last] & ~np.isin(documents.input_ids[last], special)
    return {
        "special_tokens": found,
        "documents_ending_without_one": int(documents.counts[open_end].sum()),
    }
