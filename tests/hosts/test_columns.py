"""A column of marks through the stock commands: `trl sft --config` with and without packing, and `xtf show`."""

from __future__ import annotations

import pyarrow.parquet as pq
import pytest

from tests import tiny
from tests.hosts.test_end_to_end import BIN, command, recipe
from tests.training.test_columns import CRITIC, NOISE, problems

SMALL = {"load_in_4bit": None, "use_peft": None, "max_steps": 2, "save_strategy": "no", "save_steps": None}
PACKED = {"packing": True, "packing_strategy": "bfd", "max_length": 200}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny.save_base(folder / "model")
    tiny.save_rows(folder / "data/train.jsonl", problems(24))
    wrong = problems(24)
    wrong[5]["noise"] = [[0, 4], [90, 95]]
    tiny.save_rows(folder / "wrong/train.jsonl", wrong)
    return folder


def sft(base, out, **changes):
    path = recipe(base, out, xtf=CRITIC, **SMALL, **changes)
    return path, command(BIN / "trl", "sft", "--config", path, cache=out.parent / "cache")


@pytest.mark.parametrize("options", [{}, PACKED], ids=["rows", "packed"])
def test_marked_text_is_dropped_and_shown(base, tmp_path, options):
    path, result = sft(base, tmp_path / "out", **options)
    assert result.returncode == 0, result.stderr[-3000:]
    table = pq.read_table(tmp_path / "out/xtf/scores.parquet").to_pandas()
    texts = table[~table.kept].groupby("document").token.apply("".join)
    assert texts.tolist() == [f" {NOISE}"] * 12 and set(table[~table.kept].reason) == {"critic"}
    assert ((table.row.max() + 1) == 24) == (not options)
    shown = command(BIN / "xtf", "show", path, "--reason", "critic", "-n", "1", cache=tmp_path / "cache")
    assert shown.returncode == 0 and "critic" in shown.stdout and "happy" in shown.stdout, shown.stderr[-2000:]


@pytest.mark.parametrize("options", [{}, PACKED], ids=["rows", "packed"])
def test_a_mark_that_does_not_fit_is_refused_by_row(base, tmp_path, options):
    path = recipe(base, tmp_path / "out", xtf=CRITIC, dataset_name=str(base / "wrong"), **SMALL, **options)
    result = command(BIN / "xtf", "score", path, cache=tmp_path / "cache")
    assert result.returncode == 1  # the launcher's code
    assert "xtf: error: row 5 of the training data, column noise: the span [90, 95] does not fit" in result.stderr
    assert result.stderr.count("Traceback") == 1 and not (tmp_path / "out/xtf").exists()  # the launcher's, too
