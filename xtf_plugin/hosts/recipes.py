"""Reads, checks and runs recipes for the command `xtf`. Training runs do not use this module."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .. import environment
from ..errors import XTFError, XTFUserError
from . import axolotl_checks, fail_closed, hub

if TYPE_CHECKING:
    from ..config.block import XTFConfig

Host = Literal["trl", "axolotl"]

COMMANDS = {"trl": "trl sft --config", "axolotl": "axolotl train"}  # before the recipe's path
_MODULES = {"trl": "trl.cli", "axolotl": "axolotl.cli.main"}  # with the command's `main`
_HOST_KEYS: dict[str, Host] = {"model_name_or_path": "trl", "base_model": "axolotl"}
_DEFAULT_OUTPUT_DIRS = {"trl": "trainer_output", "axolotl": "./model-out"}  # of transformers >= 5, of Axolotl 0.19


@dataclass(frozen=True)
class Recipe:
    """A YAML file with a known host; nothing else is validated."""

    path: Path
    host: Host
    data: dict[str, Any]
    block: Any  # the value of `xtf:`; None if it is absent

    @property
    def env(self) -> dict[str, str]:
        """The variables that TRL sets: its `env:` block. Raises XTFUserError if it is not a mapping."""
        env = (self.data.get("env") or {}) if self.host == "trl" else {}
        if not isinstance(env, dict):
            raise XTFUserError(f"{self.path}: `env:` must be a mapping of names to values, not {type(env).__name__}.")
        return {str(key): str(value) for key, value in env.items()}

    @property
    def model(self) -> str | None:
        """The model that is trained, as the recipe names it."""
        return self.data.get("model_name_or_path") or self.data.get("base_model")

    @property
    def streamed(self) -> bool:
        """Whether the host streams the training data."""
        of_trl = "streaming" if self.data.get("datasets") else "dataset_streaming"
        return self.data.get(of_trl if self.host == "trl" else "streaming") is True

    def output_dir(self, extra: Sequence[str] = ()) -> Path:
        """The output folder: `--output_dir` of the extra host arguments, else the recipe's, else the default."""
        chosen = self.data.get("output_dir") or _DEFAULT_OUTPUT_DIRS[self.host]
        for index, argument in enumerate(extra):
            name, _, value = argument.partition("=")
            if name in ("--output_dir", "--output-dir"):
                chosen = value or (extra[index + 1] if index + 1 < len(extra) else chosen)
        return Path(os.path.expanduser(str(chosen)))

    def scores_path(self, extra: Sequence[str] = ()) -> Path:
        """The path of the score table that a run writes: in `<output_dir>/xtf`, or in the folder of `report:`."""
        report = self.block.get("report") if isinstance(self.block, dict) else None
        folder = Path(os.path.expanduser(report)) if isinstance(report, str) else self.output_dir(extra) / "xtf"
        return folder / "scores.parquet"


def load_recipe(path: str | Path) -> Recipe:
    """Read a recipe. Raises XTFUserError for an unreadable file, bad YAML, no mapping, or not exactly one host."""
    path = Path(path)
    if path.suffix in (".jsonl", ".csv"):
        raise XTFUserError(f"{path} is data, not a recipe. Name a recipe (YAML), or write one: xtf init --help")
    data = _read_mapping(path)
    hosts = [host for key, host in _HOST_KEYS.items() if data.get(key) is not None]
    if len(hosts) != 1:
        raise XTFUserError(
            f"{path}: cannot tell whose recipe this is. Set `model_name_or_path` (TRL) or `base_model` (Axolotl), not "
            f"both; found the keys: {', '.join(map(str, data)) or 'none'}."
        )
    if "xtf" in data and data["xtf"] is None:
        raise XTFUserError(f"{path}: {fail_closed.EMPTY_BLOCK} Settings of the block are indented below `xtf:`.")
    return Recipe(path=path, host=hosts[0], data=data, block=data.get("xtf"))


def _read_mapping(path: Path) -> dict[str, Any]:
    from ..config.block import of_yaml, repeated_key

    try:
        text = path.read_text(encoding="utf-8")
        data = of_yaml(text)
    except OSError as error:
        next_ = f"{hub.looked_at(str(path))}. Correct the path, or write a recipe: xtf init --help"
        why = f"{error.strerror or error}{next_ if isinstance(error, FileNotFoundError) else '.'}"
        raise XTFUserError(f"cannot read the recipe {path}: {why}") from error
    except UnicodeDecodeError as error:
        raise XTFUserError(f"{path} is not a text file (not UTF-8 at byte {error.start}).") from error
    except ValueError as error:
        raise XTFUserError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(data, dict):
        raise XTFUserError(f"{path} must hold a YAML mapping (`key: value` lines), not {type(data).__name__}.")
    if repeated := repeated_key(text):
        key, line = repeated
        raise XTFUserError(
            f"{path}, line {line}: `{key}:` is repeated, and YAML keeps only the last one. Write it once, and put all "
            "entries into one list: [..., ...]."
        )
    return data


