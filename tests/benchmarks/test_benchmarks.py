"""The benchmarks run: tiny sizes on whatever device there is, tables as they would be put into a page, no figure."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from tests import real
from tests.benchmarks import (
    bench_authors,
    bench_compile,
    bench_gpu,
    bench_overheads,
    bench_padding,
    bench_profile,
    bench_run,
    bench_scale,
    bench_scoring,
    bench_selection,
    bench_splices,
    bench_start,
    bench_step,
    bench_streaming,
    bench_verification,
    common,
    cost,
    gpu_parts,
    reach,
)
from tests.benchmarks.bench_scoring import make_documents, make_model
from tests.gpu.parts import PARTS, Settings
from tests.reliability import LONG

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs/benchmarks"
MARKS = {  # of the programs that have a `--smoke`
    bench_authors: "bench_authors",
    bench_compile: "compile",
    bench_gpu: "bench_gpu",
    bench_overheads: "overheads",
    bench_padding: "bench_padding",
    bench_profile: "profile",
    bench_run: "bench_run",
    bench_scale: "scale",
    bench_scoring: "scoring 30M",
    bench_selection: "selection",
    bench_splices: "splices",
    bench_start: "start",
    bench_step: "bench_step",
    bench_streaming: "streaming",
    bench_verification: "verification",
}
REAL = {"real models", "real models, agreement"}
OTHER_MARKS = {
    "agreement",
    "profile_gpu",
    "reach",
    "scoring 150M",
    "gpu sft",
    *REAL,
    *(mark.replace("models", "models, gpu", 1) for mark in REAL),
}


def all_pages() -> str:
    """The text of all pages of benchmarks, whose marks are written into."""
    return "\n".join(page.read_text(encoding="utf-8") for page in sorted(PAGES.glob("*.md")))


def parts(text: str, mark: str) -> tuple[str, str, str]:
    """What stands before, between and behind the marks of a page."""
    before, begin, rest = text.partition(f"<!-- {mark} -->")
    inside, end, after = rest.partition(f"<!-- /{mark} -->")
    assert begin and end, f"no marks {mark}"
    return before, inside, after


@pytest.mark.skipif(not LONG, reason="a laboratory; `make test-long` runs it")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("program", MARKS, ids=lambda m: m.__name__.split(".")[-1])
def test_a_table_is_printed_and_put_into_the_page(program, tmp_path, capsys):
    page, mark = tmp_path / "page.md", MARKS[program]
    page.write_text(all_pages(), encoding="utf-8")
    before, old, after = parts(page.read_text(encoding="utf-8"), mark)
    program.main(["--smoke", "--repeats", "1", "--write", str(page)])
    found = parts(page.read_text(encoding="utf-8"), mark)
    assert (found[0], found[2]) == (before, after), "written outside of the marks"
    assert found[1] != old and "commit " in found[1] and "failed: " not in found[1]
    table = [line for line in found[1].splitlines() if line.startswith("|")]
    assert table[0] == "| " + " | ".join(program.HEAD) + " |"
    assert len(table) > 3 and len({line.count("|") for line in table}) == 1, "rows of unlike length"
    assert all(line in capsys.readouterr().out for line in table[-1:])


def test_every_mark_of_the_page_has_a_program_and_every_program_a_make_target():
    marks = re.findall(r"<!-- ([^/].*?) -->", all_pages())
    assert sorted(marks) == sorted([*MARKS.values(), *OTHER_MARKS])
    named = "".join(
        subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for target in ("bench", "bench-long")
    )
    on_a_gpu = Settings(Path("out"), Path("scratch"), Path("docs/benchmarks"), smoke=False)
    named += "\n".join(" ".join(part.command(on_a_gpu, 60.0)) for part in PARTS)  # what `make gpu` runs
    commands = [line for line in named.splitlines() if re.search(r"-m tests\.benchmarks\.(?!proof)", line)]
    run = {re.search(r"tests\.benchmarks\.(\w+)", line)[1] for line in commands}
    assert run == {program.__name__.split(".")[-1] for program in MARKS} | {"agreement", "bench_real", "cost", "reach"}
    assert all("--write docs/" in line for line in commands)


@pytest.mark.parametrize("program", [one for one in MARKS if "reach" in one.HEAD[-1]], ids=lambda m: m.__name__)
def test_what_stands_against_a_figure_is_repeated_five_times(program, monkeypatch):
    class Told(Exception):
        pass

    def tell(*given, **options):
        raise Told(common.arguments(*given, **options).parse_args([]).repeats)

    monkeypatch.setattr(program, "arguments", tell)
    with pytest.raises(Told, match="^5$"):
        program.main([])


class TestReach:
    def test_a_value_is_compared_as_it_was_measured(self):
        assert reach.Reach("1.00").judge(1.0) == "≤ 1.00: kept"
        assert reach.Reach("1.00").judge(1.0001) == "≤ 1.00: missed"
        assert reach.Reach("2", " %").judge(0.019) == "≤ 2 %: kept"
        assert reach.Reach("2", " %").judge(0.021) == "≤ 2 %: missed"
        assert reach.Reach("20", at_most=False).judge(19.9) == "≥ 20: missed"
        assert reach.Reach("20", at_most=False).judge(float("nan")) == "≥ 20: missed"

    def test_long_documents_on_a_gpu_have_a_figure_of_their_own(self):
        assert str(reach.scoring(True, reach.CUDA, 2_048)) == "≤ 1.15"
        assert str(reach.scoring(True, reach.CUDA, 8_192)) == "≤ 1.30"
        assert str(reach.scoring(True, reach.FP32, 8_192)) == "≤ 1.05"
        assert str(reach.scoring(False, reach.CUDA, 8_192)) == "≤ 1.05"

    def test_the_page_has_the_figures_of_the_programs(self, tmp_path):
        shutil.copytree(PAGES, tmp_path / "pages")
        reach.main(["--write", str(tmp_path / "pages")])
        for page in PAGES.glob("*.md"):
            assert (tmp_path / "pages" / page.name).read_text(encoding="utf-8") == page.read_text(encoding="utf-8")

    def test_a_folder_in_which_no_page_has_the_marks_is_refused(self, tmp_path):
        (tmp_path / "page.md").write_text("<!-- another -->\n<!-- /another -->\n", encoding="utf-8")
        with pytest.raises(ValueError, match="no page in .* has a line <!-- reach -->"):
            reach.main(["--write", str(tmp_path)])


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
        yield ["b", "the first row", "1", "1", "1"]
        while True:
            math.sqrt(2)

    def fine(*_):
        return iter([["c", "fine", "1", "1", "1"]])

    monkeypatch.setattr(bench_gpu, "SECTIONS", {"a": (broken, 1), "b": (endless, 0.1), "c": (fine, 1)})
    assert [row[1] for row in bench_gpu.measure(gpu_parts.SMOKE, 1, 1.0)] == [
        "failed: CUDA out of memory",
        "the first row",
        "failed: stopped after 0 s",
        "fine",
    ]


def test_sections_that_are_left_when_the_time_is_up_are_not_measured(monkeypatch):
    begun = []

    def endless(*_):
        begun.append(1)
        while True:
            math.sqrt(2)
        yield []

    monkeypatch.setattr(bench_gpu, "SECTIONS", {name: (endless, 0.9) for name in "abc"})
    begin = time.perf_counter()
    rows = bench_gpu.measure(gpu_parts.SMOKE, 1, 0.5)
    assert time.perf_counter() - begin < 2
    assert [row[1] for row in rows] == ["failed: stopped after 0 s"] * 2 + ["not measured: out of time"]
    assert len(begun) == 2


class TestProfile:
    def test_the_parts_of_a_pass_are_told_apart(self):
        model, documents = make_model("tiny", "fp32"), make_documents((4, 60, 90))
        for name, sums in ((bench_scoring.FLOOR, False), (bench_scoring.ALL, True)):
            run = bench_profile.partial(bench_scoring.PROCEDURES[name], model, documents)
            whole, taken = bench_profile.parts(run, 1, False)
            assert sum(taken.values()) == pytest.approx(whole)
            assert min(taken.values()) >= 0 and taken[bench_profile.REST] < whole
            kinds = (bench_profile.PRODUCTS, bench_profile.ATTENTION, bench_profile.ELEMENTWISE, bench_profile.COPIES)
            assert all(taken[kind] > 0 for kind in kinds)
            assert (taken[bench_profile.SUMS] > 0) is sums

    @pytest.mark.parametrize(
        ("name", "kind"),
        [
            ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NNT", bench_profile.PRODUCTS),
            ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", bench_profile.PRODUCTS),
            ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 128, 4>>", bench_profile.ATTENTION),
            ("_received", bench_profile.ATTENTION),
            ("_row_moments", bench_profile.SUMS),
            ("void at::native::vectorized_elementwise_kernel<4, at::native::silu_kernel>", bench_profile.ELEMENTWISE),
            ("void at::native::reduce_kernel<512, 1, at::native::MeanOps>", bench_profile.ELEMENTWISE),
            ("void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda>", bench_profile.COPIES),
            ("Memcpy DtoH (Device -> Pinned)", bench_profile.COPIES),
            ("something new", bench_profile.REST),
        ],
    )
    def test_kernels_of_a_gpu_are_told_apart_by_name(self, name, kind):
        assert bench_profile.kind_of_kernel(name) == kind


class TestMemory:
    def test_the_peak_is_what_is_held_at_once_and_given_back(self):
        size = 64 * 2**20

        def run():
            for _ in range(3):
                held = np.ones(size, dtype=np.uint8)
                assert held[-1] == 1
                del held

        assert common.peaks(run, 3) == pytest.approx([size / 1e6] * 3, abs=8)


def test_the_authors_score_of_attention_says_nothing():
    """Each softmax row sums to 1, so its mean over keys is one over the length."""
    model, documents = make_model("tiny", "fp32"), make_documents((2, 20, 30))
    for index, scores in enumerate(bench_authors.attention_pass(model, documents)):
        np.testing.assert_allclose(scores, 1 / documents.lengths[index], rtol=1e-4)
    assert model.config._attn_implementation != "eager"


def test_the_authors_probabilities_are_ours():
    from tests.scoring.test_engine import run

    model, documents = make_model("tiny", "fp32"), make_documents((3, 20, 30))
    found, _ = run(documents, model, ())
    for index, probabilities in enumerate(bench_authors.probability_pass(model, documents)):
        _, completion = documents.document(index)
        ours = np.exp(found[documents.keys[index].tobytes()].logprobs)
        np.testing.assert_allclose(ours, probabilities[completion[1:]], rtol=1e-3)


@real.needs(real.SMOLLM2)
def test_a_whole_run_is_of_a_real_model_on_text_with_noise(tmp_path):
    bench_run.save_model(tmp_path)
    assert (tmp_path / "model/tokenizer.json").is_file() and (tmp_path / "model/model.safetensors").is_file()
    rows = bench_run.demo_rows(real.tokenizer(real.SMOLLM2), 16)
    noise = [row.noise for row in bench_run.prepare().make_rows(0)[0][:16]]
    assert len(rows) == 16 and 0 < sum(map(bool, noise)) < 16


@pytest.mark.filterwarnings("ignore")
def test_both_forms_of_the_defaults_scores_agree_and_the_fast_one_reads_less():
    given = bench_splices.tiny_given(6)
    found = bench_splices.measure(given, 1)
    once, *others = bench_splices.rows_of(found)
    assert int(once[2].replace(",", "")) == given.documents.lengths.sum() and len(others) == 2 * len(
        bench_splices.SCORES
    )
    for name, row in zip(bench_splices.SCORES, others[1::2], strict=True):
        naive, fast = (found[name, form] for form in (bench_splices.NAIVE, bench_splices.FAST))
        np.testing.assert_allclose(fast.values, naive.values, atol=2e-4)
        assert np.isfinite(fast.values).any() and row[:2] == [name, bench_splices.FAST]
        if name == "new_text":
            assert naive.tokens == fast.tokens == 0
        else:
            assert naive.tokens > fast.tokens > given.documents.lengths.sum()
            assert float(row[3]) == pytest.approx(fast.tokens / naive.tokens, abs=1e-3)


def test_medians_of_procedures_in_turn():
    calls = []
    procedures = {name: (lambda name=name: calls.append(name)) for name in "ab"}
    assert set(common.in_turn(procedures, 2)) == {"a", "b"}
    assert calls == ["a", "b"] * 3
    naps = iter((0.0, 0.02, 0.001, 0.06))  # the first warms up
    found = common.in_turn({"a": lambda: time.sleep(next(naps))}, 3)
    assert 0.02 <= found["a"] < 0.06


def test_no_round_begins_when_time_is_up_but_the_first():
    calls = []
    procedures = {name: (lambda name=name: calls.append(name)) for name in "ab"}
    assert {name: len(times) for name, times in common.rounds(procedures, 5, until=0.0).items()} == {"a": 1, "b": 1}
    assert calls == ["a", "b"] * 2


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
