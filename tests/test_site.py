"""The site is built as `make docs-site` builds it: what leads nowhere fails, and pages need no other server.

`make test` installs mkdocs and builds the site before it runs the tests; without mkdocs these are skipped.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import site_hooks
from tests.pages import ROOT

pytest.importorskip("mkdocs", reason="needs mkdocs-material and mkdocstrings: pip install -e '.[docs]'")


def build(folder: Path) -> subprocess.CompletedProcess[str]:
    """Build a copy of the pages with the words of the make target."""
    asked = subprocess.run(["make", "-n", "docs-site"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    words = re.search(r"mkdocs (build .*)", asked)[1].split()
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture
def copy(tmp_path) -> Path:
    """The repository with pages that a test may change."""
    for path in ROOT.iterdir():
        if path.name[0] != "." and path.name not in ("docs", "mkdocs.yml"):
            (tmp_path / path.name).symlink_to(path)
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    return tmp_path


def test_the_site_is_built_without_a_warning_and_stands_alone(copy):
    result = build(copy)
    assert result.returncode == 0, result.stderr[-3000:]
    pages = {path: path.read_text(encoding="utf-8") for path in (copy / ".site").rglob("*.html")}
    assert len(pages) > 30
    for path, text in pages.items():
        loaded = re.findall(r'<(?:script|img|iframe|source)[^>]* src="(https?:[^"]+)', text)
        loaded += re.findall(r'<link[^>]* rel="?(?:stylesheet|preconnect)[^>]*href="(https?:[^"]+)', text)
        assert loaded == [], path
    assert f"{site_hooks.repository()}/blob/main/SECURITY.md" in pages[copy / ".site/reliability.html"]
    assert "Attach XTF to a finished trainer" in pages[copy / ".site/api.html"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[gone](gone.md)", "gone.md"),
        ("[gone](choosing.md#gone)", "does not contain an anchor '#gone'"),
        ("[gone](../GONE.md)", "GONE.md"),
        ("::: xtf_plugin.gone", "xtf_plugin.gone"),
    ],
)
def test_what_leads_nowhere_fails(copy, text, says):
    with (copy / "docs/index.md").open("a", encoding="utf-8") as page:
        page.write(f"\n{text}\n")
    result = build(copy)
    assert result.returncode != 0
    assert says in result.stderr


def test_a_page_that_the_navigation_leaves_out_fails(copy):
    (copy / "docs/orphan.md").write_text("# Orphan\n", encoding="utf-8")
    result = build(copy)
    assert result.returncode != 0
    assert "orphan.md" in result.stderr


def test_the_test_command_builds_the_site():
    asked = subprocess.run(["make", "-n", "test"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "mkdocs build --strict" in asked
    assert "quiet" not in re.search(r"mkdocs build.*", asked)[0], "mkdocs counts no warnings when it is quiet"
