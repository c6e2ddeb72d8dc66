"""Computes a keep flag and a reason for every completion token from scores; pure NumPy.

It runs on stored scores, so other thresholds need no reference. The result of a document depends on its own scores, the
configuration and, for some rules, the dataset's distribution; never on the order of the documents.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..config.block import XTFConfig
from ..config.scores import SLOTS
from ..data.ragged import UNDEFINED_KEY, Bools, Floats, Hashes, Ints, Layout, lowest, random_keys, sort_keys
from ..errors import XTFError
from .rules import Rules, Segments, evaluate

PROTECTED, FLOOR, FORCED, CONTROL = (1 << bit for bit in range(3, 7))
BITS = {name: 1 << place for place, name in enumerate(SLOTS)}
DECISIONS = {"protected": PROTECTED, "floor": FLOOR, "forced": FORCED, "control": CONTROL}

Reasons = NDArray[np.uint8] | NDArray[np.uint16]


def rule_bits(config: XTFConfig) -> dict[str, int]:
    """The reason bit of every score that is on, in the order of `config.scores`."""
    own = {name: 2 * CONTROL << place for place, name in enumerate(config.selectors)}
    return {name: own[name] if name in own else BITS[name] for name in config.scores}


def reason_text(bits: int, rules: Mapping[str, int] = BITS) -> str:
    """Names of the bits of a token's reason, as in the score table; `rules` are the scores' bits, see `rule_bits`."""
    return ",".join(name for name, bit in {**rules, **DECISIONS}.items() if bits & bit)


@dataclass(frozen=True)
class Scores:
    """Scores of the M completion tokens of N distinct documents.

    Args:
        keys: (N, 16) uint8, document keys.
        offsets: (N + 1,) int64; document `i` holds the tokens `offsets[i]` up to `offsets[i + 1]` of the flat arrays.
        counts: (N,) int64, how often the document occurs; weighs every statistic over the dataset.
        token_ids: (M,) int32.
        positions: (M,) int32, index within the document; the token at 0 is neither predicted nor trained.
        values: by name of the score, (M,) float32 as its scorer gave them; NaN: undefined.
        logprobs: (M,) float32 natural-log probabilities under the run's own reference; None: not scored.
    """

    keys: NDArray[np.uint8]
    offsets: Ints
    counts: Ints
    token_ids: NDArray[np.int32]
    positions: NDArray[np.int32]
    values: Mapping[str, Floats] = field(default_factory=dict)
    logprobs: Floats | None = None


@dataclass(frozen=True)
class Selection:
    """The tokens to train on, and the reasons.

    Args:
        keep: (M,) False where the label becomes -100.
        reasons: (M,) bits: every score whose rule fired (see `rule_bits`), and PROTECTED, FLOOR, FORCED or CONTROL
            where that decided. 8 bits wide, 16 with selectors.
        thresholds: by score, its rule and the resulting thresholds; plain JSON values, in units of `seen`.
        fired: by score, on how many completion tokens of the dataset its rule fired.
        warnings: for the user.
        best: (N,) the trainable token that `min_kept` keeps first, as an index among the completion tokens; -1: none.
        rules: by score, its rules with the thresholds that were used.
        seen: by score, (M,) float32 as its rule saw them.
    """

    keep: Bools
    reasons: Reasons
    thresholds: dict[str, Any]
    fired: dict[str, int]
    warnings: list[str]
    best: Ints
    rules: Mapping[str, Rules] = field(default_factory=dict)
    seen: Mapping[str, Floats] = field(default_factory=dict)


def select(
    scores: Scores,
    config: XTFConfig,
    protected: Bools | None = None,
    forced: Bools | None = None,
    segments: Segments | None = None,
    frozen: Mapping[str, Rules] | None = None,
    seen: Mapping[str, Floats] | None = None,
    inside: Bools | None = None,
) -> Selection:
    """Decide for every completion token, Eq. (1): rules, `combine`, `force_drop`, protection, control, floor.

    Args:
        scores: of the whole dataset.
        protected: (M,) tokens that are never dropped; forced: (M,) tokens that are dropped unless protected.
        segments: the first tokens of the sentences and lines, by unit; needed if some score has one.
        frozen: `rules` of another selection, whose thresholds are used instead of those of `scores`; for streams.
        seen: `seen` of another selection, used instead of `scores.values`.
        inside: (M,) tokens that begin inside a character. A character of which a token is kept is kept whole, unless a
            control draws the tokens.

    Raises:
        XTFError: arrays of wrong shapes, a missing score, or missing segments.
    """
    layout = Layout(scores.offsets, scores.counts)
    values = scores.values if seen is None else seen
    _check(scores, values, config, protected, forced)
    keep = np.zeros(len(scores.token_ids), dtype=bool)
    reasons: Reasons = np.zeros(len(keep), dtype=np.uint16 if config.selectors else np.uint8)
    bits, best = rule_bits(config), np.full(len(scores.counts), -1, dtype=np.int64)
    results = {}
    for name, score in config.scores.items():
        given = None if frozen is None else frozen[name]
        results[name] = evaluate(name, values[name], layout, score, segments, given, averaged=seen is not None)
        reasons |= results[name].mask * reasons.dtype.type(bits[name])
    warnings = sum((result.warnings for result in results.values()), [])
    first = next((results[name].seen for name in (*config.selectors, *results)), None)
    for tokens, documents, part in layout.chunks():
        chunk = _Chunk(
            part,
            scores.keys[documents],
            scores.positions[tokens] > 0,
            _rescue_order(first, scores.logprobs, tokens),
            np.zeros(part.offsets[-1], dtype=bool) if protected is None else protected[tokens],
            np.zeros(part.offsets[-1], dtype=bool) if forced is None else forced[tokens],
        )
        keep[tokens], reasons[tokens] = _decide(chunk, reasons[tokens], config, list(bits.values()))
        best[documents] = _best(chunk)
    _keep_characters(keep, reasons, None if config.control else inside)
    trainable = scores.positions > 0
    if trainable.any() and not (keep & trainable).any():
        warnings.append(
            f"every one of the {int(trainable.sum())} trainable tokens is dropped; loosen the rules, or raise min_kept"
        )
    return Selection(
        keep=keep,
        reasons=reasons,
        thresholds={name: result.thresholds for name, result in results.items()},
        fired={name: result.fired for name, result in results.items()},
        warnings=warnings,
        best=best,
        rules={name: result.rules for name, result in results.items()},
        seen={name: result.seen for name, result in results.items()},
    )


def _check(
    scores: Scores, values: Mapping[str, Floats], config: XTFConfig, protected: Bools | None, forced: Bools | None
) -> None:
    size, number = len(scores.token_ids), len(scores.counts)
    arrays = {"positions": scores.positions, "logprobs": scores.logprobs, "protected": protected, "forced": forced}
    for name, array in {**values, **arrays}.items():
        if array is not None and array.shape != (size,):
            raise XTFError(f"selection: {name} has the shape {array.shape}, but there are {size} completion tokens.")
    if len(scores.offsets) != number + 1 or scores.keys.shape != (number, 16) or scores.offsets[-1] != size:
        raise XTFError(
            f"selection: {len(scores.keys)} keys, {number} counts and {len(scores.offsets)} offsets up to "
            f"{scores.offsets[-1:]} do not describe documents with {size} completion tokens."
        )
    for name in config.scores:
        if name not in values:
            raise XTFError(f"selection: {name} is on, but the documents have no scores for it.")


@dataclass(frozen=True)
class _Chunk:
    """A run of complete documents; tokens of lower `order` are rescued first."""

    layout: Layout
    keys: NDArray[np.uint8]
    trainable: Bools
    order: Hashes
    protected: Bools
    forced: Bools


def _rescue_order(first: Floats | None, logprobs: Floats | None, tokens: slice) -> Hashes:
    """Sort keys: the tokens that `min_kept` keeps first have the lowest.

    They have the highest score of the block's first score, selectors before slots; among equal scores, which a unit's
    tokens have, the highest log-probability. NaN comes last.
    """
    halves = []
    for values in (first, logprobs):
        here = -values[tokens] if values is not None else np.full(tokens.stop - tokens.start, np.nan, np.float32)
        halves.append(sort_keys(np.where(np.isinf(here), np.float32(np.nan), here)))
    keys: Hashes = (halves[0].astype(np.uint64) << np.uint64(32)) | halves[1]
    return keys


def _decide(chunk: _Chunk, reasons: Reasons, config: XTFConfig, bits_of_rules: list[int]) -> tuple[Bools, Reasons]:
    """Keep flags and final reasons of a chunk, from the bits of the rules that fired."""
    by_rules = _combined(reasons, config, bits_of_rules)
    wanted = by_rules | chunk.forced
    dropped = wanted & ~chunk.protected
    decided = wanted & chunk.protected
    kind = reasons.dtype.type
    bits = np.where(decided, kind(PROTECTED), kind(0))
    bits[dropped & ~by_rules] = FORCED
    if config.control == "random":
        planned = dropped & ~_rescued(chunk, dropped, config.min_kept)
        dropped = _drawn(chunk, planned, config.seed)
        bits[bits == FORCED] = 0
        bits[planned | dropped] = CONTROL
    rescued = _rescued(chunk, dropped, config.min_kept)
    bits[rescued] = FLOOR
    return ~dropped | rescued, reasons | bits


def _keep_characters(keep: Bools, reasons: Reasons, inside: Bools | None) -> None:
    """Keep all tokens of a character of which one is kept; changes `keep` and `reasons`."""
    if inside is None:
        return
    goes_on = np.append(inside[1:], False)  # whether the character goes on in the next token
    starts = np.flatnonzero(goes_on & ~inside)
    sizes = np.flatnonzero(inside & ~goes_on) + 1 - starts
    bounds = np.stack([starts, starts + sizes], 1).reshape(-1)
    some = np.logical_or.reduceat(np.append(keep, False), bounds)[::2] if len(starts) else np.zeros(0, dtype=bool)
    for step in range(int(sizes.max(initial=0))):
        here = starts[some & (sizes > step)] + step
        here = here[~keep[here]]
        keep[here] = True
        reasons[here] = (reasons[here] | PROTECTED) & ~np.uint16(FORCED)


def _combined(reasons: Reasons, config: XTFConfig, bits: list[int]) -> Bools:
    """Where the rules of as many scores fired as `combine` asks for."""
    fired = np.zeros(len(reasons), dtype=np.int8)
    for bit in bits:
        fired += (reasons & bit) > 0
    named = {"union": 1, "intersection": len(bits), "majority": len(bits) // 2 + 1}
    needed = named[config.combine] if isinstance(config.combine, str) else config.combine.at_least
    return fired >= max(1, needed)


def _rescued(chunk: _Chunk, dropped: Bools, min_kept: int) -> Bools:
    """Dropped tokens to keep after all: trainable ones in order, until the document keeps `min_kept`."""
    rescued = np.zeros(len(dropped), dtype=bool)
    lacking = min(min_kept, 1 << 62) - chunk.layout.count(chunk.trainable & ~dropped)
    if not (lacking > 0).any():
        return rescued
    document = chunk.layout.spread(np.arange(len(lacking)))
    candidates = np.flatnonzero(chunk.trainable & dropped & chunk.layout.spread(lacking > 0))
    candidates = candidates[np.lexsort((chunk.order[candidates], document[candidates]))]
    group = document[candidates]
    place = np.arange(len(group)) - np.searchsorted(group, group)
    rescued[candidates[place < lacking[group]]] = True
    return rescued


def _drawn(chunk: _Chunk, planned: Bools, seed: int) -> Bools:
    """As many unprotected trainable tokens of each document as were planned, drawn uniformly without replacement.

    A token in position 0, which nothing predicts, does not count and is treated as planned.
    """
    keys = np.minimum(random_keys(chunk.keys, chunk.layout, seed), UNDEFINED_KEY - np.uint32(1))
    keys[chunk.protected | ~chunk.trainable] = UNDEFINED_KEY
    drawn: Bools = lowest(keys, chunk.layout, chunk.layout.count(planned & chunk.trainable))[0]
    return drawn | (planned & ~chunk.trainable)


def _best(chunk: _Chunk) -> Ints:
    """Index of each document's first trainable token in order among its completion tokens, (N,); -1: none."""
    number, tokens = chunk.layout.count(chunk.trainable), np.flatnonzero(chunk.trainable)
    best, some = np.full(len(number), -1, dtype=np.int64), number > 0
    if len(tokens):
        starts, order = (np.cumsum(number) - number)[some], chunk.order[tokens]
        winners = np.flatnonzero(order == np.repeat(np.minimum.reduceat(order, starts), number[some]))
        best[some] = tokens[winners[np.searchsorted(winners, starts)]] - chunk.layout.offsets[:-1][some]
    return best
