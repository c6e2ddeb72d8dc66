"""Selectors from scores to masks: their own references, the shared rules, and everything that shows them by name."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console

from tests import tiny
from tests.made_scores import ALL_OFF, KN, RI, TR, with_scores
from tests.selection.test_select import NOVELTY, REASONING, RELEVANCE, from_bits, random_scores
from tests.selection.test_select import config as slots_config
from tests.test_plan import ATTRIBUTES_ON, Provider, rows
from xtf_plugin.config.block import XTFConfig
from xtf_plugin.config.scores import SLOTS
from xtf_plugin.data.documents import collect
from xtf_plugin.errors import XTFError, XTFUserError
from xtf_plugin.plan import make_plan
from xtf_plugin.report import score_table, summary, terminal, writer
from xtf_plugin.report.score_table import SCHEMA
from xtf_plugin.scoring.providers import SeparateReference
from xtf_plugin.selection.select import CONTROL, FLOOR, PROTECTED, reason_text, rule_bits, select

OFF = {"preset": "none", **ALL_OFF}
KNOWN_BITS = REASONING | NOVELTY | RELEVANCE
LOW = {"scorer": "log_probability", "drop": {"quantile": 0.25}}


def low(**keys):
    return {**LOW, **keys}


def block(*names, **keys):
    return XTFConfig.parse({**OFF, "min_kept": 0, "selectors": {name: LOW for name in names}, **keys})


class TestSelection:
    def test_bits_of_eight_selectors_fit_and_name_them(self):
        names = [f"s{i}" for i in range(8)]
        config = XTFConfig.parse({"preset": "paper", "selectors": {name: LOW for name in names}})
        bits = rule_bits(config)
        assert len(set(bits.values())) == 11 and max(bits.values()) < 1 << 16
        assert not set(bits.values()) & {PROTECTED, FLOOR, CONTROL}
        every = sum(bits.values()) | PROTECTED
        assert reason_text(every, bits) == ",".join([*SLOTS, *names, "protected"])

    def test_rules_are_those_of_the_slots(self):
        """A selector over attention's own scores drops what reasoning importance drops, rule by rule."""
        scores = random_scores([30, 50, 20], counts=[1, 3, 1])
        given = with_scores(scores, same=scores.values[RI])
        for drop in ({"quantile": 0.2}, {"below": 0.4}, {"fence": 0.3}):
            for scope in ("document", "dataset"):
                if scope == "document" and "below" in drop:
                    continue
                part = {"drop": drop, "scope": scope, "window": 3, "max_fraction": 0.15}
                if "below" in drop:
                    del part["scope"]
                slot = XTFConfig.parse({**OFF, RI: part})
                selector = XTFConfig.parse({**OFF, "selectors": {"same": {**LOW, **part}}})
                expected, got = select(scores, slot), select(given, selector)
                assert np.array_equal(got.keep, expected.keep) and not got.keep.all(), (drop, scope)
                assert got.fired["same"] == expected.fired[RI]
                assert got.thresholds["same"]["drops"] == expected.thresholds[RI]["drops"]

    @pytest.mark.parametrize("unit", ["token", "sentence", "line"])
    @pytest.mark.parametrize("slot", SLOTS)
    def test_a_selector_with_a_slots_scorer_is_the_slot_under_another_name(self, slot, unit):
        scores = random_scores([30, 0, 50, 20], counts=[1, 2, 3, 1])
        given = with_scores(scores, same=scores.values[slot])
        starts = {"sentence": np.arange(0, 100, 5), "line": np.arange(0, 100, 10)}
        for part in ({}, {"drop": {"quantile": 0.3}, "max_fraction": 0.1}):
            part = {**part, "unit": unit}
            one = select(scores, XTFConfig.parse({**OFF, "min_kept": 0, slot: part}), segments=starts)
            config = block(selectors={"same": {**part, "scorer": SLOTS[slot]}})
            other = select(given, config, segments=starts)
            assert np.array_equal(one.keep, other.keep) and one.fired[slot] == other.fired["same"]
            assert one.thresholds[slot] == other.thresholds["same"]
            np.testing.assert_array_equal(one.seen[slot], other.seen["same"])

    @pytest.mark.parametrize("unit", ["sentence", "line"])
    def test_any_scorers_scores_are_averaged_over_a_unit(self, unit):
        """Three units of four tokens; only the second is low as a whole."""
        low_one = [0, -4, 0, 0, -4, -4, 3, -4, 0, 0, -4, 0]
        scores = with_scores(from_bits(*[0] * 12), a=low_one)
        part, starts = {"scorer": "typicality", "drop": {"below": -2}, "unit": unit}, {unit: np.asarray([0, 4, 8])}
        made = select(scores, block(selectors={"a": part}), segments=starts)
        assert made.keep.tolist() == [True] * 4 + [False] * 4 + [True] * 4
        assert made.seen["a"].tolist() == [-1.0] * 4 + [-2.25] * 4 + [-1.0] * 4
        assert made.thresholds["a"]["unit"] == unit
        slot = select(with_scores(scores, knowledge_novelty=low_one), block(**{KN: part}), segments=starts)
        assert np.array_equal(slot.keep, made.keep), "a slot with another scorer is judged as that scorer's scores are"

    def test_without_selectors_reasons_stay_8_bits_wide(self):
        scores = random_scores([30, 50])
        plain = select(scores, slots_config())
        beside = select(with_scores(scores, s=np.ones(80)), slots_config(selectors={"s": low(drop={"below": 0})}))
        assert plain.reasons.dtype == np.uint8 and beside.reasons.dtype == np.uint16
        assert np.array_equal(plain.reasons, beside.reasons) and np.array_equal(plain.keep, beside.keep)

    @pytest.mark.parametrize(
        ("combine", "dropped"),
        [("union", [1, 1, 1, 0]), ("intersection", [1, 0, 0, 0]), ("majority", [1, 1, 0, 0]), (2, [1, 1, 0, 0])],
    )
    def test_selectors_vote(self, combine, dropped):
        scores = with_scores(from_bits(0, 0, 0, 0), a=[0, 0, 0, 9], b=[0, 0, 9, 9], c=[0, 9, 9, 9])
        combine = combine if isinstance(combine, str) else {"at_least": combine}
        parts = {name: low(drop={"below": 1}) for name in "abc"}
        made = select(scores, block(selectors=parts, combine=combine))
        assert (~made.keep).tolist() == [bool(flag) for flag in dropped]

    def test_undefined_scores_never_drop_and_are_not_complained_about(self):
        made = select(
            with_scores(from_bits(0, 0, 0), a=[np.nan, -9, 0]), block(selectors={"a": low(drop={"below": -1})})
        )
        assert made.keep.tolist() == [True, False, True] and made.warnings == []

    def test_a_rule_that_fires_on_nothing_is_reported_under_the_selectors_name(self):
        made = select(with_scores(from_bits(0, 0), a=[1, 2]), block(selectors={"a": low(drop={"below": -5})}))
        assert len(made.warnings) == 1
        assert made.warnings[0].startswith("a: the rule {below: -5.0} fires on nothing")
        assert "remove it (`a: false`" in made.warnings[0]

    def test_protection_floor_and_control_hold(self):
        scores = with_scores(from_bits(*[0] * 6), a=np.arange(6))
        parts = {"a": low(drop={"below": 4})}
        protected = np.asarray([True] + [False] * 5)
        made = select(scores, block(selectors=parts, min_kept=4), protected)
        assert made.keep.sum() == 4 and made.keep[0]
        assert made.reasons[0] & PROTECTED and made.reasons[0] & rule_bits(block(selectors=parts))["a"]
        assert ((made.reasons & FLOOR) > 0).sum() == 1
        drawn = select(scores, block(selectors=parts, control="random", min_kept=0))
        assert (~drawn.keep).sum() == 4 and ((drawn.reasons & CONTROL) > 0).any()

    def test_the_floor_brings_back_what_the_first_selector_minds_least(self):
        """Not the most novel token: to a selector that may be the worst noise."""
        scores = with_scores(from_bits(*[0] * 5), a=[-9, -5, -5, -7, -9], b=[0, -1, -2, -3, -4])
        scores = replace(scores, logprobs=np.float32([-1, -8, -2, -3, -9]))
        parts = {"a": low(drop={"below": 0}), "b": low(drop={"below": 9})}
        for min_kept, kept in [(1, [2]), (2, [1, 2]), (3, [1, 2, 3]), (4, [0, 1, 2, 3])]:
            made = select(scores, block(selectors=parts, min_kept=min_kept))
            assert np.flatnonzero(made.keep).tolist() == kept and (made.reasons[made.keep] & FLOOR).all()
        assert made.best.tolist() == [2]

    def test_a_selector_that_was_not_scored_is_refused(self):
        with pytest.raises(XTFError, match="a is on"):
            select(from_bits(0, 0), block("a"))


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A reference of its own, as a folder on disk."""
    folder = tmp_path_factory.mktemp("other")
    tiny.model(seed=7).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return {"model": str(folder), "quantization": "none"}


@pytest.fixture
def plan(tmp_path, monkeypatch):
    """make_plan on the tiny model; counts how often a separate reference is loaded."""

    def make(block, data=None, tokenizer=None, provider=None):
        tokenizer = tokenizer or tiny.tokenizer()
        documents = collect(data or rows())
        config = XTFConfig.parse({**ATTRIBUTES_ON, "cache_dir": str(tmp_path / "cache"), "min_kept": 0, **block})
        opened = []

        def references(reference):
            made = SeparateReference(reference, tokenizer, documents, torch.device("cpu"))
            inner = made.open
            monkeypatch.setattr(made, "open", lambda: opened.append(1) or inner(), raising=False)
            return made

        provider = provider or Provider()
        made = make_plan(config, documents, provider, tokenizer, references=references, progress=False)
        made.__dict__.update(opened=opened, provider=provider)
        return made

    return make


def logprobs(model, documents):
    """Independent log-probabilities of every completion token."""
    found = []
    for index in range(len(documents)):
        ids, completion = documents.document(index)
        ids = torch.from_numpy(ids.astype(np.int64))
        with torch.no_grad():
            rates = model(input_ids=ids[None]).logits[0].float().log_softmax(-1)
        own = torch.cat([torch.tensor([float("nan")]), rates[:-1].gather(-1, ids[1:, None])[:, 0]])
        found.append(own[torch.from_numpy(completion)])
    return torch.cat(found).numpy()


class TestPlan:
    def test_log_probability_is_the_references_own(self, plan, other):
        made = plan({**OFF, "selectors": {"own": LOW, "theirs": low(reference=other)}})
        np.testing.assert_allclose(made.scores.values["own"], logprobs(tiny.model(), made.documents), atol=1e-4)
        np.testing.assert_allclose(
            made.scores.values["theirs"], logprobs(tiny.model(seed=7), made.documents), atol=1e-4
        )

    def test_excess_loss_keeps_what_the_reference_finds_easier_than_the_base(self, plan, other):
        part = {"scorer": "excess_loss", "reference": other, "drop": {"quantile": 0.4}}
        protect = {"special_tokens": False, "formats": None}
        made = plan({**OFF, "protect": protect, "selectors": {"rho": part}})
        excess = logprobs(tiny.model(seed=7), made.documents) - logprobs(tiny.model(), made.documents)
        np.testing.assert_allclose(made.scores.values["rho"], excess, atol=2e-4)
        cut = np.quantile(excess, 0.4)
        clear = np.abs(excess - cut) > 1e-3
        assert np.array_equal(made.selection.keep[clear], excess[clear] > cut)
        fixed = plan({**OFF, "selectors": {"tc": {**part, "scorer": "token_cleaning"}}})
        assert np.array_equal(fixed.scores.values["tc"], made.scores.values["rho"])

    def test_a_reference_is_loaded_once_for_two_selectors_and_never_again(self, plan, other):
        parts = {
            "rho": {"scorer": "excess_loss", "reference": other, "drop": {"quantile": 0.4}},
            "low": low(reference=other),
        }
        first = plan({"selectors": parts})
        assert first.opened == [1] and first.provider.opened == 1
        assert len(first.scorers["references"]) == 1
        assert first.scorers["references"][0]["documents"] == len(first.documents)
        second = plan({"selectors": {**parts, "rho": {**parts["rho"], "drop": {"quantile": 0.1}}}})
        assert second.opened == [] and second.provider.opened == 0
        assert second.scorers["references"][0]["stored_documents"] == len(second.documents)
        assert not np.array_equal(first.selection.keep, second.selection.keep)

    @pytest.mark.parametrize(
        ("slot", "part"),
        [
            (RI, {"layers": "last", "drop": {"quantile": 0.3}, "window": 3}),
            (RI, {"drop": {"fence": 0.2}, "unit": "sentence"}),
            (KN, {"drop": {"known_above": 0.5, "unknown_below": 0.002}}),
            (KN, {"drop": {"quantile": 0.3}, "unit": "sentence", "max_fraction": 0.2}),
            (TR, {"drop": {"cluster": 1, "of": 3}}),
        ],
        ids=str,
    )
    def test_a_selector_gives_the_slots_masks_and_needs_no_other_pass(self, plan, slot, part):
        protect = {"special_tokens": False, "formats": None}
        one = plan({**OFF, "protect": protect, slot: part})
        other = plan({**OFF, "protect": protect, "selectors": {"mine": {**part, "scorer": SLOTS[slot]}}})
        assert np.array_equal(one.selection.keep, other.selection.keep) and not one.selection.keep.all()
        np.testing.assert_array_equal(one.scores.values[slot], other.scores.values["mine"])
        assert one.selection.thresholds[slot] == other.selection.thresholds["mine"]
        assert one.provider.opened == 1 and other.provider.opened == 0

    def test_a_slot_takes_any_scorer(self, plan):
        part = {"scorer": "typicality", "drop": {"below": -1}}
        slot = plan({**OFF, KN: part})
        selector = plan({**OFF, "selectors": {"odd": part}})
        assert np.array_equal(slot.selection.keep, selector.selection.keep) and not slot.selection.keep.all()
        np.testing.assert_array_equal(slot.scores.values[KN], selector.scores.values["odd"])
        assert slot.selection.reasons.dtype == np.uint8 and slot.scorers["scores"][KN]["scorer"] == "typicality"

    def test_two_scores_of_one_block_may_read_different_layers(self, plan):
        heads = {"scorer": "attention_received", "drop": {"quantile": 0.2}}
        layers = {"low": [0], "high": [-1], "also_low": "first"}
        parts = {name: {**heads, "layers": chosen} for name, chosen in layers.items()}
        made = plan({**OFF, "selectors": parts})
        alone = {name: plan({**OFF, "selectors": {name: part}}) for name, part in parts.items()}
        for name, other in alone.items():
            np.testing.assert_array_equal(made.scores.values[name], other.scores.values[name])
            assert other.provider.opened == 0, "its layers were stored by the block with all of them"
        low, high = made.scores.values["low"], made.scores.values["high"]
        np.testing.assert_array_equal(low, made.scores.values["also_low"])
        assert not np.allclose(low, high, equal_nan=True) and made.provider.opened == 1

    def test_a_selector_changes_no_score_and_no_reason_of_the_slots(self, plan):
        alone, beside = plan({}), plan({"selectors": {"low": LOW}})
        assert beside.provider.opened == 0
        assert np.array_equal(alone.selection.reasons & KNOWN_BITS, beside.selection.reasons & KNOWN_BITS)
        assert (alone.selection.keep & ~beside.selection.keep).any()
        assert not (~alone.selection.keep & beside.selection.keep).any()

    def test_the_main_reference_runs_only_if_somebody_asks(self, plan, other):
        made = plan({**OFF, "selectors": {"low": low(reference=other)}})
        assert made.provider.opened == 0 and made.scores.logprobs is None
        made = plan({**OFF, "selectors": {"low": LOW}})
        assert made.provider.opened == 1 and made.scores.logprobs is not None

    def test_another_tokenizer_is_refused_by_the_selectors_name(self, plan, tmp_path):
        folder = tmp_path / "foreign"
        tiny.model().save_pretrained(folder)
        foreign = tiny.tokenizer().train_new_from_iterator(["something else entirely"], vocab_size=300)
        foreign.save_pretrained(folder)
        with pytest.raises(XTFUserError, match=r"xtf\.selectors\.low\.reference\.model: the tokenizer of"):
            plan({"selectors": {"low": low(reference={"model": str(folder)})}})
        with pytest.raises(XTFUserError, match=r"xtf\.selectors\.low\.reference\.model: config and tokenizer"):
            plan({"selectors": {"low": low(reference={"model": str(tmp_path / "nowhere")})}})
        with pytest.raises(XTFUserError, match=r"^xtf\.knowledge_novelty\.reference\.model: the tokenizer of"):
            plan({KN: low(reference={"model": str(folder)})})

    def test_what_only_the_model_can_refuse_is_named_by_its_place_in_the_block(self, plan):
        heads = {"scorer": "attention_received", "layers": [9]}
        with pytest.raises(XTFUserError, match=r"^xtf\.selectors\.heads\.layers: \[9\] beyond"):
            plan({"selectors": {"heads": heads}})
        with pytest.raises(XTFUserError, match=r"^xtf\.reasoning_importance\.layers: \[9\] beyond"):
            plan({RI: {"layers": [9]}})

    def test_a_broken_reference_is_refused(self, plan, tmp_path):
        model = tiny.model()
        with torch.no_grad():
            model.lm_head.weight.fill_(float("nan"))
        model.save_pretrained(tmp_path / "broken")
        tiny.tokenizer().save_pretrained(tmp_path / "broken")
        with pytest.raises(XTFError, match="NaN or infinite"):
            plan({"selectors": {"low": low(reference={"model": str(tmp_path / "broken"), "quantization": "none"})}})


class TestShown:
    def test_table_summary_metrics_and_terminal_name_the_selector(self, plan, tmp_path):
        made = plan({"selectors": {"low": LOW, "never": low(drop={"below": -1e6})}})
        written = writer.write(made, tiny.tokenizer(), tmp_path / "report")
        table = pq.read_table(tmp_path / "report" / "scores.parquet")
        assert table.schema.names == [*SCHEMA.names, "low", "never"]
        reasons = table["reason"].to_pylist()
        fired = sum("low" in reason.split(",") for reason in reasons)
        facts = json.loads(written[0].read_text())
        assert facts["totals"]["scores"]["low"]["fired"] == fired > 0
        assert "low & never" in facts["totals"]["overlap_of_the_smaller_set"]
        assert facts["scorers"]["scores"]["low"]["version"] == 1
        assert facts["thresholds"]["low"]["scorer"] == "log_probability"
        assert summary.metrics(made)["xtf/dropped_by/low"] > 0 and summary.metrics(made)["xtf/dropped_by/never"] == 0
        console = Console(width=120, record=True)
        console.print(terminal.totals_table(facts["totals"]))
        lines = [line.split() for line in console.export_text().splitlines()]
        assert next(line for line in lines if "low" in line)[3] == f"{fired:,}"
        assert next(line for line in lines if "never" in line)[3] == "0"

    def test_documents_are_shown_with_the_selectors_name(self, plan, tmp_path):
        made = plan({**OFF, "selectors": {"low": LOW}})
        path = tmp_path / "scores.parquet"
        score_table.write(score_table.ScoreTable.of_plan(made, tiny.tokenizer()), made.documents, path)
        console = Console(width=400, record=True)
        found = terminal.find(score_table.open_file(path), terminal.Wanted(), 99, path)
        terminal.render_documents(found, "", console)
        assert "|low-]" in console.export_text()

    def test_without_selectors_files_are_as_before(self, plan, tmp_path):
        made = plan({})
        writer.write(made, tiny.tokenizer(), tmp_path)
        assert pq.read_schema(tmp_path / "scores.parquet").names == SCHEMA.names
        facts = json.loads((tmp_path / "summary.json").read_text())
        assert "selectors" not in facts["config"] and list(facts["scorers"]["scores"]) == list(SLOTS)
