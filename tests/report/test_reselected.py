"""Stored scores under another threshold: `xtf show` and `xtf report` decide as a run would, without a host."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import numpy as np
import pytest
import yaml

from tests import tiny
from tests.made_scores import DROPS, KN, RI
from tests.training.test_callback import masks, run
from xtf_plugin import cli
from xtf_plugin.config.block import XTFConfig
from xtf_plugin.report import reselected, score_table

OTHER = {**DROPS, KN: {"drop": {"quantile": 0.3}}, RI: {"drop": {"quantile": 0.05}}, "combine": "majority"}


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """A folder with a run of one block, and what a run with another one keeps."""
    folder = tmp_path_factory.mktemp("scored")
    model = tiny.model()
    model.config._name_or_path = "some/model"
    run(folder, DROPS, model=model)
    other, _ = run(folder / "other", OTHER, model=tiny.model())
    return folder, masks(other)


def recipe(folder, block, **more):
    path = folder / "recipe.yaml"
    data = {"model_name_or_path": "some/model", "dataset_name": "some/data", "output_dir": str(folder / "out")}
    path.write_text(yaml.safe_dump({**data, "xtf": {**block, "cache_dir": str(folder / "cache")}, **more}))
    return path


def test_the_decisions_are_those_of_a_run_with_that_block(scored):
    folder, expected = scored
    config = XTFConfig.parse({**OTHER, "cache_dir": str(folder / "cache")})
    table = reselected.select_again(folder / "out/xtf/scores.parquet", config, "some/model")
    parts = np.split(table.keep, table.offsets[1:-1])
    found = {key.tobytes(): part.tolist() for key, part in zip(table.keys, parts, strict=True)}
    assert found == expected
    before = score_table.read(folder / "out/xtf/scores.parquet")
    assert not np.array_equal(before.keep, table.keep)
    assert table.about["totals"]["kept_tokens"] == int(table.keep @ table.weights)
    assert table.about["warnings"][0] == reselected.NOTE


def test_a_score_that_the_block_has_lost(scored):
    folder, _ = scored
    config = XTFConfig.parse({"preset": "none", KN: DROPS[KN], "cache_dir": str(folder / "cache")})
    table = reselected.select_again(folder / "out/xtf/scores.parquet", config, "some/model")
    assert list(table.scores) == [KN]
    before = score_table.read(folder / "out/xtf/scores.parquet")
    assert before.keep.sum() < table.keep.sum() < table.keep.size
    with pytest.raises(SystemExit) as ended:
        cli.main(["report", str(recipe(folder, {"preset": "none", KN: DROPS[KN]}))])
    assert ended.value.code == 0


@pytest.mark.parametrize(
    ("block", "model"),
    [
        (DROPS, "some/model"),  # nothing has changed in the block: then in the data
        (OTHER, "another/model"),
        ({**OTHER, "protect": {"patterns": ["a"]}}, "some/model"),
        ({**OTHER, KN: {"scorer": "typicality", "drop": {"quantile": 0.3}}}, "some/model"),
    ],
)
def test_scores_that_do_not_serve_are_left_alone(scored, block, model):
    folder, _ = scored
    config = XTFConfig.parse({**block, "cache_dir": str(folder / "cache")})
    assert reselected.select_again(folder / "out/xtf/scores.parquet", config, model) is None


@pytest.mark.parametrize("command", [["show", "-n", "2"], ["report"]])
def test_commands_import_no_host(scored, command):
    folder, _ = scored
    path = recipe(folder, OTHER)
    code = f"""
import sys
from xtf_plugin import cli
try:
    cli.main([{command[0]!r}, {str(path)!r}, *{command[1:]!r}])
finally:
    print({{"torch", "transformers", "trl", "datasets"}} & set(sys.modules))
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 0 and ended.stdout.endswith("set()\n"), ended.stderr
    assert "selected again from the stored scores" in ended.stdout


def test_documents_are_shown_as_from_a_table(scored, capsys):
    folder, _ = scored
    path = recipe(folder, OTHER)
    with pytest.raises(SystemExit):
        cli.main(["show", str(path), "--row", "0"])
    shown = capsys.readouterr().out
    config = XTFConfig.parse({**OTHER, "cache_dir": str(folder / "cache")})
    table = reselected.select_again(folder / "out/xtf/scores.parquet", config, "some/model")
    assert f"kept {int(table.keep[: table.offsets[1]].sum())} of {table.offsets[1]}" in shown


def test_ten_thousand_rows_take_seconds(scored, tmp_path, monkeypatch):
    """Of a made table; on quiet cores it takes less than three."""
    folder, _ = scored
    table = score_table.read(folder / "out/xtf/scores.parquet")
    times, size = 10_000 // len(table.rows) + 1, len(table.keep)
    many = reselected.replace(
        table,
        keys=np.random.default_rng(0).integers(0, 256, (times * len(table.rows), 16), dtype=np.uint8),
        offsets=np.concatenate([[0], *(table.offsets[1:] + part * size for part in range(times))]),
        counts=np.tile(table.counts, times),
        rows=np.arange(times * len(table.rows)),
        scores={name: np.tile(values, times) for name, values in table.scores.items()},
        logprobs=None,
        **{
            name: np.tile(getattr(table, name), times)
            for name in ("token_ids", "positions", "keep", "reasons", "protected", "forced")
        },
    )
    monkeypatch.setattr(score_table, "read", lambda path: many)
    config = XTFConfig.parse({**OTHER, "cache_dir": str(folder / "cache")})
    begin = time.perf_counter()
    found = reselected.select_again(tmp_path, config, "some/model")
    assert len(list(reselected.documents(found))) >= 10_000
    assert time.perf_counter() - begin < 30
    json.dumps(found.about)
