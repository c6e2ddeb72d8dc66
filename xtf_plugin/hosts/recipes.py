"""Recipes on the command line: whose they are, whether their block would be applied, and how they are run.

A training run never comes through here: hosts parse their own recipes, and a run asks the same questions itself.
`xtf score` runs the host's own stock command, as a user would.
"""

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
from ..hosts import axolotl_checks

if TYPE_CHECKING:
    from ..config.block import XTFConfig

Host = Literal["trl", "axolotl"]

COMMANDS = {"trl": "trl sft --config", "axolotl": "axolotl train"}  # and the recipe
_MODULES = {"trl": "trl.cli", "axolotl": "axolotl.cli.main"}  # whose `main` a command's script runs
_HOST_KEYS: dict[str, Host] = {"model_name_or_path": "trl", "base_model": "axolotl"}
_DEFAULT_OUTPUT_DIRS = {"trl": "trainer_output", "axolotl": "./model-out"}  # of transformers >= 5, of Axolotl 0.19
_OURS = ("XTF_DRY_RUN", "XTF_SCORES_OUTPUT")
_NO_ENTRY = "the boot hook of xtf-plugin is not registered in {prefix} (entry point group torch.backends)"


@dataclass(frozen=True)
class Recipe:
    """A host's YAML file as read: nothing validated beyond its being a mapping with a known host."""

    path: Path
    host: Host
    data: dict[str, Any]
    block: Any  # the raw `xtf:` value; None when absent

    @property
    def env(self) -> dict[str, str]:
        """What the host will export: TRL's `env:` block. Raises XTFUserError if it is not a mapping."""
        env = (self.data.get("env") or {}) if self.host == "trl" else {}
        if not isinstance(env, dict):
            raise XTFUserError(f"{self.path}: `env:` must be a mapping of names to values, not {type(env).__name__}.")
        return {str(key): str(value) for key, value in env.items()}

    @property
    def streamed(self) -> bool:
        """Whether the host reads the training data row by row, without ever having all of it."""
        return self.data.get("dataset_streaming") is True or self.data.get("streaming") is True

    def output_dir(self, extra: Sequence[str] = ()) -> Path:
        """Where the run writes: `--output_dir` of the extra host arguments, else the recipe's, else the default."""
        chosen = self.data.get("output_dir") or _DEFAULT_OUTPUT_DIRS[self.host]
        for index, argument in enumerate(extra):
            name, _, value = argument.partition("=")
            if name in ("--output_dir", "--output-dir"):
                chosen = value or (extra[index + 1] if index + 1 < len(extra) else chosen)
        return Path(os.path.expanduser(str(chosen)))

    def scores_path(self, extra: Sequence[str] = ()) -> Path:
        """Where a run of this recipe leaves its score table: `<output_dir>/xtf`, or the folder that `report:` names."""
        report = self.block.get("report") if isinstance(self.block, dict) else None
        folder = Path(os.path.expanduser(report)) if isinstance(report, str) else self.output_dir(extra) / "xtf"
        return folder / "scores.parquet"


def load_recipe(path: str | Path) -> Recipe:
    """Read a YAML recipe.

    Raises XTFUserError for a missing or unreadable file, bad YAML, anything but a mapping, and a host that is unknown
    or ambiguous.
    """
    path = Path(path)
    data = _read_mapping(path)
    hosts = [host for key, host in _HOST_KEYS.items() if data.get(key) is not None]
    if len(hosts) == 2:
        raise XTFUserError(
            f"{path}: both `model_name_or_path` (TRL) and `base_model` (Axolotl) are set; remove the one that is not "
            "your trainer's."
        )
    if not hosts:
        raise XTFUserError(
            f"{path}: cannot tell whose recipe this is. A TRL recipe names its model in `model_name_or_path`, one of "
            f"Axolotl in `base_model`; found the keys: {', '.join(map(str, data)) or 'none'}."
        )
    return Recipe(path=path, host=hosts[0], data=data, block=data.get("xtf"))