def parse_block(recipe: Recipe) -> XTFConfig | None:
    """The config of a recipe's block, None if it is absent or off.

    Raises XTFUserError for a wrong block, and for settings of the recipe with which it is not applied.
    """
    from ..config.block import XTFConfig
    from ..config.scores import check_streamed

    if recipe.host == "axolotl":
        axolotl_checks.has_block(recipe.data)
    config = XTFConfig.parse(recipe.block)
    if config is None:
        return None
    if recipe.host == "axolotl":
        axolotl_checks.check_plugin_line(recipe.data)
        axolotl_checks.check_settings(recipe.data)
    elif recipe.streamed:
        if recipe.data.get("dataloader_num_workers"):
            raise XTFUserError(environment.WORKERS_REFUSED.format(workers=recipe.data["dataloader_num_workers"]))
        check_streamed(config.scores, config.report_columns)
    return config


def check_environment(recipe: Recipe) -> str:
    """The state of the boot hook. Raises XTFUserError if this environment would not apply the recipe's block."""
    autoload = os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD", "1")
    off = "" if autoload == "1" else f"off (TORCH_DEVICE_BACKEND_AUTOLOAD={autoload})"
    if not environment.hook_installed():
        off = f"the boot hook of xtf-plugin is not registered in {sys.prefix} (entry point group torch.backends)"
    if recipe.host == "axolotl":  # it loads the plugin itself; the hook notices if it has not
        axolotl_checks.check_surroundings()
        state = f"{off}: the recipe's plugin applies the block, but nothing would notice a failed import of the plugin"
        return state if off else "installed and on"
    if off and autoload == "1":
        raise XTFUserError(f"{off}, so `trl sft` would not see the block. Run: pip install xtf-plugin")
    environment.check_switches(os.environ)
    environment.check_switches(recipe.env, f"the `env:` block of {recipe.path}")
    environment.check_version("trl")
    return "installed and on"


def score_recipe(recipe: Recipe, extra: Sequence[str], output: Path | None) -> tuple[Path, int]:
    """Run the host's command as a dry run; return the score table's path and the exit code (0, 1 or 2).

    Raises XTFUserError for a recipe that cannot be scored, and XTFError if the run ended with 0 and wrote no table.
    """
    if recipe.host == "axolotl":
        axolotl_checks.check_words(extra)
    if recipe.host == "axolotl" or not extra:
        parse_block(recipe)  # here, since a launcher ends with 1 and a traceback when its child refuses a block
    if recipe.block in (None, False) and not any(argument.split("=")[0] == "--xtf" for argument in extra):
        raise XTFUserError(f"{recipe.path} {off(recipe)}: nothing to score. The shortest block: `xtf: true`.")
    if taken := [name for name in ("XTF_DRY_RUN", "XTF_SCORES_OUTPUT") if name in recipe.env]:
        raise XTFUserError(f"the `env:` block of {recipe.path} sets {', '.join(taken)}, which `xtf score` sets itself.")
    table = (output or recipe.scores_path(extra)).absolute()
    folder = next(path for path in table.parents if path.exists())
    if table.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise XTFUserError(f"the score table cannot be written to {table}. Name a file in a writable folder.")
    before = table.stat().st_mtime_ns if table.exists() else None
    # hosts start launchers by name
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    variables = {**os.environ, "PATH": path, "XTF_DRY_RUN": "1", "XTF_SCORES_OUTPUT": str(table)}
    code = subprocess.run([*host_command(recipe), *extra], env=variables, check=False).returncode
    if code == 0 and (not table.exists() or table.stat().st_mtime_ns == before):
        raise XTFError(f"the run ended without writing {table}: its `xtf:` block was not applied. Try: xtf check")
    return table, code if code in (0, 2) else 1


def host_command(recipe: Recipe) -> list[str]:
    """The command line that trains `recipe`: the host's script of this interpreter, or the call that it would make."""
    name, *words = COMMANDS[recipe.host].split()
    script = shutil.which(name, path=sysconfig.get_path("scripts"))
    call = f"import sys; from {_MODULES[recipe.host]} import main; sys.exit(main())"
    return [*([script] if script else [sys.executable, "-c", call]), *words, str(recipe.path)]


def off(recipe: Recipe) -> str:
    """Why a recipe trains without XTF, to follow the recipe's name in a message."""
    if recipe.block is not None:
        return "turns XTF off (`xtf: false`)"
    meant = next((key for key in map(str, recipe.data) if fail_closed.meant_as_block(key)), None)
    why = f" (`{meant}:` is none; write `xtf:`)" if meant else ""
    for key, value in recipe.data.items():
        if any(isinstance(each, dict) and "xtf" in each for each in (value if isinstance(value, list) else [value])):
            why = f" (the one under `{key}:` is not read; write it at the left edge)"
    return f"has no `xtf:` block{why}"
