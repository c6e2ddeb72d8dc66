"""Public names of xtf-plugin, resolved on first use.

`import xtf_plugin` must import neither torch nor a trainer: PyTorch imports this package at the end of `import torch`,
in every process that uses torch, whether or not it trains.
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
__all__ = [
    "XTFCallback",
    "XTFConfig",
    "XTFDataCollator",
    "XTFDryRun",
    "XTFError",
    "XTFPlugin",
    "XTFUserError",
    "attach",
]

_HOME = {
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
    """Import the module that defines `name` the first time it is asked for (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    """List the lazy names too."""
    return sorted({*globals(), *__all__})
