"""What every host's hook needs to fail closed: keys that were meant as a block, and how a refused run ends.

Standard library only, like all that the boot hook may load; knows no host.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import XTFUserError, harmless

EMPTY_BLOCK = (
    "the recipe's `xtf:` block is empty. Write `xtf: true` for the defaults, `xtf: false` for off, or a mapping."
)


def meant_as_block(key: str, value: Any) -> bool:
    """Whether an unknown recipe key is `xtf` mistyped: other case or spaces, two letters swapped, one too many, or a
    setting of the block that stands beside it (`xtf.control`, as in a sweep).
    """
    plain = key.strip().casefold()
    if plain == "xtf":
        return key != "xtf"
    if re.match(r"xtf[\W_]", plain):
        return True
    likely = sorted(plain) == sorted("xtf") or (len(plain) == 4 and {"x", "t", "f"} <= set(plain))
    return likely and (value is True or isinstance(value, dict))


def mentions_block(path: str) -> bool:
    """Whether a recipe seems to hold a block, for processes that do not parse it: a key `xtf`, or one meant so.

    A folder of recipes may hold one. Raises OSError for a file that cannot be read.
    """
    if os.path.isdir(path):
        return True
    with open(path, encoding="utf-8-sig", errors="replace") as recipe:
        keys = re.findall(r"""(?m)(?:^|[{,])\s*["']?([\w.-]+)["']?\s*:""", recipe.read())
    return any(key == "xtf" or meant_as_block(key, True) for key in keys)


def wrap(owner: Any, name: str, build: Callable[[Any], Any], undo: list[Callable[[], None]]) -> None:
    """Replace `owner.name` by `build(original)` once, and note in `undo` how to put it back (inherited: delete again).

    Raises AttributeError, before any change, if the owner has no such name.
    """
    original = getattr(owner, name)
    if getattr(original, "_xtf_patch", False):
        return
    replacement: Any = functools.update_wrapper(build(original), original)
    replacement._xtf_patch = True
    own = name in vars(owner)
    undo.append(functools.partial(setattr, owner, name, original) if own else functools.partial(delattr, owner, name))
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


def ending_with_2(function: Callable[..., Any]) -> Callable[..., Any]:
    """Under a stock command nobody can catch the user's error: print it alone and end with 2, without a traceback."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except XTFUserError as error:
            sys.stderr.write(harmless(f"xtf: error: {str(error).removeprefix('xtf: ')}\n"))
            raise SystemExit(2) from error

    return wrapper


def handing_on_2(previous: Callable[..., Any], mine: Callable[[str], bool]) -> Callable[..., Any]:
    """For the process that launched the training: its launcher turns the child's 2 into a traceback and 1; undo that.

    Args:
        previous: the excepthook for everything else.
        mine: told the failed command, whether it is a run that a block of ours may have ended with 2.
    """

    def excepthook(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        one = isinstance(error, subprocess.CalledProcessError) and error.returncode == 2 and mine(str(error.cmd))
        if one or _first_of_several(error) == 2:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(2)  # the only way to choose the exit code here; the child has said why
        previous(kind, error, trace)

    return excepthook


def _first_of_several(error: BaseException) -> int | None:
    """Exit code of the rank that ended first, if `error` is what torch's launcher of several processes raises."""
    if type(error).__name__ != "ChildFailedError":
        return None
    first: Any = error
    return first.get_first_failure()[1].exitcode  # type: ignore[no-any-return]
