"""Scores become a keep flag and a reason for every completion token; pure NumPy.

Thresholds are choices, so this runs again whenever one changes, on stored scores. What happens to a document follows
from its own scores, the configuration, and (where a rule says so) the dataset's distribution; never from its place
among the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .config import XTFConfig
from .errors import XTFError
from .firing import Segments, evaluate
from .rules import Rules
from .segments import UNDEFINED_KEY, Bools, Hashes, Ints, Layout, lowest, ordered, random_keys

REASONING, NOVELTY, RELEVANCE, PROTECTED, FLOOR, FORCED, CONTROL = (1 << bit for bit in range(7))
BITS = {"reasoning_importance": REASONING, "knowledge_novelty": NOVELTY, "task_relevance": RELEVANCE}
DECISIONS = {"protected": PROTECTED, "floor": FLOOR, "forced": FORCED, "control": CONTROL}

Reasons = NDArray[np.uint8] | NDArray[np.uint16]


def rule_bits(config: XTFConfig) -> dict[str, int]:
    """The reason bit of every attribute that is on and of every selector, as the block orders them."""
    own = {name: 2 * CONTROL << place for place, name in enumerate(config.selectors)}
    return {name: own[name] if name in own else BITS[name] for name in config.voters}


def reason_text(bits: int, rules: Mapping[str, int] = BITS) -> str:
    """Names of the bits of a reason as in the score table: "reasoning_importance,protected"; empty for 0.

    Args:
        bits: of one token.
        rules: bits of attributes and selectors, see `rule_bits`.
    """
    return ",".join(name for name, bit in {**rules, **DECISIONS}.items() if bits & bit)


@dataclass(frozen=True)
class Scores:
    """What is known about the completion tokens of N distinct documents, M tokens in all.

    Args:
        keys: (N, 16) uint8, document keys.
        offsets: (N + 1,) int64; document `i` holds the tokens `offsets[i]` up to `offsets[i + 1]` of the flat arrays.
        counts: (N,) int64, how often the document occurs; weighs every statistic over the dataset.
        token_ids: (M,) int32.
        positions: (M,) int32, place within the document; 0 is the document's first token: never predicted nor
            trained.
        reasoning_importance: (M,) float32 attention received, 1.0 = uniform; NaN: undefined. None: not scored.
        logprobs: (M,) float32 natural-log probabilities; knowledge novelty is `1 - exp(logprob)`.
        task_relevance: (M,) float32 in [0, 1].
        entropy: (M,) float32 nats, the surprisal that the reference itself expected in each place; deviation: (M,)
            float32 nats, its standard deviation. NaN where the log-probability is. None: not scored.
        selectors: (M,) float32 scores by name of the selector; None for one that has none before the second epoch.
    """

    keys: NDArray[np.uint8]
    offsets: NDArray[np.int64]
    counts: NDArray[np.int64]
    token_ids: NDArray[np.int32]
    positions: NDArray[np.int32]
    reasoning_importance: NDArray[np.float32] | None = None
    logprobs: NDArray[np.float32] | None = None
    task_relevance: NDArray[np.float32] | None = None
    entropy: NDArray[np.float32] | None = None
    deviation: NDArray[np.float32] | None = None
    selectors: Mapping[str, NDArray[np.float32] | None] = field(default_factory=dict)

    def of(self, voter: str) -> NDArray[np.float32] | None:
        """The scores behind an attribute or a selector: log-probabilities for knowledge novelty."""
        known = {
            **self.selectors,
            "reasoning_importance": self.reasoning_importance,
            "knowledge_novelty": self.logprobs,
            "task_relevance": self.task_relevance,
        }
        return known.get(voter)


@dataclass(frozen=True)
class Selection:
    """What to train on, and why.

    Args:
        keep: (M,) False where the label becomes -100.
        reasons: (M,) bits: every attribute and selector whose rule fired (see `rule_bits`), and PROTECTED, FLOOR,
            FORCED or CONTROL where that decided. 8 bits wide, 16 with selectors.
        thresholds: per attribute and selector, its rule and the numbers it came to; plain JSON values, in units of its
            score.
        fired: per attribute and selector, on how many completion tokens of the dataset its rule fired (a document
            counts as often as it occurs).
        warnings: what the user has to be told.
        best: (N,) index among its completion tokens of the token that a document would keep last; -1 if it has none
            that trains.
        rules: per attribute and selector, its rules with the thresholds that were used.
        seen: per attribute and selector, (M,) the scores that its rule saw: after the window, novelty in [0, 1].
    """

    keep: NDArray[np.bool_]
    reasons: Reasons
    thresholds: dict[str, Any]
    fired: dict[str, int]
    warnings: list[str]
    best: NDArray[np.int64]
    rules: Mapping[str, Rules] = field(default_factory=dict)
    seen: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)


def select(
    scores: Scores,
    config: XTFConfig,
    protected: NDArray[np.bool_] | None = None,
    forced: NDArray[np.bool_] | None = None,
    segments: Segments | None = None,
    frozen: Mapping[str, Rules] | None = None,
    seen: Mapping[str, NDArray[np.float32]] | None = None,
) -> Selection:
    """Decide for every completion token, Eq. (1): rules, `combine`, `force_drop`, protection, control, floor.

    Args:
        scores: of the whole dataset.
        config: the block.
        protected: (M,) tokens that are never dropped; forced: (M,) tokens that are dropped unless protected.
        segments: the first tokens of the sentences and lines, by unit; needed if some window is one.
        frozen: the rules of another selection, for a part of a stream: thresholds are its, not those of `scores`.
        seen: the scores of attributes and selectors as their rules see them, (M,) by name, instead of those in `scores`
            (the log-probabilities aside): what another `Selection` has under this name.

    Raises:
        XTFError: arrays that do not fit together, an attribute that is on, or a selector, that was not scored, or
            segments that are needed and not given.
    """
    layout = Layout(scores.offsets, scores.counts)
    given = {name: scores.of(name) if seen is None else seen.get(name) for name in (*BITS, *config.selectors)}
    _check(scores, given, config, protected, forced)
    size = len(scores.token_ids)
    keep = np.zeros(size, dtype=bool)
    reasons: Reasons = np.zeros(size, dtype=np.uint16 if config.selectors else np.uint8)
    bits, voting = rule_bits(config), [name for name in config.voters if given[name] is not None]
    best = np.full(len(scores.counts), -1, dtype=np.int64)
    thresholds: dict[str, Any] = {}
    fired, warnings, rules, looked = dict[str, int](), list[str](), dict[str, Rules](), dict[str, NDArray[np.float32]]()
    for name in config.voters:
        values = given[name]
        if values is None:
            thresholds[name], fired[name] = {"rule": None, "drops": {}, "from_epoch": 2}, 0
            continue
        rule, part = None if frozen is None else frozen[name], config.part(name)
        firing = evaluate(name, values, scores.positions, layout, part, segments, rule, seen=seen is not None)
        reasons |= firing.mask * reasons.dtype.type(bits[name])
        thresholds[name], fired[name] = firing.thresholds, firing.fired
        warnings, rules[name] = warnings + firing.warnings, firing.rules
        looked[name] = firing.seen
    for tokens, documents, part in layout.chunks():
        chunk = _Chunk(
            part,
            scores.keys[documents],
            scores.positions[tokens] > 0,
            _rescue_order(scores.logprobs, looked, config, tokens),
            np.zeros(part.offsets[-1], dtype=bool) if protected is None else protected[tokens],
            np.zeros(part.offsets[-1], dtype=bool) if forced is None else forced[tokens],
        )
        keep[tokens], reasons[tokens] = _decide(chunk, reasons[tokens], config, [bits[name] for name in voting])
        best[documents] = _best(chunk)
    trainable = scores.positions > 0
    if trainable.any() and not (keep & trainable).any():
        warnings.append(
            f"every one of the {int(trainable.sum())} trainable completion tokens is dropped; loosen the rules, or set "
            "min_kept above 0"
        )
    return Selection(keep, reasons, thresholds, fired, warnings, best, rules, looked)


def _check(
    scores: Scores,
    voters: Mapping[str, NDArray[np.float32] | None],
    config: XTFConfig,
    protected: Bools | None,
    forced: Bools | None,
) -> None:
    size, number = len(scores.token_ids), len(scores.counts)
    arrays = {"positions": scores.positions, **voters, "protected": protected, "forced": forced}
    arrays |= {"entropy": scores.entropy, "deviation": scores.deviation}
    for name, array in arrays.items():
        if array is not None and array.shape != (size,):
            raise XTFError(f"selection: {name} has the shape {array.shape}, but there are {size} completion tokens")
    if len(scores.offsets) != number + 1 or scores.keys.shape != (number, 16) or scores.offsets[-1] != size:
        raise XTFError(
            f"selection: {len(scores.keys)} keys, {number} counts and {len(scores.offsets)} offsets up to "
            f"{scores.offsets[-1:]} do not describe documents with {size} completion tokens"
        )
    for name in config.voters:
        if voters[name] is None and name not in scores.selectors:
            raise XTFError(f"selection: {name} is on, but the documents were not scored for it")


@dataclass(frozen=True)
class _Chunk:
    """A run of whole documents; `order` sorts tokens by who is brought back first, see `_rescue_order`."""

    layout: Layout
    keys: NDArray[np.uint8]
    trainable: Bools
    order: Hashes
    protected: Bools
    forced: Bools


def _rescue_order(
    logprobs: NDArray[np.float32] | None, seen: Mapping[str, NDArray[np.float32]], config: XTFConfig, tokens: slice
) -> Hashes:
    """Sort keys of what is brought back first; NaN comes last. Scores are those that the rules saw.

    With attributes alone by novelty: lowest log-probability first; without one, highest task relevance. To a selector
    the most novel token may be the worst noise: its highest score comes first, and of equal ones the most probable.
    """
    voiced = [seen[name] for name in config.selectors if name in seen]
    by = ((logprobs, 1), (seen.get("task_relevance"), -1))
    if voiced:
        by = ((voiced[0], -1), (logprobs, -1))
    halves = []
    for values, sign in by:
        if values is None:
            halves.append(np.full(tokens.stop - tokens.start, UNDEFINED_KEY))
        else:
            here = values[tokens] * np.float32(sign)
            halves.append(ordered(np.where(np.isinf(here), np.float32(np.nan), here)))
    order: Hashes = (halves[0].astype(np.uint64) << np.uint64(32)) | halves[1]
    return order


def _decide(chunk: _Chunk, reasons: Reasons, config: XTFConfig, voting: list[int]) -> tuple[Bools, Reasons]:
    """Keep flags and complete reasons of a chunk, from the bits of the rules that fired; `voting`: bits that count."""
    by_rules = _combined(reasons, config, voting)
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


def _combined(reasons: Reasons, config: XTFConfig, voting: list[int]) -> Bools:
    """Where enough of the attributes and selectors that have scores have fired."""
    votes = np.zeros(len(reasons), dtype=np.int8)
    for bit in voting:
        votes += (reasons & bit) > 0
    return votes >= votes_needed(config, len(voting))


def votes_needed(config: XTFConfig, active: int) -> int:
    """Of how many of the `active` attributes and selectors a rule must fire to drop a token."""
    named = {"union": 1, "intersection": active, "majority": active // 2 + 1}
    return max(1, named[config.combine] if isinstance(config.combine, str) else config.combine.at_least)


def _rescued(chunk: _Chunk, dropped: Bools, min_kept: int) -> Bools:
    """Dropped tokens that the floor brings back: trainable ones in order, until a document keeps `min_kept`."""
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
    """As many unprotected tokens of each document as were to be dropped, drawn uniformly without replacement.

    Only tokens that train count and are drawn; one in position 0, which nothing predicts, stays as planned.
    """
    keys = np.minimum(random_keys(chunk.keys, chunk.layout, seed), UNDEFINED_KEY - np.uint32(1))
    keys[chunk.protected | ~chunk.trainable] = UNDEFINED_KEY
    drawn: Bools = lowest(keys, chunk.layout, chunk.layout.count(planned & chunk.trainable))[0]
    return drawn | (planned & ~chunk.trainable)


def _best(chunk: _Chunk) -> Ints:
    """Index among its completion tokens of each document's first trainable token in order, (N,); -1: it has none."""
    number = chunk.layout.count(chunk.trainable)
    best = np.full(len(number), -1, dtype=np.int64)
    some = number > 0
    if not some.any():
        return best
    tokens = np.flatnonzero(chunk.trainable)
    starts = (np.cumsum(number) - number)[some]
    order = chunk.order[tokens]
    least = np.repeat(np.minimum.reduceat(order, starts), number[some])
    winners = np.flatnonzero(order == least)
    first = winners[np.searchsorted(winners, starts)]
    best[some] = tokens[first] - chunk.layout.offsets[:-1][some]
    return best
