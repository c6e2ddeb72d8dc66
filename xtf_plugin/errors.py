"""The errors a user can meet, apart from everything else so that each module (and the boot hook) can raise them.

`XTFError` means: the `xtf:` block was present and could not be applied, so the run stops. `XTFUserError` is the part of
it that the user's own input causes; the command line turns it into one message and exit code 2.
"""

from __future__ import annotations

import unicodedata

# Letters, marks and symbols without ink: joiners, fillers of Hangul and Khmer, empty Braille; variation selectors.
_BLANK = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0\U00016fe4\U0001d159")
_BLANK |= frozenset(map(chr, (*range(0x180B, 0x1810), *range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0))))


class XTFError(RuntimeError):
    """The `xtf:` block could not be applied; training must not go on as plain SFT."""


class XTFUserError(XTFError, ValueError):
    """The user's recipe, data or environment is at fault; the message names the value and the next step."""


class XTFDryRun(SystemExit):
    """Ends a `dry_run` before the first optimizer step. A `SystemExit` with code 0: stock commands end cleanly."""

    def __init__(self) -> None:
        super().__init__(0)


def escaped(char: str) -> str:
    """A character as it is if it is printed and seen, else its code: `\\x1b`, `\\u202e`."""
    # Categories C* hold control, bidirectional and zero-width characters; Zl, Zp and odd spaces would move text unseen.
    category = unicodedata.category(char)
    if category[0] != "C" and category not in ("Zl", "Zp", "Zs") and char not in _BLANK:
        return char
    code = ord(char)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def harmless(text: str) -> str:
    """A message with everything escaped that could act on a terminal; spaces and line ends stay."""
    return "".join(char if char in " \n" else escaped(char) for char in text)
