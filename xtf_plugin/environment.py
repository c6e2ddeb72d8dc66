"""Versions, environment switches and private names of the packages around us, in one place.

Imports the standard library alone, and has no effect without an `xtf:` block.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from importlib import metadata
from typing import Any

from .errors import XTFUserError

# Of each host: its name, the oldest release that can apply a block, the newest that is tested.
# TRL 1.9 is the first whose train rows carry `labels`; older Axolotl releases pin a TRL and a transformers below ours.
HOSTS = {"trl": ("TRL", (1, 9), (1, 16)), "axolotl": ("Axolotl", (0, 19), (0, 19))}

WORKERS_REFUSED = (
    "xtf: the training data is streamed and dataloader_num_workers is {workers}: rows would be fetched in processes "
    "that have no model to score them with. Set dataloader_num_workers: 0, or do not stream (dataset_streaming: false; "
    "streaming: false under `datasets`)."
)

_logger = logging.getLogger("xtf_plugin")


def release(version: str) -> tuple[int, ...]:
    """Return the leading numbers of a version: "1.16.0.dev0" -> (1, 16, 0); () if there are none."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in match.group().split(".")) if match else ()


def is_on(value: str | None) -> bool:
    """Return whether an environment variable's value is one of 1, true, yes, on (any case)."""
    return value is not None and value.strip().lower() in ("1", "true", "yes", "on")


def installed_version(distribution: str) -> str | None:
    """Return the installed version of a distribution, None if it is not installed; imports nothing."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def hook_installed() -> bool:
    """Return whether this environment's metadata makes PyTorch call our boot hook."""
    return any(entry.value.startswith("xtf_plugin_boot:") for entry in metadata.entry_points(group="torch.backends"))


def check_version(host: str) -> None:
    """Refuse an installed host that cannot apply a block, and warn of one that is newer than any tested.

    Raises:
        XTFUserError: it is not installed, or too old.
    """
    name, oldest, tested = HOSTS[host]
    version = installed_version(host)
    legal, newest = f"{host}>={oldest[0]}.{oldest[1]}", f"{tested[0]}.{tested[1]}"
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


def signature_columns(trainer: Any) -> list[str]:
    """The columns that a transformers Trainer does not remove from its rows; TRL and Axolotl have lists of their own.

    Private: `Trainer._signature_columns`. Without it training begins with an AttributeError; tests/training/test_callback.py.
    """
    before = trainer._signature_columns
    if before is None:
        trainer._set_signature_columns_if_needed()
    known: list[str] = trainer._signature_columns
    trainer._signature_columns = before  # Axolotl's packing takes a column out of the list, once, when it is asked
    return known
