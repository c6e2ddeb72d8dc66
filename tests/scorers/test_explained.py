"""What prompt and text before a sentence explain of it, against documents that are built by hand and read alone."""

from __future__ import annotations

import os
from contextlib import contextmanager

import numpy as np
import pytest

from tests import tiny
from tests.made_scores import TR
from tests.scorers.by_hand import Reader, chat, context_of, sentences, several_turns, spread, units_of
from xtf_plugin.data.documents import collect
from xtf_plugin.scorers import explained
from xtf_plugin.scorers.explained import PRIOR, ExplainedConfig, common_template

NAN = float("nan")


@pytest.fixture
def read_prompts(monkeypatch):
    """To random weights all prompts say too little."""
    monkeypatch.setattr(explained, "LEAST", -np.inf)


@contextmanager
def asked(documents, folder, **options):
    yield from context_of(documents, folder, **options)


def part_of(**part):
    return ExplainedConfig.model_validate({"scorer": "explained", **part})


def template_by_hand(documents):
    """Longest common beginning and end of what stands before each turn; they do not overlap in the shortest prompt."""
    prompts = []
    for index in range(len(documents)):
        ids, completion = documents.document(index)
        turns = [at for at in np.flatnonzero(completion) if at and not completion[at - 1]]
        prompts += [ids[:at].tolist() for at in turns]
    front = list(os.path.commonprefix(prompts))
    back = list(os.path.commonprefix([prompt[::-1] for prompt in prompts]))
    back = back[: min(map(len, prompts)) - len(front)]
    return front + back[::-1]


class ByHand:
    """The definition, a unit at a time."""

    def __init__(self, units, template, first, protected=None, reader=None):
        self.units, self.template, self.first, self.reader = units, template, first, reader or Reader()
        self.protected = protected or [False] * len(units)
        self.own = [unit.ids[unit.start : min(unit.end, unit.start + first)] for unit in units]

    def read(self, past, own):
        """Surprise of tokens that are more than white space."""
        says = [bool(tiny.tokenizer().decode([index]).strip()) for index in own]
        return -float(self.reader.logprobs([*past, *own])[len(past) :][says].sum())

    def share(self, number, begin):
        """Of one unit, which is read after the tokens of its document before `begin`."""
        unit, own, read = self.units[number], self.own[number], self.read
        has_prompt = unit.turn > len(self.template)
        if unit.start == 0 or self.protected[number] or not (has_prompt or unit.start > unit.turn):
            return NAN
        if not tiny.tokenizer().decode(own).strip():
            return NAN
        before, alone = read(unit.ids[:begin], own), read(self.template, own)
        if begin < unit.start:  # behind a gap the first token counts as without one
            before += read(unit.ids[: unit.start], own[:1]) - read(unit.ids[:begin], own[:1])
        known = (read(unit.ids[: unit.turn], own) + before) / 2 if has_prompt else before
        return 1 - (known + PRIOR) / (alone + PRIOR)

    def by_prompt(self, number):
        unit, own, read = self.units[number], self.own[number], self.read
        behind = read(unit.ids[: unit.turn], own) if unit.turn and unit.start > unit.turn else NAN
        return 1 - (behind + PRIOR) / (read(self.template, own) + PRIOR)

    def once(self):
        return [self.share(number, unit.start) for number, unit in enumerate(self.units)]

    def rescored(self, limit, rounds=3):
        """Shares after the dropped units that stand directly before a kept one in its turn are left out."""
        shares, begins = self.once(), [unit.start for unit in self.units]
        for _ in range(rounds):
            dropped, again = [share < limit for share in shares], []
            for number, unit in enumerate(self.units):
                first = number
                while first and dropped[first - 1] and self.units[first - 1].end == self.units[first].start > unit.turn:
                    if self.units[first - 1].document != unit.document:
                        break
                    first -= 1
                begin = self.units[first].start
                kept = shares[number] >= limit and not self.by_prompt(number) >= 2 * limit
                if begin < begins[number] and kept:
                    begins[number] = begin
                    again.append(number)
            for number in again:
                shares[number] = self.share(number, begins[number])
            if not again:
                break
        return shares


