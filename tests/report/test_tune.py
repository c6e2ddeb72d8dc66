"""`xtf tune`: its counts are those of runs with the blocks that it prints, or are labelled "about"."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import yaml
from rich.console import Console

from tests import tiny
from tests.made_scores import DEFAULT, DROPS, KN, RI, TR, odd_sentences, read_prompts
from tests.report.tables import plan_of, saved, table_of
from xtf_plugin import cli
from xtf_plugin.config.block import XTFConfig
from xtf_plugin.plan import UNFILTERED
from xtf_plugin.report import score_table, tune
from xtf_plugin.report.page.shortest_block import minimal
from xtf_plugin.selection.select import FORCED

NEVER = {"mine": {"scorer": "log_probability", "drop": {"below": -1e6}}}
TWO = {**DROPS, "selectors": {"mine": {"scorer": "log_probability", "unit": "sentence", "drop": {"below": -7.3}}}}


def problems(n: int = 24) -> list[dict]:
    """Word problems as documents whose answers have several sentences, some of them in all."""
    fast, made = tiny.tokenizer(), []
    for row in tiny.problems(n):
        prompt, answer = (fast(row[name])["input_ids"] for name in ("prompt", "completion"))
        made.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    return made


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder and the plan of a block with three scores, none of which depends on what is dropped."""
    folder = tmp_path_factory.mktemp("two")
    return folder, plan_of(folder, problems(), **TWO)


@pytest.fixture
def default(tmp_path, monkeypatch):
    read_prompts(monkeypatch)
    return plan_of(tmp_path, problems(), **DEFAULT)


def named(found: list[tune.Setting]) -> dict[str, tune.Setting]:
    return {each.name: each for each in found}


def test_every_setting_drops_what_a_run_with_its_block_drops(two):
    folder, plan = two
    table = table_of(plan)
    found = tune.settings(table, plan.config)
    assert {f"{s} {w}" for s in ("RI", "KN", "mine") for w in ("milder", "stronger", "alone")} < named(found).keys()
    for each in found:
        block = yaml.safe_load(tune.block_text(each.config))["xtf"]
        again = plan_of(folder, problems(), **block)
        assert each.exact and np.array_equal(again.selection.keep, ~each.dropped), each.name
        totals = table_of(again).about["totals"]
        assert each.shares == {name: one["dropped_fraction"] for name, one in totals["scores"].items()}
    assert np.array_equal(found[0].dropped, ~table.keep)


def test_milder_drops_less_and_stronger_more(two):
    table = table_of(two[1])
    found = named(tune.settings(table, table.config))
    for short, name in (("RI", RI), ("KN", KN), ("mine", "mine")):
        shares = [found[key].shares[name] for key in (f"{short} milder", "as it is", f"{short} stronger")]
        assert shares == sorted(set(shares)), short


def test_what_depends_on_what_is_dropped_says_about(default):
    """`explained` scores again without dropped text, and `influence` asks about what another score finds doubtful."""
    found = named(tune.settings(table_of(default), default.config))
    assert {name for name, each in found.items() if not each.exact} == {"TR milder", "TR stronger"}
    assert {"as it is", "RI milder", "KN stronger"} <= found.keys()


@pytest.mark.parametrize(
    ("block", "exact"),
    [
        ({}, True),
        ({TR: {"drop": {"of_median": 0.3}}}, False),
        ({KN: {"drop": {"below": 0.5}}}, True),
        ({RI: {"drop": {"below": 1.0}}}, True),
        ({RI: False}, True),
        ({RI: False, TR: False}, True),
        ({RI: False, TR: {"drop": {"of_median": 0.3}}}, False),
        ({"min_kept": 3}, True),
    ],
)
def test_what_is_exact_of_the_default(block, exact):
    assert tune._is_exact(XTFConfig(), XTFConfig(**block)) is exact


def test_scores_that_another_one_reads_are_never_alone(default):
    """`influence` asks about what `explained` finds doubtful."""
    config = XTFConfig()
    assert [name for name, *_ in tune._alone(config)] == ["KN alone", "TR alone"]
    assert [name for name, *_ in tune._alone(default.config)] == ["RI alone", "KN alone", "TR alone"]
    assert list(tune._alone(XTFConfig(preset="none", **{KN: True}))) == []


@pytest.mark.parametrize(
    "drop",
    [{"quantile": 0.2}, {"below": -6.0}, {"fence": 0.5}, {"cluster": 2, "of": 4}],
    ids=lambda drop: next(iter(drop)),
)
def test_every_kind_of_rule(tmp_path, drop):
    part = {"scorer": "log_probability", "drop": drop}
    plan = plan_of(tmp_path, problems(), preset="none", selectors={"mine": part})
    found = tune.settings(table_of(plan), plan.config)
    changes = [XTFConfig(**yaml.safe_load(tune.block_text(each.config))["xtf"]) for each in found]
    assert changes == [each.config for each in found] and len(found) > 1


