"""Openings: text that is out of place, found by how it begins."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from xtf_plugin.config.block import XTFConfig
from xtf_plugin.errors import XTFUserError
from xtf_plugin.scorers import opening
from xtf_plugin.testing import check_scorer

BELOW = {"drop": {"below": -1.0}}


@pytest.mark.parametrize(
    "options",
    [
        {"reference": {"model": "other"}},
        {"unit": "line", "clip": 0.5},
        {"unit": "both", "clip": 2.0},
        {"unit": "both", "context": "kept", "clip": 3.0, **BELOW},
        {"unit": "line", "context": "kept", "reference": {"model": "other"}, "drop": {"below": -0.2}},
    ],
)
def test_it_conforms(options):
    check_scorer(opening.opening, options)


def context(logprobs, entropy, starts):
    arrays = {"logprobs": np.float32(logprobs), "entropy": np.float32(entropy)}
    return SimpleNamespace(
        predictions=lambda _: SimpleNamespace(**arrays),
        segments=lambda _: np.asarray(starts),
        offsets=np.asarray([0, len(arrays["logprobs"])]),
    )


def score(given, **keys):
    config = opening.OpeningConfig(scorer="opening", drop={"quantile": 0.1}, **keys)
    return opening.opening.score(given, config)


def by_the_definition(typical, starts, clip):
    found = np.empty(len(typical))
    for low, high in zip(starts, [*starts[1:], len(typical)], strict=True):
        known = [(i, float(one)) for i, one in enumerate(typical[low:high]) if not np.isnan(one)]
        weight = sum(1 / (i + 1) for i, _ in known)
        found[low:high] = sum(max(one, -clip) / (i + 1) for i, one in known) / weight if weight else np.nan
    return found


def test_opening_equals_its_definition_on_random_units():
    rng = np.random.default_rng(0)
    for trial in range(30):
        size = int(rng.integers(1, 60))
        starts = np.union1d([0], rng.integers(0, size, rng.integers(0, 9)))
        logprobs, entropy = -rng.exponential(4, size), rng.exponential(1, size)
        logprobs[rng.random(size) < 0.2] = np.nan
        for clip in (0.0, 2.0, 100.0):
            expected = by_the_definition(np.float32(logprobs) + np.float32(entropy), starts, clip)
            got = score(context(logprobs, entropy, starts), clip=clip)
            np.testing.assert_allclose(got, np.float32(expected), rtol=1e-5, err_msg=str(trial))


def test_both_is_the_worse_of_the_sentence_and_of_its_line_so_far():
    units = {"sentence": np.asarray([0, 3, 5, 6]), "line": np.asarray([0, 6])}
    typical = [-8, -8, 0, -1, 0, -2, 0, 0, 0]
    given = context(typical, [0.0] * 9, None)
    given.segments = units.__getitem__
    sentence, both = score(given, unit="sentence"), score(given, unit="both")
    line = [by_the_definition(typical[:end], [0], 8.0)[0] for end in (3, 5, 6)]
    expected = np.minimum(sentence, np.repeat([*line, 0], [3, 2, 1, 3]))
    np.testing.assert_allclose(both, expected, rtol=1e-6)
    assert not np.array_equal(both, sentence) and both[0] == sentence[0]  # a line's beginning is not judged by its end


def test_no_token_no_score():
    assert score(context([], [], [])).shape == (0,)


def test_fluent_filler_is_found_by_its_beginning_and_not_by_its_average():
    """Five likely tokens; a digression whose first token is a surprise and whose rest follows; an uncertain start."""
    logprobs = [-0.1, -0.1, -0.1, -0.1, -0.1, -9.0, -0.05, -0.05, -0.05, -0.05, -0.05, -0.05, -3.0, -0.1, -0.1]
    entropy = [0.1] * 12 + [3.0, 0.1, 0.1]  # where many words may begin a sentence, an improbable one is no noise
    starts = [0, 5, 12]
    scores = score(context(logprobs, entropy, starts))
    assert (scores < -3).tolist() == [False] * 5 + [True] * 7 + [False] * 3
    means = np.repeat(np.add.reduceat(np.float64(logprobs), starts) / np.diff([*starts, 15]), np.diff([*starts, 15]))
    assert means[5] > -2 and (means < -1).sum() == 10  # averages of the digression and of the good sentence are alike


def test_one_odd_token_drops_no_sentence():
    """A typo late in a sentence changes its score little, and even less with the clip."""
    given = context([-0.1, -0.1, -0.1, -0.1, -30.0, -0.1, -0.1], [0.1] * 7, [0])
    assert score(given)[0] > -1 and score(given, clip=100.0)[0] < -2


DROPS = {"scorer": "opening", "unit": "both", "context": "kept", "drop": {"below": -4.0}}


def test_keys_that_cannot_act_are_refused():
    def refused(match, **keys):
        with pytest.raises(XTFUserError, match=match):
            XTFConfig.parse({"selectors": {"odd": {**DROPS, **keys}}})

    refused("odd.clip: 4.0 keeps every score", clip=4)
    refused("odd.drop: .*quantile.* depends on other doc.*add `context: document`", drop={"quantile": 0.1})
    refused("odd.drop: .*fence", drop={"fence": 1.5})
    refused("odd.window: 3 has no effect beside `unit: both`", window=3)
    refused("odd.max_fraction: 0.5 would keep text .*use context: document", max_fraction=0.5)
    free = {"context": "document", "drop": {"quantile": 0.1}, "max_fraction": 0.5}
    XTFConfig.parse({"selectors": {"odd": {**DROPS, **free}}})


def test_what_is_infinite_is_undefined_and_drops_nothing():
    assert np.isnan(score(context([-np.inf], [0.5], [0]))).all()
    assert score(context([-np.inf, -0.5], [0.5, 0.5], [0])).tolist() == [0, 0]
