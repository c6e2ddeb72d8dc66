"""Helpers of all hosts' hooks, so that no run with an `xtf:` block trains plain SFT. Standard library only."""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import XTFError, XTFUserError, harmless

EMPTY_BLOCK = (
    "the recipe's `xtf:` block is empty. Write `xtf: true` for the defaults, `xtf: false` for off, or a mapping."
)


def meant_as_block(key: str) -> bool:
    """Whether a key is a mistyped `xtf` (`XTF`, `xft`, `xtff`), or one of its settings beside it (`xtf.seed`)."""
    return key != "xtf" and set(re.split(r"[\W_]", key.strip().lower())[0]) == set("xtf")


def wrap(owner: Any, name: str, build: Callable[[Any], Any]) -> None:
    """Replace `owner.name` by `build(original)`, once. Raises AttributeError if the owner has no such name."""
    original = getattr(owner, name)
    if getattr(original, "_xtf_patch", False):
        return
    replacement: Any = functools.update_wrapper(build(original), original)
    replacement._xtf_patch = True
    setattr(owner, name, replacement)


@contextmanager
def complete_installation() -> Iterator[None]:
    """Raise XTFUserError if an import inside fails: a module of ours or of another package is missing or damaged."""
    try:
        yield
    except (ImportError, SyntaxError, AttributeError) as error:
        raise XTFUserError(
            f"xtf: xtf-plugin, or a package that it needs, is damaged or too old ({type(error).__name__}: {error}), so "
            "the `xtf:` block cannot be applied. Repair it: pip install --force-reinstall xtf-plugin"
        ) from error


def exit_on_error(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make `function` print an XTFError as one message and raise SystemExit(2): stock commands do not catch it.

    An error of a dataloader's process arrives with its traceback, of which the message is printed alone.
    """

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except XTFError as error:
            message = re.split(r"\n(?:[\w.]+\.)?XTF(?:User)?Error: ", str(error))[-1].strip().removeprefix("xtf: ")
            sys.stderr.write(harmless(f"xtf: error: {message}\n"))
            raise SystemExit(2) from error

    return wrapper
