"""`axolotl xtf ...`: the `xtf` command as a subcommand of Axolotl's, which asks its entry points for a click command.

Everything is handed on unread. Typer's own command would not do: newer releases of it bring a click of their own, whose
commands are none to Axolotl.
"""

from __future__ import annotations

import click

from .cli import main


@click.command(
    "xtf",
    add_help_option=False,
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    short_help="check, score and inspect the `xtf:` block of a recipe (xtf-plugin)",
)
@click.argument("words", nargs=-1, type=click.UNPROCESSED)
def xtf(words: tuple[str, ...]) -> None:
    """Check, score and inspect the `xtf:` block of a recipe; the words are those of the command `xtf`."""
    main(words)
