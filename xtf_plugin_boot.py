"""The function that PyTorch calls at the end of `import torch`, outside the package, so that it survives its damage.

An error here would break `import torch` for every program, so the package is imported in `install` alone.
"""

from __future__ import annotations

import contextlib
import re
import sys

_REPAIR = "Repair it: pip install --force-reinstall xtf-plugin, or remove it: pip uninstall xtf-plugin"
_KEY = re.compile(r"""(?im)(?:^|[{,])\s*["']?xtf[\w.-]*["']?\s*:""")


def install() -> None:
    """Set up the boot hook. If that fails, print why, and end the process if its command line brings a block."""
    try:
        from xtf_plugin.hosts.boot import install as hook
    except Exception as error:
        _say(f"xtf-plugin is damaged ({type(error).__name__}: {error}): `xtf:` blocks are NOT applied. {_REPAIR}")
        refuse_block(_REPAIR)
        return
    hook()


def refuse_block(why: str) -> None:
    """Raise SystemExit(2) if this process's command line brings an `xtf:` block, which will not be applied."""
    if brings_block(sys.argv[1:]):
        _say(f"xtf: error: this run has an `xtf:` block, which cannot be applied. {why}")
        raise SystemExit(2)


def brings_block(words: list[str]) -> bool:
    """Whether a command line has a block, or names a recipe that seems to have one."""
    if any(word.split("=")[0] == "--xtf" for word in words):
        return True
    for flag, word in zip(["", *words], words, strict=False):
        path = word.partition("=")[2] if word.startswith("--config=") else word
        if flag == "--config" or path.endswith((".yaml", ".yml", ".json")):  # Axolotl's have no flag
            with contextlib.suppress(OSError), open(path, encoding="utf-8-sig", errors="replace") as recipe:
                if _KEY.search(recipe.read()):
                    return True
    return False


def _say(text: str) -> None:
    with contextlib.suppress(OSError, AttributeError, ValueError):  # closed, or None
        sys.stderr.write(f"{text}\n")
