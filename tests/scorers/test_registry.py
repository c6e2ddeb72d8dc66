"""Selectors and slots of the block and their scorers: built-in ones and those of other packages."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests import tiny
from tests.made_scores import KN
from tests.pages import ROOT, blocks, inline_code
from tests.test_plan import Provider, rows
from tests.test_repo_rules import loaded_by
from xtf_plugin.config.block import XTFConfig
from xtf_plugin.config.scores import MOST, RESERVED, SLOTS
from xtf_plugin.data.documents import collect
from xtf_plugin.errors import XTFError, XTFUserError
from xtf_plugin.report.score_table import SCHEMA
from xtf_plugin.scorers import ScoreConfig, Scorer, registry

PAGE = ROOT / "docs" / "own-scorer.md"
RHO = {"scorer": "excess_loss", "reference": {"model": "other", "quantization": "none"}, "drop": {"quantile": 0.4}}
LOW = {"scorer": "log_probability", "drop": {"below": -1.0}}
OFF = {"preset": "none"}


def parse(**selectors):
    return XTFConfig.parse({"preset": "paper", "selectors": selectors})


def refusal(block) -> str:
    with pytest.raises(XTFUserError) as caught:
        XTFConfig.parse(block)
    assert "pydantic" not in str(caught.value)
    return str(caught.value)


def install(folder: Path, name: str, code: str, entry: str | None = None, package: str | None = None) -> None:
    """What `pip install` writes: a module and a dist-info folder with the entry point."""
    folder.mkdir(exist_ok=True)
    package = package or f"pkg-{name}"
    (folder / f"{package.replace('-', '_')}.py").write_text(code, encoding="utf-8")
    info = folder / f"{package.replace('-', '_')}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n", encoding="utf-8")
    entry = entry or f"{package.replace('-', '_')}:Made"
    (info / "entry_points.txt").write_text(f"[{registry.GROUP}]\n{name} = {entry}\n", encoding="utf-8")


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder on sys.path to install into; modules imported from it are forgotten afterwards."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    before = set(sys.modules)
    yield folder
    for name in set(sys.modules) - before:
        if str(folder) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


MADE = """
import numpy as np
from xtf_plugin.scorers import ScoreConfig, scorer

class Loose(ScoreConfig, extra="allow"):
    pass

@scorer({name!r}, {options})
def Made(context, config):
    '''Low scores are dropped.'''
    return {score}
