"""Reads a recipe and tells whose it is, for the command line; a training run never comes through here.

Hosts parse their own recipes. This reader only answers what must be known before a host is started: which command runs
the recipe, what its `xtf:` block and `env:` say, and where its output goes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import XTFUserError
from ._compat import AXOLOTL_DEFAULT_OUTPUT_DIR, TRL_DEFAULT_OUTPUT_DIR

Host = Literal["trl", "axolotl"]

_HOST_KEYS: dict[str, Host] = {"model_name_or_path": "trl", "base_model": "axolotl"}
_DEFAULT_OUTPUT_DIRS = {"trl": TRL_DEFAULT_OUTPUT_DIR, "axolotl": AXOLOTL_DEFAULT_OUTPUT_DIR}


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
