"""The errors that users can meet. Standard library only, so that the boot hook can raise them too."""

from __future__ import annotations

import unicodedata

# Invisible letters, marks and symbols: joiners, fillers of Hangul and Khmer, empty Braille, variation selectors.
_BLANK = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0\U00016fe4\U0001d159")
_BLANK |= frozenset(map(chr, (*range(0x180B, 0x1810), *range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0))))


class XTFError(RuntimeError):
    """The `xtf:` block could not be applied, so the run must stop: it would train plain SFT."""


class XTFUserError(XTFError, ValueError):
    """An `XTFError` that the user's recipe, data or environment causes; commands end with exit code 2."""


class XTFDryRun(SystemExit):
    """Ends a `dry_run` before the first optimizer step; the exit code is 0."""

    def __init__(self) -> None:
        super().__init__(0)


def escaped(char: str) -> str:
    """A visible character unchanged, any other as its code: `\\x1b`, `\\u202e`."""
    # Categories C*: control, bidirectional and zero-width characters. Zl, Zp and Zs: line ends and unusual spaces.
    category = unicodedata.category(char)
    if category[0] != "C" and category not in ("Zl", "Zp", "Zs") and char not in _BLANK:
        return char
    code = ord(char)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def reason(error: BaseException) -> str:
    """The text of an error on one line and without its full stop, to stand inside a sentence."""
    return " ".join(str(error).split()).rstrip(".")


def harmless(text: str) -> str:
    """A message with everything escaped that could act on a terminal, except spaces and line ends."""
    return "".join(char if char in " \n" else escaped(char) for char in text)
