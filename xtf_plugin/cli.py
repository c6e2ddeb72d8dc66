"""The `xtf` command: write a recipe, check it, score it, show what it or another setting drops, manage the score cache.

It runs the host's own command as a subprocess and reads the files that this command writes; it loads no model itself.
Exit codes: 0 success, 2 wrong user input (one message, no traceback), 1 any other error.
Heavy imports are inside the commands, so that `xtf --help` and `xtf check` start fast.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from . import __version__, environment
from .errors import XTFError, XTFUserError, harmless
from .hosts.recipes import COMMANDS, Recipe, check_environment, load_recipe, off, parse_block, score_recipe

if TYPE_CHECKING:
    from .config.block import XTFConfig
    from .report.score_table import ScoreTable

app = typer.Typer(
    name="xtf",
    help="Leaves noise in fine-tuning data out of the loss: write, check, score and tune a recipe's `xtf:` block.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
cache_app = typer.Typer(help="List or prune the score cache.", no_args_is_help=True)
app.add_typer(cache_app, name="cache")

_DISTRIBUTIONS = ("torch", "transformers", "trl", "peft", "bitsandbytes")

_RECIPE = typer.Argument(help="A recipe (YAML) of TRL or Axolotl with an `xtf:` block.")
RecipeArgument = Annotated[Path, _RECIPE]
TargetArgument = Annotated[Path, typer.Argument(help="A recipe, or a scores.parquet.")]
ExtraArgument = Annotated[list[str] | None, typer.Argument(help="After `--`: more arguments for the host's command.")]
CacheOption = Annotated[Path | None, typer.Option("--cache-dir", help="Default: $XTF_CACHE, or the user's cache.")]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; always raises SystemExit with the documented exit code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # an ASCII pipe cannot encode every mark
    try:
        app(args=None if argv is None else list(argv), prog_name="xtf")
    except XTFError as error:
        typer.echo(harmless(f"xtf: error: {str(error).removeprefix('xtf: ')}"), err=True)
        raise SystemExit(2 if isinstance(error, XTFUserError) else 1) from None


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"xtf-plugin {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Options before a command."""


@app.command(epilog=f"More recipes, for word problems, code, medicine and finance, are in {environment.recipes()}.")
def init(
    model: Annotated[str, typer.Option("--model", help="A folder of save_pretrained, or a name on the hub.")],
    dataset: Annotated[
        str, typer.Option("--dataset", help="A file (JSON Lines, JSON, CSV, Parquet), a folder of them, or a hub name.")
    ],
    host: Annotated[
        str | None, typer.Option("--host", help="trl or axolotl. Default: trl, unless only axolotl is installed.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", help="The recipe; never overwritten.")] = Path("recipe.yaml"),
) -> None:
    """Write a recipe for a model and a data set: LoRA, the data's columns, an `xtf:` block. Loads no model.

    Data under column names that the host does not know is written again, into a folder beside the recipe.
    """
    from .hosts.init_recipe import init as write

    typer.echo(harmless("\n".join(write(model, dataset, host, output))))


@app.command()
def check(
    recipe: Annotated[Path | None, _RECIPE] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of the `xtf:` block.")] = False,
) -> None:
    """Validate block, recipe, paths, data and template without loading a model."""
    from .config.block import XTFConfig
    from .hosts.preflight import notes, problems

    if schema:
        typer.echo(json.dumps(XTFConfig.json_schema(), indent=2))
        return
    if recipe is None:
        raise XTFUserError("name a recipe (xtf check RECIPE), or ask for the block's schema (xtf check --schema).")
    loaded = load_recipe(recipe)
    config = parse_block(loaded)
    if config is None:
        raise XTFUserError(f"{recipe} {off(loaded)}, so it trains without XTF. The shortest block: `xtf: true`.")
    hook = check_environment(loaded)
    if found := problems(loaded, config):
        raise XTFUserError(f"{recipe}: this run would fail.\n" + "\n".join(f"- {problem}" for problem in found))
    typer.echo(f"{recipe}: ok")
    for name, value in _facts(loaded, config, hook).items():
        typer.echo(f"{name:<12}{value}")  # no table, which could break paths
    for note in notes(loaded):
        typer.echo(f"note: {note}")
    typer.echo(f"next: xtf score {recipe}")


