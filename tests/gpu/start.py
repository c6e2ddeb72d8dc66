"""Joins the parts of a kit and runs `python -m tests.gpu`, on a machine without a network and with its own PyTorch.

    python part-1/start.py [--folder .] [--output results] [--prepare] [any option of python -m tests.gpu]

Needs Python's standard library and pip alone. `--folder` is where the part folders lie, and where `unpacked/` is made.
What is unpacked already is not unpacked again: a kit may come in several transfers, and the command may be repeated.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
DONE = ".complete"


def join(folder: Path, group: dict, output: Path) -> str:
    """Join and unpack the pieces of an archive into `output`; what is wrong with them, or nothing.

    Args:
        folder: holds the part folders.
        group: the manifest's entry, with paths and hashes of the pieces.
    """
    archive = output / f"{group['group']}.tar"
    with archive.open("wb") as joined:
        for piece in group["pieces"]:
            path = folder / piece["path"]
            if not path.is_file():
                archive.unlink()
                return f"{piece['path']} is missing"
            data = path.read_bytes()
            if hashlib.sha256(data).hexdigest() != piece["sha256"]:
                archive.unlink()
                return f"{piece['path']} is damaged"
            joined.write(data)
    with tarfile.open(archive) as opened:
        if sys.version_info >= (3, 12):
            opened.extractall(output, filter="data")
        else:
            opened.extractall(output)  # our own archive, whose hashes have just been checked
    archive.unlink()
    return ""


def once(folder: Path, name: str) -> Path:
    """A folder for something that is made once: emptied if it is not marked complete."""
    output = folder / name
    if not (output / DONE).exists():
        shutil.rmtree(output, ignore_errors=True)
        output.mkdir(parents=True)
    return output


def unpack_base(folder: Path, group: dict, unpacked: Path) -> Path:
    """Unpack the project, and install its wheels into a folder of their own; the folder."""
    base = once(unpacked, "base")
    if (base / DONE).exists():
        return base
    fault = join(folder, group, base)
    if fault:
        sys.exit(f"error: {fault}. The parts of the base must all be here; transfer that part again.")
    (base / "project").mkdir()
    with tarfile.open(base / "project.tar") as opened:
        opened.extractall(base / "project")
    wheels = sorted(map(str, (base / "wheels").glob("*.whl"))) if (base / "wheels").is_dir() else []
    if wheels:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-cache-dir"]
        subprocess.run([*command, "--upgrade", "--target", str(base / "site"), *wheels], check=True)
    (base / DONE).touch()
    return base


def environment(base: Path, models: Path, commit: str) -> dict[str, str]:
    """Of the run: packages of the kit before the machine's, no network, models of the kit."""
    path = [str(base / "site"), str(base / "project"), *filter(None, [os.environ.get("PYTHONPATH")])]
    more = {"XTF_TEST_MODELS": str(models), "XTF_COMMIT": commit, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    return {**os.environ, **more, "PYTHONPATH": os.pathsep.join(path)}


def unpack_model(folder: Path, group: dict, base: Path, models: Path, env: dict[str, str]) -> str:
    """Unpack a model and write its weights in bfloat16; why it cannot be used, or nothing."""
    name = group["group"]
    work = once(models, f".{name}")
    if (work / DONE).exists():
        return ""
    fault = join(folder, group, work)
    if fault:
        return fault
    shutil.rmtree(models / name, ignore_errors=True)
    made = work / "models" / name
    config, kept = made / "config.json", (made / "config.json").read_bytes()
    code = "import sys, pathlib, models; models.save_weights(*map(pathlib.Path, sys.argv[1:]))"
    words = [sys.executable, "-c", code, str(work / "gguf" / f"{name}.gguf"), str(made)]
    env = {**env, "PYTHONPATH": f"{base / 'project' / 'recipes'}{os.pathsep}{env['PYTHONPATH']}"}
    result = subprocess.run(words, env=env, check=False)
    if result.returncode:
        return f"its weights could not be made (exit code {result.returncode})"
    config.write_bytes(kept)  # as it was made where the kit was packed
    made.rename(models / name)
    (work / DONE).touch()
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=HERE.parent, help="holds part-1, part-2, …")
    parser.add_argument("--output", type=Path, default=Path("results"))
    parser.add_argument("--prepare", action="store_true", help="unpack what is here, and run nothing")
    options, others = parser.parse_known_args()
    begin, folder = time.perf_counter(), options.folder.resolve()
    manifest = json.loads((HERE / "manifest.json").read_text(encoding="utf-8"))
    unpacked = folder / "unpacked"
    models = unpacked / "models"
    models.mkdir(parents=True, exist_ok=True)
    base_group, *model_groups = manifest["groups"]
    base = unpack_base(folder, base_group, unpacked)
    env = environment(base, models, manifest["commit"])
    for group in model_groups:
        fault = unpack_model(folder, group, base, models, env)
        print(f"{group['group']}: {fault or 'ready'}", flush=True)
    print(f"unpacked in {time.perf_counter() - begin:.0f} s", flush=True)
    if options.prepare:
        return 0
    options.output.mkdir(parents=True, exist_ok=True)
    page = options.output / "benchmarks.md"
    if not page.exists():
        shutil.copy(base / "project/docs/benchmarks.md", page)
    words = [
        sys.executable,
        "-m",
        "tests.gpu",
        "--output",
        str(options.output.resolve()),
        "--page",
        str(page.resolve()),
    ]
    return subprocess.run([*words, *others], env=env, cwd=base / "project", check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
