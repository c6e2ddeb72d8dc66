"""What PyTorch calls at the end of `import torch`: a file beside the package, which a damaged package cannot break.

Whatever it raised would break `import torch` for programs that never heard of us. The package may have lost files, or
have been deleted while its metadata stayed; so it is imported inside `install` alone. Standard library only.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable

_REPAIR = "Repair it: pip install --force-reinstall xtf-plugin, or remove it: pip uninstall xtf-plugin"

_KEY = r"""(?im)(?:^|[{,])\s*["']?xtf[\w.-]*["']?\s*:"""


def install() -> None:
    """Set the boot hook up; if it cannot be, say so and let `import torch` go on, unless this run brings a block."""
    try:
        from xtf_plugin.hosts.autoload import install as hook
    except Exception as error:
        _say(f"xtf-plugin is damaged ({type(error).__name__}: {error}): `xtf:` blocks are NOT applied. {_REPAIR}")
        if brings_block(sys.argv[1:], names_block):
            _say(f"xtf: error: this run has an `xtf:` block, which cannot be applied. {_REPAIR}")
            raise SystemExit(2) from error
        return
    hook()


def _say(text: str) -> None:
    with contextlib.suppress(OSError, AttributeError, ValueError):  # closed, or none (pythonw)
        sys.stderr.write(f"{text}\n")


def names_block(path: str) -> bool:
    """`hosts.guard.mentions_block` where that is lost."""
    with open(path, encoding="utf-8-sig", errors="replace") as recipe:
        return re.search(_KEY, recipe.read()) is not None


def brings_block(words: list[str], mentions: Callable[[str], bool]) -> bool:
    """Whether a command line holds a block, or a recipe that it names `mentions` one."""
    found = any(word.split("=")[0] == "--xtf" for word in words)
    for flag, word in zip(["", *words], words, strict=False):
        path = word.partition("=")[2] if word.startswith("--config=") else word
        if flag == "--config" or path.endswith((".yaml", ".yml", ".json")):  # Axolotl's recipes follow no flag
            with contextlib.suppress(OSError):
                found = found or mentions(path)
    return found