@app.command()
def score(
    recipe: RecipeArgument,
    extra: ExtraArgument = None,
    output: Annotated[Path | None, typer.Option("--output", help="Also write the score table here.")] = None,
) -> None:
    """Run the host's own pipeline up to the first optimizer step; write score table and report."""
    loaded = load_recipe(recipe)
    path, code = score_recipe(loaded, extra or [], output)
    if code == 0:
        typer.echo(f"scores: {path}")
        # with other arguments or another place, the recipe does not lead to this table
        target = path if extra or output else recipe
        page = path.parent / "report.html"
        looked_at = f", or open {page} in a browser" if page.exists() else ""
        typer.echo(f"next: xtf show {target}, xtf tune {target}{looked_at}")
    elif not extra:
        _say_why(loaded)
    raise typer.Exit(code)


@app.command()
def show(
    target: TargetArgument,
    extra: ExtraArgument = None,
    n: Annotated[int, typer.Option("-n", min=1, help="How many documents, those that lose most first.")] = 5,
    row: Annotated[int | None, typer.Option("--row", min=0, help="All documents of one dataset row.")] = None,
    document: Annotated[str | None, typer.Option("--document", help="Documents whose key begins so.")] = None,
    grep: Annotated[str | None, typer.Option("--grep", help="Documents whose completion this regex matches.")] = None,
    reason: Annotated[
        str | None,
        typer.Option(
            "--reason",
            help="Documents in which it dropped something: RI, KN, TR or the name of a score; or in which it decided: "
            "protected, floor, forced, control.",
        ),
    ] = None,
    dropped: Annotated[bool, typer.Option("--dropped", help="Only documents in which something is dropped.")] = False,
) -> None:
    """Print documents with kept and dropped tokens and reasons, those that lose most first.

    Scores first if there is no current table.
    """
    from .report import score_table, terminal

    console = Console()
    wanted = terminal.Wanted(row, document, grep, reason, dropped)
    if table := _selected_again(target, extra or []):
        from .report import reselected

        terminal.check_row(row, table.about)
        console.print(Text(f"xtf: {reselected.NOTE}", style="dim"), soft_wrap=True)
        shown = terminal.matching(reselected.documents(table), list(table.scores), wanted, n)
        terminal.render_documents(shown, wanted.described(), console, terminal.legend(table.about))
        return
    path = _table_path(target, extra or [])
    file = score_table.open_file(path)
    about = score_table.metadata(file)
    terminal.check_row(row, about)
    found, meaning = terminal.find(file, wanted, n, path), terminal.legend(about)
    terminal.render_documents(found, wanted.described(), console, meaning)


@app.command()
def report(
    target: TargetArgument,
    extra: ExtraArgument = None,
    output: Annotated[Path | None, typer.Option("--output", help="Write the page here.")] = None,
) -> None:
    """Print kept and dropped shares and write report.html; scores first if there is no current table."""
    from .report import score_table, writer

    if table := _selected_again(target, extra or []):
        page = output or load_recipe(target).scores_path().parent / writer.PAGE
        Console().print(writer.write_report(table, page))
        Console().print(Text(f"xtf: {table.about['warnings'][0]}\nreport: {page}"), soft_wrap=True)
        return
    path = _table_path(target, extra or [])
    page = output or path.parent / writer.PAGE
    Console().print(writer.write_report(score_table.read(path), page))
    Console().print(Text(f"report: {page}"), soft_wrap=True)


