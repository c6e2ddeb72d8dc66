"""The boot hook: PyTorch calls `install` at the end of `import torch`, in every process of the environment.

No other way leads from a pip-installed package into a stock `trl sft` (`pyproject.toml`, group `torch.backends`). An
error here would break `import torch` for every program, so this module is standard library only, and logs errors.

Torch is often imported while a trl module is half executed. So `when_imported` handles three states: a module that is
absent (watch the spec that the import system will find), half imported (watch the spec that is being loaded), or
complete (call back at once). A watched spec keeps its loader; it notices that importlib sets `_initializing` to False,
once per load, after the module's last line or its failure. A broken trl fails with its own error.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any

PARSER_MODULE = "trl.scripts.utils"
AXOLOTL_MODULE = "axolotl.cli.config"

_waiting: dict[str, Callable[[ModuleType], None]] = {}
_searching = threading.local()


def install() -> None:
    """Patch TRL's parser and Axolotl's loading of recipes once they are imported; idempotent.

    Raises SystemExit if that fails and the command line names a recipe with an `xtf:` block.
    """
    for name, patcher, host, cure in (
        (PARSER_MODULE, "trl", "TRL", "pip install 'trl>=1.9'"),
        (AXOLOTL_MODULE, "axolotl_checks", "Axolotl", "pip install axolotl==0.19.0"),
    ):
        reported = partial(_report_failure, host, cure)
        reported(when_imported, name, partial(reported, _patch, patcher))


def when_imported(name: str, callback: Callable[[ModuleType], None]) -> None:
    """Call `callback(module)` once the module `name` is completely imported: now, or right after its import.

    An exception of a deferred `callback` is raised by that import. After a failed import, the callback waits for the
    next one. A second callback for the same module replaces the first.
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
    """A meta path finder that returns the other finders' spec of an awaited module, watched."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """The watched spec; None for a module that is not awaited."""
        if name not in _waiting or getattr(_searching, "active", False):
            return None
        _searching.active = True  # another finder may ask all finders too, and must not recurse into this one
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
    """Give `spec` a class that calls `_import_ended` when importlib ends the load."""
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


def _patch(patcher: str, module: ModuleType) -> None:
    import_module(f".{patcher}", __package__).patch(module)


def _report_failure(host: str, cure: str, action: Callable[..., None], *args: Any) -> None:
    """Call `action`; log its error, and end the process with 2 if the command line names a recipe with an `xtf:` block.

    It catches every `Exception`: one would break `import torch`, or a host's import, for programs without a block.
    """
    try:
        action(*args)
    except Exception as error:
        import logging

        from xtf_plugin_boot import refuse_block

        why = f"{type(error).__name__}: {error}"
        logging.getLogger("xtf_plugin").error(
            "xtf-plugin could not patch %s (%s): `xtf:` blocks are NOT applied in this process.", host, why
        )
        if isinstance(error, (ImportError, SyntaxError)):
            cure = "pip install --force-reinstall xtf-plugin"
        refuse_block(f"xtf-plugin does not fit the installed {host} ({why}). Install what fits: {cure}")
