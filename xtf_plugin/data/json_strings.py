r"""Texts inside JSON, whose line breaks are written as a backslash and an n.

An answer that is a JSON object, or calls a tool with one, is a single line, however many sentences are in its strings.
Only what parses as JSON is read so: in other text `\n` may be LaTeX (`\nu`), a path or code.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence

import numpy as np

from .token_text import byte_offsets

Span = tuple[int, int]

# an object that begins a text, a line, or what follows a tag
_OBJECT = re.compile(r'(?:\A|[\n>])\s*(\{\s*")')
_STRING = re.compile(r'"([^"\\]*(?:\\.[^"\\]*)*)"?', re.DOTALL)
_KEY = re.compile(r"\s*:")
_BREAK = re.compile(r"((?:\\r)?\\n(?:\\[nrt]|\s)*)|\\.", re.DOTALL)  # the second: any other escape, also \\ before an n


def strings(pieces: Sequence[bytes]) -> Iterator[tuple[Span, list[Span]]]:
    """The strings that are values of JSON objects in a text, given the bytes of its tokens.

    An object counts if it parses, or if the text ends in the midst of it.

    Returns:
        for each string its first token after the opening quote, and the token with the closing quote (the number of
        tokens, if there is none); and likewise for each line break with the white space after it, its first token and
        the one that holds what follows.
    """
    data = b"".join(pieces)
    text = data.decode("utf-8", errors="surrogateescape")
    found = list(_spans(text))
    if not found:  # most braces are those of code or LaTeX
        return
    places = byte_offsets(text, len(data))
    ends = np.cumsum([len(piece) for piece in pieces])
    begins = ends - [len(piece) for piece in pieces]
    for spans in found:
        low, high = places[np.asarray(spans)].T
        first, behind = np.searchsorted(begins, low), np.searchsorted(ends, high, side="right")
        whole, *breaks = zip(first.tolist(), behind.tolist(), strict=True)
        yield whole, breaks


def _spans(text: str) -> Iterator[list[Span]]:
    """The characters of each string without its quotes, and those of its line breaks."""
    for low, high in _objects(text):
        for string in _STRING.finditer(text, low, high):
            if not _KEY.match(text, string.end()):
                escapes = _BREAK.finditer(text, *string.span(1))
                yield [string.span(1), *(one.span() for one in escapes if one[1])]


def _objects(text: str) -> Iterator[Span]:
    """Where objects of JSON begin and end."""
    decoder, place = json.JSONDecoder(), 0
    while found := _OBJECT.search(text, place):
        begin = found.start(1)
        try:
            place = decoder.raw_decode(text, begin)[1]
        except json.JSONDecodeError as error:
            place = max(error.pos, begin + 1)
            if error.msg.startswith("Unterminated string") or not text[error.pos :].strip():
                place = len(text)
                yield begin, place
            continue
        except (ValueError, RecursionError):  # a number of thousands of digits, or thousands of brackets
            return
        yield begin, place
