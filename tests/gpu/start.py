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
MINUTES = 8.8  # unpacking included; imports and the end of a part come on top, and many machines give ten minutes


def extract(archive: Path, output: Path) -> None:
    """Unpack an archive; where Python can, without anything that would lead out of `output`."""
    with tarfile.open(archive) as opened:
        if hasattr(tarfile, "data_filter"):
            opened.extractall(output, filter="data")
        else:
            opened.extractall(output)


def join(folder: Path, group: dict, output: Path) -> str:
    """Join and unpack the pieces of an archive into `output`; what is wrong with them, or nothing.

    The hashes find what was lost or damaged on the way.

    Args:
        folder: holds the part folders.
        group: the manifest's entry, with paths and hashes of the pieces.
    """
    archive = output / ".joined.tar"
    with archive.open("wb") as joined:
        for piece in group["pieces"]:
            path = folder / piece["path"]
            data = path.read_bytes() if path.is_file() else None
            if data is None or hashlib.sha256(data).hexdigest() != piece["sha256"]:
                archive.unlink()
                return f"{piece['path']} is {'missing' if data is None else 'damaged'}"
            joined.write(data)
    extract(archive, output)
    archive.unlink()
    return ""


def identity(group: dict) -> str:
    """What tells an archive from that of another kit."""
    return " ".join(piece["sha256"] for piece in group["pieces"])


def is_done(output: Path, group: dict) -> bool:
    """Whether a folder holds what is made of this archive, complete."""
    mark = output / DONE
    return mark.is_file() and mark.read_text(encoding="utf-8") == identity(group)


def emptied(output: Path) -> Path:
    """A folder without anything in it."""
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    return output


def unpack_project(folder: Path, group: dict, output: Path) -> str:
    """Unpack the project; what is wrong, or nothing."""
    if is_done(output, group):
        return ""
    fault = join(folder, group, emptied(output))
    if not fault:
        extract(output / "tree.tar", output / "project")
        (output / DONE).write_text(identity(group), encoding="utf-8")
    return fault


def unpack_wheels(folder: Path, group: dict, output: Path) -> str:
    """Install the wheels into a folder of their own; what is wrong, or nothing."""
    if is_done(output, group):
        return ""
    fault = join(folder, group, emptied(output))
    if fault:
        return fault
    wheels = sorted(map(str, (output / "wheels").glob("*.whl"))) if (output / "wheels").is_dir() else []
    if wheels:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-cache-dir"]
        result = subprocess.run([*command, "--no-compile", "--target", str(output / "site"), *wheels], check=False)
        if result.returncode:
            return f"pip cannot install its wheels (exit code {result.returncode})"
    (output / DONE).write_text(identity(group), encoding="utf-8")
    return ""


def environment(unpacked: Path, commit: str) -> dict[str, str]:
    """Of the run: packages of the kit before the machine's, no network, models of the kit."""
    places = [unpacked / "project/site", unpacked / "wheels/site", unpacked / "project/project"]
    path = [*map(str, places), *filter(None, [os.environ.get("PYTHONPATH")])]
    data = {"XTF_TEST_DATA": str(unpacked / "project/data")}
    more = {**data, "XTF_TEST_MODELS": str(unpacked / "models"), "XTF_COMMIT": commit, "HF_HUB_OFFLINE": "1"}
    return {**os.environ, **more, "PYTHONUNBUFFERED": "1", "PYTHONPATH": os.pathsep.join(path)}


def unpack_model(folder: Path, group: dict, unpacked: Path, env: dict[str, str]) -> str:
    """Unpack a model and write its weights in bfloat16; why it cannot be used, or nothing."""
    name, models = group["group"], unpacked / "models"
    work = models / f".{name}"
    if is_done(work, group):
        return ""
    fault = join(folder, group, emptied(work))
    if fault:
        return fault
    shutil.rmtree(models / name, ignore_errors=True)
    made = work / "models" / name
    config = (made / "config.json").read_bytes()
    code = "import sys, pathlib, models; models.save_weights(*map(pathlib.Path, sys.argv[1:]))"
    words = [sys.executable, "-c", code, str(work / "gguf" / f"{name}.gguf"), str(made)]
    recipes = str(unpacked / "project/project/recipes")
    env = {**env, "PYTHONPATH": f"{recipes}{os.pathsep}{env['PYTHONPATH']}"}
    result = subprocess.run(words, env=env, check=False)
    if result.returncode:
        return f"its weights could not be made (exit code {result.returncode})"
    (made / "config.json").write_bytes(config)  # as it was made where the kit was packed
    made.rename(models / name)
    (work / DONE).write_text(identity(group), encoding="utf-8")
    return ""


def main() -> int:
    """Unpack what is here, and run; the exit code."""
    begin = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=HERE.parent, help="holds part-1, part-2, …")
    parser.add_argument("--output", type=Path, default=Path("results"))
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all of it, unpacking included")
    parser.add_argument("--prepare", action="store_true", help="unpack what is here, and run nothing")
    options, others = parser.parse_known_args()
    folder, manifest = options.folder.resolve(), json.loads((HERE / "manifest.json").read_text(encoding="utf-8"))
    unpacked = folder / "unpacked"
    (unpacked / "models").mkdir(parents=True, exist_ok=True)
    project, wheels, *models = manifest["groups"]
    faults = [unpack_project(folder, project, unpacked / "project"), unpack_wheels(folder, wheels, unpacked / "wheels")]
    env = environment(unpacked, manifest["commit"])
    if not any(faults):
        for group in models:
            fault = unpack_model(folder, group, unpacked, env)
            print(f"{group['group']}: {fault or 'ready'}", flush=True)
    took = time.perf_counter() - begin
    print(*(f"not ready: {fault}" for fault in faults if fault), f"unpacked in {took:.0f} s", sep="\n", flush=True)
    if options.prepare:
        return 0
    if any(faults):
        print("error: project and wheels must be here; transfer those parts again.", file=sys.stderr)
        return 1
    options.output.mkdir(parents=True, exist_ok=True)
    pages = options.output / "benchmarks"
    if not pages.exists():
        shutil.copytree(unpacked / "project/project/docs/benchmarks", pages)
    words = ["--output", str(options.output.resolve()), "--page", str(pages.resolve())]
    words += ["--minutes", f"{options.minutes - took / 60:.2f}", *others]
    tree = unpacked / "project/project"
    return subprocess.run([sys.executable, "-m", "tests.gpu", *words], env=env, cwd=tree, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