@pytest.mark.parametrize(
    "drop",
    [
        {"known_above": 0.001},
        {"known_above": 0.9, "unknown_below": 0.001},
        {"known_above": 0.02, "unknown_below": 0.005},
    ],
)
def test_rules_of_novelty(tmp_path, drop):
    plan = plan_of(tmp_path, problems(), preset="none", **{KN: {"drop": drop}})
    found = tune.settings(table_of(plan), plan.config)
    assert any(each.dropped.any() for each in found[1:])


def test_a_block_that_drops_nothing_is_given_some_that_do(tmp_path):
    part = {"scorer": "log_probability", "unit": "sentence", "drop": {"below": -99.0}}
    plan = plan_of(tmp_path, problems(), preset="none", selectors={"mine": part})
    found = named(tune.settings(table_of(plan), plan.config))
    assert not found["as it is"].dropped.any()
    assert 0 < found["mine stronger"].shares["mine"] < found["mine much stronger"].shares["mine"] < 0.15


def test_where_no_threshold_drops_anything_the_reason_is_given(tmp_path):
    """To a tiny model the prompts say nothing, so the default's scores are undefined."""
    plan = plan_of(tmp_path, problems())
    found = tune.settings(table_of(plan), plan.config)
    text = " ".join(shown(found, plan).split())
    assert [each.name for each in found] == ["as it is"] and "the prompts of this data say too little" in text
    assert "No threshold of these scores drops anything here" in text and "selectors.md" in text
    (warning,) = (text for text in plan.warnings if text.startswith("nothing at all is dropped"))
    assert UNFILTERED in warning and warning.endswith("xtf tune RECIPE")  # a stream says another thing in its place


def test_a_random_control_is_left_aside(two, tmp_path):
    table = table_of(two[1])
    drawn = plan_of(tmp_path, problems(), **TWO, control="random")
    found = tune.settings(table_of(drawn), drawn.config)
    assert np.array_equal(found[0].dropped, ~table.keep)
    assert "control: random" in tune.block_text(found[1].config) and "draws its tokens at random" in shown(found, drawn)


def shown(found, plan, width=80):
    stream = io.StringIO()
    tune.show(found, table_of(plan), "scores.parquet", Console(file=stream, width=width))
    return stream.getvalue()


@pytest.mark.parametrize("width", [80, 120])
def test_it_is_readable_at_usual_widths(default, width):
    text = shown(tune.settings(table_of(default), default.config), default, width)
    assert max(map(len, text.splitlines())) <= width
    rows = [line.split() for line in text.splitlines() if re.match(r" *\d+ \S", line)]
    assert any(row[1:3] == ["as", "it"] for row in rows) and any("about" in row for row in rows)
    for heading in ("drops", "RI", "KN", "TR", "more", "less"):
        assert heading in text.splitlines()[1].split()


def test_numbers_of_a_row(two):
    table = table_of(two[1])
    found = tune.settings(table, table.config)
    lines = shown(found, two[1], 120).splitlines()
    each = named(found)["mine stronger"]
    cells = next(line for line in lines if "mine stronger" in line).split()
    more, less = each.dropped & ~found[0].dropped, found[0].dropped & ~each.dropped
    parts = [100 * float(table.weights[flags].sum() / table.weights.sum()) for flags in (each.dropped, more, less)]
    assert [cells[-6], *cells[-2:]] == [f"{part:.1f}" for part in parts] and parts[1] > 0


def test_examples_are_what_is_dropped(default):
    table = table_of(default)
    texts = tune.examples(table, ~table.keep)
    assert 1 <= len(texts) <= tune.EXAMPLES and len(set(texts)) == len(texts)
    whole = "".join(table.pieces[token].decode(errors="replace") for token in table.token_ids.tolist())
    assert all(text.replace("↵", "\n") in whole for text in texts)
    assert tune.examples(table, np.zeros(len(table.keep), dtype=bool)) == []
    everything = tune.examples(table, np.ones(len(table.keep), dtype=bool))
    assert "Sure, happy to help!" in " ".join(everything)  # the most frequent sentence


def test_what_is_forced_out_is_counted_apart_and_no_example_of_a_score(tmp_path, monkeypatch):
    read_prompts(monkeypatch)
    plan = plan_of(tmp_path, problems(), **DEFAULT, force_drop=["Sure, happy to help!"])
    text = shown(tune.settings(table_of(plan), plan.config), plan, 120)
    head, base = (line.split() for line in text.splitlines()[1:3])
    forced = 100 * plan.weights[plan.selection.reasons == FORCED].sum() / plan.weights.sum()
    assert head[-3:] == ["forced", "more", "less"] and base[-1] == f"{forced:.1f}" != "0.0"
    assert "drops  Sure, happy to help!" not in text
    only = plan_of(tmp_path, problems(), preset="none", selectors=NEVER, force_drop=["Sure, happy to help!"])
    text = shown(tune.settings(table_of(only), only.config), only, 120)
    assert "no score drops anything; force_drop does" in text and "drops nothing" not in text


