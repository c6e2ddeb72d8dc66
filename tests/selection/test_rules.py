"""Every rule against a plain loop over documents, and by hand where the numbers are the point."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from tests.made_scores import KN, RI, TR
from xtf_plugin.config.block import XTFConfig
from xtf_plugin.data import ragged
from xtf_plugin.data.ragged import Layout
from xtf_plugin.selection import rules
from xtf_plugin.selection.otsu import multi_otsu

NAN = float("nan")


def layout_of(documents, counts=None):
    offsets = np.concatenate([[0], np.cumsum([len(d) for d in documents])]).astype(np.int64)
    return Layout(offsets, np.asarray([1] * len(documents) if counts is None else counts, dtype=np.int64))


def fire(name, documents, counts=None, **settings):
    """Evaluate the score of one slot."""
    values = np.concatenate([np.asarray(d, dtype=np.float32) for d in documents])
    config = XTFConfig.parse({"preset": "none", name: settings}).scores[name]
    return rules.evaluate(name, values, layout_of(documents, counts), config)


def averaged(document, window):
    """The window, spelt out."""
    half = window // 2
    result = np.full(len(document), NAN)
    for i, value in enumerate(document):
        near = document[max(0, i - half) : i + half + 1]
        if not math.isnan(value):
            result[i] = np.mean([v for v in near.tolist() if not math.isnan(v)])
    return result.astype(np.float32).astype(np.float64)


def naive(name, documents, counts, *, drop, scope=None, scale="linear", window=1, max_fraction=None):
    """All rules as loops in float64; returns a mask over the flat tokens."""
    scope = scope or ("document" if name == RI else "dataset")
    documents = [averaged(np.asarray(d, dtype=np.float64), window) for d in documents]
    everything = np.concatenate([np.tile(d, c) for d, c in zip(documents, counts, strict=True)])
    everything = everything[~np.isnan(everything)]
    log = np.log if scale == "log" else lambda values: values
    masks = []
    for scores in documents:
        defined = scores[~np.isnan(scores)]
        novelty, rank = -np.expm1(scores), scores
        mask = np.zeros(len(scores), dtype=bool)
        if "fence" in drop:
            pool = defined if scope == "document" else everything
            q1, q3 = np.quantile(log(pool), [0.25, 0.75]) if len(pool) else (0, 0)
            mask = log(scores) < q1 - drop["fence"] * (q3 - q1)
        elif "quantile" in drop and name == KN:
            mask, rank = novelty < np.quantile(-np.expm1(everything), drop["quantile"]), novelty
        elif "quantile" in drop and scope == "document":
            order = sorted((s, i) for i, s in enumerate(scores.tolist()) if not math.isnan(s))
            mask[[i for _, i in order[: math.floor(drop["quantile"] * len(order))]]] = True
        elif "quantile" in drop:
            mask = scores < np.quantile(everything, drop["quantile"])
        elif "below" in drop:
            mask = scores < drop["below"]
        elif "of_median" in drop:
            seen, pool = (novelty, -np.expm1(everything)) if name == KN else (scores, everything)
            mask, rank = seen < drop["of_median"] * np.median(pool), seen
        elif "cluster" in drop:
            cuts = [-np.inf, *multi_otsu(everything, classes=drop["of"]), np.inf]
            mask = (scores > cuts[drop["cluster"] - 1]) & (scores <= cuts[drop["cluster"]])
        else:
            a, b, P = drop.get("known_above"), drop.get("unknown_below"), np.exp(scores)
            known = P > a if a is not None else mask
            unknown = P < b if b is not None else mask
            mask = known | unknown
            rank = scores if a is None else novelty
            if a is not None and b is not None:
                rank = -np.maximum((P - a) / (1 - a), (b - P) / b)
        if max_fraction is not None:
            order = sorted((rank[i], i) for i in np.flatnonzero(mask).tolist())
            mask = np.zeros(len(scores), dtype=bool)
            mask[[i for _, i in order[: math.floor(max_fraction * len(scores))]]] = True
        masks.append(mask)
    return np.concatenate(masks)


CASES = [
    (RI, {"drop": {"fence": 0.3}}),
    (RI, {"drop": {"fence": 0.2}, "scale": "log", "window": 3}),
    (RI, {"drop": {"fence": 0.1}, "scope": "dataset"}),
    (RI, {"drop": {"fence": 0.5}, "scope": "dataset", "scale": "log"}),
    (RI, {"drop": {"quantile": 0.25}}),
    (RI, {"drop": {"quantile": 0.4}, "window": 5, "max_fraction": 0.2}),
    (RI, {"drop": {"quantile": 0.3}, "scope": "dataset", "max_fraction": 0.1}),
    (RI, {"drop": {"below": 0.5}, "window": 9}),
    (RI, {"drop": {"of_median": 0.6}}),
    (RI, {"drop": {"of_median": 1}, "window": 3, "max_fraction": 0.2}),
    (KN, {"drop": {"of_median": 0.9}, "max_fraction": 0.15}),
    (TR, {"drop": {"of_median": 0.8}, "window": 7}),
    (KN, {"drop": {"known_above": 0.8}}),
    (KN, {"drop": {"known_above": 0.7}, "window": 3, "max_fraction": 0.15}),
    (KN, {"drop": {"unknown_below": 0.3}, "max_fraction": 0.2}),
    (KN, {"drop": {"known_above": 0.7, "unknown_below": 0.3}, "max_fraction": 0.25}),
    (KN, {"drop": {"quantile": 0.2}, "window": 7}),
    (TR, {"drop": {"cluster": 2, "of": 5}}),
    (TR, {"drop": {"cluster": 1, "of": 3}, "window": 3, "max_fraction": 0.2}),
    (TR, {"drop": {"cluster": 2, "of": 3}, "max_fraction": 0.05}),
    (TR, {"drop": {"cluster": 3, "of": 3}, "window": 13}),
    (TR, {"drop": {"quantile": 0.3}}),
    (TR, {"drop": {"below": 0.4}}),
    (TR, {"drop": {"fence": 0.1}}),
    (TR, {"drop": {"quantile": 0.3}, "scope": "document", "window": 3}),
]


@pytest.mark.parametrize(("name", "settings"), CASES)
@pytest.mark.parametrize("chunk", [1 << 17, 25])
def test_every_rule_equals_a_loop_over_documents(monkeypatch, name, settings, chunk):
    monkeypatch.setattr(ragged, "CHUNK_TOKENS", chunk)
    rng = np.random.default_rng(7)
    documents = []
    for length in [30, 0, 1, 17, 2, 64, 5, 0, 40, 3, 0]:
        scores = rng.choice(rng.gamma(1.0, size=25), length) + 0.01  # few values: ties are common
        scores[rng.random(length) < 0.1] = NAN
        documents.append((-scores if name == KN else scores).astype(np.float32))
    counts = rng.integers(1, 4, len(documents))
    found = fire(name, documents, counts, **settings)
    expected = naive(name, documents, counts.tolist(), **settings)
    np.testing.assert_array_equal(found.mask, expected)
    assert 0 < expected.sum() < len(expected), "the case must have something to tell apart"
    assert found.fired == layout_of(documents, counts).spread(counts)[expected].sum()
    json.dumps(found.thresholds, allow_nan=False)


def test_fence_by_hand_and_strictly_below():
    scores = [1.0, 10, 11, 12, 13]  # Q1 = 10, Q3 = 12, fence = 8 for k = 1
    found = fire(RI, [scores, [8.0, 10, 11, 12, 13]], drop={"fence": 1.0})
    assert found.mask.tolist() == [True] + [False] * 9, "a score on the fence is kept"
    assert found.thresholds["drops"] == {"below": {"median": 8.0, "min": 8.0, "max": 8.0}}
    assert found.thresholds["rule"] == {"fence": 1.0}


def test_log_fence_survives_scores_of_zero():
    found = fire(RI, [[0.0, 1, 1.1, 1.2, 1.3, 1.4]], drop={"fence": 1.0}, scale="log")
    assert found.mask.tolist() == [True] + [False] * 5
    assert found.warnings == []


def test_document_quantile_is_an_exact_count_and_the_earliest_of_equals_are_dropped():
    found = fire(RI, [[3.0, 1, 1, 1, NAN, 2, 9, 9, 9, 9, 9]], drop={"quantile": 0.25})
    assert np.flatnonzero(found.mask).tolist() == [1, 2], "floor(0.25 * 10 defined) = 2"
    assert fire(RI, [[0.0, -0.0, 1, 1]], drop={"quantile": 0.25}).mask.tolist() == [True, False, False, False]


def test_novelty_thresholds_are_strict_probabilities():
    logprobs = np.log(np.asarray([0.5, 0.94, 0.96, 1.0, 0.01]))
    assert fire(KN, [logprobs], drop={"known_above": 0.95}).mask.tolist() == [False, False, True, True, False]
    assert fire(KN, [logprobs], drop={"unknown_below": 0.05}).mask.tolist() == [False] * 4 + [True]
    one_over_e = math.exp(-1)  # its logarithm is exact
    for drop in ({"known_above": one_over_e}, {"unknown_below": one_over_e}):
        assert fire(KN, [[-1.0, -0.9, -1.1]], drop=drop).mask.sum() == 1, "a probability on the threshold is kept"
    both = fire(KN, [logprobs], drop={"known_above": 0.95, "unknown_below": 0.05})
    assert both.mask.tolist() == [False, False, True, True, True]
    assert both.thresholds["drops"] == pytest.approx({"below": 0.05, "above": 0.95})
    np.testing.assert_array_equal(both.seen, -np.expm1(logprobs.astype(np.float32)))


def test_max_fraction_lets_the_most_extreme_through_whatever_their_direction():
    P = np.asarray([0.96, 0.999, 0.5, 0.04, 0.0001, 0.5, 0.5, 0.5])
    both = {"known_above": 0.95, "unknown_below": 0.05}
    capped = fire(KN, [np.log(P)], drop=both, max_fraction=0.25)
    assert np.flatnonzero(capped.mask).tolist() == [1, 4]
    single = fire(KN, [np.log([0.99, 0.999999, 0.99999, 0.2])], drop={"known_above": 0.95}, max_fraction=0.25)
    assert np.flatnonzero(single.mask).tolist() == [1]


def test_window_averages_logprobs_within_the_document_only():
    documents = [[-0.001, -0.001, -9.0], [-0.001, NAN, -0.001]]
    found = fire(KN, documents, drop={"known_above": 0.95}, window=3)
    assert found.mask.tolist() == [True, False, False, True, False, True]


def test_a_share_of_the_median_by_hand():
    found = fire(RI, [[1.0, 2, 2.5], [5, 6], [10.0]], [1, 1, 3], drop={"of_median": 0.4})  # 1 2 2.5 5 6 10 10 10
    assert found.thresholds["median"] == 5.5 and found.thresholds["drops"] == {"below": pytest.approx(2.2)}
    assert found.mask.tolist() == [True, True] + [False] * 4 and found.thresholds["rule"] == {"of_median": 0.4}
    on_it = fire(RI, [[1.0, 2, 2]], drop={"of_median": 0.5})
    assert not on_it.mask.any(), "a score on the threshold is kept"
    assert fire(RI, [[-1.0, 0, 1, 2, 3]], drop={"of_median": 0}).mask.tolist() == [True] + [False] * 4


@pytest.mark.parametrize("scores", [[-3.0, -2, -1], [-1.0, 0, 5], [-5.0, -1e-30, 1]])
def test_a_share_of_a_median_that_is_not_positive_fires_on_nothing(scores):
    """Half of a negative median is above it, so that most tokens would be dropped."""
    found = fire(RI, [scores], drop={"of_median": 0.5})
    assert (
        not found.mask.any() and found.thresholds["drops"] == {} and found.thresholds["median"] == np.float32(scores[1])
    )
    (warning,) = found.warnings
    assert "of_median: 0.5" in warning and f"the median is {scores[1]:.4g}" in warning
    json.dumps(found.thresholds, allow_nan=False)
    nothing = fire(RI, [[NAN, NAN]], drop={"of_median": 0.5})
    assert not nothing.mask.any() and nothing.thresholds["median"] is None
    assert ["no score is defined" in warning for warning in nothing.warnings] == [True]


def test_a_share_of_the_median_stays_what_it_was_for_a_later_part_of_a_stream():
    first = fire(RI, [[1.0, 2, 4, 6, 8]], drop={"of_median": 0.5})
    config = XTFConfig.parse({"preset": "none", RI: {"drop": {"of_median": 0.5}}}).scores[RI]
    later = np.asarray([1.0, 1.9, 2.1, 100, 200, 300], dtype=np.float32)
    found = rules.evaluate(RI, later, layout_of([later]), config, rules=first.rules)
    assert found.mask.tolist() == [True, True] + [False] * 4 and found.warnings == []
    assert found.thresholds["drops"] == first.thresholds["drops"] == {"below": 2.0}


def test_a_scorer_that_finds_nothing_in_clean_data_gives_no_warning():
    for scorer, warned in (("explained", False), ("new_text", False), ("typicality", True)):
        part = {"scorer": scorer, "drop": {"below": -9}}
        config = XTFConfig.parse({"preset": "none", TR: part}).scores[TR]
        values = np.asarray([0.1, 0.2], dtype=np.float32)
        found = rules.evaluate(TR, values, layout_of([values]), config, averaged=True)
        assert bool(found.warnings) == warned and not found.mask.any()


def test_otsu_runs_over_occurrences_and_takes_one_class():
    documents = [[0.0, 0.1, 0.5, 0.52, 0.9, 1.0]]
    found = fire(TR, documents, drop={"cluster": 2, "of": 3})
    assert np.flatnonzero(found.mask).tolist() == [2, 3]
    facts = found.thresholds
    assert facts["classes"]["sizes"] == [2, 2, 2]
    assert facts["drops"] == {"above": pytest.approx(0.1), "up_to": pytest.approx(0.52)}


def test_otsu_without_enough_values_warns_and_drops_nothing():
    found = fire(TR, [[0.1, 0.2, 0.1, NAN]], drop={"cluster": 2, "of": 5})
    assert not found.mask.any()
    assert "2 distinct values" in found.warnings[-1] and "5 classes" in found.warnings[-1]
    json.dumps(found.thresholds, allow_nan=False)


def test_an_inert_rule_is_reported_with_its_scores():
    found = fire(RI, [[1.0, 2, 3, 4, 5]], drop={"fence": 1.0})
    assert len(found.warnings) == 1
    for part in (RI, "fence: 1.0", "min 1", "50 % 3", "95 % 4.8", "max 5", "below 0"):
        assert part in found.warnings[0]
    half = fire(KN, [np.log([0.99, 0.5])], drop={"known_above": 0.95, "unknown_below": 0.01})
    assert len(half.warnings) == 1 and "unknown_below" in half.warnings[0], "each rule answers for itself"


def test_a_cap_that_lets_nothing_through_is_reported():
    found = fire(RI, [[1.0, 2, 3, 4]], drop={"below": 2.5}, max_fraction=0.2)
    assert found.fired == 0 and "max_fraction 0.2" in found.warnings[0]


def test_undefined_scores_never_fire_and_infinite_ones_are_counted():
    found = fire(RI, [[NAN, 1.0, -math.inf, 0.1, NAN]], [3], drop={"below": 0.5})
    assert np.flatnonzero(found.mask).tolist() == [3]
    assert found.fired == 3
    assert found.warnings == [f"{RI}: 3 of 15 scores are infinite; {RI} never drops these tokens"]
    assert fire(RI, [[NAN, 0.1, NAN]], drop={"below": 0.5}).warnings == []
    nothing = fire(TR, [[NAN, NAN]], drop={"below": 0.5})
    assert not nothing.mask.any() and "no score is defined" in nothing.warnings[-1]


@pytest.mark.filterwarnings("ignore:overflow")
def test_scores_that_the_mapping_makes_infinite_are_undefined():
    found = fire(KN, [[3e38, -1.0, -2.0, -0.5]], drop={"cluster": 1, "of": 2})
    assert found.mask.tolist() == [False, False, False, True] and np.isnan(found.seen[0])


def test_the_input_is_left_alone():
    values = np.asarray([math.inf, 1.0, 0.2], dtype=np.float32)
    config = XTFConfig.parse({"preset": "none", RI: {"drop": {"below": 0.5}, "window": 3}}).reasoning_importance
    rules.evaluate(RI, values, layout_of([values]), config)
    assert math.isinf(values[0])


@pytest.mark.parametrize("weighted", [False, True])
def test_quantiles_equal_numpys_to_the_last_bit(weighted):
    rng = np.random.default_rng(9)
    documents = [rng.normal(size=n).astype(np.float32) for n in (1, 2, 7, 100, 33)]
    documents[2][3], documents[3][5] = NAN, -0.0
    counts = rng.integers(1, 5, 5) if weighted else np.ones(5, dtype=np.int64)
    layout, flat = layout_of(documents, counts), np.concatenate(documents)
    q = [0.0, 0.05, 0.25, 0.5, 0.777, 1.0]
    everything = np.concatenate([np.tile(d, c) for d, c in zip(documents, counts, strict=True)]).astype(np.float64)
    expected = np.quantile(everything[~np.isnan(everything)], q)
    np.testing.assert_array_equal(ragged.dataset_quantiles(flat, layout, q), expected)
    per_document = ragged.document_quantiles(flat, layout, q)
    for column, document in zip(per_document.T, documents, strict=True):
        np.testing.assert_array_equal(column, np.quantile(document[~np.isnan(document)].astype(np.float64), q))