def _read_mapping(path: Path) -> dict[str, Any]:
    import yaml

    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise XTFUserError(f"cannot read the recipe {path}: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise XTFUserError(f"{path} is not a text file (not UTF-8 at byte {error.start}).") from error
    # besides YAMLError, PyYAML's constructors raise these on scalars that do not fit their tag
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise XTFUserError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(data, dict):
        raise XTFUserError(f"{path} must hold a YAML mapping (`key: value` lines), not {type(data).__name__}.")
    return data


def parse_block(recipe: Recipe) -> XTFConfig | None:
    """The config of a recipe's block, None when it is absent or off.

    Raises XTFUserError for a wrong block, and for one that its host would not apply, whatever the environment.
    """
    from ..config.block import XTFConfig
    from ..config.scores import check_streamed

    if recipe.host == "axolotl":
        axolotl_checks.has_block(recipe.data)  # an empty one, and a mistyped key
    config = XTFConfig.parse(recipe.block)
    if config is None:
        return None
    if recipe.host == "axolotl":
        axolotl_checks.check_plugin_line(recipe.data)
        axolotl_checks.check_settings(recipe.data)
    elif recipe.streamed:
        if recipe.data.get("dataloader_num_workers"):
            raise XTFUserError(environment.WORKERS_REFUSED.format(workers=recipe.data["dataloader_num_workers"]))
        check_streamed(config.selectors)
    return config


def check_environment(recipe: Recipe) -> str:
    """Raise XTFUserError unless a run of this recipe, here, would apply its block; else say what applies it."""
    if recipe.host == "axolotl":
        environment.check_version("axolotl")
        environment.check_disabled(os.environ)
        return _axolotl_hook()
    if not environment.hook_installed():
        raise XTFUserError(
            f"{_NO_ENTRY.format(prefix=sys.prefix)}, so `trl sft` would not see the block. Run: pip install xtf-plugin"
        )
    environment.check_switches(os.environ)
    environment.check_switches(recipe.env, f"the `env:` block of {recipe.path}")
    environment.check_version("trl")
    return "installed and on"


def _axolotl_hook() -> str:
    """Axolotl loads the plugin by the recipe's line; the hook is what notices that it did not."""
    if not environment.hook_installed():
        off = _NO_ENTRY.format(prefix=sys.prefix)
    else:
        try:
            environment.check_switches(os.environ)
            return "installed and on"
        except XTFUserError:
            off = f"off (TORCH_DEVICE_BACKEND_AUTOLOAD={os.environ['TORCH_DEVICE_BACKEND_AUTOLOAD']})"
    return f"{off}: the recipe's plugin applies the block, but nothing would notice if Axolotl could not import it"


def score_recipe(recipe: Recipe, extra: Sequence[str], output: Path | None) -> tuple[Path, int]:
    """Run the host's command as a dry run; return where the table is and the exit code, 0, 2 or 1.

    Raises XTFError if the run ended well but left no new table, XTFUserError if the recipe could not end as a dry run.
    """
    if recipe.host == "axolotl":
        axolotl_checks.check_words(extra)
    if recipe.host == "axolotl" or not extra:
        parse_block(recipe)  # a launcher ends with 1 and a traceback for a block that its child refuses
    if recipe.block in (None, False) and not any(argument.split("=")[0] == "--xtf" for argument in extra):
        raise XTFUserError(f"{recipe.path} {off(recipe)}: nothing to score. The shortest block: `xtf: true`.")
    taken = [name for name in _OURS if name in recipe.env]
    if taken:
        raise XTFUserError(f"the `env:` block of {recipe.path} sets {', '.join(taken)}, which `xtf score` sets itself.")
    table = (output or recipe.scores_path(extra)).absolute()
    if table.is_dir() or not _writable(table.parent):
        raise XTFUserError(f"the score table cannot be written to {table}: name a file in a folder that can be made.")
    before = table.stat().st_mtime_ns if table.exists() else None
    variables = {**os.environ, "XTF_DRY_RUN": "1", "XTF_SCORES_OUTPUT": str(table)}
    code = subprocess.run([*host_command(recipe), *extra], env=variables, check=False).returncode
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
