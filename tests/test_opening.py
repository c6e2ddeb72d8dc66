"""Openings: what is out of place by how it begins, and the second look at what stands behind it."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests import tiny
from tests.test_pipeline import Provider
from tests.test_selectors import OFF
from xtf_plugin import attributes, report
from xtf_plugin.config import XTFConfig
from xtf_plugin.documents import collect
from xtf_plugin.errors import XTFUserError
from xtf_plugin.pipeline import make_plan, marked_tokens, segment_starts
from xtf_plugin.scorers import again, opening
from xtf_plugin.scorers.base import ScoringContext
from xtf_plugin.testing import check_scorer

LIMIT = -14.0  # about half of the units of `Sure` are below
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
    check_scorer(opening.Opening, options)


def context(logprobs, entropy, starts):
    arrays = {"logprobs": np.float32(logprobs), "entropy": np.float32(entropy)}
    return SimpleNamespace(predictions=lambda _: SimpleNamespace(**arrays), segments=lambda _: np.asarray(starts))


def score(given, **keys):
    config = opening.OpeningConfig(scorer="opening", drop={"quantile": 0.1}, **keys)
    return opening.Opening(config).score(given)


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
    assert means[5] > -2 and (means < -1).sum() == 10  # the average cannot tell the digression from the good sentence


def test_one_odd_token_condemns_no_sentence():
    """A typo far down costs its sentence little, whatever its own score, and less still behind the clip."""
    given = context([-0.1, -0.1, -0.1, -0.1, -30.0, -0.1, -0.1], [0.1] * 7, [0])
    assert score(given)[0] > -1 and score(given, clip=100.0)[0] < -2


def test_keys_that_cannot_act_are_refused():
    def refused(match, **keys):
        with pytest.raises(XTFUserError, match=match):
            XTFConfig.parse({"selectors": {"out_of_place": keys}})

    refused("out_of_place.clip: 4.0 keeps every score", clip=4)
    refused("out_of_place.context: 'kept' has to know", drop={"quantile": 0.1})
    refused("out_of_place.context: 'kept' has to know", drop={"fence": 1.5})
    refused("out_of_place.window: 3 beside", window=3)
    XTFConfig.parse({"selectors": {"out_of_place": {"context": "document", "drop": {"quantile": 0.1}, "window": 3}}})


class Sure:
    """The tiny model, sure of itself everywhere for no reason, so that much is out of place to it."""

    def __init__(self):
        self.model = tiny.model()
        with torch.no_grad():
            self.model.get_output_embeddings().weight.mul_(4)

    @torch.no_grad()
    def typical(self, ids, labelled):
        """Log-probability plus entropy of the labelled tokens of one document, through the model's own forward."""
        ids = torch.as_tensor(np.asarray(ids), dtype=torch.int64)
        hidden = self.model.model(input_ids=ids[None]).last_hidden_state[0, :-1]
        found = attributes.predictions(hidden, self.model.lm_head, ids[1:])  # the definition, in float32
        return (found[0] + found[1]).numpy()[np.asarray(labelled)[1:]]


def judged_in_order(sure, documents, config, protected):
    """The definition of `context: kept`: units in order, each judged behind what was kept before it. (M,) scores."""
    tokenizer, part = tiny.tokenizer(), config.selectors["odd"]
    levels = [segment_starts(documents, tokenizer, unit) for unit in opening.UNITS[part.unit]]
    pieces = sorted({int(start) for level in levels for start in level})
    flat, offsets = np.flatnonzero(documents.completion), documents.completion_offsets
    typical = np.concatenate([sure.typical(*documents.document(i)) for i in range(len(documents))])

    def judge(start, end):
        begins = [level[level <= start].max() for level in levels]
        return min(by_the_definition(typical[begin:end], [0], part.clip)[0] for begin in begins)

    bounds = list(zip(pieces, [*pieces[1:], len(flat)], strict=True))
    once = [judge(start, end) for start, end in bounds]
    scores = np.repeat(once, [end - start for start, end in bounds])
    for (start, end), first in zip(bounds, once, strict=True):
        if not first < part.drop.below:
            continue
        begin = documents.offsets[np.searchsorted(offsets, start, side="right") - 1]
        gone = set(flat[:start][(scores[:start] < part.drop.below) & ~protected[:start]].tolist())
        past = [documents.input_ids[i] for i in range(begin, flat[start]) if i not in gone]
        own = documents.input_ids[flat[start:end]].tolist()
        typical[start:end] = sure.typical(past + own, [False] * len(past) + [True] * len(own))
        scores[start:end] = max(first, judge(start, end))
    return scores


def several_lines(n=16):
    """Completions of several lines and sentences."""
    fast, made = tiny.tokenizer(), []
    for index in range(n):
        prompt = fast(f"Question {index}?")["input_ids"]
        pairs = tiny.problems(3, seed=index)
        text = "\n".join(pair["completion"].strip() for pair in pairs)
        ids = prompt + fast(text)["input_ids"] + [fast.eos_token_id]
        made.append({"input_ids": ids, "labels": [-100] * len(prompt) + ids[len(prompt) :]})
    return collect(made)


def config_of(tmp_path, **part):
    odd = {"scorer": "opening", "context": "kept", "clip": 100.0, **part}
    return XTFConfig.parse({**OFF, "min_kept": 0, "cache_dir": str(tmp_path), "selectors": {"odd": odd}})