def close(found, expected, units):
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, spread(expected, units), atol=1e-4)


@pytest.mark.parametrize("first", [1, 4, 16, 100])
@pytest.mark.parametrize("unit", ["sentence", "line"])
def test_equals_documents_that_are_built_by_hand(tmp_path, read_prompts, unit, first):
    documents = several_turns()
    starts = sentences(documents, unit)
    units = units_of(documents, starts)
    with asked(documents, tmp_path) as context:
        found = explained.explained.score(context, part_of(unit=unit, first=first, drop={"below": -1e9}))
    template = template_by_hand(documents)
    assert len(template) > len(chat("You count.\n")), "prompts begin and end alike"
    expected = ByHand(units, template, first).once()
    close(found, expected, units)
    assert np.isnan(expected).any() and np.nanstd(expected) > 0.01


@pytest.mark.parametrize("quantile", [0.2, 0.4, 0.6, 0.8])
def test_units_behind_dropped_ones_are_read_without_them(tmp_path, read_prompts, quantile):
    documents = several_turns(12)
    units = units_of(documents, sentences(documents))
    hand = ByHand(units, template_by_hand(documents), 16)
    once = np.asarray(hand.once())
    ordered = np.sort(once[~np.isnan(once)])
    near = int(quantile * len(ordered)) + np.arange(-3, 4)
    wide = near[np.argmax(np.diff(ordered)[near])]  # so that rounding moves no unit over the limit
    limit = float(ordered[wide : wide + 2].mean())
    expected = hand.rescored(limit)
    assert (np.abs(np.asarray(expected) - limit) > 1e-4).all() or np.isnan(expected).any()
    with asked(documents, tmp_path) as context:
        found = explained.explained.score(context, part_of(drop={"below": limit}))
    close(found, expected, units)
    changed = ~np.isclose(once, expected, atol=1e-3, equal_nan=True)
    assert changed.any() and not changed.all(), "the case must rescore"


def test_the_limit_of_a_share_of_the_median_is_the_rules(tmp_path, monkeypatch):
    """`of_median` decides which units are left out before others, with each document as often as it occurs."""
    documents = several_turns(12)
    units = units_of(documents, sentences(documents))
    hand = ByHand(units, template_by_hand(documents), 16)
    values = spread(hand.once(), units)
    times = np.repeat(documents.counts, np.diff(documents.completion_offsets))
    median = float(np.nanmedian(np.repeat(values, times)))
    assert median != np.nanmedian(values), "the case must tell occurrences from documents"
    for least, scored in ((median - 1e-4, True), (median + 1e-4, False)):
        monkeypatch.setattr(explained, "LEAST", least)
        with asked(documents, tmp_path) as context:
            found = explained.explained.score(context, part_of())
        assert np.isnan(found).all() != scored and bool(context.warnings) != scored
    share = 0.5
    monkeypatch.setattr(explained, "LEAST", -np.inf)
    with asked(documents, tmp_path) as context:
        close(
            explained.explained.score(context, part_of(drop={"of_median": share})), hand.rescored(share * median), units
        )


def test_a_reference_that_reads_no_prompts_scores_nothing_and_says_so(tmp_path):
    documents = several_turns()
    with asked(documents, tmp_path) as context:
        found = explained.explained.score(context, part_of())
    assert np.isnan(found).all() and len(found) == len(context.token_ids)
    (warning,) = context.warnings
    assert "of the median sentence" in warning and "the prompts of this data say too little" in warning


def test_white_space_says_nothing(tmp_path, read_prompts):
    """How far a line is indented changes no score, and a unit of white space alone has none."""
    found = []
    for space in ("\n", "\n\n\n\n\n\n"):
        ids = [
            (chat(f"{one['prompt']}\nAnswer:"), chat(f"It is seven.{space}It is eight.")) for one in tiny.problems(4)
        ]
        rows = [{"input_ids": prompt + own, "labels": [-100] * len(prompt) + own} for prompt, own in ids]
        documents = collect(rows)
        with asked(documents, tmp_path / str(len(space))) as context:
            scores = explained.explained.score(context, part_of(drop={"below": -1e9}))
        found.append(scores[documents.completion_offsets[:-1]])
    assert not np.isnan(found).any()
    np.testing.assert_allclose(found[0], found[1], atol=1e-5)  # of the sentence before the space


