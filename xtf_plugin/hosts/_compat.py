"""Version floors, version probes and environment switches of the hosts, in one place.

Nothing here has any effect without an `xtf:` block. Each constant says when it may go.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from importlib import metadata

from ..errors import XTFUserError

TRL_OLDEST = (1, 9)  # first release whose train rows carry `labels`; goes up only when a patch point changes
TRL_NEWEST_TESTED = (1, 16)  # raise after a run of the test suite on a newer release
AXOLOTL_OLDEST = (0, 19)  # the only release tested; older ones pin a TRL and a transformers below what we need
AXOLOTL_NEWEST_TESTED = (0, 19)  # raise after `make test-axolotl` on a newer release
AXOLOTL_DEFAULT_OUTPUT_DIR = "./model-out"  # where an Axolotl recipe without `output_dir` writes
TRL_DEFAULT_OUTPUT_DIR = "trainer_output"  # where a recipe without `output_dir` writes; from transformers >= 5

WORKERS_REFUSED = (
    "xtf: the training data is streamed and dataloader_num_workers is {workers}: rows would be fetched in processes "
    "that have no model to score them with. Set dataloader_num_workers: 0, or do not stream (dataset_streaming: false; "
    "streaming: false under `datasets`)."
)

_TRUE = frozenset({"1", "true", "yes", "on"})
_logger = logging.getLogger("xtf_plugin")


def release(version: str) -> tuple[int, ...]:
    """Return the leading numbers of a version: "1.16.0.dev0" -> (1, 16, 0); () if there are none."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in match.group().split(".")) if match else ()


def is_on(value: str | None) -> bool:
    """Return whether an environment variable's value is one of 1, true, yes, on (any case)."""
    return value is not None and value.strip().lower() in _TRUE


def installed_version(distribution: str) -> str | None:
    """Return the installed version of a distribution, None if it is not installed; imports nothing."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def hook_installed() -> bool:
    """Return whether this environment's metadata makes PyTorch call our boot hook."""
    ours = ("xtf_plugin_boot:", "xtf_plugin.")  # the second: of an editable install that was made before the first
    return any(entry.value.startswith(ours) for entry in metadata.entry_points(group="torch.backends"))


def check_trl(version: str | None) -> None:
    """Refuse a TRL that cannot apply a block, and warn of one that is newer than any tested.

    Raises XTFUserError when `version` is None (not installed) or below `TRL_OLDEST`.
    """
    _check_release("TRL", "trl", version, TRL_OLDEST, TRL_NEWEST_TESTED)


def check_axolotl(version: str | None) -> None:
    """Refuse an Axolotl that cannot apply a block, and warn of one that is newer than any tested.

    Raises XTFUserError when `version` is None (not installed) or below `AXOLOTL_OLDEST`.
    """
    _check_release("Axolotl", "axolotl", version, AXOLOTL_OLDEST, AXOLOTL_NEWEST_TESTED)


def _check_release(
    name: str, package: str, version: str | None, oldest: tuple[int, ...], tested: tuple[int, ...]
) -> None:
    legal = f"{package}>={oldest[0]}.{oldest[1]}"
    newest = f"{tested[0]}.{tested[1]}"
    if version is None or release(version)[:2] < oldest:
        found = "not installed" if version is None else f"version {version}"
        raise XTFUserError(
            f"xtf: {name} is {found}, an `xtf:` block needs {legal} (tested up to {newest}). Run: pip install '{legal}'"
        )
    if release(version)[:2] > tested:
        _logger.warning("xtf: %s %s is newer than the newest tested release, %s; going on.", name, version, newest)


def check_disabled(environment: Mapping[str, str], source: str = "this process's environment") -> None:
    """Refuse an environment that switches XTF off under a recipe with a block. Raises XTFUserError."""
    if is_on(environment.get("XTF_DISABLE")):
        raise XTFUserError(
            f"xtf: block present but XTF_DISABLE={environment['XTF_DISABLE']}: remove one of them (set in {source})."
        )


def check_switches(environment: Mapping[str, str], source: str = "this process's environment") -> None:
    """Refuse an environment in which a block would be parsed here and ignored in the process that trains.

    `environment` is what the training process will see; `source` is named in the message. Raises XTFUserError.
    """
    check_disabled(environment, source)
    autoload = environment.get("TORCH_DEVICE_BACKEND_AUTOLOAD", "1")
    if autoload != "1":  # PyTorch's own test: every value but "1" turns autoloading off
        raise XTFUserError(
            f"xtf: block present but TORCH_DEVICE_BACKEND_AUTOLOAD={autoload} would keep the training process from "
            f"seeing it, and train plain SFT: remove one of them, or set it to 1 (set in {source})."
        )
