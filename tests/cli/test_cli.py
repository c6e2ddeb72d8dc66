"""The `xtf` command: exit codes and messages, what it starts, what it reads. No model, no training.

A few lines of Python that note their arguments replace the host's command. One test runs the real `trl sft`, which
refuses a wrong block before it launches anything.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from tests import forked
from xtf_plugin import cli, environment
from xtf_plugin.hosts import hub, recipes
from xtf_plugin.hosts.row_settings import row_settings
from xtf_plugin.report.score_table import SCHEMA


def score_table(row, document, position, token, kept, reason, prompt=None, token_id=None):
    """A score table as a run writes it, all scores undefined."""
    decided = {"row": row, "document": document, "position": position, "token": token, "kept": kept, "reason": reason}
    decided |= {} if prompt is None else {"prompt": prompt}
    no = [False] * len(row)
    decided |= {"token_id": token_id or list(range(len(row))), "protected": no, "forced": no}
    return pa.table([pa.array(decided.get(n, [None] * len(row)), SCHEMA.field(n).type) for n in SCHEMA.names], SCHEMA)


TABLE = score_table(
    row=[0, 0, 1],
    document=["aa", "aa", "bb"],
    position=[3, 4, 2],
    token=["A", " dog", "B"],
    kept=[True, False, True],
    reason=["", "knowledge_novelty", ""],
)


@pytest.fixture(autouse=True)
def calm_environment(monkeypatch):
    names = ("XTF_DISABLE", "TORCH_DEVICE_BACKEND_AUTOLOAD", "XTF_DRY_RUN", "XTF_SCORES_OUTPUT", "HF_HUB_OFFLINE")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(hub, "missing", lambda *_: "")  # tests/hosts/test_preflight.py asks one


@pytest.fixture
def write(tmp_path):
    def write_recipe(**data):
        path = tmp_path / "recipe.yaml"
        of_host = {"output_dir": str(tmp_path / "out"), "dataset_name": "some/data"}  # on the hub: not looked at
        data = {"model_name_or_path": "some/model", **of_host, "xtf": True, **data}
        path.write_text(yaml.safe_dump({key: value for key, value in data.items() if value is not ...}))
        return path

    return write_recipe


@pytest.fixture
def xtf(capsys):
    """Run the command line in process; return (exit code, stdout, stderr)."""

    def call(*argv):
        with pytest.raises(SystemExit) as stopped:
            cli.main([str(argument) for argument in argv])
        captured = capsys.readouterr()
        return stopped.value.code or 0, captured.out, captured.err

    return call


@pytest.fixture
def host(tmp_path, monkeypatch):
    """A host command that notes what it was given, writes a score table, and exits with a code."""
    note = tmp_path / "note.json"
    pq.write_table(TABLE, tmp_path / "source.parquet")

    def become(code=0, writes=True):
        script = f"""
            import json, os, shutil, sys
            output = os.environ["XTF_SCORES_OUTPUT"]
            note = {{"argv": sys.argv[1:], "output": output, "dry": os.environ["XTF_DRY_RUN"]}}
            note["path"] = os.environ["PATH"]
            json.dump(note, open({str(note)!r}, "w"))
            if {writes}:
                os.makedirs(os.path.dirname(output), exist_ok=True)
                shutil.copyfile({str(tmp_path / "source.parquet")!r}, output)
            sys.exit({code})
        """
        start, words = [sys.executable, "-c", textwrap.dedent(script)], recipes.COMMANDS
        monkeypatch.setattr(recipes, "host_command", lambda r: [*start, *words[r.host].split()[1:], str(r.path)])

    become()
    become.started = lambda: json.loads(note.read_text()) if note.exists() else None
    become.forget = note.unlink
    return become


def test_version(xtf):
    code, out, _ = xtf("--version")
    assert code == 0 and out.startswith("xtf-plugin 0.")


def test_command_line_does_not_import_torch():
    code = "import sys, xtf_plugin.cli; print({'torch', 'trl', 'pyarrow', 'pydantic'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


def test_check_says_what_will_happen(xtf, write):
    path = write(xtf={"preset": "paper", "task_relevance": False})
    code, out, _ = xtf("check", path)
    assert code == 0 and "adapters off" not in out
    assert "adapters off" in xtf("check", write(use_peft=True))[1]
    scores = "reasoning_importance (attention_received), knowledge_novelty (novelty)"
    for expected in ("ok", "trl", "paper", scores, "the model being trained", "scores.parquet"):
        assert expected in out
    assert "task_relevance" not in out


def test_check_says_which_scorer_a_slot_has_that_names_none(xtf, write):
    """`true` was the paper's scorer once, and is the preset's now."""
    slots = {"reasoning_importance": True, "knowledge_novelty": {"drop": {"quantile": 0.1}}}
    for preset, expected in (("default", "influence new_text"), ("none", "attention_received novelty")):
        of_reasoning, of_novelty = expected.split()
        _, out, _ = xtf("check", write(xtf={"preset": preset, **slots}))
        assert f"reasoning_importance ({of_reasoning}), knowledge_novelty ({of_novelty})" in out


def test_check_prints_the_schema(xtf):
    code, out, _ = xtf("check", "--schema")
    assert code == 0 and "reasoning_importance" in json.loads(out)["properties"]


@pytest.mark.parametrize(
    "data, message",
    [
        ({"xtf": ...}, "has no `xtf:` block,"),
        ({"xtf": ..., "XTF": {"preset": "default"}}, "has no `xtf:` block (`XTF:` is none; write `xtf:`)"),
        ({"xtf": ..., "datasets": [{"path": "d", "xtf": True}]}, "(the one under `datasets:` is not read; write it at"),
        ({"xtf": None, "preset": "default"}, "block is empty. Write `xtf: true` for the defaults"),
        ({"xtf": False}, "turns XTF off"),
        ({"xtf": {"pres": "paper"}}, "preset"),
        ({"env": {"XTF_DISABLE": 1}}, "XTF_DISABLE=1"),
        ({"env": {"TORCH_DEVICE_BACKEND_AUTOLOAD": 0}}, "TORCH_DEVICE_BACKEND_AUTOLOAD=0"),
        ({"env": [1]}, "`env:` must be a mapping"),
        ({"model_name_or_path": ...}, "cannot tell whose recipe"),
        ({"base_model": "m"}, "both"),
    ],
)
def test_check_refuses_with_one_message(xtf, write, data, message):
    code, out, err = xtf("check", write(**data))
    assert code == 2 and out == ""
    assert message in err and err.startswith("xtf: error: ") and "Traceback" not in err


@pytest.mark.parametrize(
    "content, message",
    [
        (b"- a", "mapping"),
        (b"a: [", "not valid YAML"),
        (b"a: 2024-13-45", "not valid YAML"),
        (b"[" * 9000, "not valid YAML"),
        (b"\xff\xfe", "UTF-8"),
    ],
)
def test_check_refuses_what_is_no_recipe(xtf, tmp_path, content, message):
    path = tmp_path / "r.yaml"
    path.write_bytes(content)
    code, _, err = xtf("check", path)
    assert code == 2 and message in err


@pytest.mark.parametrize(
    "block, line, key",
    [
        ("xtf:\n  force_drop: [a]\n  min_kept: 1\n  force_drop: [b]\n", 5, "force_drop"),
        ("xtf: true\nxtf: false\n", 3, "xtf"),
        ("xtf: {protect: {patterns: [a], patterns: [b]}}\n", 2, "patterns"),
        ("xtf: {seed: 1, protect: {formats: null}, seed: 2}\n", 2, "seed"),
    ],
)
def test_a_key_that_is_written_twice_is_refused(xtf, tmp_path, block, line, key):
    """Lines that a run suggests are pasted one below the other, and YAML would keep the last alone."""
    path = tmp_path / "r.yaml"
    path.write_text("model_name_or_path: m\n" + block)
    code, _, err = xtf("check", path)
    assert code == 2 and f"line {line}: `{key}:` is repeated" in err


def test_a_block_that_contains_itself_is_read(xtf, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("model_name_or_path: m\nxtf: &a {protect: *a}\n")
    code, _, err = xtf("check", path)
    assert code == 2 and "second time" not in err


def test_check_needs_file_hook_and_version(xtf, write, monkeypatch, tmp_path):
    assert xtf("check", tmp_path / "absent.yaml")[0] == 2
    assert xtf("check")[0] == 2
    monkeypatch.setattr(environment, "installed_version", lambda name: "1.0.0")
    code, _, err = xtf("check", write())
    assert code == 2 and "pip install 'trl>=1.9'" in err
    monkeypatch.setattr(environment, "hook_installed", lambda: False)
    code, _, err = xtf("check", write())
    assert code == 2 and "pip install xtf-plugin" in err


def test_output_dir_follows_the_host(write):
    loaded = recipes.load_recipe(write(output_dir="runs/a"))
    assert str(loaded.scores_path()) == os.path.join("runs", "a", "xtf", "scores.parquet")
    assert loaded.output_dir(["--output_dir", "b"]).name == "b"
    assert loaded.output_dir(["--output-dir=c"]).name == "c"
    assert recipes.load_recipe(write(output_dir=...)).output_dir().name == "trainer_output"
    assert recipes.load_recipe(write(xtf={"report": "there"})).scores_path().parent.name == "there"
    home = recipes.load_recipe(write(xtf={"report": "~/there"})).scores_path()  # where the run's own report goes
    assert str(home) == os.path.expanduser("~/there/scores.parquet")


def test_score_runs_the_hosts_own_command_as_a_dry_run(xtf, write, host, tmp_path):
    path = write()
    code, out, _ = xtf("score", path, "--", "--max_steps", "3")
    started = host.started()
    assert code == 0 and "scores.parquet" in out
    assert (
        f"next: xtf show {tmp_path / 'out/xtf/scores.parquet'}" in out
    )  # not the recipe: other arguments, other scores
    assert started["argv"] == ["sft", "--config", str(path), "--max_steps", "3"]
    assert started["dry"] == "1"
    assert started["output"] == str(tmp_path / "out" / "xtf" / "scores.parquet")
    assert xtf("score", path, "--output", tmp_path / "mine.parquet")[0] == 0
    assert host.started()["output"] == str(tmp_path / "mine.parquet")


def test_a_host_finds_its_launchers_without_an_activated_environment(xtf, write, host, monkeypatch):
    """Axolotl starts `accelerate` by its name."""
    monkeypatch.setenv("PATH", "/nowhere")
    assert xtf("score", write())[0] == 0
    assert host.started()["path"].split(os.pathsep) == [os.path.dirname(sys.executable), "/nowhere"]


@pytest.mark.parametrize("theirs, ours", [(2, 2), (1, 1), (77, 1)])
def test_score_passes_the_exit_code_through(xtf, write, host, theirs, ours):
    host(code=theirs, writes=False)
    assert xtf("score", write())[0] == ours


@pytest.mark.parametrize("command", ["score", "show"])
def test_a_failed_run_ends_with_what_check_knows(xtf, write, host, tmp_path, command):
    """The host's traceback of a folder that is not there speaks of the hub."""
    host(code=1, writes=False)
    code, _, err = xtf(command, write(dataset_name=str(tmp_path / "absent")))
    first = "scoring first, since" in err.splitlines()[0]
    assert first == (command == "show") and ("there is not a score table" in err) == first
    assert code == 1 and err.splitlines()[-1].startswith("- ") and "absent" in err.splitlines()[-1]
    assert "- " not in xtf(command, write())[2]


