"""`python -m tests.gpu` and its kit, on a CPU: parts that fail or hang, a second start, pieces lost on the way, and the
whole chain in its smoke form, unpacked in a clean folder, without a network.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import psutil
import pytest

from tests import forked, real
from tests.gpu import __main__ as command
from tests.gpu import kit, parts, start
from tests.gpu.parts import PARTS, Part, Settings
from tests.reliability import LONG

ROOT = Path(__file__).parents[2]


def part(name: str, code: str, limit: float = 60.0, **more) -> Part:
    return Part(name, f"checks {name}", limit, lambda settings, seconds: ["-c", code], **more)


def settings(folder: Path, smoke: bool = True) -> Settings:
    return Settings(folder, folder / "scratch", None, smoke)


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
    some = [
        part("fails", "print('a kernel is wrong'); raise SystemExit(1)"),
        part("crashes", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"),
        part("hangs", hanging, limit=1.5),
        part("lacks", "", modules=("no_such_package",)),
        part("fine", "print('the last line')"),
    ]
    found = command.run_all(settings(tmp_path), some, 1.0)
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
    some = [part("passes", count), part("fails", f"{count}; raise SystemExit(1)")]
    command.run_all(settings(tmp_path, smoke=False), some, 1.0)
    with (tmp_path / command.RESULTS).open("a") as handle:
        handle.write('{"part": "cut o')  # the machine was taken away
    command.run_all(settings(tmp_path, smoke=False), some, 1.0)
    assert (tmp_path / "runs").read_text() == "xxx", "the part that passed ran twice"
    monkeypatch.setattr(command, "commit", lambda: "another")
    command.run_all(settings(tmp_path, smoke=False), some, 1.0)
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
    assert all(f"{part.description}: not measured" in printed for part in PARTS)


@pytest.fixture
def interruptible():
    """A shell that starts tests in the background lets them ignore SIGINT; `main` undoes that, as this does."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_a_part_whose_time_is_over_can_write_what_it_has(tmp_path):
    code = "try:\n  import time; time.sleep(60)\nfinally:\n  print('the table so far')"
    found = command.run_all(settings(tmp_path), [part("slow", code, limit=6.0)], 1.0)
    assert found[0].status == "out of time" and "the table so far" in found[0].tail and found[0].seconds < 30


@pytest.mark.usefixtures("on_a_gpu")
def test_a_smoke_run_is_no_pass_for_the_real_one(tmp_path):
    count = f"open({str(tmp_path / 'runs')!r}, 'a').write('x')"
    for smoke in (True, False):
        command.run_all(settings(tmp_path, smoke=smoke), [part("passes", count)], 1.0)
    assert (tmp_path / "runs").read_text() == "xx"


def test_limits_leave_time_for_the_most_important_parts():
    assert sum(part.limit for part in PARTS[:4]) <= 8.9 * 60


def test_benchmarks_are_given_less_time_than_their_part_has(tmp_path):
    for one in PARTS:
        words = one.command(settings(tmp_path, smoke=False), 60.0)
        if "--minutes" in words:
            assert float(words[words.index("--minutes") + 1]) <= 0.5


def test_a_gpu_that_pytorch_cannot_use_is_an_error(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "has_an_unusable_gpu", lambda: True)
    assert command.main(["--output", str(tmp_path)]) == 2
    assert "built without CUDA" in capsys.readouterr().err


@pytest.mark.parametrize("body, code", [("pass", 0), ("assert False", 1), ("pytest.skip('needs Triton')", 1)])
def test_tests_that_are_skipped_on_a_gpu_are_no_pass(tmp_path, body, code):
    file = tmp_path / "test_it.py"
    test = "@pytest.mark.gpu\ndef test_{}():\n    {}\n"
    file.write_text("\n".join(["import pytest", test.format("one", body), test.format("two", "pass")]))
    words = [sys.executable, "-m", "tests.gpu.checks", str(file)]
    result = forked.run(words, cwd=ROOT)
    assert result.returncode == code, result.stdout
    assert ("skipped, which is no pass: Skipped: needs Triton" in result.stdout) == ("skip" in body)
    assert forked.run([*words, "--smoke"], cwd=ROOT).returncode == int("assert" in body)


