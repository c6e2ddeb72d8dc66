"""What a user of the package has without the repository: addresses, README's links, recipes. `make package` runs it."""

from __future__ import annotations

import re
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

from xtf_plugin import environment

tomllib = pytest.importorskip("tomllib")  # Python 3.11
ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
URLS = PROJECT["project"]["urls"]


@pytest.fixture
def hook(monkeypatch):
    """hatch_build.py, without hatchling, which only builds have."""
    interface = SimpleNamespace(MetadataHookInterface=object)
    monkeypatch.setitem(sys.modules, "hatchling.metadata.plugin.interface", interface)
    monkeypatch.syspath_prepend(str(ROOT))
    yield __import__("hatch_build")
    sys.modules.pop("hatch_build")


def test_links_of_the_readme_are_complete_in_the_package(hook):
    text = hook.CompleteLinks.__new__(hook.CompleteLinks)
    text.root, about = str(ROOT), {"urls": URLS}
    text.update(about)
    shown = about["readme"]["text"]
    targets = [target for target in re.findall(r"\]\(([^)\s]+)", shown) if not target.startswith("#")]
    assert all(target.startswith("https://") for target in targets)
    ours = [target for target in targets if target.startswith(URLS["Repository"])]
    assert len(ours) > 5
    for target in ours:
        kind, branch, path = target.removeprefix(URLS["Repository"] + "/").split("/", 2)
        assert kind in ("blob", "raw") and branch == "main" and (ROOT / path.split("#")[0]).exists(), target


@pytest.mark.parametrize(
    ("text", "complete"),
    [
        ("[a](docs/a.md#b)", "[a](R/blob/main/docs/a.md#b)"),
        ("![a](docs/a.png)", "![a](R/raw/main/docs/a.png)"),
        ("[a](https://b)", "[a](https://b)"),
        ("[a](#b)", "[a](#b)"),
    ],
)
def test_which_links_are_changed(hook, text, complete):
    assert hook.complete(text, "R") == complete


def test_every_address_begins_with_the_repositorys(hook):
    assert all(url.startswith(URLS["Repository"]) for url in URLS.values())
    found = [path for path in (ROOT / "xtf_plugin").rglob("*.py") if "github.com/xtf" in path.read_text("utf-8")]
    assert found == [], "addresses of the project are in pyproject.toml alone"


def test_messages_name_the_documentation_that_the_metadata_names(monkeypatch):
    known = SimpleNamespace(get_all=lambda name: [f"{key}, {url}" for key, url in URLS.items()])
    monkeypatch.setattr(metadata, "metadata", lambda name: known)
    assert environment.docs("config.md") == f"{URLS['Documentation']}/config.md"
    monkeypatch.setattr(metadata, "metadata", lambda name: SimpleNamespace(get_all=lambda name: None))
    assert environment.docs("config.md") == "docs/config.md"


def test_recipes_are_those_of_the_repository_in_a_clone():
    assert environment.recipes() == ROOT / "recipes"
    assert PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"] == {"recipes": "xtf_plugin/recipes"}
