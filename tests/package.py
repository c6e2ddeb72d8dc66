"""The quickstart, from an installed package and without the repository: what `make package` ends with.

    python -m tests.package .venv-package/bin

The folder is that of an environment with the wheel in it. A tiny model and data are made here; every command runs in a
folder of its own. Anything that is not as a new user should find it ends with an assertion.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from tests import tiny

ABOUT = """
import json, pathlib, xtf_plugin
from importlib import metadata
from xtf_plugin import environment
about = metadata.metadata("xtf-plugin")
print(json.dumps({
    "file": xtf_plugin.__file__, "recipes": str(environment.recipes()), "docs": environment.docs("config.md"),
    "text": about.get_payload(), "urls": about.get_all("Project-URL"),
}))
"""


def run(bin_: Path, folder: Path, *words: str, code: int = 0) -> str:
    """What a command prints; it must end with `code`."""
    outside = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment = {**outside, "XTF_CACHE": str(folder / "cache"), "PATH": f"{bin_}{os.pathsep}{os.environ['PATH']}"}
    program = [str(bin_ / words[0]), *words[1:]]
    ended = subprocess.run(program, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert ended.returncode == code, f"{' '.join(words)}: {ended.returncode}\n{ended.stdout}\n{ended.stderr[-3000:]}"
    return ended.stdout + ended.stderr


def check_metadata(bin_: Path, folder: Path) -> None:
    """The package is the installed one, its recipes are in it, and its addresses are complete."""
    about = json.loads(run(bin_, folder, "python", "-c", ABOUT).splitlines()[-1])
    package = Path(about["file"]).parent
    assert package.is_relative_to(bin_.parent), f"{package} is not the installed package"
    assert Path(about["recipes"]).is_relative_to(package)
    assert {"math_qwen3_4b_qlora.yaml", "axolotl", "domains"} <= {
        path.name for path in Path(about["recipes"]).iterdir()
    }
    assert about["docs"].startswith("https://") and about["docs"] in run(
        bin_, folder, "xtf", "check", "wrong.yaml", code=2
    )
    assert "# xtf-plugin" in about["text"] and len(about["urls"]) >= 4
    relative = [
        target for target in re.findall(r"\]\(([^)\s]+)", about["text"]) if not target.startswith(("https:", "#"))
    ]
    assert not relative, f"README links that a package index breaks: {relative}"
    assert about["recipes"] in run(bin_, folder, "xtf", "init", "--help").replace("\n ", "").replace(" ", "")


def quickstart(bin_: Path, folder: Path) -> None:
    """From a model and a data set to scores, documents, other settings and a training run."""
    wanted = run(bin_, folder, "xtf", "init", "--model", "model", "--dataset", "data.jsonl")
    assert "next: xtf check recipe.yaml" in wanted
    assert "recipe.yaml: ok" in run(bin_, folder, "xtf", "check", "recipe.yaml")
    assert "scores.parquet" in run(bin_, folder, "xtf", "score", "recipe.yaml")
    for name in ("scores.parquet", "summary.json", "report.html"):
        assert (folder / "runs/recipe/xtf" / name).is_file(), name
    assert "kept" in run(bin_, folder, "xtf", "show", "recipe.yaml", "-n", "1")
    assert "as it is" in run(bin_, folder, "xtf", "tune", "recipe.yaml")
    assert run(bin_, folder, "xtf", "tune", "recipe.yaml", "--setting", "1").startswith("xtf:")
    run(bin_, folder, "trl", "sft", "--config", "recipe.yaml", "--max_steps", "1", "--save_strategy", "no")


def main() -> None:
    """Run both in a folder that is removed."""
    bin_ = Path(sys.argv[1]).absolute()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tiny.save_base(folder / "model")
        rows = [{"question": row["prompt"], "answer": row["completion"]} for row in tiny.problems(24)]
        tiny.save_rows(folder / "data.jsonl", rows)
        (folder / "wrong.yaml").write_text("model_name_or_path: model\nxtf: {min_kpet: 1}\n", encoding="utf-8")
        check_metadata(bin_, folder)
        quickstart(bin_, folder)
    print("package: the quickstart runs from the installed wheel")


if __name__ == "__main__":
    main()