@pytest.fixture
def archives(tmp_path):
    """Archives with a file each, of bytes that differ everywhere."""
    made = []
    for group in ("base", "model"):
        data = tmp_path / f"{group}.bin"
        data.write_bytes(os.urandom(5_000))
        made.append((group, tmp_path / f"{group}.tar"))
        with tarfile.open(made[-1][1], "w") as archive:
            archive.add(data, "data.bin")
    return made


def test_pieces_of_a_kit_give_the_files_back_and_keep_to_the_limit(tmp_path, archives):
    folders = kit.make_kit(tmp_path / "kit", archives, limit=3_000)
    assert [part.name for part in folders] == [f"part-{number}" for number in range(1, len(folders) + 1)] and len(
        folders
    ) > 5
    manifest = json.loads((folders[-1] / "manifest.json").read_text())
    for part in folders:
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


def test_training_needs_its_data_which_a_kit_brings(tmp_path, monkeypatch):
    (tmp_path / "gsm8k_train.jsonl").write_text("{}\n")
    kit.pack_project(tmp_path / "project.tar", tmp_path)
    with tarfile.open(tmp_path / "project.tar") as archive:
        archive.extractall(tmp_path / "there", filter="data")
    last, env = PARTS[-1], start.environment(tmp_path, "a commit")
    assert last.name == "training" and env["XTF_TEST_DATA"] == str(tmp_path / "project/data")
    monkeypatch.setattr(real, "is_made", lambda name: True)
    for folder, answer in ((tmp_path / "elsewhere", "no gsm8k_train.jsonl"), (tmp_path / "there/data", "")):
        monkeypatch.setattr(parts, "DATA", folder)
        missing = last.missing(settings(tmp_path, smoke=False))
        assert missing.startswith(answer) and bool(missing) is bool(answer)


def test_what_another_kit_left_is_unpacked_anew(tmp_path, archives):
    kit.make_kit(tmp_path / "kit", archives, limit=3_000)
    group = json.loads((tmp_path / "kit/part-1/manifest.json").read_text())["groups"][0]
    output = tmp_path / "out"
    output.mkdir()
    (output / start.DONE).write_text("of another kit")
    assert not start.is_done(output, group)
    (output / start.DONE).write_text(start.identity(group))
    assert start.is_done(output, group)


@pytest.mark.skipif(not LONG, reason="takes a minute; `make test-long` runs it")
@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="the kit holds the last commit: needs a repository")
def test_the_kit_unpacked_in_a_clean_folder_runs_its_smoke_without_a_network(tmp_path):
    """The interpreter of the tests stands in for the machine's: it has every package, so that no wheel is packed."""
    there, wheels = tmp_path / "there", tmp_path / "no wheels"
    for folder in (there, wheels):
        folder.mkdir()
    kit.pack_project(tmp_path / "project.tar")
    kit.pack_wheels(tmp_path / "wheels.tar", wheels)
    kit.make_kit(there / "kit", [(name, tmp_path / f"{name}.tar") for name in ("project", "wheels")], limit=1 << 20)
    assert len(list((there / "kit").iterdir())) > 2
    nowhere = "http://127.0.0.1:9"
    environment = {
        **{name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "XTF_TEST_MODELS")},
        **{"http_proxy": nowhere, "https_proxy": nowhere, "PIP_NO_INDEX": "1", "CUDA_VISIBLE_DEVICES": ""},
    }

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(there / "kit/part-1/start.py"), *words]
        return subprocess.run(command, env=environment, cwd=there, capture_output=True, text=True, check=False)

    result = run("--output", "results", "--smoke", "--only", "kernels", "sft", "real")
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert dict(results(there / "results")) == {"kernels": "passed", "sft": "passed", "real": "passed"}
    pages = "".join(page.read_text(encoding="utf-8") for page in (there / "results/benchmarks").glob("*.md"))
    assert "a tiny Llama" in pages and "xtf, all three attributes" in pages
    assert len([path for path in (there / "results").iterdir() if path.is_file()]) == 4, "logs and results"
    assert "unpacked in 0 s" in run("--prepare").stdout, "unpacked again"
    env = start.environment(there / "kit/unpacked", "a commit")
    code = "import importlib.metadata as m; print(m.distribution('xtf-plugin').locate_file(''))"
    found = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    assert str(there) in found, "the hooks are those of the kit"
