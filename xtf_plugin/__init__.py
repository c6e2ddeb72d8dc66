"""The public names of xtf-plugin, imported on first use.

`import xtf_plugin` imports neither torch nor a trainer, since PyTorch imports this package at the end of every
`import torch`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config.block import XTFConfig
    from .errors import XTFDryRun, XTFError, XTFUserError
    from .hosts.axolotl import XTFPlugin
    from .training.callback import XTFCallback, attach
    from .training.collator import XTFDataCollator

__version__ = "0.1.0"
__all__ = ["XTFCallback", "XTFConfig", "XTFDataCollator", "XTFDryRun", "XTFError", "XTFPlugin", "XTFUserError"]
__all__ += ["attach"]

_MODULES = {
    "XTFCallback": "training.callback",
    "XTFConfig": "config.block",
    "XTFDataCollator": "training.collator",
    "XTFDryRun": "errors",
    "XTFError": "errors",
    "XTFPlugin": "hosts.axolotl",
    "XTFUserError": "errors",
    "attach": "training.callback",
}


def __getattr__(name: str) -> Any:
    """Import the module that defines `name` on first use (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    """All names, also those that are not imported yet."""
    return sorted({*globals(), *__all__})