def test_text_of_the_data_cannot_act_on_the_terminal(two):
    table = table_of(two[1])
    evil = replace(table, pieces=dict.fromkeys(table.pieces, b"\x1b[31m\xe2\x80\xae"))
    assert not re.search("[\x1b\u202e]", "".join(tune.examples(evil, ~evil.keep)))


def test_the_shortest_block_of_a_config():
    for block in ({}, {TR: {"drop": {"of_median": 0.3}}}, DROPS, TWO, {"preset": "paper", RI: False}, odd_sentences()):
        config = XTFConfig(**block)
        assert XTFConfig(**minimal(config)) == config
    assert minimal(XTFConfig(**{TR: {"drop": {"of_median": 0.3}}})) == {
        "preset": "default",
        TR: {"drop": {"of_median": 0.3}},
    }


def call(*words):
    with pytest.raises(SystemExit) as ended:
        cli.main(list(map(str, words)))
    return ended.value.code or 0


def recipe(folder, block, out):
    path = folder / "recipe.yaml"
    data = {"model_name_or_path": "tiny", "dataset_name": "some/data", "output_dir": str(out), "xtf": block}
    path.write_text(yaml.safe_dump(data))
    return path


def test_commands_on_a_recipe_and_on_a_table(two, tmp_path, capsys):
    folder, plan = two
    path = saved(plan, tmp_path / "out/xtf/scores.parquet")
    block = {**TWO, "cache_dir": str(folder / "cache")}
    named_recipe = recipe(tmp_path, block, tmp_path / "out")
    assert call("tune", named_recipe) == 0
    of_recipe = capsys.readouterr().out
    assert call("tune", path) == 0
    assert capsys.readouterr().out.replace(str(path), str(named_recipe)) == of_recipe.replace(
        str(path), str(named_recipe)
    )
    assert call("tune", named_recipe, "--setting", 2) == 0
    pasted = yaml.safe_load(capsys.readouterr().out)["xtf"]
    assert XTFConfig(**pasted) == tune.settings(score_table.read(path), plan.config)[1].config
    assert call("tune", named_recipe, "--setting", 99) == 2
    assert re.search(r"there are \d+ settings", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (False, "turns XTF off"),
        ({**TWO, "force_drop": ["x"]}, "`force_drop` of the block changed after the table was made. Run `xtf score`"),
        ({"min_kpet": 1}, "min_kept"),
    ],
)
def test_blocks_that_are_refused(two, tmp_path, capsys, block, message):
    saved(two[1], tmp_path / "out/xtf/scores.parquet")
    assert call("tune", recipe(tmp_path, block, tmp_path / "out")) == 2
    assert message in capsys.readouterr().err


def test_scores_of_another_model_are_refused(two, tmp_path, capsys):
    saved(two[1], tmp_path / "out/xtf/scores.parquet")
    path = recipe(tmp_path, TWO, tmp_path / "out")
    path.write_text(path.read_text().replace("tiny", "other/model"))
    assert call("tune", path) == 2
    assert f"trains other/model. Run: xtf score {path}" in capsys.readouterr().err


def test_without_scores_the_next_step_is_named(tmp_path, capsys):
    path = recipe(tmp_path, True, tmp_path / "out")
    assert call("tune", path) == 2
    assert f"Score it first: xtf score {path}" in capsys.readouterr().err
    assert call("tune", tmp_path / "absent.parquet") == 2


def test_no_host_is_imported(two, tmp_path):
    path = saved(two[1], tmp_path / "scores.parquet")
    code = f"""
import sys
from xtf_plugin import cli
try:
    cli.main(["tune", {str(path)!r}])
finally:
    print({{"torch", "transformers", "trl", "datasets"}} & set(sys.modules))
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 0 and ended.stdout.endswith("set()\n"), ended.stderr


def test_a_million_tokens_take_seconds(two):
    """On quiet cores about ten."""
    table = table_of(two[1])
    size, times = len(table.keep), 1_000_000 // len(table.keep) + 1
    number = times * len(table.rows)
    many = replace(
        table,
        keys=np.random.default_rng(0).integers(0, 256, (number, 16), dtype=np.uint8),
        offsets=np.concatenate([[0], *(table.offsets[1:] + part * size for part in range(times))]),
        counts=np.tile(table.counts, times),
        rows=np.arange(number),
        scores={name: np.tile(values, times) for name, values in table.scores.items()},
        logprobs=None,
        **{
            name: np.tile(getattr(table, name), times)
            for name in ("token_ids", "positions", "keep", "reasons", "protected", "forced")
        },
    )
    begin = time.perf_counter()
    found = tune.settings(many, many.config)
    tune.show(found, many, "scores.parquet", Console(file=io.StringIO(), width=80))
    print(f"{time.perf_counter() - begin:.1f} s")
    assert len(found) > 5 and time.perf_counter() - begin < 60