@app.command()
def tune(
    target: TargetArgument,
    setting: Annotated[int | None, typer.Option("--setting", min=1, help="Print only the block of this one.")] = None,
) -> None:
    """Print what other settings of the block would drop, with examples, from stored scores; loads no model."""
    from .report import score_table
    from .report import tune as tuning

    path, config = target, None
    if target.suffix != ".parquet":
        recipe = load_recipe(target)
        path, config = recipe.scores_path(), parse_block(recipe)
        if config is None:
            raise XTFUserError(f"{target} {off(recipe)}: nothing to tune. The shortest block: `xtf: true`.")
        if not path.exists():
            raise XTFUserError(f"{target} has no stored scores ({path}). Score it first: xtf score {target}")
        if why := _other_rows(path, recipe):
            raise XTFUserError(f"{why}. Score it again: xtf score {target}")
    table = score_table.read(path)
    if config is not None and config.reference.model is None:
        named, model = table.about.get("reference", {}).get("name"), recipe.model
        if named != model:
            raise XTFUserError(
                f"{path} has the scores of {named}, but {target} trains {model}. Run: xtf score {target}"
            )
    found = tuning.settings(table, config or table.config)
    if setting is None:
        tuning.show(found, table, str(path), Console())
        typer.echo(f"\nThe block of a setting, to paste in place of the recipe's own: xtf tune {target} --setting N")
        return
    if setting > len(found):
        raise XTFUserError(f"--setting {setting}: there are {len(found)} settings. List them: xtf tune {target}")
    typer.echo(tuning.block_text(found[setting - 1].config), nl=False)


@cache_app.command("list")
def cache_list(cache_dir: CacheOption = None) -> None:
    """Show what the score cache holds, one line per reference and choice of layers."""
    from .store.admin import list_cache

    root = _cache_root(cache_dir)
    entries = list_cache(root)
    if not entries:
        typer.echo(f"{root}: no cached scores.")
        return
    table = Table(title=str(root), title_justify="left")
    table.add_column("reference", no_wrap=True)  # to be copied into `prune --reference`
    table.add_column("model", overflow="fold")
    table.add_column("layers", overflow="fold")
    for heading in ("documents", "tokens", "MiB", "written"):
        table.add_column(heading, justify="right", no_wrap=True)
    for entry in entries:
        size, when = entry.bytes / 2**20, datetime.fromtimestamp(entry.modified).strftime("%Y-%m-%d")
        model = Text(harmless(str(entry.description.get("name", "unknown"))))
        counts = (f"{entry.documents:,}", f"{entry.tokens:,}", f"{size:,.1f}")
        table.add_row(entry.reference[:12], model, Text(harmless(str(entry.layers or "-"))), *counts, when)
    Console().print(table)