def test_white_space_goes_with_the_dropped_line_before_it(tmp_path, read_prompts):
    """A blank line has no share of its own; the line behind it is read without it and the dropped one."""
    texts = ("It is seven.\n\nThe sum is eight.\n", "It is seven.\n\nThe sum is nine.\n")
    ids = [(chat(f"{one['prompt']}\nAnswer:"), chat(text)) for one, text in zip(tiny.problems(2), texts, strict=True)]
    documents = collect([{"input_ids": past + own, "labels": [-100] * len(past) + own} for past, own in ids])
    starts = sentences(documents, "line")
    with asked(documents, tmp_path) as context:
        found = explained._Units(context, part_of(unit="line"))
        blank = found.blank
        assert blank.any() and not blank[np.flatnonzero(blank) - 1].any()
        dropped = np.append(blank[1:], False)  # the line before each blank one
        begins = found._before_dropped(dropped)
    behind = np.flatnonzero(blank) + 1
    assert begins[behind].tolist() == starts[behind - 2].tolist()
    others = ~blank & ~np.isin(np.arange(len(starts)), behind)
    assert others.any() and begins[others].tolist() == starts[others].tolist()


def test_protected_units_are_not_read(tmp_path, read_prompts):
    """They are kept whatever they score, and nothing before another unit is left out for them."""
    documents = several_turns()
    starts = sentences(documents)
    units = units_of(documents, starts)
    protected = [number % 3 == 1 for number in range(len(units))]
    limit = 0.0
    hand = ByHand(units, template_by_hand(documents), 16, protected)
    with asked(documents, tmp_path, protected=spread(protected, units).astype(bool)) as context:
        asked_for, ask = [], context.predictions_of
        context.predictions_of = lambda splices, reference: asked_for.append(splices) or ask(splices, reference)
        found = explained.explained.score(context, part_of(drop={"below": limit}))
    close(found, hand.rescored(limit), units)
    read = {int(begin) for splices in asked_for for begin in splices.begin}
    assert not read & {int(start) for start, flag in zip(starts, protected, strict=True) if flag}


def prompted(prompts, answers=" Ben has 3 pens. He buys 4 pens. The answer is 7."):
    rows = []
    for number, prompt in enumerate(prompts):
        ids, own = chat(prompt), chat(f" {number}{answers}")
        rows.append({"input_ids": ids + own, "labels": [-100] * len(ids) + own})
    return collect(rows)


def test_equal_prompts_say_nothing_of_an_answer(tmp_path, read_prompts):
    """The template is the prompt, so that only text before a unit explains it, and a first unit is NaN."""
    documents = prompted(["Tell me.", "Tell me.", "Tell me."])
    units = units_of(documents, sentences(documents))
    assert common_template(documents, tiny.tokenizer()).tolist() == chat("Tell me.")
    with asked(documents, tmp_path) as context:
        found = explained.explained.score(context, part_of(drop={"below": -1e9}))
    expected = ByHand(units, chat("Tell me."), 16).once()
    close(found, expected, units)
    assert [np.isnan(value) for value in expected] == [unit.start == unit.turn for unit in units]


def test_the_template_is_one_token_at_least():
    fast = tiny.tokenizer()
    none_alike = prompted(["Tell", "me", "why?"])
    assert common_template(none_alike, fast).tolist() == [fast.eos_token_id], "this tokenizer has no BOS"
    text = collect([{"input_ids": [7, 8], "labels": [7, 8]}])
    assert common_template(text, fast).tolist() == [fast.eos_token_id]
    assert common_template(text, None).tolist() == [7]
    fast_with_bos = type("Fast", (), {"bos_token_id": 3, "eos_token_id": 4})
    assert common_template(text, fast_with_bos).tolist() == [3]


