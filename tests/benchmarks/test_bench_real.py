"""The benchmark of real models runs on a tiny one, writes both its tables, and says what is missing."""

from __future__ import annotations

import pytest

from tests import real
from tests.benchmarks import bench_real, common
from tests.benchmarks.test_benchmarks import all_pages, parts


@pytest.mark.filterwarnings("ignore")
def test_both_tables_of_real_models_are_put_into_the_page(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(all_pages(), encoding="utf-8")
    bench_real.main(["--smoke", "--repeats", "1", "--write", str(page)])
    suffix = ", gpu" if common.device().type == "cuda" else ""
    for mark, head in (
        (f"real models{suffix}", bench_real.COST),
        (f"real models{suffix}, agreement", bench_real.AGREEMENT),
    ):
        table = [line for line in parts(page.read_text(encoding="utf-8"), mark)[1].splitlines() if line.startswith("|")]
        assert table[0] == "| " + " | ".join(head) + " |"
        assert len(table) > 3 and all("a tiny Llama" in line for line in table[2:])
    assert all("kept" in line for line in table[2:])


def test_a_real_model_that_is_missing_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(real, "MODELS", tmp_path)
    bench_real.main(["--models", real.GEMMA3])
    assert f"{common.NOT_MEASURED}: no such model here: make models" in capsys.readouterr().out
