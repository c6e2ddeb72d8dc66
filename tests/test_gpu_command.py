"""`python -m tests.gpu` and its kit, on a CPU: parts that fail or hang, a second start, pieces lost on the way, and the
whole chain in its smoke form, unpacked in a clean folder, without a network.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import psutil
import pytest

from tests.gpu import __main__ as command
from tests.gpu import kit, start
from tests.gpu.parts import PARTS, Part, Settings

ROOT = Path(__file__).parents[1]


def part(name: str, code: str, limit: float = 60.0, **more) -> Part:
    return Part(name, f"tells {name}", limit, lambda settings: ["-c", code], **more)


def settings(folder: Path, smoke: bool = True) -> Settings:
    return Settings(folder, None, smoke)


def results(folder: Path) -> list[tuple[str, str]]:
    lines = (folder / command.RESULTS).read_text(encoding="utf-8").splitlines()
    return [(result["part"], result["status"]) for result in map(json.loads, lines)]


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Nothing runs on it: only the command believes there is one."""
    monkeypatch.setattr(command, "device_name", lambda: "a GPU")
    monkeypatch.setattr(command.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(command, "machine", lambda: "a machine")


def test_a_part_that_fails_hangs_or_lacks_something_leaves_the_others(tmp_path):
    hanging = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    parts = [
        part("fails", "print('a kernel is wrong'); raise SystemExit(1)"),
        part("crashes", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"),
        part("hangs", hanging, limit=1.5),
        part("lacks", "", modules=("no_such_package",)),
        part("fine", "print('the last line')"),
    ]
    found = command.run_all(settings(tmp_path), parts, 1.0)
    assert [result.status for result in found] == ["failed", "failed", "out of time", "not measured", "passed"]
    assert results(tmp_path) == [(result.part, result.status) for result in found], "written as they come"
    assert "a kernel is wrong" in found[0].tail and "no_such_package" in found[3].tail
    assert (tmp_path / "fine.log").read_text() == "the last line\n"
    left = [
        one for one in psutil.process_iter(["cmdline"]) if "import time; time.sleep(60)" in (one.info["cmdline"] or ())
    ]
    assert not left, "a process of the part that hung is still there"


@pytest.mark.usefixtures("on_a_gpu")
def test_a_second_start_runs_what_has_not_passed_at_this_commit(tmp_path, monkeypatch):
    count = f"open({str(tmp_path / 'runs')!r}, 'a').write('x')"
    parts = [part("passes", count), part("fails", f"{count}; raise SystemExit(1)")]
    command.run_all(settings(tmp_path, smoke=False), parts, 1.0)
    with (tmp_path / command.RESULTS).open("a") as handle:
        handle.write('{"part": "cut o')  # the machine was taken away
    command.run_all(settings(tmp_path, smoke=False), parts, 1.0)
    assert (tmp_path / "runs").read_text() == "xxx", "the part that passed ran twice"
    monkeypatch.setattr(command, "commit", lambda: "another")
    command.run_all(settings(tmp_path, smoke=False), parts, 1.0)
    assert (tmp_path / "runs").read_text() == "xxxxx"


@pytest.mark.usefixtures("on_a_gpu")
def test_no_part_begins_when_the_time_is_up(tmp_path):
    found = command.run_all(settings(tmp_path, smoke=False), [part("late", "")], 0.0)
    assert found[0].status == "not measured" and "start the command again" in found[0].tail


@pytest.mark.skipif(command.device_name() != "no GPU", reason="has a GPU")
def test_without_a_gpu_every_part_says_that_it_was_not_measured(tmp_path, capsys):
    assert command.main(["--output", str(tmp_path)]) == 0
    assert results(tmp_path) == [(part.name, "not measured") for part in PARTS]
    printed = capsys.readouterr().out
    assert all(f"{part.tells}: not measured" in printed for part in PARTS)


def test_limits_of_the_parts_leave_time_for_the_first_ones():
    assert sum(part.limit for part in PARTS[:3]) < 8 * 60


@pytest.fixture
def archives(tmp_path):
    """Two archives with a file each: of bytes that differ everywhere."""
    made = []
    for group in ("base", "model"):
        data = tmp_path / f"{group}.bin"
        data.write_bytes(os.urandom(5_000))
        made.append((group, tmp_path / f"{group}.tar"))
        with tarfile.open(made[-1][1], "w") as archive:
            archive.add(data, "data.bin")
    return made


def test_pieces_of_a_kit_give_the_files_back_and_keep_to_the_limit(tmp_path, archives):
    parts = kit.make_kit(tmp_path / "kit", archives, limit=3_000)
    assert [part.name for part in parts] == [f"part-{number}" for number in range(1, len(parts) + 1)] and len(parts) > 5
    manifest = json.loads((parts[-1] / "manifest.json").read_text())
    for part in parts:
        assert sum(file.stat().st_size for file in part.iterdir() if file.name[-3:].isdigit()) <= 3_000
    for group in manifest["groups"]:
        output = tmp_path / f"out-{group['group']}"
        output.mkdir()
        assert start.join(tmp_path / "kit", group, output) == ""
        assert (output / "data.bin").read_bytes() == (tmp_path / f"{group['group']}.bin").read_bytes()


@pytest.mark.parametrize("fault", ["missing", "damaged"])
def test_a_piece_that_was_lost_or_damaged_on_the_way_is_named(tmp_path, archives, fault):
    kit.make_kit(tmp_path / "kit", archives, limit=3_000)
    manifest = json.loads((tmp_path / "kit/part-1/manifest.json").read_text())
    piece = tmp_path / "kit" / manifest["groups"][0]["pieces"][1]["path"]
    if fault == "missing":
        piece.unlink()
    else:
        piece.write_bytes(piece.read_bytes()[:-1] + b"\0")
    output = tmp_path / "out"
    output.mkdir()
    assert start.join(tmp_path / "kit", manifest["groups"][0], output) == f"part-2/base.001 is {fault}"
    assert list(output.iterdir()) == []


def test_the_kit_has_what_a_machine_lacks_and_leaves_it_its_own_torch():
    alone = {line.split("==")[0] for line in kit.needed({}, "3.12")}
    assert {"transformers", "trl", "bitsandbytes", "datasets", "pydantic-core", "numpy", "gguf", "pytest"} <= alone
    assert not [name for name in alone if name.startswith(("torch", "triton", "nvidia", "xtf"))]
    image = kit.read_freeze((ROOT / "tests/gpu/torch_image.txt").read_text(encoding="utf-8"))
    fewer = {line.split("==")[0] for line in kit.needed(image, "3.12")}
    assert {"trl", "bitsandbytes", "pydantic-core"} <= fewer < alone and "transformers" not in fewer
    assert "transformers" in {line.split("==")[0] for line in kit.needed({**image, "transformers": "4.50.0"}, "3.12")}


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="the kit holds the last commit: needs a repository")
def test_the_kit_unpacked_in_a_clean_folder_runs_its_smoke_without_a_network(tmp_path):
    """The interpreter of the tests stands in for the machine's: it has every package, so that no wheel is packed."""
    parts = tmp_path / "there/kit"
    parts.parent.mkdir()
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    kit.pack_base(tmp_path / "base.tar", wheels)
    kit.make_kit(parts, [("base", tmp_path / "base.tar")], limit=1 << 20)
    assert len(list(parts.iterdir())) > 2
    nowhere = "http://127.0.0.1:9"
    environment = {
        **{name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "XTF_TEST_MODELS")},
        **{"http_proxy": nowhere, "https_proxy": nowhere, "PIP_NO_INDEX": "1", "CUDA_VISIBLE_DEVICES": ""},
    }
    words = [sys.executable, str(parts / "part-1/start.py"), "--output", str(tmp_path / "there/results"), "--smoke"]
    result = subprocess.run(
        [*words, "--only", "kernels", "sft", "real"],
        env=environment,
        cwd=tmp_path / "there",
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    found = dict(results(tmp_path / "there/results"))
    assert found == {"kernels": "passed", "sft": "passed", "real": "passed"}
    page = (tmp_path / "there/results/benchmarks.md").read_text(encoding="utf-8")
    assert "a tiny Llama" in page and "xtf, all three attributes" in page
    again = subprocess.run([*words[:2], "--prepare"], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode == 0 and "unpacked in 0 s" in again.stdout
    shutil.rmtree(tmp_path / "there")
