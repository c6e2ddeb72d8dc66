"""Rules of this repository that no linter knows: sizes, one-way imports, what an import may load, what is never used.

Each rule is a function that returns the places that break it, as `file:line: what`; the last test shows that every one
of them can find something.
"""

from __future__ import annotations

import ast
import graphlib
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "xtf_plugin"
BOOT = ROOT / "xtf_plugin_boot.py"
LONGEST_FILE = 300
LONGEST_BODY = 40
# a kernel cut in pieces is slower, and harder to follow
LONG_BODIES_ALLOWED = {PACKAGE / f"{name}.py" for name in ("kernels", "triton_kernels", "triton_moments")}
MACHINE_PATH = re.compile(r"(?<![\w.~-])/(?:work|farm|root|home)/|/tmp[/]w")
CATCH_ALL_ALLOWED = [  # what must not end a program that it only serves
    f"{PACKAGE / 'hosts' / 'autoload.py'}: _report_failure",
    f"{PACKAGE / 'hosts' / 'trackers.py'}: _attached",
    f"{PACKAGE / 'report' / 'writer.py'}: _reported",
    f"{BOOT}: install",
]
UNSAFE_MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def sources(*folders: Path) -> list[Path]:
    return sorted(path for folder in folders for path in folder.rglob("*.py"))


def tracked_files() -> list[Path]:
    """What git tracks; without git (a source distribution), every text file that is not in a hidden folder."""
    if (ROOT / ".git").exists():
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]
    visible = (p for p in ROOT.rglob("*") if not any(part.startswith(".") for part in p.relative_to(ROOT).parts))
    return [path for path in visible if path.suffix in {".md", ".py", ".toml", ".txt", ".yaml"} and path.is_file()]


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def machine_paths(paths: Iterable[Path]) -> list[str]:
    found = []
    for path in paths:
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="ignore").splitlines(), start=1):
            if MACHINE_PATH.search(line):
                found.append(f"{path}:{number}: {line.strip()}")
    return found


def long_files(paths: Iterable[Path]) -> list[str]:
    lengths = ((path, len(path.read_text(encoding="utf-8").splitlines())) for path in paths)
    return [f"{path}: {length} lines" for path, length in lengths if length > LONGEST_FILE]


def long_functions(paths: Iterable[Path]) -> list[str]:
    found = []
    for path in paths:
        for node in ast.walk(tree(path)):
            if isinstance(node, Function):
                body = node.body[1:] if ast.get_docstring(node, clean=False) is not None else node.body
                length = (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0
                if length > LONGEST_BODY:
                    found.append(f"{path}:{node.lineno}: {node.name} has a body of {length} lines")
    return found


def unsafe_uses(paths: Iterable[Path]) -> list[str]:
    """Whatever would run code out of a file that somebody else may have written."""
    found = []
    for path in paths:
        for node in ast.walk(tree(path)):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Attribute):
                names = [ast.unparse(node)]
            elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                names = ["pickle"]
            if any(name == "torch.load" or name.split(".")[0] in UNSAFE_MODULES for name in names):
                found.append(f"{path}:{node.lineno}: {ast.unparse(node)}")
    return found


def catch_alls(paths: Iterable[Path]) -> list[str]:
    """`except Exception` and bare `except`, by the function they stand in.

    `except BaseException` counts too, unless it only cleans up: its last statement raises again.
    """
    found = []
    for path in paths:
        module = tree(path)
        owner = {
            child: node.name for node in ast.walk(module) if isinstance(node, Function) for child in ast.walk(node)
        }
        for node in ast.walk(module):
            if not isinstance(node, ast.ExceptHandler):
                continue
            kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            caught = {"BaseException" if kind is None else ast.unparse(kind) for kind in kinds}
            raises_again = isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None
            if "Exception" in caught or ("BaseException" in caught and not raises_again):
                found.append(f"{path}: {owner.get(node, 'module level')}")
    return found


def imports_on_load(statements: Iterable[ast.stmt]) -> Iterator[ast.Import | ast.ImportFrom]:
    """The imports that run when a module is imported: none in functions or under TYPE_CHECKING."""
    for node in statements:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            yield from imports_on_load(node.orelse)
        elif not isinstance(node, Function):
            for field in ("body", "orelse", "finalbody"):
                yield from imports_on_load(getattr(node, field, []))
            for handler in getattr(node, "handlers", []):
                yield from imports_on_load(handler.body)


