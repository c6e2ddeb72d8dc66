"""The benchmarks run: tiny sizes on whatever device there is, tables as they would be put into a page, no figure."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tests.benchmarks import (
    bench_authors,
    bench_gpu,
    bench_padding,
    bench_reference,
    bench_run,
    bench_step,
    common,
    cost,
)
from tests.benchmarks.bench_scoring import make_documents, make_model


def words(name: str, tmp_path) -> list[str]:
    folder = ["--folder", str(tmp_path / "bases")] if name == "bench_reference" else []
    return ["--smoke", "--repeats", "1", *folder]


@pytest.mark.parametrize(
    "program",
    [bench_authors, bench_gpu, bench_padding, bench_reference, bench_run, bench_step],
    ids=lambda m: m.__name__,
)
def test_a_table_is_printed_and_put_into_a_page(program, tmp_path, capsys):
    name = program.__name__.split(".")[-1]
    page = tmp_path / "page.md"
    page.write_text(f"Before.\n<!-- {name} -->old<!-- /{name} -->\nAfter.\n")
    program.main([*words(name, tmp_path), "--write", str(page)])
    text = page.read_text()
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert table[0] == "| " + " | ".join(program.HEAD) + " |"
    assert len(table) > 3 and len({line.count("|") for line in table}) == 1, "rows of unlike length"
    assert table[-1] in capsys.readouterr().out
    assert text.startswith("Before.") and text.endswith("After.\n") and "old" not in text
    assert "failed: " not in text and "commit " in text


@pytest.mark.skipif(common.device().type == "cuda", reason="has a GPU")
def test_without_a_gpu_nothing_is_said_to_be_measured(capsys):
    bench_gpu.main([])
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")][2:]
    assert len(table) == len(bench_gpu.SECTIONS)
    assert all("not measured yet: no CUDA device" in line for line in table)


@pytest.mark.filterwarnings("ignore")
def test_a_section_that_fails_or_takes_too_long_leaves_the_others(monkeypatch):
    def broken(*_):
        raise RuntimeError("CUDA out of memory")

    def endless(*_):
        while True:
            math.sqrt(2)

    def fine(*_):
        return [["c", "fine", "1", "1", "1"]]

    monkeypatch.setattr(bench_gpu, "SECTIONS", {"a": (broken, 1), "b": (endless, 0.1), "c": (fine, 1)})
    assert [row[1] for row in bench_gpu.measure(bench_gpu.SMOKE, 1, 1.0)] == [
        "failed: CUDA out of memory",
        "failed: stopped after 0 s",
        "fine",
    ]


def test_the_authors_score_of_attention_says_nothing():
    """Each softmax row sums to 1, so its mean over keys is one over the length."""
    model, documents = make_model("tiny", "fp32"), make_documents((2, 20, 30))
    for index, scores in enumerate(bench_authors.attention_pass(model, documents)):
        np.testing.assert_allclose(scores, 1 / documents.lengths[index], rtol=1e-4)
    assert model.config._attn_implementation != "eager"


def test_the_authors_probabilities_are_ours():
    from tests.test_scorer import run

    model, documents = make_model("tiny", "fp32"), make_documents((3, 20, 30))
    found, _ = run(documents, model, ())
    for index, probabilities in enumerate(bench_authors.probability_pass(model, documents)):
        _, completion = documents.document(index)
        ours = np.exp(found[documents.keys[index].tobytes()].logprobs)
        np.testing.assert_allclose(ours, probabilities[completion[1:]], rtol=1e-3)


def test_jaccard_and_the_lowest_tenth():
    one, other = np.array([True, True, False, False]), np.array([True, False, True, False])
    assert bench_reference.jaccard(one, other) == pytest.approx(1 / 3)
    assert math.isnan(bench_reference.jaccard(~one & one, ~one & one))
    scores = np.arange(20, dtype=np.float32)
    scores[0] = np.nan
    assert np.flatnonzero(bench_reference.lowest(scores)).tolist() == [1, 2]


def test_medians_of_procedures_in_turn():
    calls = []
    procedures = {name: (lambda name=name: calls.append(name)) for name in "ab"}
    assert set(common.in_turn(procedures, 2)) == {"a", "b"}
    assert calls == ["a", "b"] * 3
    assert common.in_turn({"a": lambda: None}, 5, until=0.0)["a"] >= 0


class TestArithmetic:
    shape = cost.SHAPES[1]  # 8B

    def test_weights_are_those_of_the_model(self):
        for shape, billions in zip(cost.SHAPES, (1.24, 8.03, 70.6), strict=True):
            assert (shape.P + shape.embeddings) / 1e9 == pytest.approx(billions, rel=0.01)

    def test_attention_received_is_half_of_a_layers_attention(self):
        T = 2_048
        whole = self.shape.forward_flops(T) - 2 * self.shape.P
        assert self.shape.received_flops(T, self.shape.L) == pytest.approx(whole / 2)
        assert self.shape.seen(T) == self.shape.D * T  # a head's size times heads is the hidden size here

    def test_tables_are_printed_and_written(self, tmp_path, capsys):
        page = tmp_path / "page.md"
        page.write_text("<!-- cost --><!-- /cost -->")
        cost.main(["--flops", "1e14", "--write", str(page)])
        assert capsys.readouterr().out.count("computed, not measured") == 3
        assert "70B" in page.read_text()
