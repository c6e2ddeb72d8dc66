"""Sentences and lines as units: first tokens, means, and dropped sentences."""

from __future__ import annotations

import re

import numpy as np
import pytest

from tests import tiny
from tests.made_scores import ALL_OFF, KN, RI, TR, scores_of
from tests.selection.test_rules import layout_of
from tests.test_plan import plan  # noqa: F401, a fixture
from xtf_plugin.config.block import XTFConfig
from xtf_plugin.data import ragged, sentences
from xtf_plugin.data.ragged import segment_means
from xtf_plugin.errors import XTFError
from xtf_plugin.selection import rules
from xtf_plugin.selection.select import select
from xtf_plugin.selection.text_rules import special_ids

SPECIAL = "<s>"
NOTHING = {"special_tokens": False, "formats": None}


class Pieces:
    """A tokenizer whose token `i` is the text `pieces[i]`."""

    def __init__(self, pieces) -> None:
        self.pieces = list(pieces)

    def decode(self, ids, **_):
        return "".join(self.pieces[i] for i in ids)


def starts_of(unit, *runs):
    """Segment starts of runs that are lists of pieces."""
    pieces = sorted({piece for run in runs for piece in run} | {SPECIAL})
    ids = [pieces.index(piece) for run in runs for piece in run]
    offsets = np.concatenate([[0], np.cumsum([len(run) for run in runs])])
    tokens = np.asarray(ids, dtype=np.int32)
    return sentences.segment_starts(unit, Pieces(pieces), tokens, offsets, [pieces.index(SPECIAL)])


def cut(unit, text):
    """The segments of a run whose tokens are separated by |, joined by //."""
    run = text.split("|")
    edges = [*starts_of(unit, run).tolist(), len(run)]
    return " // ".join("|".join(run[a:b]) for a, b in zip(edges[:-1], edges[1:], strict=True))


@pytest.mark.parametrize(
    "expected",
    [
        "One|.// Two|!// Three|?",
        "It| costs| 3|.|50| coins|.// Then| go",
        "So| e|.|g.// this",
        "v|1.2|.3| is| out",
        "Why|?|!// Because|...// yes",
        "a|.|  | |\t//b",  # only whitespace: of the sentence before
        "a|. //b",
        "a|.|\n|\n//b|\n// c",
        "a|.||// b",  # a token without text does not hide the whitespace behind it
        "a|.||b",
        "  |a| b|.// c",
        "a|.//<s>//\n//b",
        "a| b//<s>//<s>// c",
        "a|.\nb//c",
    ],
)
def test_sentences_by_hand(expected):
    assert cut("sentence", expected.replace("//", "|")) == expected.replace("//", " // ")


@pytest.mark.parametrize("expected", ["a|.| b|\n//  |c|\r\n//\n//d", "a|\nb//c", "a//<s>//b|\n//<s>", "a| b", "|\n//"])
def test_lines_by_hand(expected):
    assert cut("line", expected.replace("//", "|")) == expected.replace("//", " // ")


POOL = ["a", " b", ".", "!", "? ", " .", "3", ".5", "\n", " \n", "  ", " ", "", "\n\n", "e.g.", ".\n", "x.y", ". c"]
POOL += ["\t", "c", "\u00e9", SPECIAL]


def naive_starts(unit, run):
    """The definition as a loop over one run."""

    def ends(i):
        found = re.search(r"[.!?]\s", run[i] + "".join(run[i + 1 :])[:1])
        return run[i] != SPECIAL and ("\n" in run[i] or (unit == "sentence" and found is not None))

    starts = []
    for i in range(len(run)):
        if i == 0 or SPECIAL in run[i - 1 : i + 1]:
            starts.append(i)
        elif unit == "line":
            starts += [i] * ends(i - 1)
        elif run[i].strip():
            j = i - 1
            while not ends(j) and not run[j].strip() and j not in starts:
                j -= 1
            starts += [i] * ends(j)
    return starts


@pytest.mark.parametrize("unit", ["sentence", "line"])
@pytest.mark.parametrize("chunk", [1 << 20, 7])
def test_starts_equal_a_loop(monkeypatch, unit, chunk):
    monkeypatch.setattr(sentences, "CHUNK_TOKENS", chunk)
    rng = np.random.default_rng(3)
    runs = [rng.choice(POOL, size).tolist() for size in [0, 40, 1, 0, 3, 90, 2, 200, 1, 0]]
    expected, at = [], 0
    for run in runs:
        expected += [at + i for i in naive_starts(unit, run)]
        at += len(run)
    assert starts_of(unit, *runs).tolist() == expected
    assert len(expected) > 40


def test_nothing_to_cut():
    assert starts_of("sentence").tolist() == starts_of("line", []).tolist() == []


def random_scores(rng, lengths):
    """Documents of these lengths, some scores undefined, and starts of segments that respect them."""
    layout = layout_of([np.zeros(n) for n in lengths])
    size = int(layout.offsets[-1])
    scores = rng.gamma(1.0, size=size).astype(np.float32)
    scores[rng.random(size) < 0.3] = np.nan
    begins = rng.random(size) < 0.2
    begins[layout.offsets[:-1][np.asarray(lengths) > 0]] = True
    return scores, layout, np.flatnonzero(begins)


