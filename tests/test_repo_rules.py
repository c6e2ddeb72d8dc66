"""Rules of this repository that no linter checks: long functions, the order of imports, what an import may load.

Each rule is a function that returns the places that break it, as `file:line: what`. The last test shows that every
rule finds a planted violation.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests import import_graph
from tests.faults.__main__ import FAULTS, place

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "xtf_plugin"
BOOT = ROOT / "xtf_plugin_boot.py"
FOLDERS = sorted(path.parent for path in PACKAGE.glob("*/__init__.py"))
LONGEST_BODY = 40
# a kernel that is split is slower, and harder to follow
LONG_BODIES_ALLOWED = {PACKAGE / f"scoring/kernels/{name}.py" for name in ("triton_attention", "triton_logit_stats")}
MACHINE_PATH = re.compile(r"(?<![\w.~-])/(?:work|farm|root|home)/|/tmp[/]w")
CATCH_ALL_ALLOWED = [  # failures here must not end the program
    f"{PACKAGE / 'data' / 'turns.py'}: rendered",  # of a chat template, which may raise anything
    f"{PACKAGE / 'hosts' / 'boot.py'}: _report_failure",
    f"{PACKAGE / 'report' / 'writer.py'}: _table_and_page",
    f"{PACKAGE / 'training' / 'trainer.py'}: log_report",
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


def first_files_missing(folders: Iterable[Path]) -> list[str]:
    """Folders whose `__init__` docstring names no file of the folder, or one that does not exist."""
    found = []
    for folder in folders:
        named = re.findall(r"`([\w/]+\.py)`", ast.get_docstring(tree(folder / "__init__.py")) or "")
        if not named or not all((folder / name).is_file() for name in named):
            found.append(f"{folder}: names {named}")
    return found


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


def test_functions_are_short():
    assert long_functions(path for path in sources(PACKAGE) if path not in LONG_BODIES_ALLOWED) == []


def test_nothing_unpickles():
    assert unsafe_uses([*sources(PACKAGE), BOOT]) == []


def test_only_what_serves_others_catches_everything():
    assert catch_alls([*sources(PACKAGE), BOOT]) == CATCH_ALL_ALLOWED


def test_folders_import_one_way():
    found = import_graph.imports()
    assert len(found) > 200
    assert import_graph.against_order(found) == []


def test_imports_have_no_circle():
    assert import_graph.circle(import_graph.imports()) == []


def test_every_folder_names_the_file_to_read_first():
    assert len(FOLDERS) == 9
    assert first_files_missing(FOLDERS) == []


def test_picture_of_the_imports_is_fresh():
    stored = (ROOT / "docs" / "images" / "architecture.svg").read_text(encoding="utf-8")
    fresh = "python -m tests.import_graph --write docs/images/architecture.svg"
    assert stored == import_graph.picture(), f"make it again: {fresh}"


@pytest.mark.parametrize("module", ["xtf_plugin", "xtf_plugin.cli", "xtf_plugin.hosts.boot", "xtf_plugin_boot"])
def test_import_loads_neither_torch_nor_trl(module):
    loaded = loaded_by(f"import {module}")
    assert module.partition(".")[0] in loaded
    assert not loaded & {"torch", "trl", "transformers", "datasets", "pyarrow"}


def test_every_rule_can_find_something(tmp_path):
    package = tmp_path / "planted"
    package.mkdir()
    (package / "__init__.py").write_text("from . import a\n")
    (package / "a.py").write_text("try:\n    import os\nexcept Exception:\n    raise\n")
    (package / "b.py").write_text("def f():\n    import pickle\n")
    (package / "c.py").write_text("try:\n    f()\nexcept BaseException:\n    raise\n")
    exact = 'def f():\n    """One\n\n    two.\n    """\n' + "    f()\n" * LONGEST_BODY
    (package / "long.py").write_text(f"{exact}    f()\n{exact}")
    (package / "path.py").write_text("x = 'sub/" + "home/x'\ny = '/" + "home/x/y'\nimport torch\ntorch.load(y)\n")
    paths = sources(package)
    assert [found.split(": ")[0] for found in machine_paths(paths)] == [f"{package / 'path.py'}:2"]
    assert [found.split(": ")[0] for found in long_functions(paths)] == [f"{package / 'long.py'}:1"]
    assert [found.split(": ")[1] for found in unsafe_uses(paths)] == ["import pickle", "torch.load"]
    assert catch_alls(paths) == [f"{package / 'a.py'}: module level"]


def test_rules_of_imports_can_find_something(tmp_path):
    package = tmp_path / "planted"
    for folder, docstring in (("data", "read `documents.py`"), ("store", "read `gone.py`"), ("report", "nothing")):
        (package / folder).mkdir(parents=True)
        (package / folder / "__init__.py").write_text(f'"""A folder: {docstring}."""\n')
    (package / "__init__.py").write_text("from .data import documents\n")
    (package / "errors.py").write_text("from .data import documents\n")
    (package / "extra.py").write_text("from . import errors\n")
    (package / "data/documents.py").write_text("def f():\n    from ..store.store import g\nimport planted.errors\n")
    (package / "store/store.py").write_text("import typing\nif typing.TYPE_CHECKING:\n    from .. import plan\n")
    (package / "plan.py").write_text("from .data.documents import f\nfrom .errors import f\nimport os\n")
    found = import_graph.imports(package)
    pairs = {(each.importer, each.imported, each.line) for each in found}
    wrong = {("data.documents", "store.store", 2), ("store.store", "plan", 3), ("errors", "data.documents", 1)}
    assert wrong < pairs and ("data.documents", "errors", 3) in pairs and ("plan", "errors", 2) in pairs
    broken = {line.partition(": ")[2] for line in import_graph.against_order(found)}
    assert broken == {f"{a} imports {b}" for a, b, _ in wrong} | {"extra imports errors"}
    assert {"data.documents", "errors"} <= set(import_graph.circle(found))
    assert import_graph.circle([each for each in found if each.importer == "plan"]) == []
    folders = [package / name for name in ("data", "store", "report")]
    assert [line.split(": ")[1] for line in first_files_missing(folders)] == ["names ['gone.py']", "names []"]


def test_every_planted_fault_has_its_place():
    """A fault whose text is gone finds nothing, and only a whole run of `tests.faults` would say so."""
    assert [name for name, fault in FAULTS.items() if place(fault, ROOT) is None] == []
