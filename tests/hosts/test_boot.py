"""The boot hook: three states of a module, nothing raised, nothing imported, in any order of imports.

The import-order tests run real interpreters, because the order is the whole point: torch first never meets the
half-imported trl modules that `from trl import SFTTrainer` leaves on the way. Each costs a torch import, so what
needs no torch is tested on planted modules.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import logging
import os
import subprocess
import sys
import textwrap
import types

import pytest

from tests import hooks
from xtf_plugin.hosts import boot


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """Write a module that can be imported, and forget it and every hook afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    names = []

    def plant(body, name="planted_module"):
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(body))
        importlib.invalidate_caches()
        names.append(name)
        return name

    yield plant
    for name in names:
        sys.modules.pop(name, None)
    hooks.uninstall()
    boot.install()


def run(code, **environment):
    """Run `code` in a fresh interpreter; return the completed process."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def output(code, **environment):
    process = run(code, **environment)
    assert process.returncode == 0, process.stderr
    return process.stdout.split()


def test_absent_module_is_met_complete(planted):
    name = planted("first = 1\nlast = 2")
    seen = []
    boot.when_imported(name, lambda module: seen.append(module.last))
    assert seen == []
    module = importlib.import_module(name)
    assert seen == [2]
    assert type(module.__spec__) is importlib.machinery.ModuleSpec
    assert type(module.__loader__) is importlib.machinery.SourceFileLoader


def test_half_imported_module_is_met_complete(planted):
    name = planted(
        """
        from xtf_plugin.hosts.boot import when_imported
        seen = []
        when_imported(__name__, lambda module: seen.append(module.last))
        early = list(seen)
        last = 2
        """
    )
    module = importlib.import_module(name)
    assert module.early == []
    assert module.seen == [2]


def test_complete_module_is_met_at_once(planted):
    name = planted("last = 2")
    importlib.import_module(name)
    seen = []
    boot.when_imported(name, lambda module: seen.append(module.last))
    assert seen == [2]


def test_failing_import_keeps_its_own_error_and_the_next_attempt_counts(planted, tmp_path):
    name = planted("raise ImportError('the stock message')")
    seen = []
    boot.when_imported(name, seen.append)
    with pytest.raises(ImportError, match="^the stock message$"):
        importlib.import_module(name)
    assert seen == []
    (tmp_path / f"{name}.py").write_text("answer = 42  # longer than before, so that the cached bytecode is stale")
    importlib.invalidate_caches()
    assert seen == [importlib.import_module(name)]


def test_another_finder_that_searches_the_whole_meta_path_does_not_recurse(planted, monkeypatch):
    name = planted("last = 2")

    class Greedy:
        calls = 0

        def find_spec(self, wanted, path=None, target=None):
            Greedy.calls += wanted == name
            assert Greedy.calls < 10
            others = [finder for finder in sys.meta_path if finder is not self]
            return next((s for finder in others if (s := finder.find_spec(wanted, path, target)) is not None), None)

    seen = []
    boot.when_imported(name, lambda module: seen.append(module.last))
    monkeypatch.setattr(sys, "meta_path", [sys.meta_path[0], Greedy(), *sys.meta_path[1:]])
    importlib.import_module(name)
    assert seen == [2]


def test_install_reports_and_never_raises(planted, monkeypatch, caplog):
    strange = types.ModuleType(boot.PARSER_MODULE)  # a TRL whose parser has moved
    monkeypatch.setitem(sys.modules, boot.PARSER_MODULE, strange)
    with caplog.at_level(logging.ERROR, "xtf_plugin"):
        boot.install()
    assert "NOT applied" in caplog.text and "TrlParser" in caplog.text


def test_installing_twice_keeps_one_finder(planted):
    hooks.uninstall()
    sys_modules_copy = sys.modules.pop(boot.PARSER_MODULE, None)
    try:
        boot.install()
        boot.install()
        assert sum(finder is boot._finder for finder in sys.meta_path) == 1
        hooks.uninstall()
        assert boot._finder not in sys.meta_path
    finally:
        if sys_modules_copy is not None:
            sys.modules[boot.PARSER_MODULE] = sys_modules_copy


def test_install_is_standard_library_only_and_fast(tmp_path):
    code = """
        import __future__, importlib.metadata, logging, sys, threading, time, typing  # what torch has imported by then
        start = time.perf_counter()
        from xtf_plugin.hosts.boot import install
        install()
        print(time.perf_counter() - start)
        ours = sys.stdlib_module_names
        print(*(name for name in sys.modules if name.split(".")[0] not in ours and not name.startswith("__")))
    """
    bytecode = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(tmp_path)}
    output(code, **bytecode)
    seconds, *modules = output(code, **bytecode)
    foreign = {name for name in modules if not name.startswith(("xtf_plugin", "_xtf", "sitecustomize", "_virtualenv"))}
    assert not {name.split(".")[0] for name in foreign} & {"torch", "trl", "transformers", "pydantic", "numpy", "rich"}
    assert {name for name in modules if name.startswith("xtf_plugin")} == {
        "xtf_plugin",
        "xtf_plugin.hosts",
        "xtf_plugin.hosts.boot",
    }
    assert float(seconds) < 0.02  # measured: below 0.001 s; the bound allows for a busy machine


def test_trl_not_installed():
    code = """
        import sys
        from xtf_plugin.hosts import boot
        class Block:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] == "trl":
                    raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        sys.meta_path.insert(0, Block())
        boot.install()
        try:
            import trl.scripts.utils
        except ModuleNotFoundError as error:
            print(error.name)
    """
    assert output(code) == ["trl"]


def test_broken_trl_shows_its_own_error(tmp_path):
    scripts = tmp_path / "trl" / "scripts"
    scripts.mkdir(parents=True)
    (tmp_path / "trl" / "__init__.py").touch()
    (scripts / "__init__.py").touch()
    install = "from xtf_plugin.hosts import boot; boot.install()"
    (scripts / "utils.py").write_text(f"{install}\nimport no_such_module")
    code = f"{install}; import trl.scripts.utils"
    process = run(code, PYTHONPATH=str(tmp_path))
    assert process.returncode == 1
    assert process.stderr.rstrip().endswith("ModuleNotFoundError: No module named 'no_such_module'")
    assert "xtf-plugin" not in process.stderr


PATCHED = "print(*(getattr(T.__init__, '_xtf_patch', False) for T in [sys.modules['trl.scripts.utils'].TrlParser]))"


@pytest.mark.parametrize(
    "first",
    [
        "import torch; assert 'trl' not in sys.modules; import trl.scripts.utils",
        "from trl import SFTTrainer; import trl.scripts.utils",
        "import trl.scripts.utils; import torch",
    ],
    ids=["torch first", "SFTTrainer first", "parser first"],
)
def test_parser_is_patched_whatever_is_imported_first(first):
    assert output(f"import sys\n{first}\n{PATCHED}") == ["True"]


def test_transformers_alone_does_not_import_trl():
    code = """
        import sys, torch, transformers
        print("trl" in sys.modules, "pydantic" in sys.modules and "xtf_plugin.config.block" in sys.modules)
        print("xtf_plugin.hosts.boot" in sys.modules)
    """
    assert output(code) == ["False", "False", "True"]