def test_the_templates_ends_do_not_overlap():
    """`a b a` and `a b a b a` begin and end with `a b a`; the shorter one has three tokens."""
    documents = collect(
        [{"input_ids": [*ids, 9], "labels": [-100] * len(ids) + [9]} for ids in ([1, 2, 1], [1, 2, 1, 2, 1])]
    )
    assert common_template(documents, None).tolist() == [1, 2, 1]
    two = collect([{"input_ids": [*ids, 9], "labels": [-100] * len(ids) + [9]} for ids in ([1, 5, 2], [1, 6, 6, 2])])
    assert common_template(two, None).tolist() == [1, 2]


def test_a_stream_keeps_template_limit_and_verdict_of_its_sample(tmp_path, read_prompts):
    sample, later = several_turns(), prompted(["Count.", "Say more."])
    with asked(sample, tmp_path) as context:
        once = explained.explained.score(context, part_of(drop={"below": -1e9}))
        share = 0.5
        frozen = explained.explained.frozen(context, part_of(drop={"of_median": share}))
    times = np.repeat(sample.counts, np.diff(sample.completion_offsets))
    limit = share * float(np.nanmedian(np.repeat(once, times)))
    units = units_of(later, sentences(later))
    with asked(later, tmp_path) as context:
        found = frozen(context, part_of(drop={"of_median": share}))
        assert not np.array_equal(found, explained.explained.score(context, part_of()), equal_nan=True)
    close(found, ByHand(units, template_by_hand(sample), 16).rescored(limit), units)


def test_a_sample_whose_prompts_say_too_little_switches_it_off_for_the_stream(tmp_path, monkeypatch):
    sample, later = several_turns(), prompted(["Count.", "Say more."])
    with asked(sample, tmp_path) as context:
        frozen = explained.explained.frozen(context, part_of())
    monkeypatch.setattr(explained, "LEAST", -np.inf)
    with asked(later, tmp_path) as context:
        assert np.isnan(frozen(context, part_of())).all()


def test_later_documents_of_a_stream_do_not_switch_it_off(tmp_path, monkeypatch):
    """A few of them say little of the data; the sample has decided."""
    monkeypatch.setattr(explained, "LEAST", -np.inf)
    with asked(several_turns(), tmp_path) as context:
        frozen = explained.explained.frozen(context, part_of())
    monkeypatch.setattr(explained, "LEAST", np.inf)
    with asked(several_turns(3), tmp_path) as context:
        assert not np.isnan(frozen(context, part_of())).all() and not context.warnings


def test_the_constants_are_those_of_the_docstring():
    """With others, the same documents have other scores."""
    assert (explained.PRIOR, explained.LEAST, explained.ROUNDS) == (5.0, 0.1, 3)


def test_no_document_of_the_dataset_has_a_unit_after_its_first(tmp_path, read_prompts):
    """Text of one sentence each: nothing is known of it, and nothing is asked of the reference but that."""
    documents = collect([{"input_ids": ids, "labels": ids} for ids in (chat("So it is."), chat("He has 4 pens."))])
    with asked(documents, tmp_path) as context:
        assert np.isnan(explained.explained.score(context, part_of(drop={"below": 0}))).all()


def test_a_plan_drops_by_the_share_and_stores_what_it_asks(tmp_path, read_prompts):
    from tests.test_plan import Provider
    from xtf_plugin.config.block import XTFConfig
    from xtf_plugin.plan import make_plan

    block = {"preset": "none", TR: {"scorer": "explained", "drop": {"below": 0.0}}, "cache_dir": str(tmp_path)}
    config = XTFConfig.parse({**block, "min_kept": 0, "protect": {"formats": None, "special_tokens": False}})
    documents, provider = several_turns(), Provider()
    first = make_plan(config, documents, provider, tiny.tokenizer(), progress=False)
    assert np.array_equal(~first.selection.keep, first.scores.values[TR] < 0) and not first.selection.keep.all()
    assert first.scorers["excerpts"]["documents"] > 0
    second = make_plan(config, documents, provider, tiny.tokenizer(), progress=False)
    assert provider.opened == 1 and second.scorers["excerpts"]["documents"] == 0
    assert np.array_equal(first.selection.keep, second.selection.keep)
