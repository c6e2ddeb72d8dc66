"""The `xtf` command on Axolotl recipes: what it says, refuses and starts. Axolotl itself is in tests/axolotl."""

from __future__ import annotations

import os

import pytest

from tests.cli.test_cli import calm_environment, host, write, xtf  # noqa: F401 (fixtures)
from tests.report.tables import plan_of, saved
from xtf_plugin import environment
from xtf_plugin.hosts import recipes

PLUGIN = "xtf_plugin.XTFPlugin"
AXOLOTL = {"model_name_or_path": ..., "base_model": "some/model", "plugins": [PLUGIN]}
AXOLOTL |= {"dataset_name": ..., "datasets": [{"path": "some/data", "type": "chat_template"}]}  # on the hub


@pytest.fixture
def installed(monkeypatch):
    """An environment with Axolotl in it, as far as versions tell."""
    own = environment.installed_version
    monkeypatch.setattr(environment, "installed_version", lambda name: "0.19.0" if name == "axolotl" else own(name))


def test_check_says_what_will_happen(xtf, write, installed):
    code, out, _ = xtf("check", write(**AXOLOTL, xtf={"preset": "paper"}))
    assert code == 0
    for expected in ("axolotl (axolotl train)", "axolotl 0.19.0", "installed and on", "paper", "scores.parquet"):
        assert expected in out


@pytest.mark.parametrize(
    "data, message",
    [
        ({"plugins": ...}, f"Add this line to the recipe: plugins: [{PLUGIN}]"),
        ({"plugins": ["other.Plugin"]}, f"plugins: [other.Plugin, {PLUGIN}]"),
        ({"plugins": PLUGIN}, "must be a list"),
        ({"xtf": None}, "block is empty"),
        ({"xtf": ..., "XTF": True}, "Did you mean `xtf:`"),
        ({"xtf": ...}, "has no `xtf:` block"),
        ({"xtf": False}, "turns XTF off"),
        ({"xtf": {"min_kpet": 1}}, "min_kept"),
        ({"rl": "dpo"}, "`rl: dpo` and `xtf:` do not go together"),
        ({"expert_parallel_size": 2}, "splits a model or a sequence between processes"),
        ({"plugins": ["diffusion.DiffusionPlugin", PLUGIN]}, "also noises its input"),
        ({"streaming": True}, "set streaming: false"),
        ({"pretraining_dataset": [{"path": "c4"}]}, "`pretraining_dataset`"),
    ],
)
def test_check_and_score_refuse_with_one_message(xtf, write, host, installed, data, message):
    path = write(**{**AXOLOTL, **data})
    for command in ("check", "score"):
        code, out, err = xtf(command, path)
        assert code == 2 and out == "" and host.started() is None
        assert message in err and err.startswith("xtf: error: ")


def test_check_needs_axolotl_and_reports_a_disabled_hook(xtf, write, installed, monkeypatch):
    path = write(**AXOLOTL)
    monkeypatch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    code, out, _ = xtf("check", path)
    assert code == 0 and "off (TORCH_DEVICE_BACKEND_AUTOLOAD=0)" in out and "nothing would notice" in out
    monkeypatch.setattr(environment, "hook_installed", lambda: False)
    assert "not registered in" in xtf("check", path)[1]
    monkeypatch.setenv("XTF_DISABLE", "1")
    assert xtf("check", path)[0] == 2
    monkeypatch.delenv("XTF_DISABLE")
    monkeypatch.setattr(environment, "installed_version", lambda name: None)
    code, _, err = xtf("check", path)
    assert code == 2 and "pip install 'axolotl>=0.19'" in err


def test_score_runs_axolotls_own_command_as_a_dry_run(xtf, write, host, tmp_path):
    path = write(**AXOLOTL)
    assert xtf("score", path, "--", "--launcher", "python")[0] == 0
    started = host.started()
    assert started["argv"] == ["train", str(path), "--launcher", "python"] and started["dry"] == "1"
    assert started["output"] == str(tmp_path / "out" / "xtf" / "scores.parquet")
    code, _, err = xtf("score", path, "--", "--xtf", "true")
    assert code == 2 and "Axolotl's command has no `--xtf`" in err


def test_show_and_report_score_a_recipe_once(xtf, write, host, tmp_path):
    plan = plan_of(tmp_path)
    path = write(**{**AXOLOTL, "base_model": plan.reference["name"]}, xtf={"cache_dir": str(tmp_path / "cache")})
    saved(plan, tmp_path / "source.parquet")  # as a run with this block writes it
    assert "answer·is" in xtf("show", path)[1]
    host.forget()
    assert xtf("report", path)[0] == 0
    assert host.started() is None


def test_output_dir_follows_axolotl(write):
    loaded = recipes.load_recipe(write(**AXOLOTL, output_dir=...))
    assert str(loaded.scores_path()) == os.path.join("model-out", "xtf", "scores.parquet")
    assert loaded.output_dir(["--output-dir=c"]).name == "c"
    assert recipes.load_recipe(write(**AXOLOTL, env={"XTF_DISABLE": "1"})).env == {}  # TRL's key, not Axolotl's
