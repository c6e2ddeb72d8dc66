"""Completions as Markdown with the dropped tokens struck through: the figures say how much, only reading says what."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.benchmarks.proof.data import Row

Flags = NDArray[np.bool_]
LONGEST = 600
BEFORE = 25  # kept tokens shown before the first dropped one where a text is too long to show whole
SPECIAL = re.compile(r"([\\`*_~<>#|\[\]$&])")


def escaped(text: str) -> str:
    """Text that Markdown shows as it is, on one line: line breaks are ⏎, and spaces that would vanish are dots."""
    text = re.sub(r" {2,}", lambda found: "·" * len(found[0]), text)
    return SPECIAL.sub(r"\\\1", text).replace("\n", "⏎")


def struck(text: str) -> str:
    """Struck through; spaces at the ends go outside, or Markdown would print the tildes."""
    if not text.strip():
        return f"~~{escaped(text).replace(' ', '␣')}~~" if text else ""
    body = text.strip(" ")
    before, after = text[: len(text) - len(text.lstrip(" "))], text[len(text.rstrip(" ")) :]
    return f"{escaped(before)}~~{escaped(body)}~~{escaped(after)}"


def marked(ids: Sequence[int], dropped: Sequence[bool], tokenizer: Any) -> str:
    """A completion as one line of Markdown."""
    parts = []
    for gone, group in groupby(zip(ids, dropped, strict=True), key=lambda pair: pair[1]):
        text = tokenizer.decode([token for token, _ in group])
        parts.append(struck(text) if gone else escaped(text))
    return "".join(parts)


def excerpt(ids: Sequence[int], dropped: Sequence[bool], tokenizer: Any, longest: int = LONGEST) -> str:
    """`marked`, cut to `longest` characters around the first dropped token where the whole is longer."""
    whole = marked(ids, dropped, tokenizer)
    if len(whole) <= longest:
        return whole
    begin = max(0, list(dropped).index(True) - BEFORE)
    end = len(ids)
    while True:
        text = ("… " if begin else "") + marked(ids[begin:end], dropped[begin:end], tokenizer)
        text += " …" if end < len(ids) else ""
        if len(text) <= longest:
            return text
        end -= 1


def shown(
    rows: Sequence[Row], dropped: Flags, rules: Mapping[str, Flags], tokenizer: Any, number: int
) -> list[dict[str, Any]]:
    """The first rows of which something is dropped: index, text, and which rules dropped how many tokens."""
    found: list[dict[str, Any]] = []
    at = 0
    for index, row in enumerate(rows):
        own = slice(at, at + len(row.completion))
        at = own.stop
        if len(found) < number and dropped[own].any():
            counts = {rule: int(flags[own].sum()) for rule, flags in rules.items() if flags[own].any()}
            text = excerpt(row.completion, dropped[own].tolist(), tokenizer)
            found.append({"row": index, "tokens": len(row.completion), "rules": counts, "text": text})
    return found
