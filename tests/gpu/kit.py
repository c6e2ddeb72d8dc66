"""Packs what a GPU machine without a network lacks to run `python -m tests.gpu`: `make gpu-kit`.

    python -m tests.gpu.kit --have have.txt [--output .gpu-kit] [--python 3.12] [--models NAME ...]
      [--axolotl] [--data FOLDER]

`have.txt` is what `pip freeze` prints on that machine; it keeps its own PyTorch, Triton and everything else that is new
enough. The kit holds wheels for the other packages in the versions installed here, the repository as it is committed,
and real models as 4-bit files (recipes/models.py). It comes as folders `part-1`, `part-2`, … of at most 48 MiB, for
transfers with a limit; every folder has `start.py`, which joins and runs them:

    python part-1/start.py --output results

The project is an archive of its own in the first part: after a change only that part goes again. A model whose parts
did not come is left out, and its rows say so.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata as metadata
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "recipes"))  # a folder of scripts

import models  # noqa: E402

PART = 48 << 20  # bytes of a folder's pieces
DISTRIBUTION = "xtf-plugin"
BESIDES = ("gguf", "psutil", "pytest", "pytest-xdist")  # what the runner needs besides the package
OWN = ("torch", "triton", "nvidia-", "cuda-")  # the machine's: made for its driver
PLATFORMS = [f"manylinux_2_{n}_x86_64" for n in (39, 35, 34, 31, 28, 27, 24, 17, 12, 5)] + ["manylinux2014_x86_64"]
# Axolotl asks for many packages; these are what importing its LoRA kernels takes besides those of the package.
AXOLOTL = {
    "axolotl": "0.19.0",
    "addict": "2.4.0",
    "evaluate": "0.4.1",
    "opentelemetry-api": "1.45.2",
    "pillow": "11.3.0",
    "protobuf": "6.33.6",
    "wandb": "0.31.0",
}


def read_freeze(text: str) -> dict[str, str]:
    """Names and versions of the lines `name==version` of `pip freeze`; other lines are left out."""
    pairs = (line.split("==", 1) for line in text.splitlines() if "==" in line and not line.startswith(("#", "-")))
    return {canonicalize_name(name.strip()): version.strip() for name, version in pairs}


def is_the_machines(name: str) -> bool:
    """Whether a package is never packed, because a machine with a GPU has its own."""
    return any(name.startswith(start) if start.endswith("-") else name == start for start in OWN)


def needed(have: dict[str, str], python: str) -> list[str]:
    """Requirements `name==version` of everything that the runner imports and the machine lacks, or has too old.

    Versions are those of this environment, in which the tests run.

    Raises:
        metadata.PackageNotFoundError: a package is not installed here.
    """
    environment: dict[str, Any] = {
        **default_environment(),
        "python_version": python,
        "python_full_version": f"{python}.0",
    }
    environment |= {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64", "extra": ""}
    queue, seen, wanted = [Requirement(name) for name in (DISTRIBUTION, *BESIDES)], set[str](), dict[str, str]()
    while queue:
        requirement = queue.pop()
        name = canonicalize_name(requirement.name)
        if requirement.marker is not None and not requirement.marker.evaluate(environment):
            continue
        if is_the_machines(name):
            continue
        enough = name in have and requirement.specifier.contains(have[name], prereleases=True)
        if name != DISTRIBUTION and not enough:
            wanted[name] = metadata.version(name)
        if name in seen or enough:
            continue
        seen.add(name)
        queue += [Requirement(line) for line in metadata.requires(name) or []]
    return sorted(f"{name}=={version}" for name, version in wanted.items())


def download(requirements: Iterable[str], output: Path, python: str) -> None:
    """Wheels of exactly these packages for another Python on Linux x86-64.

    Raises:
        subprocess.CalledProcessError: pip found no wheel; it says which.
    """
    target = [word for name in PLATFORMS for word in ("--platform", name)]
    abis = [word for name in (f"cp{python.replace('.', '')}", "abi3", "none") for word in ("--abi", name)]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", python, "--implementation", "cp", *abis, *target, "--dest", str(output)]
    for requirement in requirements:
        subprocess.run([*command, requirement], check=True)


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    """Put a file into an archive."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


def pack_project(path: Path, data: Path | None = None) -> None:
    """The repository as it is committed, and the package's metadata: its entry points are its hooks into TRL.

    With `data`, also what the training comparison reads of that folder.
    """
    tree = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, check=True, capture_output=True).stdout
    installed = metadata.distribution(DISTRIBUTION)
    folder = f"site/xtf_plugin-{installed.version}.dist-info"
    with tarfile.open(path, "w") as archive:
        add(archive, "tree.tar", tree)
        for name in ("METADATA", "entry_points.txt"):
            add(archive, f"{folder}/{name}", (installed.read_text(name) or "").encode())
        if data is not None:
            archive.add(data / "gsm8k_train.jsonl", "data/gsm8k_train.jsonl")