@cache_app.command("prune")
def cache_prune(
    older_than_days: Annotated[float | None, typer.Option(help="Only scores older than this many days.")] = None,
    reference: Annotated[
        str | None, typer.Option(help="Only this reference: its fingerprint, or its first digits.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="All cached scores.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be deleted; delete nothing.")] = False,
    cache_dir: CacheOption = None,
) -> None:
    """Delete cached scores; they are computed again when a run needs them."""
    from .store.admin import prune_cache

    root, verb = _cache_root(cache_dir), "would remove" if dry_run else "removed"
    result = prune_cache(
        root, older_than_days=older_than_days, reference=reference, everything=everything, dry_run=dry_run
    )
    typer.echo(f"{verb} {len(result.removed)} files, {result.bytes / 2**20:,.1f} MiB")
    for path, why in result.refused:
        typer.echo(f"xtf: left {path}: {why}", err=True)
    raise typer.Exit(1 if result.refused else 0)


def _cache_root(chosen: Path | None) -> Path:
    from .config.block import XTFConfig

    return chosen or XTFConfig.model_validate({}).resolved_cache_dir()


def _facts(recipe: Recipe, config: XTFConfig, hook: str) -> dict[str, str]:
    names = ("axolotl", *_DISTRIBUTIONS) if recipe.host == "axolotl" else _DISTRIBUTIONS
    versions = [f"{name} {environment.installed_version(name) or 'not installed'}" for name in names]
    reference = config.reference
    adapters = ", adapters off" if recipe.data.get("use_peft") or recipe.data.get("adapter") else ""
    return {
        "host": f"{recipe.host} ({COMMANDS[recipe.host]})",
        "hook": hook,
        "versions": ", ".join([f"xtf-plugin {__version__}", *versions]),
        "preset": config.preset,
        "scores": ", ".join(f"{name} ({part.scorer})" for name, part in config.scores.items()) or "none",
        "reference": f"the model being trained{adapters}"
        if reference.model is None
        else f"{reference.model} ({reference.quantization})",
        **({"data": f"streamed; its first {config.calibration} documents calibrate"} if recipe.streamed else {}),
        "cache": str(config.resolved_cache_dir()),
        "table": str(recipe.scores_path()),
    }


def _say_why(recipe: Recipe) -> None:
    """After a failed run, what `xtf check` knows of it: the host's traceback seldom says it."""
    from .hosts.preflight import problems

    config = parse_block(recipe)
    found = problems(recipe, config) if config is not None else []
    if found:
        lines = "\n".join(f"- {problem}" for problem in found)
        typer.echo(
            harmless(f"\nxtf: error: {recipe.path}: the run failed, and `xtf check` names this:\n{lines}"), err=True
        )


def _table_path(target: Path, extra: Sequence[str]) -> Path:
    """The score table of a target; scores a recipe first if its table is missing or outdated, or `extra` is given."""
    if target.suffix == ".parquet":
        return target
    recipe = load_recipe(target)
    path = recipe.scores_path(extra)
    why = "arguments follow `--`" if extra else _outdated(path, target, recipe)
    if not why:
        return path
    typer.echo(f"xtf: scoring first, since {why}", err=True)
    path, code = score_recipe(recipe, extra, None)
    if code:
        if not extra:
            _say_why(recipe)
        raise typer.Exit(code)
    return path


def _selected_again(target: Path, extra: Sequence[str]) -> ScoreTable | None:
    """The stored scores of a recipe whose thresholds were changed; None: its table is current, or does not serve."""
    from .report import reselected

    if target.suffix == ".parquet" or extra:
        return None
    recipe = load_recipe(target)
    path, config = recipe.scores_path(), parse_block(recipe)
    if config is None or not path.exists() or _other_rows(path, recipe) or not _outdated(path, target, recipe):
        return None
    return reselected.select_again(path, config, recipe.model)


def _other_rows(path: Path, recipe: Recipe) -> str:
    """Why a score table may be of other rows than the recipe's; empty if nothing says so."""
    from .hosts.row_settings import differing, row_settings
    from .hosts.training_rows import newest_change
    from .report import score_table

    about = score_table.metadata(score_table.open_file(path))
    if names := differing(about.get("recipe"), row_settings(recipe.data)):
        return f"the run that made {path} had another {', '.join(names)}"
    return f"the data has changed after {path} was made" if newest_change(recipe) > path.stat().st_mtime_ns else ""


def _outdated(path: Path, target: Path, recipe: Recipe) -> str:
    """Why a recipe's score table has to be made again; empty if it is current."""
    from .config.block import XTFConfig
    from .report import score_table

    if not path.exists():
        return f"there is not a score table {path.absolute()} yet"
    config, about = XTFConfig.parse(recipe.block), score_table.metadata(score_table.open_file(path))
    if about.get("format", score_table.FORMAT) != score_table.FORMAT:
        return f"{path} is of another version of xtf-plugin"
    if why := _other_rows(path, recipe):
        return f"{why}. What is stored is not scored again"
    scored_by = about.get("reference", {}).get("name")
    if config is not None and config.reference.model is None and scored_by not in (None, recipe.model):
        return f"{path} has the scores of {scored_by}, and the recipe trains {recipe.model}"
    if config is not None and about.get("config") not in (None, config.to_dict()):
        return "the block has changed, and more of it than thresholds. What is stored is not scored again"
    newer = path.stat().st_mtime_ns < target.stat().st_mtime_ns
    return f"{target} is newer than its score table. What is stored is not scored again" if newer else ""


if __name__ == "__main__":
    main()
