"""What the laboratory prints: tables that say what their numbers are, pictures, and no mixture of two laboratories."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

from tests.benchmarks.proof import __main__ as laboratory
from tests.benchmarks.proof import arms, comparison, folders, plan, plots, runs, stats
from tests.benchmarks.proof.tables import accuracy_table

SMOKE_BASE, SMOKE = laboratory.SCALES["smoke"]


class TestFolders:
    def test_more_seeds_or_workers_go_on_in_the_same_folder(self, tmp_path):
        folders.claim(tmp_path, SMOKE, SMOKE_BASE)
        folders.claim(tmp_path, replace(SMOKE, seeds=9, workers=7), SMOKE_BASE)

    def test_other_settings_are_refused_and_named(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(laboratory, "quiet", lambda: None)  # it would silence other tests' warnings
        command = ["--folder", str(tmp_path), "--only", "tables", "--scale"]
        laboratory.main([*command, "smoke"])
        before = (tmp_path / "scale.json").read_text()
        with pytest.raises(SystemExit):
            laboratory.main([*command, "cpu"])
        told = capsys.readouterr().err
        assert "rows is 24 there, 400 here" in told and "base.hidden is 64 there, 128 here" in told
        _, error = told.split("error: ")
        assert "epochs" not in error and "seeds" not in error and "--folder" in error and "delete" in error
        assert (tmp_path / "scale.json").read_text() == before

    def test_other_texts_are_refused(self, tmp_path, monkeypatch):
        sources = tmp_path / "sources"
        sources.mkdir()
        for name in folders.GENERATORS:
            (sources / name).write_bytes((Path(folders.__file__).parent / name).read_bytes())
        assert folders.texts(sources) == folders.texts()
        (sources / "noise.py").write_text("KINDS = ()")
        changed = folders.texts(sources)
        folders.claim(tmp_path / "results", SMOKE, SMOKE_BASE)
        monkeypatch.setattr(folders, "texts", lambda: changed)
        with pytest.raises(ValueError, match=f"texts is .* there, {changed} here"):
            folders.claim(tmp_path / "results", SMOKE, SMOKE_BASE)


def outcomes(seeds, **values):
    """Results of the main table's arms: per arm its accuracy on each seed of `seeds[arm]`."""
    found = {}
    for arm, own in seeds.items():
        for seed in own:
            share = values.get(arm, 0.5) + 0.01 * seed
            kinds = {"step": 0.1, "eos": 0.0, "junk/varying/span": 0.9, "junk/varying/single": 0.2}
            result = {"accuracy": share, "sampled": share / 2, "truncated": 0.25 * (arm == "paper"), "kept": 0.6}
            job = runs.Job("arms", plan.MAIN, arm, seed, plan.MAIN_RATE, plan.MAIN)
            found[job.key] = {**result, "dropped_by_kind": kinds}
    return found


class TestTables:
    JOBS = plan.jobs(["arms"], 4)

    def test_all_rows_have_the_seeds_that_all_arms_have(self):
        found = comparison.compare(self.JOBS, outcomes({"plain": range(4), "paper": range(1, 4), "oracle": range(3)}))
        assert found.seeds == (1, 2) and all(list(one.by_seed) == [1, 2] for one in found.outcomes)

    def test_rows_keep_their_own_seeds_where_two_are_not_shared(self):
        results = outcomes({"plain": range(3), "paper": [1, 2], "oracle": [2, 3]})
        found = comparison.compare(self.JOBS, results)
        assert found.seeds is None
        assert [sorted(one.by_seed) for one in found.outcomes] == [[0, 1, 2], [1, 2], [2, 3]]
        assert "0, 1, 2 in plain SFT; 1, 2 in paper; 2, 3 in oracle: exactly the planted noise" in accuracy_table(
            "Title", self.JOBS, results
        )

    def test_p_values_are_corrected_over_both_metrics_and_all_arms(self):
        results = outcomes({"plain": range(3), "paper": range(3), "oracle": range(3)})
        rng = random.Random(0)
        results = {k: {**r, "accuracy": rng.random(), "sampled": rng.random()} for k, r in results.items()}
        found = comparison.compare(self.JOBS, results)
        plain, *others = found.outcomes
        raw = [
            stats.paired(*([100 * one.by_seed[seed][metric] for seed in range(3)] for one in (other, plain)))[2]
            for other in others
            for metric in comparison.METRICS
        ]
        assert [d.p for other in others for d in other.differences.values()] == stats.holm(raw) != raw
        assert found.tests == 4 and not plain.differences

    def test_a_table_says_what_its_numbers_are(self):
        text = accuracy_table("Title", self.JOBS, outcomes(dict.fromkeys(("plain", "paper"), range(2))))
        assert "Every row has the seeds 0, 1." in text
        assert "at most 25.0%, of paper." in text
        assert "No greedy completion" in accuracy_table("Title", self.JOBS, outcomes({"plain": range(2)}))


def test_pictures_are_reproducible_and_show_every_arm_and_family(tmp_path):
    rule = {"spans": 0.8, "good_lost": 0.1}
    rules = {"default": rule, "KN, P < 0.05": rule}
    rules |= {
        f"{name} below {x}": {"spans": 0.1 * x + 1, "good_lost": 0.1} for name in ("a, line,", "b") for x in (-5, -3.5)
    }
    setting = {"world": "sums", "base": "sums", "quantization": None, "rate": plan.MAIN_RATE, "rules": rules}
    assert {k: [x for x, _ in v] for k, v in plots.sweeps(rules).items()} == {"a, line": [-5, -3.5], "b": [-5, -3.5]}
    (tmp_path / "detection.json").write_text(json.dumps([setting]))
    lines = [{"key": k, "result": r} for k, r in outcomes(dict.fromkeys(arms.ARMS, range(2)), paper=0.2).items()]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    first, second = (plots.write(tmp_path, tmp_path / name, SMOKE) for name in ("one", "two"))
    assert [path.name for path in first] == ["sensitivity.svg", "differences.svg", "rates.svg"]
    sensitivity, differences, rates = (path.read_text() for path in first)
    assert [sensitivity, differences, rates] == [path.read_text() for path in second]
    assert not any("<dc:date>" in text for text in (sensitivity, differences, rates))
    assert all(f"<!-- {text} -->" in sensitivity for text in ("a, line", "b", "default", "\u22123.5"))
    assert all(f"<!-- {comparison.label(arm)} -->" in differences for arm in arms.ARMS if arm != "plain")
    assert "<!-- plain SFT -->" in rates and "<!-- paper -->" not in rates
