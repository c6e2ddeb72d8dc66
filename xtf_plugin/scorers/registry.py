"""Which scorers there are: the built-in ones and those of installed packages, found by entry point.

A package's code is imported when a block names its scorer, never before: an unused broken package breaks nothing.
"""

from __future__ import annotations

import difflib
import inspect
import os
import sys
from functools import lru_cache
from importlib import metadata

from .. import environment
from ..errors import XTFUserError
from .attention_received import attention_received
from .base import ScoreConfig, Scorer
from .column import column
from .embedding_similarity import embedding_similarity
from .excess_loss import excess_loss, token_cleaning
from .explained import explained
from .influence import influence
from .log_probability import log_probability
from .new_text import new_text
from .novelty import novelty
from .running_text import running_text
from .typicality import typicality

GROUP = "xtf_plugin.scorers"
_PAPER = (attention_received, novelty, embedding_similarity)
_DEFAULT = (influence, new_text, explained)
_OTHERS = (typicality, log_probability, excess_loss, token_cleaning, running_text, column)
BUILTIN: dict[str, Scorer] = {each.name: each for each in (*_PAPER, *_DEFAULT, *_OTHERS)}
# Scorers that earlier versions had, and what to write instead.
_REMOVED = {
    "opening": "was removed, because it tells noise of real models from good text little better than chance. Write "
    "`explained`, which asks sentences or lines, without `clip` and `context`, and with `drop: {of_median: 0.2}`"
}
# The errors that importing another package's module raises; others, such as KeyboardInterrupt, end the process.
_IMPORT_ERRORS: tuple[type[Exception], ...] = (ImportError, AttributeError, SyntaxError, NameError, TypeError)
_IMPORT_ERRORS += (ValueError, LookupError, RuntimeError, OSError)


def find(name: str) -> Scorer:
    """The scorer registered under a name.

    Raises:
        XTFUserError: no such name, two packages claim it, its package cannot be imported, or it does not conform. The
            text follows the name in the message: "is not a registered scorer ...".
    """
    entries = [entry for entry in _registered() if entry.name == name]
    entries = list({(entry.value, _package(entry)): entry for entry in entries}.values())  # a folder twice on sys.path
    if name in BUILTIN and not entries:
        return BUILTIN[name]
    if not entries and name in _REMOVED:
        raise XTFUserError(_REMOVED[name])
    if not entries:
        known = [*BUILTIN, *sorted({entry.name for entry in _registered()} - BUILTIN.keys())]
        near = difflib.get_close_matches(name.lower().replace("-", "_"), known, n=1, cutoff=0.5)
        hint = f"Did you mean {near[0]}? " if near else ""
        raise XTFUserError(f"is not a registered scorer. {hint}Registered: {', '.join(known)}; {_how()}")
    if name in BUILTIN or len(entries) > 1:
        owners = ["xtf-plugin"] * (name in BUILTIN) + sorted(map(_package, entries))
        raise XTFUserError(f"is a scorer of several packages ({', '.join(owners)}); uninstall all but one of them")
    return _loaded(entries[0])


def _how() -> str:
    page = environment.docs("own-scorer.md")
    return f"a package registers one as an entry point of the group {GROUP}, see {page}"


def package_of(name: str) -> str:
    """The distribution that registers a scorer, with its version: "some-package 1.2"."""
    found = [entry for entry in _registered() if entry.name == name]
    return _package(found[0]) if found else "xtf-plugin"


def _registered() -> tuple[metadata.EntryPoint, ...]:
    """The entry points of all packages, read again only if one was installed or removed, or `sys.path` changed.

    A command asks dozens of times, and each reading takes 20 ms, since it opens a file of every installed package.
    """
    return _read(tuple((place, _changed(place)) for place in sys.path))


@lru_cache(maxsize=1)
def _read(places: tuple[tuple[str, int], ...]) -> tuple[metadata.EntryPoint, ...]:
    return tuple(metadata.entry_points(group=GROUP))


def _changed(place: str) -> int:
    """When a folder's entries last changed."""
    try:
        return os.stat(place or ".").st_mtime_ns
    except OSError:
        return 0


def _package(entry: metadata.EntryPoint) -> str:
    return "an unnamed package" if entry.dist is None else f"{entry.dist.name} {entry.dist.version}"


def _loaded(entry: metadata.EntryPoint) -> Scorer:
    owner = f"of the package {_package(entry)} ({entry.value})"
    try:
        found: Scorer = entry.load()
    except _IMPORT_ERRORS as error:
        why = f"{type(error).__name__}: {error}"
        raise XTFUserError(f"{owner} cannot be imported: {why}. Repair or update that package") from error
    problems = complaints(found)
    if not problems and found.name != entry.name:
        problems = [f"its `name` is {found.name!r}"]
    if problems:
        raise XTFUserError(f"{owner} is not a usable scorer: {'; '.join(problems)}. Ask that package's authors")
    return found


def complaints(found: object) -> list[str]:
    """Why an object is not a scorer; empty if it is one."""
    if not isinstance(found, Scorer):
        return [f"{found!r} is not made by the decorator xtf_plugin.scorers.scorer"]
    problems = []
    if type(found.version) is not int:
        problems.append(f"its `version` is {found.version!r}, no whole number")
    if not callable(found.score):
        problems.append("its `score` cannot be called")
    if not inspect.isclass(found.Config) or not issubclass(found.Config, ScoreConfig):
        problems.append("its config is not a class derived from xtf_plugin.scorers.ScoreConfig")
    elif found.Config.model_config.get("extra") != "forbid" or not found.Config.model_config.get("frozen"):
        problems.append("its config does not forbid unknown keys, or is not frozen")
    return problems
