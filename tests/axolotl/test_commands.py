"""`xtf` on recipes of Axolotl, and `axolotl xtf`: what they start, print and write."""

from __future__ import annotations

import json

import pyarrow.parquet as pq
import pytest

from tests.axolotl import stock
from xtf_plugin.hosts.recipes import load_recipe
from xtf_plugin.hosts.row_settings import differing, row_settings

pytestmark = pytest.mark.xdist_group("chat")


@pytest.fixture(scope="module")
def scored(base, tmp_path_factory):
    """A recipe that `xtf score` has run, and what the command printed."""
    folder = tmp_path_factory.mktemp("scored")
    path = stock.write(base, folder / "out")
    result = stock.command(stock.BIN / "xtf", "score", path, "--", *stock.ONE, cache=folder / "cache")
    assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]
    return path, result


@pytest.mark.parametrize("words", [("xtf",), ("axolotl", "xtf")])
def test_check_names_host_and_version(base, tmp_path, words):
    path = stock.write(base, tmp_path / "out")
    result = stock.command(stock.BIN / words[0], *words[1:], "check", path, cache=tmp_path / "cache")
    assert result.returncode == 0, result.stderr[-3000:]
    assert "axolotl (axolotl train)" in result.stdout and "axolotl 0.19.0" in result.stdout


@pytest.mark.parametrize("words", [("xtf",), ("axolotl", "xtf")])
def test_check_refuses_with_2(base, tmp_path, words):
    path = stock.write(base, tmp_path / "out", plugins=...)
    result = stock.command(stock.BIN / words[0], *words[1:], "check", path, cache=tmp_path / "cache")
    assert result.returncode == 2 and f"plugins: [{stock.PLUGIN}]" in result.stderr


def test_axolotl_lists_the_command_and_hands_on_its_options(tmp_path):
    help_text = stock.command(stock.BIN / "axolotl", "--help", cache=tmp_path).stdout
    assert any(line.split()[:1] == ["xtf"] for line in help_text.splitlines())
    assert "xtf-plugin 0." in stock.command(stock.BIN / "axolotl", "xtf", "--version", cache=tmp_path).stdout
    assert "--schema" in stock.command(stock.BIN / "axolotl", "xtf", "check", "--help", cache=tmp_path).stdout


def test_score_ends_before_training_and_training_scores_nothing_again(base, plain, scored, tmp_path):
    path, result = scored
    out = path.parent / "out"
    assert "scores.parquet" in result.stdout and (out / "xtf/summary.json").exists()
    assert not list(out.glob("checkpoint*")) and not list(out.glob("adapter*"))
    stock.train(path, out, path.parent / "cache")
    assert json.loads((out / "xtf/summary.json").read_text())["scoring"]["scored_documents"] == 0
    assert dict(stock.seen(out)) == dict(stock.seen(plain("chat")))


def test_show_and_report_read_what_the_run_left(scored):
    path, _ = scored
    about = json.loads((path.parent / "out/xtf/summary.json").read_text())["recipe"]
    assert "base_model" in about and differing(about, row_settings(load_recipe(path).data)) == []
    show = stock.command(stock.BIN / "xtf", "show", path, "-n", "2", cache=path.parent / "cache")
    assert show.returncode == 0 and "|RI" in show.stdout and show.stdout.count("row ") == 2
    report = stock.command(stock.BIN / "axolotl", "xtf", "report", path, cache=path.parent / "cache")
    assert report.returncode == 0 and f"{stock.ROWS} documents" in report.stdout


def test_a_dry_run_of_the_block_ends_with_0(base, tmp_path):
    out = tmp_path / "out"
    result = stock.train(stock.write(base, out, xtf={**stock.DROPS, "dry_run": True}), out, tmp_path / "cache")
    assert not stock.seen_path(out).with_name("out.seen.0").exists()
    assert pq.read_table(out / "xtf/scores.parquet").num_rows > 0
    assert "Traceback" not in result.stderr and not list(out.glob("adapter*"))


def test_the_table_is_in_dataset_order_whatever_the_packing(base, plain, tmp_path):
    out = tmp_path / "out"
    packed = {"sample_packing": True, "pad_to_sequence_len": True, "micro_batch_size": 1}
    path = stock.write(base, out, **packed)
    result = stock.command(stock.BIN / "axolotl", "xtf", "score", path, "--", *stock.ONE, cache=tmp_path / "cache")
    assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]
    tables = [pq.read_table(folder / "xtf/scores.parquet") for folder in (out, plain("chat"))]
    for name in ("row", "document", "position", "token_id", "kept", "reason"):
        assert tables[0][name].to_pylist() == tables[1][name].to_pylist()