"""


def made(name="made", score="context.positions.astype(np.float32)", options=""):
    return MADE.format(name=name, score=score, options=options)


class TestBlock:
    def test_each_part_is_of_its_scorers_class_and_round_trips(self):
        config = parse(rho=RHO, low=LOW, tc={**RHO, "scorer": "token_cleaning", "mode": "fixed", "drop": {"fence": 1}})
        assert [type(part) for part in config.selectors.values()] == [
            registry.BUILTIN[name].Config for name in ("excess_loss", "log_probability", "token_cleaning")
        ]
        assert config.selectors["rho"].scope == "dataset" and config.selectors["rho"].reference.model == "other"
        assert XTFConfig.parse(config.to_dict()) == config
        assert list(XTFConfig.parse(config.to_dict()).selectors) == ["rho", "low", "tc"]
        assert XTFConfig(preset="paper", selectors=config.selectors) == config
        assert list(config.scores) == [*SLOTS, "rho", "low", "tc"]

    def test_without_selectors_a_config_is_written_as_before(self):
        assert "selectors" not in XTFConfig.parse({"preset": "paper"}).to_dict()
        assert "selectors" not in XTFConfig.parse({"preset": "paper", "selectors": {}}).to_dict()

    def test_names_of_the_score_table_are_taken(self):
        assert set(SCHEMA.names) <= RESERVED
        for name in RESERVED:
            assert f"xtf.selectors.{name}: '{name}' is taken" in refusal({"selectors": {name: LOW}})

    @pytest.mark.parametrize(
        ("selectors", "parts"),
        [
            (3, ["xtf.selectors: 3", "mapping"]),
            ({"rho": True}, ["xtf.selectors.rho: true", "scorer"]),
            ({"rho": {}}, ["xtf.selectors.rho.scorer: missing", "xtf.selectors.rho.drop: missing"]),
            ({"Rho": LOW}, ["xtf.selectors.Rho: 'Rho' is not a legal name"]),
            ({"r-o": LOW}, ["xtf.selectors.r-o"]),
            ({f"s{i}": LOW for i in range(MOST + 1)}, ["xtf.selectors.s8: 9", f"more than {MOST}"]),
            ({"r": {**LOW, "scorer": "exces_los"}}, ["xtf.selectors.r.scorer: 'exces_los'", "mean excess_loss?"]),
            (
                {"r": {**LOW, "scorer": "zz"}},
                [f"Registered: {', '.join(registry.BUILTIN)};", registry.GROUP],
            ),
            ({"r": {**LOW, "scorer": 3}}, ["xtf.selectors.r.scorer: 3"]),
            (
                {"r": {**LOW, "wndow": 3}},
                ["xtf.selectors.r.wndow", "mean window?", "unit, window, scope, scale, max_fraction, ref"],
            ),
            ({"r": {**LOW, "window": 2}}, ["xtf.selectors.r.window: 2 is even"]),
            ({"r": {**LOW, "window": "line"}}, ["xtf.selectors.r.window: 'line' is a unit; write `unit: line`"]),
            ({"r": {**LOW, "unit": "both"}}, ["xtf.selectors.r.unit: 'both'", "token | sentence | line"]),
            ({"r": {**LOW, "max_fraction": 0}}, ["xtf.selectors.r.max_fraction", "> 0 and <= 1"]),
            ({"r": {**LOW, "scope": "document"}}, ["xtf.selectors.r.scope: 'document' has no effect"]),
            ({"r": {**LOW, "drop": {"below": 1, "fence": 1}}}, ["holds below and fence", "{quantile: number"]),
            ({"r": {**LOW, "drop": {"quantle": 0.1}}}, ["xtf.selectors.r.drop.quantle", "mean quantile?"]),
            ({"r": {**LOW, "drop": {"known_above": 0.9}}}, ["xtf.selectors.r.drop.known_above"]),
            ({"r": {**RHO, "reference": {}}}, ["xtf.selectors.r.reference.model: null"]),
            ({"r": {**RHO, "reference": {"modl": "x"}}}, ["xtf.selectors.r.reference.modl", "mean model?"]),
            ({"r": {**LOW, "scorer": "excess_loss"}}, ["xtf.selectors.r.reference: missing"]),
            ({"r": {**LOW, "scorer": "token_cleaning"}}, ["xtf.selectors.r.reference: missing"]),
            ({"r": {**RHO, "scorer": "token_cleaning", "mode": "x"}}, ["xtf.selectors.r.mode: 'x'", "fixed"]),
            *(
                (
                    {"r": {**part, "scorer": "token_cleaning", "mode": "self_evolving"}},
                    ["xtf.selectors.r.mode: 'self_evolving' was removed", "name a `reference`"],
                )
                for part in (LOW, RHO)
            ),
            ({"r": {**LOW, "mode": "fixed"}}, ["xtf.selectors.r.mode: unknown key"]),
        ],
        ids=str,
    )
    def test_wrong_parts_are_reported_like_the_rest_of_the_block(self, selectors, parts):
        message = refusal({"preset": "paper", "selectors": selectors})
        assert all(part in message for part in parts), message

    def test_scores_count_selectors(self):
        assert list(XTFConfig.parse({**OFF, "selectors": {"low": LOW}}).scores) == ["low"]
        XTFConfig.parse({"preset": "paper", "selectors": {"low": LOW}, "combine": {"at_least": 4}})
        message = refusal({"preset": "paper", "selectors": {"low": LOW}, "combine": {"at_least": 5}})
        assert "more than there are scores (4)" in message
        assert "nothing could be dropped" in refusal({**OFF, "selectors": {}})

    def test_schema_knows_the_built_in_scorers_keys(self):
        schema = XTFConfig.json_schema()
        selector, off = schema["properties"]["selectors"]["oneOf"][0]["additionalProperties"]["oneOf"]
        assert off["const"] is False
        assert "required" not in selector and "mode" not in selector["properties"]
        named = [case for case in selector["allOf"] if "$ref" in case["then"]]
        refs = {case["if"]["properties"]["scorer"]["const"]: case["then"]["$ref"] for case in named}
        assert set(refs) == set(registry.BUILTIN)
        own = schema["$defs"][refs["token_cleaning"].rpartition("/")[2]]
        assert own["properties"]["mode"]["const"] == "fixed" and own["additionalProperties"] is False

    def test_parsing_loads_neither_torch_nor_other_packages(self):
        block = "{'selectors': {'low': {'scorer': 'log_probability', 'drop': {'below': 0}}}}"
        loaded = loaded_by(f"from xtf_plugin.config.block import XTFConfig; XTFConfig.parse({block})")
        assert "xtf_plugin" in loaded and not loaded & {"torch", "transformers", "trl", "pyarrow"}


class TestRegistry:
    def test_a_packages_code_is_imported_only_when_a_block_names_it(self, site):
        install(site, "bomb", "raise RuntimeError('boom')")
        parse(low=LOW)
        assert ", bomb; a package" in refusal({"selectors": {"b": {**LOW, "scorer": "zz"}}})
        message = refusal({"selectors": {"b": {"scorer": "bomb", "drop": {"below": 0}}}})
        assert "xtf.selectors.b.scorer: 'bomb' of the package pkg-bomb 1.0" in message and "boom" in message

    @pytest.mark.parametrize(
        ("code", "why"),
        [
            ("import no_such_module", "ModuleNotFoundError"),
            ("def f(:", "SyntaxError"),
            ("x = 1", "AttributeError"),
            ("class Made: pass", "not made by the decorator xtf_plugin.scorers.scorer"),
            ("Made = 3", "not made by the decorator"),
            (made(options="version='1'"), "`version` is '1', no whole number"),
            (made("other"), "its `name` is 'other'"),
            (made(options="dict"), "not a class derived from xtf_plugin.scorers.ScoreConfig"),
            (made(options="Loose"), "does not forbid unknown keys"),
            ("from xtf_plugin.scorers import Scorer\nMade = Scorer('made', None)", "its `score` cannot be called"),
        ],
    )
    def test_a_package_that_does_not_fit_is_one_clear_error(self, site, code, why):
        install(site, "made", code)
        message = refusal({"selectors": {"m": {"scorer": "made", "drop": {"below": 0}}}})
        assert "xtf.selectors.m.scorer: 'made' of the package pkg-made 1.0" in message and why in message, message

    @pytest.mark.parametrize("name", ["made", "excess_loss"])
    def test_a_name_that_two_packages_claim_is_refused(self, site, name):
        install(site, name, made(name), package="pkg-one")
        install(site, name, made(name), package="pkg-two")
        with pytest.raises(XTFUserError, match=r"several packages .*pkg-one 1.0, pkg-two 1.0"):
            registry.find(name)

    @pytest.mark.parametrize(
        ("score", "why"),
        [
            ("None", "NoneType"),
            ("context.positions", "int32"),
            ("np.zeros(3, np.float32)", r"float32 \(3,\)"),
            ("np.full(len(context.positions), np.nan, np.float32)", "NaN for all"),
        ],
    )
    def test_scores_that_do_not_fit_name_selector_and_package(self, site, tmp_path, score, why):
        install(site, "made", made(score=score))
        with pytest.raises(XTFError, match=rf"mine: the scorer made of pkg-made 1\.0 returned .*{why}"):
            plan_of({"selectors": {"mine": {"scorer": "made", "drop": {"below": 1}}}}, tmp_path)

    def test_a_scorer_cannot_write_to_what_it_is_given(self, site, tmp_path):
        install(site, "made", made(score="np.add(context.logprobs, 1, out=context.logprobs)"))
        with pytest.raises(ValueError, match="read-only"):
            plan_of({"selectors": {"mine": {"scorer": "made", "drop": {"below": 1}}}}, tmp_path)

    def test_a_package_may_score_for_a_slot(self, site, tmp_path):
        install(site, "made", made(score="(context.positions % 3).astype(np.float32)"))
        slot = {"scorer": "made", "drop": {"below": 1}}
        plan = plan_of(
            {**OFF, "min_kept": 0, "protect": {"special_tokens": False, "formats": None}, KN: slot}, tmp_path
        )
        assert np.array_equal(plan.selection.keep, plan.scores.positions % 3 > 0)
        assert plan.scorers["scores"] == {KN: {"scorer": "made", "version": 1, "package": "pkg-made 1.0"}}

    def test_find_gives_scorers(self):
        assert list(registry.BUILTIN)[:3] == list(SLOTS.values())
        for name, found in registry.BUILTIN.items():
            assert registry.find(name) is found and found.name == name
            assert isinstance(found, Scorer) and issubclass(found.Config, ScoreConfig)


def plan_of(block, tmp_path):
    from tests import tiny
    from xtf_plugin.plan import make_plan

    config = XTFConfig.parse({"cache_dir": str(tmp_path / "cache"), **block})
    return make_plan(config, collect(rows()), Provider(), tiny.tokenizer(), progress=False)


@pytest.fixture
def documented(site):
    """The package of docs/own-scorer.md, installed as its own two blocks say."""
    toml = next(block.text for block in blocks(PAGE) if block.language == "toml")
    code = next(block.text for block in blocks(PAGE) if "def repetition(" in block.text)
    assert len([line for line in code.splitlines() if line.strip()]) <= 20, "the page promises a small one"
    name, entry = toml.rsplit("\n", 1)[1].split(" = ")
    install(site, name, code, entry=entry.strip('"'), package="xtf-repetition")
    part = next(text for text in inline_code(PAGE) if "scorer: repetition" in text)
    return site, yaml.safe_load(part)


class TestDocumentedPackage:
    def test_its_selector_drops_repetitions(self, documented, tmp_path):
        _, selectors = documented
        part = {**selectors["loops"], "n": 1}  # the tiny answers repeat single tokens, no longer stretches
        plan = plan_of({**OFF, "protect": {"special_tokens": False}, "selectors": {"loops": part}}, tmp_path)
        scores = plan.scores.values["loops"]
        assert set(np.unique(scores)) == {0, 1}
        assert np.array_equal(~plan.selection.keep, scores == 0)
        assert plan.scorers["scores"]["loops"]["package"] == "xtf-repetition 1.0"

    def test_it_conforms(self, documented):
        from xtf_plugin.testing import check_scorer

        scorer = registry.find("repetition")
        assert set(np.unique(check_scorer(scorer, {"n": 1}))) == {0, 1}
        with pytest.raises(AssertionError, match="config refuses"):
            check_scorer(scorer, {"n": 0})

    def test_the_command_line_finds_it_without_torch(self, documented, tmp_path):
        site, selectors = documented
        recipe, block = tmp_path / "recipe.yaml", {"selectors": selectors}
        base, rows = tiny.save_base(tmp_path / "base"), tiny.save_rows(tmp_path / "rows.jsonl", tiny.problems(4))
        data = [{"path": "json", "data_files": str(rows)}]
        recipe.write_text(yaml.safe_dump({"model_name_or_path": str(base), "datasets": data, "xtf": block}))
        words = [str(Path(sys.executable).parent / "xtf"), "check", str(recipe)]
        path = {"PYTHONPATH": f"{site}:{ROOT}", "PATH": "/usr/bin:/bin"}
        result = subprocess.run(words, env=path, capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, result.stderr
        assert "loops (repetition)" in result.stdout
        recipe.write_text(recipe.read_text().replace("repetition", "repetitoin"))
        result = subprocess.run(words, env=path, capture_output=True, text=True, timeout=120)
        assert result.returncode == 2 and "Did you mean repetition?" in " ".join(result.stderr.split())


def test_packages_are_looked_up_once_until_one_is_installed(site, monkeypatch):
    """Each look reads a file of every package."""
    looks, look = [], registry.metadata.entry_points
    monkeypatch.setattr(registry.metadata, "entry_points", lambda **wanted: looks.append(wanted) or look(**wanted))
    registry._read.cache_clear()
    for _ in range(3):
        XTFConfig.parse({})
        assert registry.package_of("new_one") == "xtf-plugin"
    assert len(looks) == 1
    install(site, "new_one", "")
    assert registry.package_of("new_one") == "pkg-new_one 1.0"
    assert len(looks) == 2
