"""Streamed recipes through the stock commands: 4-bit QLoRA with dropout, one dataset and a mixture."""

from __future__ import annotations

import json

import pyarrow.parquet as pq
import pytest

from tests import tiny
from tests.hosts.test_end_to_end import BIN, command, history, recipe, steps
from tests.made_scores import odd_sentences

NOTHING = {"preset": "none", "selectors": {"odd": {"scorer": "typicality", "drop": {"below": -1000}}}, "calibration": 8}
LOOSE = {**odd_sentences(), "calibration": 8, "batch_tokens": 64}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny.save_base(folder / "model")
    tiny.save_rows(folder / "data/train.jsonl", tiny.problems(24))
    tiny.save_rows(folder / "data/test.jsonl", tiny.problems(8, seed=5))
    return folder


@pytest.fixture(scope="module")
def runs(base, tmp_path_factory):
    """Plain streamed SFT, XTF that drops nothing, XTF that drops, and the same over a mixture, through `trl sft`."""
    folder = tmp_path_factory.mktemp("runs")
    one = {"dataset_streaming": True, "eval_strategy": "steps", "eval_steps": 3}
    mixture = {"datasets": [{"path": str(base / "data"), "split": "train"}], "streaming": True, "dataset_name": None}
    variants = {
        "plain": one,
        "nothing": {**one, "xtf": {**NOTHING, "batch_tokens": 64}},
        "drops": {**one, "xtf": LOOSE},
        "mixture": {**mixture, "xtf": LOOSE},
    }
    for name, changes in variants.items():
        path = recipe(base, folder / name, **changes)
        result = command(BIN / "trl", "sft", "--config", path, cache=folder / "cache")
        assert result.returncode == 0, result.stderr[-3000:]
        (folder / f"{name}.err").write_text(result.stderr)
    return folder


def test_a_stream_that_drops_nothing_trains_to_the_same_bits(runs):
    assert steps(runs / "nothing") == steps(runs / "plain") and len(steps(runs / "plain")) == 3
    assert "scored 16 of them ahead of training" in (runs / "nothing.err").read_text()


def test_a_stream_that_drops_changes_training_but_not_evaluation(runs):
    assert steps(runs / "drops") != steps(runs / "plain")
    first = [
        next(entry["eval_loss"] for entry in history(runs / n) if "eval_loss" in entry) for n in ("plain", "nothing")
    ]
    assert first[0] == first[1]
    facts = json.loads((runs / "drops/xtf/summary.json").read_text())
    assert facts["streaming"] == {"calibration": 8, "documents": 8, "rows": 8, "whole_stream": False}
    assert facts["reference"]["quantization"] == "nf4/fp4" and facts["totals"]["documents"] == 8
    assert 0 < history(runs / "drops")[0]["xtf/dropped_by/odd"] < 1


def test_a_mixture_of_streams(runs):
    assert steps(runs / "mixture") == steps(runs / "drops")


def test_score_ends_with_the_sample(base, tmp_path):
    path = recipe(base, tmp_path / "out", dataset_streaming=True, xtf=LOOSE)
    output = tmp_path / "scores.parquet"
    result = command(BIN / "xtf", "score", path, "--output", output, cache=tmp_path / "cache")
    assert result.returncode == 0, result.stderr[-3000:]
    assert "calibration sample: the first 8 documents of the stream" in result.stderr
    assert set(pq.read_table(output).column("row").to_pylist()) == set(range(8))
    assert not list((tmp_path / "out").glob("checkpoint*"))


def test_check_reports_the_stream_and_refuses_what_cannot_be_streamed(base, tmp_path):
    path = recipe(base, tmp_path / "out", dataset_streaming=True, xtf=LOOSE)
    result = command(BIN / "xtf", "check", path, cache=tmp_path / "cache")
    assert result.returncode == 0 and "streamed; its first 8 documents calibrate" in result.stdout
    other = {"scorer": "typicality", "reference": {"model": "some/model"}, "drop": {"below": -5}}
    for changes, message in (
        ({"xtf": LOOSE, "dataloader_num_workers": 2}, "dataloader_num_workers is 2"),
        ({"xtf": {"selectors": {"mine": other}}}, "mine has a reference of its own"),
        ({"xtf": {"knowledge_novelty": other}}, "knowledge_novelty has a reference of its own"),
    ):
        path = recipe(base, tmp_path / "out", dataset_streaming=True, **changes)
        result = command(BIN / "xtf", "check", path, cache=tmp_path / "cache")
        assert result.returncode == 2 and message in result.stderr
    path = recipe(base, tmp_path / "out", xtf=LOOSE, dataloader_num_workers=2)
    assert "streamed" not in command(BIN / "xtf", "check", path, cache=tmp_path / "cache").stdout
