"""What the text after a sentence gains by it, against documents without the sentence that are read one by one."""

from __future__ import annotations

import numpy as np
import pytest

from tests import tiny
from tests.scorers.by_hand import Reader, chat, context_of, sentences, several_turns, spread, units_of
from tests.test_plan import Provider
from xtf_plugin.config.block import XTFConfig
from xtf_plugin.data.documents import collect
from xtf_plugin.errors import XTFUserError
from xtf_plugin.plan import make_plan
from xtf_plugin.scorers import ScoreConfig, explained
from xtf_plugin.scorers.influence import InfluenceConfig, influence

NAN = float("nan")


def part_of(**part):
    return InfluenceConfig.model_validate({"scorer": "influence", **part})


@pytest.fixture
def context(tmp_path):
    """A context with a score `other` of this rule and these values, and of some protected tokens."""
    open_ones = []

    def make(documents, other=None, drop=None, protected=None):
        made = context_of(documents, tmp_path, protected=protected)
        open_ones.append(made)
        found = next(made)
        if other is not None:
            found.scores["other"] = np.asarray(other, dtype=np.float32)
            found.parts = {"other": ScoreConfig(scorer="made", drop=drop)}
        return found

    yield make
    for made in open_ones:
        made.close()


def by_hand(units, horizon, judged=None, reader=None):
    """The definition: the clipped gains of up to `horizon` completion tokens after a unit but the first two."""
    reader, values = reader or Reader(), []
    for number, unit in enumerate(units):
        after = [at for at in range(unit.end, len(unit.ids)) if unit.completion[at]][:horizon]
        if unit.start == 0 or len(after) < 4 or not (judged is None or judged[number]):
            values.append(NAN)
            continue
        with_it, without = reader.logprobs(unit.ids), reader.logprobs(unit.ids[: unit.start] + unit.ids[unit.end :])
        gone = unit.end - unit.start
        values.append(sum(np.clip(with_it[at] - without[at - gone], -1, 1) for at in after[2:]))
    return values


def close(found, expected, units):
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, spread(expected, units), atol=2e-4)


@pytest.mark.parametrize("horizon", [4, 9, 64])
@pytest.mark.parametrize("unit", ["sentence", "line"])
def test_equals_documents_that_are_built_by_hand(context, unit, horizon):
    """Over several turns: the prompt between two turns is read with the unit and without it."""
    documents = several_turns(12)
    units = units_of(documents, sentences(documents, unit))
    expected = by_hand(units, horizon)
    found = influence.score(context(documents), part_of(among=None, unit=unit, horizon=horizon))
    close(found, expected, units)
    assert np.isnan(expected).any() and np.nanmin(expected) < 0 < np.nanmax(expected)
    over = [u for u, value in zip(units, expected, strict=True) if value == value and u.end < len(u.ids)]
    assert any(not u.completion[u.end] for u in over), "the case must ask across turns"


def test_the_horizon_ends_with_the_document(context):
    """The last unit has nothing after it, and one that three tokens follow has one that says something."""
    prompt, own = chat("How many?"), [*chat(" Ben has 3 pens."), *chat(" He buys 4 pens.")]
    first = len(chat(" Ben has 3 pens."))
    for left, scored in ((2, False), (3, False), (4, True)):
        ids = prompt + own[: first + left]
        documents = collect([{"input_ids": ids, "labels": [-100] * len(prompt) + ids[len(prompt) :]}])
        given = context(documents)
        starts = np.asarray([0, first])
        given.segments = lambda _, starts=starts: starts
        found = influence.score(given, part_of(among=None))
        assert np.isnan(found[first:]).all() and np.isnan(found[:first]).all() != scored


def test_the_next_document_is_not_read(context):
    documents = several_turns(4)
    units = units_of(documents, sentences(documents))
    found = influence.score(context(documents), part_of(among=None, horizon=10_000))
    last = [number for number, unit in enumerate(units) if unit.end == len(unit.ids)]
    values = np.split(found, sentences(documents)[1:])
    assert len(last) == len(documents) and all(np.isnan(values[number]).all() for number in last)
    close(found, by_hand(units, 10_000), units)


