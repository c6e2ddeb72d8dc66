"""What PyTorch calls at the end of `import torch`: a file beside the package, which a damaged package cannot break.

Whatever it raised would break `import torch` for programs that never heard of us. The package may have lost files, or
have been deleted while its metadata stayed; so it is imported inside `install` alone. Standard library only.
"""

from __future__ import annotations

import contextlib
import sys

_REPAIR = "Repair it: pip install --force-reinstall xtf-plugin, or remove it: pip uninstall xtf-plugin"


def install() -> None:
    """Set the boot hook up; if it cannot be, say so and let `import torch` go on, unless this run brings a block."""
    try:
        from xtf_plugin.hosts.autoload import install as hook
    except Exception as error:
        sys.stderr.write(
            f"xtf-plugin is damaged ({type(error).__name__}: {error}): `xtf:` blocks are NOT applied. {_REPAIR}\n"
        )
        if _brings_block(sys.argv[1:]):
            sys.stderr.write(f"xtf: error: this run has an `xtf:` block, which cannot be applied. {_REPAIR}\n")
            raise SystemExit(2) from error
        return
    hook()


def _brings_block(words: list[str]) -> bool:
    """Whether a command line, or a recipe that it names, seems to hold a block."""
    found = any(word.split("=")[0] == "--xtf" for word in words)
    for flag, path in zip(["", *words], words, strict=False):
        if flag == "--config" or path.endswith((".yaml", ".yml", ".json")):
            with contextlib.suppress(OSError), open(path, encoding="utf-8", errors="replace") as recipe:
                found = found or any(line.lstrip(" {\"'").casefold().startswith("xtf") for line in recipe)
    return found
