"""Whether the Hugging Face hub, or its cache on this disk, has a model or a data set that a recipe names.

A name that is not a folder is taken for one of the hub. So a mistyped folder is found only when the hub refuses it,
after many retries. Here the hub is asked once, and once more for a file of a gated one.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from functools import cache
from http.client import HTTPException
from pathlib import Path
from typing import Any, Literal
from urllib.error import HTTPError
from urllib.parse import quote
from urllib.request import HTTPRedirectHandler, Request, build_opener, urlopen

from ..environment import is_on

Kind = Literal["model", "dataset"]
SECONDS = 5.0  # for an answer of the hub


def folder_of(name: str | None, revision: str | None, env: Mapping[str, str]) -> Path | None:
    """The folder of a model's files: its own, or that of its revision in the hub's cache; None: not here.

    Args:
        name, revision: as `from_pretrained` takes them.
        env: the variables of the process that will load it.
    """
    if os.path.isdir(str(name)):  # unlike `Path`, it takes names of any length
        return Path(str(name))
    model = _cache(env) / ("models--" + str(name).replace("/", "--"))
    named, commit = model / "refs" / (revision or "main"), revision or ""
    if os.path.isfile(named):
        commit = named.read_text(encoding="utf-8").strip()
    found = model / "snapshots" / commit
    return found if commit and os.path.isfile(found / "config.json") else None


def looked_at(path: str) -> str:
    """The whole path of a relative one, to follow it in a message; empty for any other."""
    return "" if path.startswith(("/", "~")) else f" (looked for: {Path(path).absolute()})"


def _home(env: Mapping[str, str]) -> str:
    return env.get("HF_HOME") or os.path.join(env.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")


def _cache(env: Mapping[str, str]) -> Path:
    hub = env.get("HF_HUB_CACHE") or env.get("HUGGINGFACE_HUB_CACHE") or os.path.join(_home(env), "hub")
    return Path(os.path.expandvars(os.path.expanduser(hub)))


def _holds_data(name: str, env: Mapping[str, str]) -> bool:
    """Whether a cache holds something of a data set."""
    prepared = env.get("HF_DATASETS_CACHE") or os.path.join(_home(env), "datasets")
    folder, plain = Path(os.path.expandvars(os.path.expanduser(prepared))), re.compile(r"[^a-z0-9]")
    known = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    wanted = plain.sub("", name.lower())
    return os.path.isdir(_cache(env) / ("datasets--" + name.replace("/", "--"))) or any(
        plain.sub("", each.lower()) == wanted for each in known
    )


def missing(kind: Kind, name: str, revision: str | None, env: Mapping[str, str]) -> str:
    """Why a run cannot fetch what is not a folder here, with the next step; empty: it can, or nobody can tell.

    Args:
        name, revision: as the host hands them on.
        env: the variables of the process that will fetch it.
    """
    here = folder_of(name, revision, env) is not None if kind == "model" else _holds_data(name, env)
    if here:
        return ""
    if is_on(env.get("HF_HUB_OFFLINE")):
        of = f" (revision {revision})" if revision else ""
        why = f"{name}{of} is not in the cache, and HF_HUB_OFFLINE is set. Unset it, or name a folder"
    else:
        token = "".join((env.get("HF_TOKEN") or "").split())  # a block of YAML text ends with a line feed
        why = _answer(kind, name, env.get("HF_ENDPOINT") or "https://huggingface.co", token or None)
    folder = Path(name).absolute()
    return why and f"there is no folder {folder}, so {name} would be fetched from the Hugging Face hub: {why}."


@cache
def _answer(kind: Kind, name: str, endpoint: str, token: str | None) -> str:
    """What is wrong with a name by the hub's answer; empty: nothing, or the answer does not say."""
    home, where = endpoint.rstrip("/"), quote(name)
    try:
        with urlopen(_request(f"{home}/api/{kind}s/{where}", token), timeout=SECONDS) as answer:
            file = _behind_a_gate(answer.read())
        page = f"{home}/{'datasets/' if kind == 'dataset' else ''}{where}"
        if file and _refuses(_request(f"{page}/resolve/main/{quote(file)}", token, "HEAD")):
            return (
                f"it is gated, and its files are not open to you. Accept its terms at {page}, then log in (hf auth "
                "login) or set HF_TOKEN"
            )
        return ""
    except HTTPError as error:
        if error.code not in (401, 403, 404):
            return ""
        return (
            f"it has no such {kind}, or you may not read it. Correct the folder or the name; for a private one log in "
            "(hf auth login)"
        )
    except (OSError, ValueError, HTTPException) as error:  # a URLError is an OSError
        why = getattr(error, "reason", None) or error
        return f"{endpoint} cannot be reached ({why}). Correct the folder, or go on where there is a network"


def _behind_a_gate(facts: bytes) -> str:
    """A file of a gated model or data set, from what the hub says of it; empty: it is not gated.

    The hub tells everybody about a gated one. Its files it gives only to who has accepted the terms.
    """
    try:
        known = json.loads(facts)
        files = [str(each["rfilename"]) for each in known["siblings"]] if known["gated"] else []
    except (ValueError, TypeError, KeyError):  # a mirror may say less
        return ""
    closed = [file for file in files if not file.startswith((".", "README", "LICENSE"))]
    return "config.json" if "config.json" in closed else next(iter(closed), "")


def _refuses(request: Request) -> bool:
    """Whether the hub does not give a file to this user; where the file itself lies is not asked."""
    try:
        with build_opener(_NoRedirect).open(request, timeout=SECONDS):
            return False
    except HTTPError as error:
        return error.code in (401, 403)
    except (OSError, HTTPException):  # the hub has answered before, so nothing is known
        return False


class _NoRedirect(HTTPRedirectHandler):
    """Takes a redirection for an answer."""

    def redirect_request(self, *_: Any) -> None:
        """No further request."""


def _request(url: str, token: str | None, method: str = "GET") -> Request:
    """A request with `token`, or without one with that of this machine's user."""
    from huggingface_hub import get_token

    token = token or get_token()
    return Request(url, headers={"authorization": f"Bearer {token}"} if token else {}, method=method)