@pytest.mark.parametrize(
    ("drop", "below"), [({"below": 0.1}, 0.1), ({"of_median": 0.2}, None), ({"quantile": 0.1}, -np.inf)]
)
def test_only_units_that_are_doubtful_in_another_score_are_asked_about(context, drop, below):
    """From its threshold (below it a unit is dropped anyway) to a share of its median."""
    documents = several_turns(12)
    units = units_of(documents, sentences(documents))
    other = np.random.default_rng(0).random(len(units)).astype(np.float32)
    other[::7] = NAN
    times = np.repeat(documents.counts, np.diff(documents.completion_offsets))
    median = float(np.nanmedian(np.repeat(spread(other, units), times)))
    below = 0.2 * median if below is None else below
    judged = (other >= below) & (other < 0.8 * median)
    expected = by_hand(units, 64, judged)
    given = context(documents, spread(other, units), drop)
    asked, ask = [], given.predictions_of
    given.predictions_of = lambda splices, reference: asked.append(len(splices.keep)) or ask(splices, reference)
    close(influence.score(given, part_of(among="other", doubtful=0.8)), expected, units)
    number = int((~np.isnan(expected)).sum())
    assert asked == [number] and 0 < number < (~np.isnan(by_hand(units, 64))).sum()


@pytest.mark.parametrize(("values", "warned"), [(-1.0, True), (0.0, True), (NAN, False)])
def test_without_a_positive_median_nothing_is_doubtful(context, values, warned):
    """Which is said, unless the other score has said why it is undefined everywhere."""
    documents = several_turns(3)
    given = context(documents, np.full(int(documents.completion.sum()), values), {"of_median": 0.2})
    given.predictions_of = given.log_probabilities = lambda *_: 1 / 0
    assert np.isnan(influence.score(given, part_of(among="other"))).all()
    found = [text for text in given.warnings if "doubtful in other" in text and f"median is {values:g}" in text]
    assert len(found) == len(given.warnings) == warned


def test_a_score_that_did_not_run_is_refused_by_the_key(context):
    with pytest.raises(XTFUserError, match=r"^among: 'task_relevance' is not a score that .* Legal: other, or null"):
        influence.score(context(several_turns(2), np.zeros(0), {"below": 0}), part_of())


def test_protected_units_are_not_asked_about(context):
    documents = several_turns(4)
    starts = sentences(documents)
    units = units_of(documents, starts)
    flags = np.arange(len(units)) % 2 == 0
    given = context(documents, protected=spread(flags, units).astype(bool))
    close(influence.score(given, part_of(among=None)), by_hand(units, 64, ~flags), units)


def test_a_stream_keeps_what_is_doubtful(context):
    """The bounds are those of the sample, whatever the later documents score."""
    sample, later = several_turns(6), several_turns(12)
    units = units_of(later, sentences(later))
    rng = np.random.default_rng(1)
    first = context(sample, rng.random(int(sample.completion.sum())), {"of_median": 0.2})
    frozen = influence.frozen(first, part_of(among="other"))
    times = np.repeat(sample.counts, np.diff(sample.completion_offsets))
    median = float(np.median(np.repeat(first.scores["other"], times)))
    values = (rng.random(len(units)) * 0.6).astype(np.float32)  # a lower median
    judged = (values >= 0.2 * median) & (values < 0.4 * median)
    given = context(later, spread(values, units), {"of_median": 0.2})
    close(frozen(given, part_of(among="other")), by_hand(units, 64, judged), units)


def test_it_runs_after_the_score_that_it_asks_in(tmp_path, monkeypatch):
    """Though it stands before it in the block."""
    monkeypatch.setattr(explained, "LEAST", -np.inf)
    block = {
        "preset": "default",
        "reasoning_importance": {"doubtful": 3},
        "knowledge_novelty": False,
        "task_relevance": {"drop": {"quantile": 0.3}},
        "protect": {"formats": None, "special_tokens": False},
        "cache_dir": str(tmp_path),
    }
    documents = several_turns(12)
    made = make_plan(XTFConfig.parse(block), documents, Provider(), tiny.tokenizer(), progress=False)
    relevance, importance = made.scores.values["task_relevance"], made.scores.values["reasoning_importance"]
    assert list(made.scores.values) == ["reasoning_importance", "task_relevance"]
    times = np.repeat(documents.counts, np.diff(documents.completion_offsets))
    median = np.nanmedian(np.repeat(relevance, times))
    units = units_of(documents, sentences(documents))
    values = np.asarray([relevance[start] for start in sentences(documents)])
    judged = (values < 3 * median) if median > 0 else np.zeros(len(units), dtype=bool)
    close(importance, by_hand(units, 64, judged), units)
    assert median > 0 and not np.isnan(importance).all()
