"""Metrics reach the trackers through the host's own logging, and a report only those that the user lets keep files."""

from __future__ import annotations

import json
import sqlite3
import sys
from types import SimpleNamespace

import pytest

from tests import tiny
from tests.hosts.test_end_to_end import BIN, command, recipe
from tests.made_scores import DROPS
from xtf_plugin.training.trainer import log_report

METRICS = ("xtf/kept_fraction", "xtf/dropped_by/reasoning_importance", "xtf/kept_tokens_per_batch")


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    """The folder of a stock `trl sft` that reports to all three, offline."""
    folder = tmp_path_factory.mktemp("tracked")
    tiny.save_base(folder / "model")
    tiny.save_rows(folder / "data/train.jsonl", tiny.problems(12))
    changes = {"report_to": ["tensorboard", "wandb", "trackio"], "max_steps": 2, "save_strategy": "no", "xtf": DROPS}
    path = recipe(folder, folder / "out", **changes)
    places = {"TENSORBOARD_LOGGING_DIR": folder / "events", "WANDB_DIR": folder, "TRACKIO_DIR": folder / "trackio"}
    quiet = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_LOG_MODEL": "end", "TRACKIO_PROJECT": "test"}
    environment = {name: str(place) for name, place in places.items()} | quiet
    result = command(BIN / "trl", "sft", "--config", path, cache=folder / "cache", **environment)
    assert result.returncode == 0, result.stderr[-4000:]
    return folder


def test_tensorboard(tracked):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tracked / "events"))
    events.Reload()
    for name in METRICS:
        assert events.Scalars(f"train/{name}")
    kept = events.Scalars("train/xtf/kept_fraction")[0].value
    totals = json.loads((tracked / "out/xtf/summary.json").read_text())["totals"]
    assert kept == pytest.approx(totals["kept_fraction"], rel=1e-6) and kept < 1


def test_wandb_offline_and_its_artifact(tracked):
    (record,) = tracked.glob("wandb/offline-run-*/*.wandb")
    data = record.read_bytes()
    for name in METRICS:
        assert f"train/{name}".encode() in data
    assert b"xtf-report" in data and b"report.html" in data


def test_trackio(tracked):
    (base,) = (tracked / "trackio").glob("*.db")
    stored = "".join(map(str, sqlite3.connect(base).execute("select * from metrics").fetchall()))
    for name in METRICS:
        assert name in stored


class OwnError(Exception):
    """As trackers define them: derived from nothing that could be named here."""


class Recorder:
    """A tracker's module, as far as a report is concerned."""

    def __init__(self):
        self.logged = []
        self.run = self

    def Artifact(self, name, type):  # noqa: N802 (wandb's name)
        return SimpleNamespace(name=name, type=type, add_file=self.logged.append)

    def log_artifact(self, *given):
        self.logged.append(given)

    def active_run(self):
        return self


@pytest.mark.parametrize(
    ("tracker", "variable", "on", "off"),
    [("wandb", "WANDB_LOG_MODEL", "checkpoint", "false"), ("mlflow", "HF_MLFLOW_LOG_ARTIFACTS", "1", "0")],
)
def test_a_report_is_attached_only_where_it_is_wanted(tmp_path, monkeypatch, tracker, variable, on, off):
    (tmp_path / "report.html").write_text("a page")
    module = Recorder()
    monkeypatch.setitem(sys.modules, tracker, module)
    monkeypatch.setenv(variable, off)
    assert log_report([tracker], tmp_path / "report.html") == [] and module.logged == []
    monkeypatch.setenv(variable, on)
    assert log_report([], tmp_path / "report.html") == log_report(None, tmp_path / "report.html") == []
    assert log_report([tracker], tmp_path / "absent.html") == [] and module.logged == []
    assert log_report(tracker, tmp_path / "report.html") == [tracker] and module.logged


def test_a_tracker_that_fails_is_logged(tmp_path, monkeypatch, caplog):
    (tmp_path / "report.html").write_text("a page")
    module = Recorder()
    module.log_artifact = lambda artifact: (_ for _ in ()).throw(OwnError("disk full"))
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setenv("WANDB_LOG_MODEL", "end")
    assert log_report(["wandb"], tmp_path / "report.html") == []
    assert "could not be attached" in caplog.text and "disk full" in caplog.text