@pytest.mark.parametrize("unit", ["sentence", "line", "both"])
def test_second_looks_equal_judging_in_order(unit, tmp_path, monkeypatch):
    monkeypatch.setattr(again, "ROUNDS", 50)
    monkeypatch.setattr(again, "BUDGET", 1_000)
    sure, documents = Sure(), several_lines()
    block = config_of(tmp_path, unit=unit, context="document", drop={"quantile": 0.5})
    once = make_plan(block, documents, Provider(sure.model), tiny.tokenizer(), progress=False).scores.selectors["odd"]
    limit = float(np.median(once)) + 1e-3
    config = config_of(tmp_path, unit=unit, drop={"below": limit})
    protected, _ = marked_tokens(config, documents, tiny.tokenizer())
    plan = make_plan(config, documents, Provider(sure.model), tiny.tokenizer(), progress=False)
    expected = judged_in_order(sure, documents, config, protected)
    np.testing.assert_allclose(plan.scores.selectors["odd"], expected, rtol=1e-3, atol=1e-3)
    revived = (once < limit) & (expected >= limit)
    assert revived.any() and (expected < limit).any(), "the data must hold both for the comparison to mean anything"


def test_few_rounds_and_the_budget_leave_verdicts_as_they_are(tmp_path, monkeypatch):
    sure, documents = Sure(), several_lines()

    def scores(number, **limits):
        for name, value in limits.items():
            monkeypatch.setattr(again, name, value)
        config = config_of(tmp_path / str(number), drop={"below": LIMIT})
        plan = make_plan(config, documents, Provider(sure.model), tiny.tokenizer(), progress=False)
        return plan.scores.selectors["odd"], plan.selectors.get("excerpts", {"tokens": 0})["tokens"]

    full, cost = scores(0, ROUNDS=50, BUDGET=1_000)
    once, nothing = scores(1, BUDGET=0)
    some, less = scores(2, BUDGET=0.5)
    assert nothing == 0 < less < cost
    assert less <= 0.5 * documents.lengths.sum()
    assert (once <= some).all() and (some < full).any()


@pytest.mark.parametrize(("logprobs", "asked"), [([-9, -0.1, -0.1], 0), ([-0.1, -0.1, -9], 0), ([-9, -0.1, -9], 1)])
def test_what_stands_behind_nothing_dropped_is_not_looked_at_again(logprobs, asked):
    """A clean dataset costs no second look, nor does noise that stands alone in its document."""
    documents = collect([{"input_ids": [1, 2, 3, 4], "labels": [-100, 2, 3, 4]}])
    calls = []

    def predictions(reference, others):
        calls.append(others)
        values = np.float32(logprobs) if others is None else np.full(int(others.completion.sum()), -9, np.float32)
        return SimpleNamespace(logprobs=values, entropy=0 * values, deviation=0 * values)

    given = ScoringContext(documents, None, predictions, segments=lambda _: np.arange(3))
    config = opening.OpeningConfig(scorer="opening", context="kept", drop={"below": -1})
    assert np.array_equal(opening.Opening(config).score(given), np.maximum(np.float32(logprobs), -8))
    assert sum(others is not None for others in calls) == asked


def test_second_looks_are_stored_and_told(tmp_path):
    sure, documents = Sure(), several_lines()
    config = config_of(tmp_path, unit="both", drop={"below": LIMIT})
    plans = [make_plan(config, documents, Provider(sure.model), tiny.tokenizer(), progress=False) for _ in range(2)]
    first, second = (plan.selectors["excerpts"] for plan in plans)
    assert first["documents"] > 0 and first["stored_documents"] >= 0 and first["seconds"] > 0
    assert second["documents"] == 0 and second["stored_documents"] >= first["documents"]
    assert np.array_equal(plans[0].selection.keep, plans[1].selection.keep)
    assert report.summary(plans[0], tiny.tokenizer())["selectors"]["excerpts"]["tokens"] == first["tokens"]
    assert any("second looks" in line for line in report._selector_lines(plans[0]))


def test_protected_tokens_stay_in_the_past():
    """What is protected trains, so what follows is judged behind it."""
    documents = collect([{"input_ids": list(range(1, 10)), "labels": [-100, *range(2, 10)]}])
    seen = []

    def predictions(reference, others):
        made = documents if others is None else others
        if others is not None:
            seen.extend(others.document(i)[0].tolist() for i in range(len(others)))
        size = int(made.completion.sum())
        return SimpleNamespace(logprobs=np.full(size, -9.0, np.float32), entropy=np.zeros(size, np.float32))

    def with_deviation(reference, others):
        found = predictions(reference, others)
        return SimpleNamespace(**vars(found), deviation=found.entropy)

    protected = np.zeros(8, dtype=bool)
    protected[1] = True
    given = ScoringContext(
        documents, None, with_deviation, segments=lambda _: np.asarray([0, 2, 5]), protected=protected
    )
    config = opening.OpeningConfig(scorer="opening", context="kept", drop={"below": -1})
    assert (opening.Opening(config).score(given) < -1).all()
    assert seen == [
        [1, 3, 4, 5, 6],
        [1, 3, 7, 8, 9],
    ]  # the prompt 1 and the protected 3 stay, the rest of what went not