def pack_wheels(path: Path, wheels: Path) -> None:
    """The wheels of a folder."""
    with tarfile.open(path, "w") as archive:
        for wheel in sorted(wheels.glob("*.whl")):
            archive.add(wheel, f"wheels/{wheel.name}")


def pack_model(path: Path, folder: Path, name: str) -> None:
    """A model: its 4-bit file, and what else the made folder holds. Weights in bfloat16 are made of it over there."""
    models.make(folder, name)
    with tarfile.open(path, "w") as archive:
        archive.add(models.gguf_file(folder, name), f"gguf/{name}.gguf")
        for file in sorted((folder / name).iterdir()):
            if file.suffix != ".safetensors":
                archive.add(file, f"models/{name}/{file.name}")


def split(group: str, path: Path, output: Path, limit: int, used: list[int]) -> dict[str, Any]:
    """Cut an archive into pieces and lay them into the part folders; `used` holds the bytes in each folder.

    Returns:
        The manifest's entry: the pieces in their order, with hashes.
    """
    pieces: list[dict[str, Any]] = []
    with path.open("rb") as handle:
        while True:
            if not used or used[-1] >= limit:
                used.append(0)
            data = handle.read(limit - used[-1])
            if not data:
                break
            place = f"part-{len(used)}/{group}.{len(pieces):03}"
            (output / place).parent.mkdir(parents=True, exist_ok=True)
            (output / place).write_bytes(data)
            used[-1] += len(data)
            pieces.append({"path": place, "sha256": hashlib.sha256(data).hexdigest()})
    return {"group": group, "pieces": pieces}


def make_kit(output: Path, groups: Iterable[tuple[str, Path]], limit: int = PART) -> list[Path]:
    """Write the part folders of some archives, replacing an earlier kit; the folders."""
    staging = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.resolve().parent))
    used: list[int] = []
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, check=True, capture_output=True, text=True)
    manifest = {
        "commit": head.stdout.strip(),
        "groups": [split(name, path, staging, limit, used) for name, path in groups],
    }
    parts = sorted(staging.glob("part-*"), key=lambda part: int(part.name.removeprefix("part-")))
    for part in parts:
        shutil.copy(Path(__file__).with_name("start.py"), part)
        (part / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(output, ignore_errors=True)
    staging.chmod(0o755)
    staging.rename(output)
    return [output / part.name for part in parts]


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(".gpu-kit"))
    parser.add_argument("--have", type=Path, help="what `pip freeze` prints there; default: nothing but PyTorch")
    parser.add_argument("--python", default="3.12", help="of that machine")
    parser.add_argument("--models", nargs="*", choices=list(models.MODELS), default=["SmolLM2-135M-Instruct"])
    parser.add_argument("--folder", type=Path, default=Path(os.environ.get("XTF_TEST_MODELS") or ROOT / ".models"))
    parser.add_argument("--axolotl", action="store_true", help="also what Axolotl's LoRA kernels need")
    parser.add_argument("--data", type=Path, help="folder with gsm8k_train.jsonl, for the training comparison")
    options = parser.parse_args(given)
    changed = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True, check=True)
    if changed.stdout.strip():
        print(f"The kit holds the last commit, not what is changed since:\n{changed.stdout}", file=sys.stderr)
    have = read_freeze(options.have.read_text(encoding="utf-8")) if options.have else {}
    wanted = needed(have, options.python)
    if options.axolotl:
        wanted += [f"{name}=={version}" for name, version in AXOLOTL.items() if name not in have]
    print("packages:", *wanted, flush=True)
    with tempfile.TemporaryDirectory() as name:
        wheels, groups = (
            Path(name) / "wheels",
            [(group, Path(name) / f"{group}.tar") for group in ("project", "wheels")],
        )
        wheels.mkdir()
        download(wanted, wheels, options.python)
        pack_project(groups[0][1], options.data)
        pack_wheels(groups[1][1], wheels)
        for model in options.models:
            groups.append((model, Path(name) / f"{model}.tar"))
            pack_model(groups[-1][1], options.folder, model)
        parts = make_kit(options.output, groups)
    for part in parts:
        print(f"{part}: {models.size(part) / 2**20:.1f} MiB")
    print(f"there: python {parts[0].name}/start.py --output results")
    return 0


if __name__ == "__main__":
    sys.exit(main())
