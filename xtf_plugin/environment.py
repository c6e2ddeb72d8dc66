"""Versions, environment variables and private names of other packages. Standard library only."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from .errors import XTFUserError

# By distribution: name, oldest release that can apply a block, newest that is tested.
# TRL 1.9 is the first with `labels` in train rows; older releases of Axolotl pin a TRL and a transformers below ours.
HOSTS = {"trl": ("TRL", (1, 9), (1, 16)), "axolotl": ("Axolotl", (0, 19), (0, 19))}

# In names of architectures that predict no next tokens.
NO_CAUSAL_LM = ("ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")

RECIPE = "_xtf_recipe"  # attribute of a trainer: hashes of the recipe's settings that decide which rows are trained

WORKERS_REFUSED = (
    "xtf: the training data is streamed and dataloader_num_workers is {workers}: rows would be fetched in processes "
    "that have no model to score them with. Set dataloader_num_workers: 0, or do not stream (dataset_streaming: false; "
    "streaming: false under `datasets`)."
)


def release(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: "1.16.0.dev0" -> (1, 16, 0); () if there are none."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in match.group().split(".")) if match else ()


def is_on(value: str | None) -> bool:
    """Whether an environment variable's value is 1, true, yes or on, in any case."""
    return value is not None and value.strip().lower() in ("1", "true", "yes", "on")


def return_freed_memory() -> None:
    """Give memory that this process has freed back to the system, where its C library is glibc.

    glibc keeps the pages of many small and large blocks that were freed in turn, as scoring leaves them, and training
    would take other ones.
    """
    import ctypes  # not at the top: the boot hook reads this file

    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def installed_version(distribution: str) -> str | None:
    """The installed version of a distribution, None if it is not installed; imports nothing."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def docs(page: str) -> str:
    """Where a page of docs/ is to be read: the address in the package's metadata (pyproject.toml), and the page."""
    try:
        urls = dict(line.split(", ", 1) for line in metadata.metadata("xtf-plugin").get_all("Project-URL") or ())
    except metadata.PackageNotFoundError:
        urls = {}
    return f"{urls['Documentation']}/{page}" if "Documentation" in urls else f"docs/{page}"


def recipes() -> Path:
    """The folder of recipes: in the package, or in a clone beside it."""
    package = Path(__file__).parent
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def hook_installed() -> bool:
    """Whether PyTorch calls our boot hook in this environment, by its metadata."""
    return any(entry.value.startswith("xtf_plugin_boot:") for entry in metadata.entry_points(group="torch.backends"))


def check_version(host: str) -> None:
    """Warn of a host that is newer than any tested. Raises XTFUserError if it is not installed or too old."""
    name, oldest, tested = HOSTS[host]
    version = installed_version(host)
    legal, newest = f"{host}>={oldest[0]}.{oldest[1]}", f"{tested[0]}.{tested[1]}"
    if version is None or release(version)[:2] < oldest:
        found = "not installed" if version is None else f"version {version}"
        raise XTFUserError(
            f"xtf: {name} is {found}, an `xtf:` block needs {legal} (tested up to {newest}). Run: pip install '{legal}'"
        )
    if release(version)[:2] > tested:
        logger = logging.getLogger("xtf_plugin")
        logger.warning("xtf: %s %s is newer than the newest tested release, %s.", name, version, newest)


def check_disabled(environment: Mapping[str, str], source: str = "this process's environment") -> None:
    """Raise XTFUserError for an environment that switches XTF off; call it for recipes with a block."""
    if is_on(environment.get("XTF_DISABLE")):
        raise XTFUserError(
            f"xtf: block present but XTF_DISABLE={environment['XTF_DISABLE']}: remove one of them (set in {source})."
        )


def check_switches(environment: Mapping[str, str], source: str = "this process's environment") -> None:
    """Raise XTFUserError if the training process, with this environment, would refuse or ignore a block."""
    check_disabled(environment, source)
    autoload = environment.get("TORCH_DEVICE_BACKEND_AUTOLOAD", "1")
    if autoload != "1":  # PyTorch's own test: every value but "1" turns autoloading off
        raise XTFUserError(
            f"xtf: block present but TORCH_DEVICE_BACKEND_AUTOLOAD={autoload} makes the training process ignore it "
            f"and train plain SFT: remove one of them, or set it to 1 (set in {source})."
        )


def signature_columns(trainer: Any) -> list[str]:
    """The columns that a transformers Trainer keeps in its rows; TRL and Axolotl set lists of their own.

    Private: `Trainer._signature_columns`. Without it, attaching raises AttributeError; tests/training/test_callback.py.
    """
    before = trainer._signature_columns
    if before is None:
        trainer._set_signature_columns_if_needed()
    known: list[str] = trainer._signature_columns
    trainer._signature_columns = before  # Axolotl's packing changes the list when it sets it
    return known
