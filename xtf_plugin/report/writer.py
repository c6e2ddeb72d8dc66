"""Writes the files of a run in `<output_dir>/xtf`: summary.json, report.html and the score table."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group

from ..errors import XTFUserError
from ..files import write_whole
from . import score_table
from .page import render as page
from .score_table import ScoreTable
from .summary import described, summary
from .terminal import by_table, totals_table

if TYPE_CHECKING:
    from ..plan import Plan

logger = logging.getLogger(__name__)

TABLE_LIMIT = 20_000_000  # completion tokens up to which every training run writes score table and report
PAGE, TABLE = "report.html", "scores.parquet"


def write(plan: Plan, tokenizer: Any, folder: Path, *, whole: bool = False) -> list[Path]:
    """Write summary.json, report and score table into `folder`; return the paths written.

    If a file cannot be written, logs a warning and goes on: the masks do not depend on it.

    Args:
        folder: is created if it is missing.
        whole: write report and score table beyond `TABLE_LIMIT` completion tokens, too.
    """
    written: list[Path] = []
    number, table, html = len(plan.scores.token_ids), None, None
    if number <= TABLE_LIMIT or whole:
        table, html = _table_and_page(plan, tokenizer, folder / PAGE)
    facts = summary(plan, tokenizer) if table is None else table.about
    try:
        for name, data in (("summary.json", (json.dumps(facts, indent=2) + "\n").encode()), (PAGE, html)):
            if data is None:
                (folder / name).unlink(missing_ok=True)  # of an earlier run
            else:
                write_whole(folder / name, data)
                written.append(folder / name)
        if table is None:
            (folder / TABLE).unlink(missing_ok=True)
            logger.warning("xtf: %d tokens: no report and no score table; `xtf score` writes them", number)
        else:
            written.append(score_table.write(table, plan.documents, folder / TABLE))
    except OSError as error:
        logger.warning("xtf: %s cannot be written (%s); training goes on without a report", folder, error)
    return written


def write_again(plan: Plan, tokenizer: Any, written: list[Path], path: Path) -> Path:
    """Write the score table to another path too; copies the one among `written`, if there is one. Raises OSError."""
    made = next((file for file in written if file.name == TABLE), None)
    if made is None:
        table, _ = _table_and_page(plan, tokenizer, path)
        return score_table.write(table, plan.documents, path)
    write_whole(path, made.read_bytes())
    return path


def _table_and_page(plan: Plan, tokenizer: Any, path: Path) -> tuple[ScoreTable, bytes | None]:
    """Score table and page; the page is None if it cannot be made, because a report must not stop a correct run."""
    try:
        table, moved = described(plan, tokenizer)
        return table, page.render(page.page_data(table, moved), page.title(path)).encode()
    except Exception:
        logger.warning("xtf: report.html could not be made; training goes on without it", exc_info=True)
        return replace(ScoreTable.of_plan(plan, tokenizer), about=summary(plan, tokenizer)), None


def write_report(table: ScoreTable, path: Path) -> Group:
    """Write report.html of a score table; return its totals, and those by column, to print.

    Raises:
        XTFUserError: the table holds what no run writes, or the page cannot be written.
    """
    try:
        by = (by_table(column, values) for column, values in table.about.get("by", {}).items())
        shares = Group(totals_table(table.about["totals"]), *by)
        html = page.render(page.page_data(table), page.title(path)).encode()
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        why = f"{type(error).__name__}: {error}"
        raise XTFUserError(
            f"the score table is not what this xtf-plugin writes ({why}). {score_table.ADVICE}"
        ) from error
    try:
        write_whole(path, html)
    except OSError as error:
        raise XTFUserError(f"the report cannot be written to {path}: {error}. Name a file: --output PATH") from error
    return shares
