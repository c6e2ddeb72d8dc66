"""Runs a recipe through its host's own stock command, as a user would: no part of its pipeline is rebuilt here."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from ..errors import XTFError, XTFUserError
from .axolotl_recipe import check_words
from .check import parse_block
from .recipe import Recipe

_OURS = ("XTF_DRY_RUN", "XTF_SCORES_OUTPUT")
COMMANDS = {"trl": "trl sft --config", "axolotl": "axolotl train"}  # and the recipe
_MODULES = {"trl": "trl.cli", "axolotl": "axolotl.cli.main"}  # whose `main` a command's script runs


def score_recipe(recipe: Recipe, extra: Sequence[str], output: Path | None) -> tuple[Path, int]:
    """Run the host's command as a dry run; return where the table is and the exit code, 0, 2 or 1.

    Raises XTFError if the run ended well but left no new table, XTFUserError if the recipe could not end as a dry run.
    """
    if recipe.host == "axolotl":
        check_words(extra)
        parse_block(recipe)  # a wrong one ends Axolotl with 1 and the traceback of its own validation
    if recipe.block in (None, False) and not any(argument.split("=")[0] == "--xtf" for argument in extra):
        raise XTFUserError(f"{recipe.path} {off(recipe)}: nothing to score. The shortest block: `xtf: true`.")
    taken = [name for name in _OURS if name in recipe.env]
    if taken:
        raise XTFUserError(f"the `env:` block of {recipe.path} sets {', '.join(taken)}, which `xtf score` sets itself.")
    table = (output or recipe.scores_path(extra)).absolute()
    if table.is_dir() or not _writable(table.parent):
        raise XTFUserError(f"the score table cannot be written to {table}: name a file in a folder that can be made.")
    before = table.stat().st_mtime_ns if table.exists() else None
    environment = {**os.environ, "XTF_DRY_RUN": "1", "XTF_SCORES_OUTPUT": str(table)}
    code = subprocess.run([*host_command(recipe), *extra], env=environment, check=False).returncode
    if code == 0 and (not table.exists() or table.stat().st_mtime_ns == before):
        raise XTFError(f"the run ended without writing {table}: its `xtf:` block was not applied. Try: xtf check")
    return table, code if code in (0, 2) else 1


def _writable(folder: Path) -> bool:
    """Whether files can be made in `folder`, or in the nearest folder above it that exists."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)


def host_command(recipe: Recipe) -> list[str]:
    """The words that train `recipe`: its host's stock script of this interpreter.

    Without a script the same call, whose folder is not on `sys.path` then.
    """
    name, *words = COMMANDS[recipe.host].split()
    script = shutil.which(name, path=sysconfig.get_path("scripts"))
    call = f"import sys; from {_MODULES[recipe.host]} import main; sys.exit(main())"
    return [*([script] if script else [sys.executable, "-c", call]), *words, str(recipe.path)]


def off(recipe: Recipe) -> str:
    """Say why a recipe trains without XTF, for a message that begins with the recipe's name."""
    return "has no `xtf:` block" if recipe.block is None else "turns XTF off (`xtf: false`)"
