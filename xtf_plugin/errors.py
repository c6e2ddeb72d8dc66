"""The errors a user can meet, apart from everything else so that each module (and the boot hook) can raise them.

`XTFError` means: the `xtf:` block was present and could not be applied, so the run stops. `XTFUserError` is the part of
it that the user's own input causes; the command line turns it into one message and exit code 2.
"""

from __future__ import annotations


class XTFError(RuntimeError):
    """The `xtf:` block could not be applied; training must not go on as plain SFT."""


class XTFUserError(XTFError, ValueError):
    """The user's recipe, data or environment is at fault; the message names the value and the next step."""


class XTFDryRun(SystemExit):
    """Ends a `dry_run` before the first optimizer step. A `SystemExit` with code 0: stock commands end cleanly."""

    def __init__(self) -> None:
        super().__init__(0)
