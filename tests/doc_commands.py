"""A rule for every command that the documentation may name, by its first word. Nothing here trains or scores.

A rule raises AssertionError, with a message that names the command, when a reader who typed it would be refused.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import typer

from tests.pages import ROOT
from xtf_plugin import cli

PLACEHOLDER = "recipe.yaml"  # the name under which the documentation speaks of a reader's own recipe


def check_pip(words: list[str]) -> None:
    if words[1] == "freeze":
        return
    name = re.search(r'^name = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)[1]
    assert words[1] in ("install", "uninstall"), f"{words}: no rule for this pip command"
    named = [re.match(r"[\w.-]*", word)[0] for word in words[2:] if word[0] != "-"]
    assert named == [name], f"{words}: the distribution is called {name}"


def check_make(words: list[str]) -> None:
    result = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def check_trl(words: list[str]) -> None:
    assert words[1] == "sft", f"{words}: not the command this package is for"
    if "--config" in words:
        name = words[words.index("--config") + 1]
        assert name == PLACEHOLDER or (ROOT / name).is_file(), f"{name}: no such recipe"


def check_axolotl(words: list[str]) -> None:
    """`train` with a recipe that exists; that Axolotl takes it is tested where Axolotl is: tests/axolotl."""
    assert words[1] in ("train", "preprocess", "xtf"), f"{words}: not a command this package is for"
    if words[1] == "xtf":
        check_xtf(words[1:])
    elif len(words) > 2:
        assert words[2] == PLACEHOLDER or (ROOT / words[2]).is_file(), f"{words[2]}: no such recipe"


def check_xtf(words: list[str]) -> None:
    """Let the real command line parse the words, without calling what they ask for; "xtf …" speaks of all of it."""
    command, rest = typer.main.get_command(cli.app), words[1:] if words[1:] != ["…"] else []
    while rest and hasattr(command, "commands"):
        assert rest[0] in command.commands, f"{' '.join(words)}: no command {rest[0]!r}"
        command, rest = command.commands[rest[0]], rest[1:]
    if not rest:
        return
    try:
        given = command.make_context(words[0], list(rest)).params.values()
    except typer.Exit:  # --help
        return
    except Exception as error:  # a usage error; its class is Click's or Typer's own, by Typer's version
        raise AssertionError(f"{' '.join(words)}: {error!r}") from error
    for path in (value for value in given if isinstance(value, Path) and value.suffix == ".yaml"):
        assert str(path) == PLACEHOLDER or (ROOT / path).is_file(), f"{path}: no such recipe"


def check_python(words: list[str]) -> None:
    """`-m module` can be imported; a script exists and knows the options it is given."""
    if words[1] == "-m":
        assert importable(words[2]), f"{words[2]}: no such module"
        return
    script = re.sub(r"^part-\d+/", "tests/gpu/", words[1])  # a folder of an unpacked kit
    assert (ROOT / script).is_file(), f"{words[1]}: no such script"
    usage = subprocess.run([sys.executable, ROOT / script, "--help"], capture_output=True, text=True, timeout=120)
    assert usage.returncode == 0, usage.stderr
    options = {word.split("=")[0] for word in words[2:] if word.startswith("--")}
    unknown = options - set(re.findall(r"--[\w-]+", usage.stdout))
    assert not unknown, f"{words[1]} knows no option {unknown}"


def check_accelerate(words: list[str]) -> None:
    assert words[1] == "launch", f"{words}: only `accelerate launch` starts a training"
    if "-m" in words:
        assert importable(words[words.index("-m") + 1]), f"{words}: no such module"


def importable(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # a parent package is missing
        return False


CHECKS = {
    "pip": check_pip,
    "make": check_make,
    "trl": check_trl,
    "axolotl": check_axolotl,
    "xtf": check_xtf,
    "python": check_python,
    "accelerate": check_accelerate,
}


def check_command(words: list[str]) -> None:
    """Check one command by the rule for its first word; a first word without a rule is an error too."""
    assert words[0] in CHECKS, f"no rule for commands that begin with {words[0]!r}: add one to tests/doc_commands.py"
    CHECKS[words[0]](words)