def test_score_says_what_to_do_next(xtf, write, host, tmp_path):
    path, page = write(), tmp_path / "out/xtf/report.html"
    assert f"next: xtf show {path}, xtf tune {path}\n" in xtf("score", path)[1]  # as with `report: false`
    page.touch()
    assert f"next: xtf show {path}, xtf tune {path}, or open {page} in a browser" in xtf("score", path)[1]
    assert f"next: xtf score {path}" in xtf("check", path)[1]


def test_score_without_a_new_table_is_a_failure(xtf, write, host):
    path = write()
    assert xtf("score", path)[0] == 0
    host(writes=False)
    code, _, err = xtf("score", path)
    assert code == 1 and "was not applied" in err


@pytest.mark.parametrize("data", [{"xtf": ...}, {"xtf": False}, {"env": {"XTF_DRY_RUN": 0}}])
def test_score_refuses_before_it_starts_anything(xtf, write, host, data):
    code, _, err = xtf("score", write(**data))
    assert code == 2 and err and host.started() is None


def test_block_on_the_command_line_is_enough_to_score(xtf, write, host):
    assert xtf("score", write(xtf=...), "--", "--xtf", "true")[0] == 0


def test_show_scores_only_when_it_must(xtf, write, host):
    path = write()
    code, out, _ = xtf("show", path, "-n", "1")
    assert code == 0 and "A[-·dog|KN-]" in out and "row 1" not in out
    host.forget()
    assert "B" in xtf("show", path, "--row", "1")[1]
    assert host.started() is None
    os.utime(path, (2**31, 2**31))  # the recipe was edited after the table was written
    code, _, err = xtf("show", path)
    assert code == 0 and host.started() and "since" in err and "is newer than its score table" in err
    host.forget()
    assert xtf("show", path, "--", "--seed", "1")[0] == 0 and host.started()


