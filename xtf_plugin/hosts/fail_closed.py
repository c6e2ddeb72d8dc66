"""What every host's hook needs to fail closed: keys that were meant as a block, and how a refused run ends.

Standard library only, like all that the boot hook may load; knows no host.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import XTFUserError, harmless

EMPTY_BLOCK = (
    "the recipe's `xtf:` block is empty. Write `xtf: true` for the defaults, `xtf: false` for off, or a mapping."
)


def meant_as_block(key: str) -> bool:
    """Whether a key that no host knows is `xtf` in another case, or a setting of the block beside it: `xtf.control`."""
    return key != "xtf" and re.match(r"\s*xtf(\W|_|$)", key, re.IGNORECASE) is not None


def wrap(owner: Any, name: str, build: Callable[[Any], Any]) -> None:
    """Replace `owner.name` by `build(original)`, once.

    Raises AttributeError, before any change, if the owner has no such name.
    """
    original = getattr(owner, name)
    if getattr(original, "_xtf_patch", False):
        return
    replacement: Any = functools.update_wrapper(build(original), original)
    replacement._xtf_patch = True
    setattr(owner, name, replacement)


@contextmanager
def whole_installation() -> Iterator[None]:
    """Around imports that only a block needs: what is missing becomes a message with the next step.

    Raises:
        XTFUserError: a module of ours, or what it needs of another package, is missing, damaged or too old.
    """
    try:
        yield
    except (ImportError, SyntaxError, AttributeError) as error:
        raise XTFUserError(
            f"xtf: xtf-plugin, or a package that it needs, is damaged or too old ({type(error).__name__}: {error}), so "
            "the `xtf:` block cannot be applied. Repair it: pip install --force-reinstall xtf-plugin"
        ) from error


def exit_on_user_error(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make `function` print a user's error alone and raise SystemExit(2): under a stock command nobody catches it."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except XTFUserError as error:
            sys.stderr.write(harmless(f"xtf: error: {str(error).removeprefix('xtf: ')}\n"))
            raise SystemExit(2) from error

    return wrapper