@pytest.mark.parametrize("chunk", [1 << 17, 25])
def test_means_equal_a_loop(monkeypatch, chunk):
    monkeypatch.setattr(ragged, "CHUNK_TOKENS", chunk)
    scores, layout, starts = random_scores(np.random.default_rng(0), [30, 0, 1, 17, 2, 640, 5, 0, 40, 3, 0])
    found = segment_means(scores, layout, starts)
    for low, high in zip(starts, [*starts[1:], len(scores)], strict=True):
        part = scores[low:high].astype(np.float64)
        expected = np.full(len(part), np.nan)
        if not np.isnan(part).all():
            expected[~np.isnan(part)] = np.nanmean(part)
        np.testing.assert_allclose(found[low:high], expected, rtol=1e-6)
    assert found.dtype == np.float32 and np.isnan(found).any() and not np.isnan(found).all()


def test_means_do_not_depend_on_the_other_documents():
    rng = np.random.default_rng(1)
    scores, layout, starts = random_scores(rng, rng.integers(1, 3_000, 200))
    together = segment_means(scores * 1e3, layout, starts)
    for i in range(0, 200, 7):
        low, high = layout.offsets[i : i + 2]
        own = starts[(starts >= low) & (starts < high)] - low
        alone = segment_means(scores[low:high] * np.float32(1e3), layout_of([np.zeros(high - low)]), own)
        np.testing.assert_array_equal(alone, together[low:high])


def odd_one_out():
    """Three sentences of four tokens; the second is improbable as a whole, though not in every token."""
    scores = scores_of([12], logprobs=[-1, -3, -1, -1, -4, -0.2, -4, -4, -1, -1, -3, -1])
    return scores, {"sentence": np.asarray([0, 4, 8])}


def novelty(unit):
    block = {"preset": "none", "min_kept": 0}
    return XTFConfig.parse({**block, KN: {"drop": {"unknown_below": 0.08}, "unit": unit}})


def test_a_sentence_as_unit_drops_the_whole_odd_sentence():
    scores, given = odd_one_out()
    by_token = select(scores, novelty("token")).keep
    by_sentence = select(scores, novelty("sentence"), segments=given)
    assert by_token.tolist() == [True, False, True, True, False, True, False, False, True, True, False, True]
    assert by_sentence.keep.tolist() == [True] * 4 + [False] * 4 + [True] * 4
    assert by_sentence.thresholds[KN]["unit"] == "sentence"


def test_segments_that_are_needed_and_not_given_are_refused():
    scores, given = odd_one_out()
    for segments_given in (None, given):
        with pytest.raises(XTFError, match="unit: line needs the first token of every line"):
            select(scores, novelty("line"), segments=segments_given)


def test_rules_see_the_means():
    scores, layout, starts = random_scores(np.random.default_rng(2), [300, 20, 0, 41])
    importance = {"drop": {"quantile": 0.3}, "max_fraction": 0.2}

    def fire(values, **settings):
        config = XTFConfig.parse({"preset": "none", RI: {**importance, **settings}}).reasoning_importance
        return rules.evaluate(RI, values, layout, config, {"line": starts}).mask

    averaged = fire(scores, unit="line")
    np.testing.assert_array_equal(averaged, fire(segment_means(scores, layout, starts)))
    assert not np.array_equal(averaged, fire(scores))


@pytest.mark.parametrize("unit", ["sentence", "line"])
def test_the_plan_drops_complete_segments(plan, unit):  # noqa: F811
    def whole(unit_of_rule):
        part = {"drop": {"quantile": 0.4}, "unit": unit_of_rule}
        made = plan({**ALL_OFF, KN: part, "protect": NOTHING, "min_kept": 0})
        runs, fast = made.documents.completion_runs, tiny.tokenizer()
        starts = sentences.segment_starts(unit, fast, made.scores.token_ids, runs, special_ids(fast))
        assert set(made.scores.offsets[:-1]) < set(starts.tolist())
        parts = np.split(made.selection.keep, starts[1:])
        assert {True, False} == {bool(part[0]) for part in parts}
        return all(part.all() or not part.any() for part in parts)

    assert whole(unit) and not whole("token")


def test_segments_are_computed_only_if_a_unit_needs_them(plan, monkeypatch):  # noqa: F811
    monkeypatch.setattr(sentences, "segment_starts", None)
    plan({RI: {"window": 5}, "protect": NOTHING})
    with pytest.raises(TypeError):
        plan({TR: {"unit": "line"}, "protect": NOTHING})
    with pytest.raises(TypeError):
        plan({"protect": {"formats": 0.5}})


SCORERS = ["attention_received", "novelty", "embedding_similarity", "typicality", "log_probability"]


@pytest.mark.parametrize("scorer", SCORERS)
def test_every_scorer_may_use_lines_as_units(plan, scorer):  # noqa: F811
    part = {"scorer": scorer, "drop": {"quantile": 0.5}, "scope": "dataset", "unit": "line"}
    made = plan({**ALL_OFF, "selectors": {"it": part}, "protect": NOTHING, "min_kept": 0})
    starts = made.text.segments["line"]
    seen = segment_means(made.scores.values["it"], ragged.Layout(made.scores.offsets, made.scores.counts), starts)
    seen = -np.expm1(seen) if scorer == "novelty" else seen
    np.testing.assert_array_equal(made.selection.seen["it"], seen)
    known = [~np.isnan(each) for each in np.split(seen, starts[1:])]
    parts = [each[here] for each, here in zip(np.split(made.selection.keep, starts[1:]), known, strict=True)]
    assert all(each.all() or not each.any() for each in parts) and not made.selection.keep.all()
