"""`axolotl xtf ...`: the `xtf` command as a subcommand of Axolotl, which loads click commands from entry points.

All arguments are passed on unparsed. The Typer command itself does not fit: newer releases of Typer contain their own
copy of click, and Axolotl does not accept its commands.
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
    """Check, score and inspect the `xtf:` block of a recipe, with the arguments of `xtf`."""
    main(words)
