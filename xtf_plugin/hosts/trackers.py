"""What we know of trackers beyond metrics, which go through the host's own logging: where a report can be attached.

A tracker is touched only if the run reports to it, it is imported already, and the user has turned its artifacts on.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ._compat import is_on

logger = logging.getLogger(__name__)

_NAME = "xtf-report"


def log_report(report_to: Sequence[str] | str | None, path: Path) -> list[str]:
    """Attach a report to the run in those trackers that keep files; return their names.

    W&B: with WANDB_LOG_MODEL, as transformers does with models. MLflow: with HF_MLFLOW_LOG_ARTIFACTS. transformers has
    no such switch for trackio, so nothing is attached there. A tracker that fails is told, not fatal: the masks do not
    depend on it.
    """
    used = [report_to] if isinstance(report_to, str) else list(report_to or ())
    done: list[str] = []
    if not path.exists():
        return done
    if "wandb" in used and os.environ.get("WANDB_LOG_MODEL", "false").lower() in ("end", "checkpoint", "true"):
        done += _attached(_wandb, path)
    if "mlflow" in used and is_on(os.environ.get("HF_MLFLOW_LOG_ARTIFACTS")):
        done += _attached(_mlflow, path)
    return done


def _attached(attach: Callable[[Path], list[str]], path: Path) -> list[str]:
    """What `attach` returns, nothing if it fails: trackers have errors of their own, which share no base."""
    try:
        return attach(path)
    except Exception as error:
        logger.warning("xtf: the report could not be attached to the tracker: %s", error)
        return []


def _wandb(path: Path) -> list[str]:
    wandb = sys.modules.get("wandb")
    if wandb is None or wandb.run is None:
        return []
    artifact = wandb.Artifact(_NAME, type="report")
    artifact.add_file(str(path))
    wandb.run.log_artifact(artifact)
    return ["wandb"]


def _mlflow(path: Path) -> list[str]:
    mlflow = sys.modules.get("mlflow")
    if mlflow is None or mlflow.active_run() is None:
        return []
    mlflow.log_artifact(str(path), _NAME)
    return ["mlflow"]
