"""Scores that no reference should give (NaN, infinite, all equal, denormal, enormous), few documents, single tokens.

Whatever they are, the masks keep their promises, thresholds are finite or undefined, and each rule fires where a loop
over documents in plain Python says it does.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.made_scores import KN, RI, TR, scores_of, taken, with_scores
from tests.reliability import record
from tests.reliability.strategies import check_selection, inputs, layouts, score_arrays, segments_of
from xtf_plugin.config.block import XTFConfig
from xtf_plugin.config.scores import SLOTS
from xtf_plugin.data import ragged as segments
from xtf_plugin.errors import XTFUserError
from xtf_plugin.report import whatif
from xtf_plugin.selection.select import Scores, select

SHARES = st.sampled_from([1e-320, 1e-9, 0.05, 0.25, 0.5, 0.9, 1 - 1e-12])
BOUNDS = st.sampled_from([0.0, -0.0, 1e-320, 1e-38, 0.5, 1.0, -4.0, 3.5e38, 1e308, -1e308])
FENCES = st.sampled_from([0.0, 1e-320, 0.5, 1.0, 1e300, 1.7e308])
PROBABILITIES = st.sampled_from([0.0, 1e-320, 1e-9, 0.5, 0.95, 1.0])


def one(**drop: Any) -> Any:
    return st.fixed_dictionaries({"drop": st.fixed_dictionaries(drop)})


ROBUST = one(fence=FENCES) | one(quantile=SHARES)
SCOPED = st.builds(lambda part, scope: {**part, "scope": scope}, ROBUST, st.sampled_from(["document", "dataset"]))
LOGGED = st.builds(
    lambda fence, scope: {"drop": {"fence": fence}, "scope": scope, "scale": "log"},
    FENCES,
    st.sampled_from(["document", "dataset"]),
)
BOTH = one(known_above=st.sampled_from([0.5, 0.95, 1.0]), unknown_below=st.sampled_from([0.0, 1e-320, 0.2]))
CLASSES = st.integers(2, 8).flatmap(lambda of: one(cluster=st.integers(1, of), of=st.just(of)))
COMMON = SCOPED | LOGGED | one(below=BOUNDS) | CLASSES
RULES: dict[str, Any] = {
    RI: COMMON,
    KN: COMMON | one(known_above=PROBABILITIES) | one(unknown_below=PROBABILITIES) | BOTH,
    TR: COMMON,
    "odd_one": COMMON.map(lambda part: {**part, "scorer": "log_probability"}),
}
UNITS = st.sampled_from([{}, {}, {"window": 3}, {"window": 5}, {"window": 101}, {"unit": "sentence"}, {"unit": "line"}])
CAPS = st.sampled_from([None, None, 1e-320, 0.3, 0.5, 1.0])


@st.composite
def blocks(draw: Any) -> dict[str, Any]:
    """A block with some rules of every kind, and everything that decides after them."""
    named = draw(st.lists(st.sampled_from(list(RULES)), min_size=1, max_size=4, unique=True))
    parts = {n: {**draw(RULES[n]), **draw(UNITS), "max_fraction": draw(CAPS)} for n in named}
    own = {name: parts.pop(name) for name in list(parts) if name not in SLOTS}
    at_least = st.integers(1, len(named)).map(lambda k: {"at_least": k})
    return {
        **{"preset": "none", **parts, "selectors": own},
        "combine": draw(st.sampled_from(["union", "intersection", "majority"]) | at_least),
        "min_kept": draw(st.sampled_from([0, 1, 2, 5, 40])),
        "control": draw(st.sampled_from([None, None, "random"])),
        "seed": draw(st.sampled_from([0, -1, 2**63 - 1, -(2**63)])),
    }


@st.composite
def scored(draw: Any) -> Scores:
    layout = draw(layouts())
    size = len(layout["token_ids"])
    attention, logprobs, relevance, own = (draw(score_arrays(size)) for _ in range(4))
    if draw(st.booleans()):  # what a reference can give: nothing is more than certain
        logprobs = -np.abs(logprobs)
    values = {RI: attention, TR: relevance, "odd_one": own}
    return with_scores(Scores(**layout), logprobs=logprobs, **values)


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
def test_masks_keep_their_promises() -> None:
    seen: Counter[str] = Counter()

    @inputs(300, 5_000)
    @given(st.data(), scored(), blocks())
    def holds(data: Any, scores: Scores, block: dict[str, Any]) -> None:
        size = len(scores.token_ids)
        flags = data.draw(st.lists(st.integers(0, 7), min_size=size, max_size=size), label="flags")
        protected, forced, begins = ((np.asarray(flags, dtype=np.int64) & bit) > 0 for bit in (1, 2, 4))
        if data.draw(st.booleans(), label="unmarked"):
            protected, forced = np.zeros((2, size), dtype=bool)
        starts = segments_of({"offsets": scores.offsets}, begins)
        config = XTFConfig.parse(block)
        assert config is not None
        made = check_selection(scores, config, protected, forced, starts)
        frozen = select(scores, config, protected, forced, starts, made.rules)
        np.testing.assert_array_equal(frozen.keep, made.keep, "a stream with the same thresholds selects otherwise")
        moved, flat = taken(scores, list(range(len(scores.counts)))[::-1])
        marks = segments_of({"offsets": moved.offsets}, begins[flat])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(segments, "CHUNK_TOKENS", 4)
            turned = select(moved, config, protected[flat], forced[flat], marks)
        np.testing.assert_array_equal(turned.keep, made.keep[flat], "the order of documents, or chunks, matter")
        alone, flat = taken(scores, [0])
        marks = segments_of({"offsets": alone.offsets}, begins[flat])
        single = select(alone, config, protected[flat], forced[flat], marks, made.rules)
        np.testing.assert_array_equal(single.keep, made.keep[flat], "a document's mask depends on the others")
        seen.update(inputs=1, tokens=size, dropped=int((~made.keep).sum()))

    holds()
    assert 0.02 * seen["tokens"] < seen["dropped"] < seen["tokens"]
    record("fuzzed scores", inputs=seen["inputs"], tokens=seen["tokens"])


def documents_of(scores: Scores) -> list[slice]:
    return [slice(int(a), int(b)) for a, b in zip(scores.offsets[:-1], scores.offsets[1:], strict=True)]


def naive(name: str, part: Any, scores: Scores) -> list[bool]:
    """Where a rule fires, document by document; Multi-Otsu, which has many answers, is checked apart."""
    values = scores.values[name]
    values = np.where(np.isinf(values), np.float32(np.nan), values)
    weight = np.repeat(scores.counts, np.diff(scores.offsets))
    drop = part.drop
    numbers = (-np.expm1(values) if name == KN else values).astype(np.float64)  # novelty is 1 - P in float32
    if drop.quantile is not None and part.scope == "document":
        fires = np.zeros(len(values), dtype=bool)
        for here in documents_of(scores):
            known = [i for i in range(here.start, here.stop) if not math.isnan(numbers[i])]
            lowest = sorted(known, key=lambda i: numbers[i])[: math.floor(drop.quantile * len(known))]
            fires[lowest] = True
        return fires.tolist()
    if drop.quantile is not None:
        return (numbers < quantiles(numbers, weight, [drop.quantile])[0]).tolist()
    if drop.below is not None:
        return (numbers < drop.below).tolist()
    if drop.fence is None:
        given = (drop.known_above, drop.unknown_below)
        known, unknown = (None if p is None else float(np.float32(1 - p)) for p in given)
        fires = np.zeros(len(values), dtype=bool)
        fires |= False if known is None else numbers < known
        return (fires | (False if unknown is None else numbers > unknown)).tolist()
    scaled = np.log(np.maximum(numbers, np.finfo(np.float32).tiny)) if part.scale == "log" else numbers
    parts = documents_of(scores) if part.scope == "document" else [slice(0, len(values))]
    fires = np.zeros(len(values), dtype=bool)
    for here in parts:
        low, high = quantiles(scaled[here], weight[here] if part.scope == "dataset" else None, [0.25, 0.75])
        fires[here] = scaled[here] < low - drop.fence * (high - low)
    return fires.tolist()


def quantiles(values: Any, weight: Any, shares: list[float]) -> Any:
    known = ~np.isnan(values)
    numbers = values[known] if weight is None else np.repeat(values[known], weight[known])
    return np.quantile(numbers, shares) if len(numbers) else np.full(len(shares), np.nan)


def check_classes(name: str, part: Any, scores: Scores, made: Any, fired: Any) -> None:
    """No other split into as many classes is better, in exact arithmetic, by more than float64 can tell."""
    values, found = made.seen[name], made.thresholds[name]
    weight = np.repeat(scores.counts, np.diff(scores.offsets))
    known = np.isfinite(values)
    points = sorted({float(v) for v in values[known]})
    if len(points) < part.drop.of:
        assert not fired.any() and "cannot be split" in found["undefined"]
        assert any("is undefined and drops nothing" in warning for warning in made.warnings)
        return
    cuts = found["classes"]["thresholds"]
    assert (fired == (known & (np.searchsorted(cuts, values) == part.drop.cluster - 1))).all()
    masses = [int(weight[known & (values == point)].sum()) for point in points]
    assert found["classes"]["sizes"] == [
        sum(m for p, m in zip(points, masses, strict=True) if np.searchsorted(cuts, p) == c)
        for c in range(part.drop.of)
    ]
    exact = [Fraction(point) for point in points]
    everything = sum((m * p * p for m, p in zip(masses, exact, strict=True)), Fraction(0))
    chosen = within(exact, masses, [points.index(cut) + 1 for cut in cuts])
    ways = itertools.combinations(range(1, len(points)), part.drop.of - 1)
    best = min(within(exact, masses, way) for way in itertools.islice(ways, 300))
    assert chosen - best <= everything / 10**12


def within(points: list[Fraction], masses: list[int], cuts: Any) -> Fraction:
    """Sum of squared distances to the class means."""
    total = Fraction(0)
    for low, high in zip([0, *cuts], [*cuts, len(points)], strict=True):
        here = list(zip(points[low:high], masses[low:high], strict=True))
        mean = sum((p * m for p, m in here), Fraction(0)) / sum(m for _, m in here)
        total += sum((m * (p - mean) ** 2 for p, m in here), Fraction(0))
    return total


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", list(RULES))
def test_a_rule_fires_where_its_definition_says(name: str) -> None:
    seen: Counter[str] = Counter()

    @inputs(120, 2_000)
    @given(scored(), RULES[name])
    def agrees(scores: Scores, part: dict[str, Any]) -> None:
        block = {name: part} if name in SLOTS else {"selectors": {name: part}}
        if name == KN:  # what is far more than certain has no novelty
            scores = with_scores(scores, logprobs=np.minimum(scores.logprobs, 80))
        config = XTFConfig.parse({"preset": "none", "min_kept": 0, **block})
        assert config is not None
        made = select(scores, config)
        fired = ~made.keep
        if config.scores[name].drop.cluster is not None:
            check_classes(name, config.scores[name], scores, made, fired)
        else:
            assert fired.tolist() == naive(name, config.scores[name], scores)
        seen.update(inputs=1, fired=int(fired.any()), quiet=int(not fired.any()))

    agrees()
    assert min(seen["fired"], seen["quiet"]) > seen["inputs"] // 20
    record("fuzzed rules", inputs=seen["inputs"])


FAR = {
    "floor": ({"min_kept": 10**30}, {"min_kept": 60}),
    "floor of 64 bits": ({"min_kept": 2**63 - 1}, {"min_kept": 60}),
    "window": ({"knowledge_novelty": {"window": 10**13 + 1}}, {"knowledge_novelty": {"window": 121}}),
    "window of 100 bits": ({"reasoning_importance": {"window": 10**30 + 1}}, {"reasoning_importance": {"window": 121}}),
}


def sixty_tokens() -> Scores:
    rng, size = np.random.default_rng(0), 60
    values = {name: 1e3 * rng.random(size) for name in (RI, TR)}
    return scores_of([size], first=0, logprobs=-rng.exponential(size=size), **values)


@pytest.mark.parametrize("what", list(FAR))
def test_a_setting_beyond_every_document_is_refused_or_equals_one_just_beyond(what: str) -> None:
    far, near = FAR[what]
    rules = {"preset": "paper", "reasoning_importance": {"drop": {"quantile": 0.1}}}
    merged = [{**rules, **b, **{k: {**rules.get(k, {}), **v} for k, v in b.items() if k in SLOTS}} for b in (far, near)]
    try:
        config = XTFConfig.parse(merged[0])
    except XTFUserError as error:
        assert re.search(r"(min_kept|window): \d+ ", str(error))
        return
    scores = sixty_tokens()
    other = XTFConfig.parse(merged[1])
    assert config is not None and other is not None
    np.testing.assert_array_equal(select(scores, config).reasons, select(scores, other).reasons)
    layout, found = segments.Layout(scores.offsets, scores.counts), []
    for block in (config, other):
        sliders = whatif.make_sliders(block, select(scores, block).seen, layout)
        found.append([slider.fires(slider.at).tolist() for slider in sliders])
    assert found[0] == found[1]


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("scope", ["document", "dataset"])
@pytest.mark.parametrize("scale", ["linear", "log"])
def test_a_fence_beyond_all_numbers_drops_nothing_and_has_no_infinite_threshold(scope: str, scale: str) -> None:
    rule = {"drop": {"fence": 1.7e308}, "scope": scope, "scale": scale}
    config = XTFConfig.parse({"preset": "none", "reasoning_importance": rule})
    assert config is not None
    nothing = np.zeros(60, dtype=bool)
    made = check_selection(sixty_tokens(), config, nothing, nothing)
    assert made.keep.all() and "fires on nothing" in " ".join(made.warnings)


@pytest.mark.parametrize("fence", [0.8e308, 1.7e308])
def test_the_median_of_two_thresholds_is_a_number_although_their_sum_is_none(fence: float) -> None:
    rule = {"drop": {"fence": fence}, "scope": "document"}
    config = XTFConfig.parse({"preset": "none", "reasoning_importance": rule})
    scores = scores_of([30, 30], reasoning_importance=np.repeat([0, 1, 0, 1], 15))  # quartiles 0 and 1: -fence
    made = check_selection(scores, config, *np.zeros((2, 60), dtype=bool))
    assert made.thresholds["reasoning_importance"]["drops"]["below"]["median"] == -fence
