"""Takes the hooks of this process back, so that a test can see stock behaviour or install them afresh."""

from __future__ import annotations

import sys
from typing import Any

from xtf_plugin.hosts import boot, trl

PATCHED = (
    ("trl.scripts.utils", "TrlParser", ("__init__", "set_defaults_with_config", "parse_args_into_dataclasses")),
    ("trl.trainer.sft_trainer", "SFTTrainer", ("__init__",)),
    ("transformers.trainer", "Trainer", ("train",)),
)


def uninstall() -> None:
    boot._waiting.clear()
    if boot._finder in sys.meta_path:
        sys.meta_path.remove(boot._finder)
    trl._argument_added = trl._block_parsed = False
    for module, owner, names in PATCHED:
        kind: Any = getattr(sys.modules.get(module), owner, None)
        for name in names:
            patch = vars(kind).get(name) if kind is not None else None
            if getattr(patch, "_xtf_patch", False):
                delattr(kind, name)
                if getattr(kind, name, None) is not patch.__wrapped__:  # it was the class's own, not inherited
                    setattr(kind, name, patch.__wrapped__)