def test_data_in_place_of_a_recipe_is_named(xtf, tmp_path):
    code, _, err = xtf("show", tmp_path / "data.jsonl")
    assert code == 2 and "data.jsonl is data, not a recipe." in err


def test_scores_of_data_that_has_changed_are_not_shown(xtf, write, host, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train.jsonl").write_text('{"text": "A dog"}\n')
    path = write(dataset_name=str(tmp_path / "data"))
    assert xtf("show", path)[0] == 0
    host.forget()
    assert xtf("show", path)[0] == 0 and host.started() is None
    (tmp_path / "data/test.jsonl").write_text('{"text": "A cat"}\n')
    os.utime(tmp_path / "data/train.jsonl", (2**31, 2**31))  # a clock that is ahead says nothing
    table = tmp_path / "out/xtf/scores.parquet"
    os.utime(table, (1_000, 1_000))
    os.utime(path, (900, 900))
    assert xtf("show", path)[0] == 0 and host.started() is None, "the test split is not trained on"
    os.utime(tmp_path / "data/train.jsonl", (1_100, 1_100))
    code, _, err = xtf("tune", path)
    assert code == 2 and "the data has changed after" in err and f"Score it again: xtf score {path}" in err
    changed = write(dataset_name=str(tmp_path / "data"), xtf={"task_relevance": {"drop": {"of_median": 0.3}}})
    for recipe in (path, changed):  # other thresholds are not selected from old scores either
        os.utime(table, (1_000, 1_000))
        code, _, err = xtf("show", recipe)
        assert code == 0 and host.started() and "since the data has changed" in err
        host.forget()


def made_with(tmp_path, **about):
    """The host's table, with this metadata."""
    pq.write_table(TABLE.replace_schema_metadata({b"xtf": json.dumps(about)}), tmp_path / "source.parquet")


@pytest.mark.parametrize("settings", [{"dataset_name": "other/data"}, {"max_length": 9}, {"model_name_or_path": "b"}])
def test_scores_of_other_rows_are_not_shown(xtf, write, host, tmp_path, settings):
    """Other data may be older than the table, so that no time tells."""
    made_with(tmp_path, recipe=row_settings(yaml.safe_load(write().read_text())))
    host()
    assert xtf("show", write())[0] == 0
    host.forget()
    (name,), path = settings, write(**settings)
    os.utime(path, (900, 900))
    code, _, err = xtf("tune", path)
    assert code == 2 and f"had another {name}. Score it again" in err
    code, _, err = xtf("show", path)
    assert code == 0 and host.started() and "scoring first, since the run" in err and f"had another {name}." in err


def test_scores_of_another_model_are_not_shown(xtf, write, host, tmp_path):
    made_with(tmp_path, reference={"name": "a"})
    path = write()
    assert xtf("show", path)[0] == 0
    os.utime(path, (900, 900))
    host.forget()
    code, _, err = xtf("show", path)
    assert code == 0 and host.started() and "has the scores of a, and the recipe trains some/model" in err


def test_show_passes_a_failed_scoring_on(xtf, write, host):
    host(code=2, writes=False)
    assert xtf("show", write())[0] == 2


def test_tables_that_are_none(xtf, tmp_path):
    (tmp_path / "text.parquet").write_text("no parquet")
    pq.write_table(pa.table({"row": [1]}), tmp_path / "other.parquet")
    for name, message in (("text", "cannot read"), ("other", "no column document"), ("absent", "cannot read")):
        code, _, err = xtf("show", tmp_path / f"{name}.parquet")
        assert code == 2 and message in err
    pq.write_table(TABLE, tmp_path / "scores.parquet")
    code, _, err = xtf("show", tmp_path / "scores.parquet", "--row", "9")
    assert code == 2 and "row 9" in err


def test_documents_beyond_the_first_batch_are_found(xtf, tmp_path):
    count = 70_000  # Parquet batches hold 65,536 rows
    constant = {"position": 1, "token": "t", "kept": True, "reason": ""}
    names = [f"{row:06x}" for row in range(count)]
    columns = {name: [value] * count for name, value in constant.items()}
    wide = score_table(row=list(range(count)), document=names, **columns)
    pq.write_table(wide, tmp_path / "scores.parquet")
    assert "row 69999 " in xtf("show", tmp_path / "scores.parquet", "--row", "69999")[1]
    assert xtf("show", tmp_path / "scores.parquet", "-n", "2")[1].count("row ") == 2


def test_stock_trl_refuses_a_wrong_block_before_it_launches(write):
    path = write(xtf={"min_kpet": 1}, dataset_name="none", bf16=False, use_cpu=True)
    command = recipes.host_command(recipes.load_recipe(path))
    process = forked.run(command, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert process.returncode == 2
    assert "min_kpet" in process.stderr and "trl sft: error:" in process.stderr
    assert "Traceback" not in process.stderr and "accelerate" not in process.stderr


def test_cache_is_listed_and_pruned(xtf, tmp_path):
    code, out, _ = xtf("cache", "list", "--cache-dir", tmp_path)
    assert code == 0 and "no cached scores" in out
    folder = tmp_path / "v2" / ("ab" * 16)
    folder.mkdir(parents=True)
    kept = tmp_path / "v2" / "notes.txt"
    kept.write_text("not ours")
    shard = folder / f"relevance-{'cd' * 16}.parquet"
    shard.write_bytes(b"x" * 2**20)
    code, out, _ = xtf("cache", "list", "--cache-dir", tmp_path)
    assert code == 0 and "abababababab" in out and "1.0" in out
    code, out, _ = xtf("cache", "prune", "--all", "--dry-run", "--cache-dir", tmp_path)
    assert code == 0 and "would remove 1 files, 1.0 MiB" in out and shard.exists()
    code, out, _ = xtf("cache", "prune", "--reference", "abab", "--cache-dir", tmp_path)
    assert code == 0 and "removed 1 files" in out and not shard.exists() and kept.exists()
    code, _, err = xtf("cache", "prune", "--cache-dir", tmp_path)
    assert code == 2 and "say what to prune" in err
