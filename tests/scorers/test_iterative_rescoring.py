"""Iterative rescoring: flagged text is scored again after the text that was kept before it."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests import tiny
from tests.scorers.test_opening import by_the_definition
from tests.scorers.test_selectors import OFF
from tests.store.test_store import fill, shard_files
from tests.test_plan import Provider
from xtf_plugin.config.block import XTFConfig
from xtf_plugin.data.documents import collect
from xtf_plugin.plan import make_plan
from xtf_plugin.report import summary
from xtf_plugin.scorers import iterative_rescoring, opening
from xtf_plugin.scorers.base import ScoringContext
from xtf_plugin.scoring.cached_scores import ScoreSource
from xtf_plugin.scoring.kernels import eager
from xtf_plugin.selection.text_rules import TextRules, segment_starts
from xtf_plugin.store import shard_format

LIMIT = -14.0  # about half of the units of `Sure` are below


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
        found = eager.predictions(hidden, self.model.lm_head, ids[1:])  # the definition, in float32
        return np.append(np.float32(np.nan), (found[0] + found[1]).numpy())[np.asarray(labelled)]


def context(documents, found, starts, without, protected=None, forced=None):
    """A context whose reference predicts `found`, and what `without` gives where tokens are left out."""
    cut = {"sentence": starts}
    source = SimpleNamespace(predictions=lambda _: found, segments=cut.__getitem__, predictions_without=without)
    return ScoringContext(documents, None, source, protected, forced)


def scored_in_order(sure, documents, config, protected, forced):
    """The definition of `context: kept`: units in order, each scored after the text kept before it, (M,)."""
    tokenizer, part = tiny.tokenizer(), config.selectors["odd"]
    levels = [segment_starts(documents, tokenizer, unit) for unit in opening.UNITS[part.unit]]
    pieces = sorted({int(start) for level in levels for start in level})
    flat, offsets = np.flatnonzero(documents.completion), documents.completion_offsets
    parts = [sure.typical(*documents.document(i)) for i in range(len(documents))]
    typical = np.concatenate(parts)
    ends_line = ["\n" in tokenizer.decode([i]) for i in documents.input_ids[flat]]

    def judge(start, end, gone):
        scores = []
        for level in levels:
            begin = level[level <= start].max()
            rest = [typical[i] for i in range(begin, end) if i >= start or not gone[i]]
            scores.append(by_the_definition(np.asarray(rest), [0], part.clip)[0])
        return np.nanmin(scores) if not np.isnan(scores).all() else np.nan

    bounds = list(zip(pieces, [*pieces[1:], len(flat)], strict=True))
    once = [judge(start, end, np.zeros(len(flat), dtype=bool)) for start, end in bounds]
    scores = np.repeat(once, [end - start for start, end in bounds])
    for (start, end), first in zip(bounds, once, strict=True):
        if not first < part.drop.below or protected[start:end].all():
            continue
        document = np.searchsorted(offsets, start, side="right") - 1
        gone = ((scores < part.drop.below) | forced) & ~protected
        gone[start:] = False
        past, line = [], 0  # `line`: kept tokens of the line so far
        own = set(flat.tolist())
        for i in range(documents.offsets[document], flat[start]):
            at = int(np.searchsorted(flat, i)) if i in own else None
            if at is None or not gone[at] or (ends_line[at] and line):
                past.append(documents.input_ids[i])
            if at is not None:
                line = 0 if ends_line[at] else line + (not gone[at])
        if not gone[offsets[document] :].any():
            continue
        unit = documents.input_ids[flat[start:end]].tolist()
        typical[start:end] = sure.typical(past + unit, [False] * len(past) + [True] * len(unit))
        scores[start:end] = max(first, judge(start, end, gone))
    return scores


def several_lines(n=16):
    """Completions of several lines and sentences: after a prompt, in two turns, and with nothing before them."""
    fast, made = tiny.tokenizer(), []
    for index in range(n):
        pairs = [pair["completion"].strip() for pair in tiny.problems(4, seed=index)]
        ids, labels = [], []
        for turn in range(1 if index % 3 else 2):
            prompt = fast(f"Question {index}?" if index % 4 else "")["input_ids"]
            own = fast("\n".join(pairs[2 * turn : 2 * turn + 2 + index % 3]))["input_ids"] + [fast.eos_token_id]
            ids, labels = ids + prompt + own, labels + [-100] * len(prompt) + own
        made.append({"input_ids": ids, "labels": labels})
    return collect(made)


def config_of(tmp_path, force_drop=(), **part):
    odd = {"scorer": "opening", "context": "kept", "clip": 100.0, **part}
    block = {"min_kept": 0, "cache_dir": str(tmp_path), "force_drop": list(force_drop)}
    return XTFConfig.parse({**OFF, **block, "selectors": {"odd": odd}})


@pytest.mark.parametrize("unit", ["sentence", "line", "both"])
def test_rescoring_in_rounds_equals_the_loop_over_units_in_order(unit, tmp_path, monkeypatch):
    monkeypatch.setattr(iterative_rescoring, "ROUNDS", 50)
    monkeypatch.setattr(iterative_rescoring, "BUDGET", 1_000)
    sure, documents = Sure(), several_lines()
    block = config_of(tmp_path, unit=unit, context="document", drop={"quantile": 0.5})
    once = make_plan(block, documents, Provider(sure.model), tiny.tokenizer(), progress=False).scores.values["odd"]
    limit = float(np.median(once)) + 1e-3
    config = config_of(tmp_path, unit=unit, drop={"below": limit}, force_drop=["happy to"])
    text = TextRules.find(config, documents, tiny.tokenizer())
    protected, forced = text.protected, text.forced
    assert forced.any() and protected.any()
    plan = make_plan(config, documents, Provider(sure.model), tiny.tokenizer(), progress=False)
    expected = scored_in_order(sure, documents, config, protected, forced)
    np.testing.assert_allclose(plan.scores.values["odd"], expected, rtol=1e-3, atol=1e-3)
    revived = (once < limit) & (expected >= limit)
    assert revived.any() and (expected < limit).any(), "the data must hold both for the comparison to mean anything"


def test_limits_of_rounds_and_budget_keep_the_first_scores_and_warn(tmp_path, monkeypatch):
    sure, documents = Sure(), several_lines()

    def scores(number, **limits):
        for name, value in limits.items():
            monkeypatch.setattr(iterative_rescoring, name, value)
        config = config_of(tmp_path / str(number), drop={"below": LIMIT})
        plan = make_plan(config, documents, Provider(sure.model), tiny.tokenizer(), progress=False)
        return plan.scores.values["odd"], plan.scorers.get("excerpts", {"tokens": 0})["tokens"], plan.warnings

    full, cost, quiet = scores(0, ROUNDS=50, BUDGET=1_000)
    first, _, warnings = scores(1, ROUNDS=1)
    assert any("odd: " in one and "after 1 rounds" in one for one in warnings) and (first != full).any()
    once, nothing, _ = scores(2, ROUNDS=50, BUDGET=0)
    some, less, warnings = scores(3, BUDGET=1)
    assert nothing == 0 < less < cost and not any("rescoring" in one for one in quiet)
    assert any("odd: " in one and "were not scored again" in one for one in warnings)
    assert (once <= some).all() and (some != full).any()


def test_a_long_prompt_does_not_use_up_the_budget():
    """Every rescoring reads the prompt; the budget counts completion tokens only."""
    size, unit = 3_000, 25
    ids = list(range(1, size + 12 * unit + 1))
    documents = collect([{"input_ids": ids, "labels": [-100] * size + ids[size:]}])

    def without(hidden, starts, wanted, _):
        values = np.full(12 * unit, np.nan, np.float32)
        for index in wanted:
            values[index * unit : (index + 1) * unit] = 0
        return SimpleNamespace(logprobs=values, entropy=0 * values, deviation=0 * values)

    low = SimpleNamespace(logprobs=np.full(12 * unit, -9, np.float32), entropy=np.zeros(12 * unit, np.float32))
    starts = np.arange(0, 12 * unit, unit)
    given = context(documents, low, starts, without)
    config = opening.OpeningConfig(scorer="opening", context="kept", drop={"below": -1})
    assert np.array_equal(opening.opening.score(given, config) < -1, np.arange(12 * unit) < unit)
    assert not given.warnings


@pytest.mark.parametrize(("logprobs", "asked"), [([-9, -0.1, -0.1], 0), ([-0.1, -0.1, -9], 0), ([-9, -0.1, -9], 1)])
def test_a_unit_without_dropped_text_before_it_is_not_scored_again(logprobs, asked):
    """A clean dataset costs no rescoring, nor does a document with one noisy unit."""
    documents = collect([{"input_ids": [1, 2, 3, 4], "labels": [-100, 2, 3, 4]}])
    calls = []

    def made(values):
        return SimpleNamespace(logprobs=np.float32(values), entropy=0 * np.float32(values))

    def without(hidden, starts, wanted, _):
        calls.extend(wanted)
        return made([-9] * 3)

    given = context(documents, made(logprobs), np.arange(3), without)
    config = opening.OpeningConfig(scorer="opening", context="kept", drop={"below": -1})
    assert np.array_equal(opening.opening.score(given, config), np.maximum(np.float32(logprobs), -8))
    assert len(calls) == asked


def test_rescoring_is_stored_and_reported(tmp_path):
    sure, documents = Sure(), several_lines()
    config = config_of(tmp_path, unit="both", drop={"below": LIMIT})
    plans = [make_plan(config, documents, Provider(sure.model), tiny.tokenizer(), progress=False) for _ in range(2)]
    first, second = (plan.scorers["excerpts"] for plan in plans)
    assert first["documents"] > 0 and first["seconds"] > 0
    assert second["documents"] == 0 and second["stored_documents"] >= first["documents"]
    assert np.array_equal(plans[0].selection.keep, plans[1].selection.keep)
    assert summary.summary(plans[0], tiny.tokenizer())["scorers"]["excerpts"]["tokens"] == first["tokens"]
    assert any("rescoring: scored" in line for line in summary._scorer_lines(plans[0]))


def test_rounds_read_only_shards_with_their_documents(tmp_path, monkeypatch):
    """A cache may hold many datasets; only the first round reads the index of each shard."""
    sure, documents = Sure(), several_lines()
    fingerprint, reads, rounds = Provider(sure.model).fingerprint(), Counter(), []
    for seed in range(3):
        fill(tmp_path, (5, 7), layers=None, reference=fingerprint, seed=seed)
    others, read, looked = shard_files(tmp_path), shard_format.read, ScoreSource.predictions_without
    monkeypatch.setattr(shard_format, "read", lambda path, *rest: reads.update([path]) or read(path, *rest))
    monkeypatch.setattr(ScoreSource, "predictions_without", lambda *given: rounds.append(given) or looked(*given))
    config = config_of(tmp_path, unit="both", drop={"below": LIMIT})
    make_plan(config, documents, Provider(sure.model), tiny.tokenizer(), progress=False)
    assert len(others) == 3 and len(rounds) > 3
    assert [reads[path] for path in others] == [1, 1, 1]


def test_another_threshold_rescores_in_one_opening_of_the_reference(tmp_path):
    documents, provider = several_lines(), Provider(Sure().model)
    opened = []
    for limit in (LIMIT, LIMIT, LIMIT + 1):
        config = config_of(tmp_path, drop={"below": limit})
        make_plan(config, documents, provider, tiny.tokenizer(), progress=False)
        opened.append(provider.opened)
    assert opened == [1, 1, 2]


def test_rescoring_reads_protected_and_prompt_tokens_and_no_forced_ones():
    """Protected tokens are trained on, so they are read; forced ones are not."""
    documents = collect([{"input_ids": list(range(1, 10)), "labels": [-100, *range(2, 10)]}])
    seen = []

    def without(hidden, starts, wanted, _):
        seen.append((hidden.tolist(), wanted.tolist()))
        return found

    found = SimpleNamespace(logprobs=np.float32([-9] * 5 + [0] * 3), entropy=np.zeros(8, np.float32))
    protected, forced = np.zeros((2, 8), dtype=bool)
    protected[1], forced[5] = True, True
    given = context(documents, found, np.asarray([0, 2, 5]), without, protected, forced)
    config = opening.OpeningConfig(scorer="opening", context="kept", drop={"below": -1})
    assert np.array_equal(opening.opening.score(given, config) < -1, np.arange(8) < 5)
    gone = [True, False, True, True, True, True, False, False]
    assert seen[0] == (gone, [1]), "the third sentence is not flagged"


def test_a_unit_of_protected_tokens_alone_is_not_scored_again():
    documents = collect([{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}])
    low = SimpleNamespace(logprobs=np.float32([np.nan, -9, -9]), entropy=np.zeros(3, np.float32))
    wanted_ever = []

    def without(hidden, starts, wanted, _):
        wanted_ever.extend(wanted)
        return low

    given = context(documents, low, np.arange(3), without, np.asarray([False, False, True]))
    config = opening.OpeningConfig(scorer="opening", context="kept", drop={"below": -1})
    scores = opening.opening.score(given, config)
    assert np.isnan(scores[0]) and (scores[1:] < -1).all() and not wanted_ever


def test_an_infinite_second_score_is_undefined_and_drops_nothing():
    documents = collect([{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}])
    low, never = (
        SimpleNamespace(logprobs=np.full(2, value, np.float32), entropy=np.zeros(2, np.float32))
        for value in (-9, -np.inf)
    )
    given = context(documents, low, np.arange(2), lambda *_: never)
    config = opening.OpeningConfig(scorer="opening", context="kept", drop={"below": -1})
    scores = opening.opening.score(given, config)
    assert scores[0] < -1 and np.isnan(scores[1])