def import_graph(package: Path) -> dict[str, set[str]]:
    """For every module of a package, the modules of the same package that importing it imports."""
    paths = {path: path.relative_to(package.parent).with_suffix("").parts for path in sources(package)}
    dotted = {path: ".".join(p for p in parts if p != "__init__") for path, parts in paths.items()}
    modules = set(dotted.values())
    graph: dict[str, set[str]] = {}
    for path, name in dotted.items():
        reached: set[str] = set()
        for node in imports_on_load(tree(path).body):
            if isinstance(node, ast.Import):
                reached |= {alias.name for alias in node.names}
                continue
            home = ".".join(paths[path][: len(paths[path]) - node.level]) if node.level else ""
            source = ".".join(part for part in (home, node.module) if part)
            reached |= {module if (module := f"{source}.{a.name}") in modules else source for a in node.names}
        graph[name] = reached & modules
    return graph


def import_cycle(package: Path) -> list[str]:
    try:
        graphlib.TopologicalSorter(import_graph(package)).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def loaded_by(statement: str) -> set[str]:
    """The top-level modules in a fresh interpreter after `statement`."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    code = f"{statement}\nimport sys; print(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    return {name.split(".")[0] for name in result.stdout.split()}


def test_no_tracked_file_names_a_path_of_some_machine():
    files = tracked_files()
    assert len(files) > 40
    assert machine_paths(files) == []


def test_files_are_short():
    assert long_files(sources(PACKAGE, ROOT / "tests")) == []


def test_functions_are_short():
    assert long_functions(path for path in sources(PACKAGE) if path not in LONG_BODIES_ALLOWED) == []


def test_nothing_unpickles():
    assert unsafe_uses([*sources(PACKAGE), BOOT]) == []


def test_only_what_serves_others_catches_everything():
    assert catch_alls([*sources(PACKAGE), BOOT]) == CATCH_ALL_ALLOWED


def test_imports_go_one_way():
    assert import_cycle(PACKAGE) == []
    assert "xtf_plugin.errors" in import_graph(PACKAGE)["xtf_plugin.hosts.trl"]


@pytest.mark.parametrize("module", ["xtf_plugin", "xtf_plugin.cli", "xtf_plugin.hosts.autoload", "xtf_plugin_boot"])
def test_import_loads_neither_torch_nor_trl(module):
    loaded = loaded_by(f"import {module}")
    assert module.partition(".")[0] in loaded
    assert not loaded & {"torch", "trl", "transformers", "datasets", "pyarrow"}


def test_every_rule_can_find_something(tmp_path):
    package = tmp_path / "planted"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "a.py").write_text("try:\n    from . import b\nexcept Exception:\n    raise\n")
    (package / "b.py").write_text("class B:\n    from .a import b\ndef f():\n    import pickle\n")
    (package / "c.py").write_text("def f():\n    from .d import g\ntry:\n    f()\nexcept BaseException:\n    raise\n")
    (package / "d.py").write_text(
        "from typing import TYPE_CHECKING\nfrom . import c\nif TYPE_CHECKING:\n    import a\n"
    )
    exact = 'def f():\n    """One\n\n    two.\n    """\n' + "    f()\n" * LONGEST_BODY
    (package / "long.py").write_text(f"{exact}    f()\n{exact}" + "#\n" * LONGEST_FILE)
    (package / "path.py").write_text("x = 'sub/" + "home/x'\ny = '/" + "home/x/y'\nimport torch\ntorch.load(y)\n")
    paths = sources(package)
    assert [found.split(": ")[0] for found in machine_paths(paths)] == [f"{package / 'path.py'}:2"]
    assert [found.split(": ")[0] for found in long_files(paths)] == [str(package / "long.py")]
    assert [found.split(": ")[0] for found in long_functions(paths)] == [f"{package / 'long.py'}:1"]
    assert [found.split(": ")[1] for found in unsafe_uses(paths)] == ["import pickle", "torch.load"]
    assert catch_alls(paths) == [f"{package / 'a.py'}: module level"]
    assert set(import_cycle(package)) == {"planted.a", "planted.b"}
