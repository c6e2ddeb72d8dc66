"""The boot hook: PyTorch calls `install` at the end of `import torch`, in every process of the environment.

It exists because a stock `trl sft` offers a pip-installed package no other way in (`pyproject.toml`, entry point group
`torch.backends`). Whatever it raised would break `import torch` for programs that never heard of us, so it is standard
library only, imports neither torch nor trl, and reports instead of raising.

Torch is often imported from inside a half-executed trl module. `when_imported` therefore tells three states apart:
absent (watch the spec that the import system will find), half-imported (watch the spec that is being loaded) and
complete (go). A watched spec keeps its stock loader; it only notices importlib setting `_initializing` back to False,
which happens once per load, after the module's last line or its failure. So a broken trl fails with its own error.

`XTF_DISABLE=1` is not read here but where a block is parsed: an off switch that lets a recipe's `xtf:` block pass
unnoticed would train plain SFT by accident. `TORCH_DEVICE_BACKEND_AUTOLOAD=0` keeps PyTorch from calling `install`.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

PARSER_MODULE = "trl.scripts.utils"
AXOLOTL_MODULE = "axolotl.cli.config"

_waiting: dict[str, Callable[[ModuleType], None]] = {}
_searching = threading.local()


def install() -> None:
    """Arrange that TRL's parser learns the `xtf:` block, and that Axolotl refuses one which its plugin does not apply,
    once their modules are complete; idempotent. Raises SystemExit if a block could not be applied.
    """
    for name, patch, host, cure in (
        (PARSER_MODULE, _teach, "TRL", "pip install 'trl>=1.9'"),
        (AXOLOTL_MODULE, _guard, "Axolotl", "pip install axolotl==0.19.0"),
    ):
        reported = partial(_report_failure, host, cure)
        reported(when_imported, name, partial(reported, patch))


def when_imported(name: str, callback: Callable[[ModuleType], None]) -> None:
    """Call `callback(module)` once the module `name` is completely imported: now, or right after its import.

    An exception from a deferred `callback` surfaces from that import. A failed import leaves the callback waiting for
    the next attempt. A second callback for a module still awaited replaces the first.
    """
    module = sys.modules.get(name)
    spec = getattr(module, "__spec__", None)
    half_imported = getattr(spec, "_initializing", False)
    if module is not None and not half_imported:
        callback(module)
        return
    _waiting[name] = callback
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
    if half_imported:
        _watch(spec)
        if not getattr(spec, "_initializing", False):  # another thread finished the import in between
            _import_ended(name)


class _Finder:
    """Meta path finder that lets the other finders find an awaited module, and watches what they found."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """Return the other finders' spec, watched; None for every module nobody waits for."""
        if name not in _waiting or getattr(_searching, "active", False):
            return None
        _searching.active = True  # a finder that asks the whole meta path, like this one, must not recurse for ever
        try:
            for finder in list(sys.meta_path):
                find = getattr(finder, "find_spec", None)
                spec = None if finder is self or find is None else find(name, path, target)
                if spec is not None:
                    _watch(spec)
                    return spec
        finally:
            _searching.active = False
        return None


_finder = _Finder()


def _watch(spec: Any) -> None:
    """Give `spec` a class that calls `_import_ended` when importlib declares its load over.

    A spec that cannot be watched (no importer is known to make one) fails the import: after a parsed block, the other
    outcome would be plain SFT.
    """
    base: Any = type(spec)
    if getattr(base, "_xtf_watched", False):
        return

    def set_attribute(self: Any, key: str, value: Any) -> None:
        base.__setattr__(self, key, value)
        if key == "_initializing" and not value:
            base.__setattr__(self, "__class__", base)
            _import_ended(self.name)

    spec.__class__ = type(base.__name__, (base,), {"__setattr__": set_attribute, "_xtf_watched": True})


def _import_ended(name: str) -> None:
    module = sys.modules.get(name)
    callback = None if module is None else _waiting.pop(name, None)  # None: the import failed; wait for the next one
    if module is not None and callback is not None:
        callback(module)


def _teach(module: ModuleType) -> None:
    from ..hosts import trl

    trl.patch_parser(module)


def _guard(module: ModuleType) -> None:
    from ..hosts import axolotl_checks

    axolotl_checks.patch_config(module)


def _report_failure(host: str, cure: str, action: Callable[..., None], *args: Any) -> None:
    """Call `action`; log what it raises, and end a run that brings an `xtf:` block.

    One of few places that catch `Exception`: letting anything through would break `import torch`, or the
    import of a host, for programs without an `xtf:` block.
    """
    try:
        action(*args)
    except Exception as error:
        import logging

        from xtf_plugin_boot import refuse_block

        why = f"{type(error).__name__}: {error}"
        logging.getLogger("xtf_plugin").error(
            "xtf-plugin could not hook into %s (%s): `xtf:` blocks are NOT applied in this process. "
            "Reinstall xtf-plugin, or `pip uninstall xtf-plugin`.",
            host,
            why,
        )
        if isinstance(error, (ImportError, SyntaxError)):
            cure = "pip install --force-reinstall xtf-plugin"
        refuse_block(f"xtf-plugin does not fit the installed {host} ({why}). Install what fits: {cure}")
