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
from tests.test_pipeline import ATTRIBUTES_ON, Provider, rows
from tests.test_selection import config as attributes_config
from tests.test_selection import from_bits, random_scores
from xtf_plugin.config import ATTRIBUTES, XTFConfig
from xtf_plugin.documents import collect
from xtf_plugin.errors import XTFError, XTFUserError
from xtf_plugin.pipeline import make_plan
from xtf_plugin.providers import SeparateReference
from xtf_plugin.report import score_table, summary, terminal, writer
from xtf_plugin.report.score_table import SCHEMA
from xtf_plugin.selection import (
    CONTROL,
    FLOOR,
    NOVELTY,
    PROTECTED,
    REASONING,
    RELEVANCE,
    reason_text,
    rule_bits,
    select,
)

OFF = {"preset": "none", **dict.fromkeys(ATTRIBUTES, False)}
KNOWN_BITS = REASONING | NOVELTY | RELEVANCE
LOW = {"scorer": "log_probability", "drop": {"quantile": 0.25}}


def low(**keys):
    return {**LOW, **keys}


def block(*names, **keys):
    return XTFConfig.parse({**OFF, "min_kept": 0, "selectors": {name: LOW for name in names}, **keys})


def with_scores(scores, **selectors):
    return replace(scores, selectors={name: np.asarray(v, dtype=np.float32) for name, v in selectors.items()})


class TestSelection:
    def test_bits_of_eight_selectors_fit_and_name_them(self):
        names = [f"s{i}" for i in range(8)]
        config = XTFConfig.parse({"preset": "paper", "selectors": {name: LOW for name in names}})
        bits = rule_bits(config)
        assert len(set(bits.values())) == 11 and max(bits.values()) < 1 << 16
        assert not set(bits.values()) & {PROTECTED, FLOOR, CONTROL}
        every = sum(bits.values()) | PROTECTED
        assert reason_text(every, bits) == ",".join([*config.attributes, *names, "protected"])

    def test_rules_are_those_of_the_attributes(self):
        """A selector over attention's own scores drops what reasoning importance drops, rule by rule."""
        scores = random_scores([30, 50, 20], counts=[1, 3, 1])
        given = with_scores(scores, same=scores.reasoning_importance)
        for drop in ({"quantile": 0.2}, {"below": 0.4}, {"fence": 0.3}):
            for scope in ("document", "dataset"):
                if scope == "document" and "below" in drop:
                    continue
                part = {"drop": drop, "scope": scope, "window": 3, "max_fraction": 0.15}
                if "below" in drop:
                    del part["scope"]
                attribute = XTFConfig.parse({**OFF, "reasoning_importance": part})
                selector = XTFConfig.parse({**OFF, "selectors": {"same": {**LOW, **part}}})
                expected, got = select(scores, attribute), select(given, selector)
                assert np.array_equal(got.keep, expected.keep) and not got.keep.all(), (drop, scope)
                assert got.fired["same"] == expected.fired["reasoning_importance"]
                assert got.thresholds["same"]["drops"] == expected.thresholds["reasoning_importance"]["drops"]

    def test_without_selectors_reasons_stay_8_bits_wide(self):
        scores = random_scores([30, 50])
        plain = select(scores, attributes_config())
        beside = select(with_scores(scores, s=np.ones(80)), attributes_config(selectors={"s": low(drop={"below": 0})}))
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

    def test_a_rule_that_fires_on_nothing_is_told_by_the_selectors_name(self):
        made = select(with_scores(from_bits(0, 0), a=[1, 2]), block(selectors={"a": low(drop={"below": -5})}))
        assert len(made.warnings) == 1
        assert made.warnings[0].startswith("a: the rule {below: -5.0} fires on nothing")
        assert "remove the selector `a`" in made.warnings[0]

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
        scores = replace(with_scores(from_bits(*[0] * 5), a=[-9, -5, -5, -7, -9], b=[0, -1, -2, -3, -4]))
        scores = replace(scores, logprobs=np.float32([-1, -8, -2, -3, -9]))
        parts = {"a": low(drop={"below": 0}), "b": low(drop={"below": 9})}
        for min_kept, kept in [(1, [2]), (2, [1, 2]), (3, [1, 2, 3]), (4, [0, 1, 2, 3])]:
            made = select(scores, block(selectors=parts, min_kept=min_kept))
            assert np.flatnonzero(made.keep).tolist() == kept and (made.reasons[made.keep] & FLOOR).all()
        assert made.best.tolist() == [2]
        later = replace(scores, selectors={"b": None, "a": scores.selectors["a"]})  # b has no scores yet
        made = select(later, block(selectors=dict(reversed(parts.items())), min_kept=1))
        assert np.flatnonzero(made.keep).tolist() == [2]

    def test_a_selector_that_was_not_scored_is_refused_and_a_later_one_has_no_vote(self):
        with pytest.raises(XTFError, match="a is on"):
            select(from_bits(0, 0), block("a"))
        scores = replace(with_scores(from_bits(0, 0), a=[0, 9]), selectors={"a": np.float32([0, 9]), "b": None})
        parts = {"a": low(drop={"below": 1}), "b": LOW}
        made = select(scores, block(selectors=parts, combine="intersection"))
        assert made.keep.tolist() == [False, True] and made.fired["b"] == 0


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
        np.testing.assert_allclose(made.scores.selectors["own"], logprobs(tiny.model(), made.documents), atol=1e-4)
        np.testing.assert_allclose(
            made.scores.selectors["theirs"], logprobs(tiny.model(seed=7), made.documents), atol=1e-4
        )

    def test_excess_loss_keeps_what_the_reference_finds_easier_than_the_base(self, plan, other):
        part = {"scorer": "excess_loss", "reference": other, "drop": {"quantile": 0.4}}
        made = plan({**OFF, "protect": {"special_tokens": False}, "selectors": {"rho": part}})
        excess = logprobs(tiny.model(seed=7), made.documents) - logprobs(tiny.model(), made.documents)
        np.testing.assert_allclose(made.scores.selectors["rho"], excess, atol=2e-4)
        cut = np.quantile(excess, 0.4)
        clear = np.abs(excess - cut) > 1e-3
        assert np.array_equal(made.selection.keep[clear], excess[clear] > cut)
        fixed = plan({**OFF, "selectors": {"tc": {**part, "scorer": "token_cleaning"}}})
        assert np.array_equal(fixed.scores.selectors["tc"], made.scores.selectors["rho"])

    def test_a_reference_is_loaded_once_for_two_selectors_and_never_again(self, plan, other):
        parts = {
            "rho": {"scorer": "excess_loss", "reference": other, "drop": {"quantile": 0.4}},
            "low": low(reference=other),
        }
        first = plan({"selectors": parts})
        assert first.opened == [1] and first.provider.opened == 1
        assert len(first.selectors["references"]) == 1
        assert first.selectors["references"][0]["documents"] == len(first.documents)
        second = plan({"selectors": {**parts, "rho": {**parts["rho"], "drop": {"quantile": 0.1}}}})
        assert second.opened == [] and second.provider.opened == 0
        assert second.selectors["references"][0]["stored_documents"] == len(second.documents)
        assert not np.array_equal(first.selection.keep, second.selection.keep)

    def test_a_selector_changes_no_score_and_no_reason_of_the_attributes(self, plan):
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
        assert facts["totals"]["attributes"]["low"]["fired"] == fired > 0
        assert "low & never" in facts["totals"]["overlap_of_the_smaller_set"]
        assert facts["selectors"]["scorers"]["low"]["version"] == 1
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
        assert "selectors" not in facts and "selectors" not in facts["config"]
