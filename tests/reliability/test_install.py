"""Install safety: with a damaged installation, or broken packages around it, `import torch` works and is silent, a
recipe without an `xtf:` block trains as stock, and one with a block is applied or ends with a code and the next step.
The one exception is the boot file itself.

All of it in a virtual environment made for these tests: the packages of this one by symbolic links, ours as a copy that
is damaged. Most runs are forked from a process that has imported everything without us and then does what
`import torch` does at its end, so that hundreds fit into minutes; the order of real imports is tried in a few.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sysconfig
import venv
from importlib import metadata
from pathlib import Path

import pytest

from tests import tiny
from tests.hosts.test_end_to_end import recipe
from tests.reliability import LONG, amount, record

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="runs are forked")

DISTRIBUTION = metadata.distribution("xtf-plugin")
(ENTRY,) = (entry for entry in DISTRIBUTION.entry_points if entry.group == "torch.backends")
PACKAGE = Path(importlib.util.find_spec("xtf_plugin").origin).parent
MODULES = sorted(path.relative_to(PACKAGE.parent).as_posix() for path in PACKAGE.rglob("*.py"))
# All that a run without a block imports; damage elsewhere cannot reach it.
LOADED = ["", "environment", "errors", "hosts", "hosts.boot", "hosts.fail_closed", "hosts.trl"]
DAMAGES = ("missing", "empty", "broken")
SHORT = {
    ("xtf_plugin/errors.py", "missing"),
    ("xtf_plugin/hosts/fail_closed.py", "broken"),
    ("xtf_plugin/hosts/trl.py", "empty"),
    ("xtf_plugin/config/block.py", "broken"),
    ("xtf_plugin/selection/select.py", "missing"),
    ("xtf_plugin/report/writer.py", "empty"),
}
CASES = [(module, damage) for module in MODULES for damage in DAMAGES if LONG or (module, damage) in SHORT]

SERVER = """
import gc, importlib, json, os, runpy, sys
import torch
if sys.argv[1:]:
    import datasets, peft, pydantic, rich.console, transformers.trainer, trl.scripts.sft, trl.trainer.sft_trainer
gc.freeze()
torch.set_num_threads(1)
print("ready", flush=True)
for line in sys.stdin:
    case, code = json.loads(line), 0
    if not os.fork():
        output = os.open(case["output"], os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(output, 1), os.dup2(output, 2)
        for name in [name for name in sys.modules if name.split(".")[0] in case["forget"]]:
            del sys.modules[name]
        sys.path[:0], sys.argv = case["paths"], case["words"]
        os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "1"
        importlib.invalidate_caches()
        try:
            torch._import_device_backends()  # as at the end of `import torch`
            print("<torch>", flush=True)
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(bool(end.code))
        except BaseException:
            sys.excepthook(*sys.exc_info())
            code = 1
        print("<loaded>", *(name for name in sys.modules if name.split(".")[0].startswith("xtf_plugin")), flush=True)
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


def copy_of_ours(folder: Path) -> Path:
    """The package, what else its entry point names, and the metadata that lead there."""
    for name in {"xtf_plugin", ENTRY.module.split(".")[0]}:
        origin = Path(importlib.util.find_spec(name).origin)
        if origin.name == "__init__.py":
            shutil.copytree(origin.parent, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(origin, folder / origin.name)
    about = folder / f"xtf_plugin-{DISTRIBUTION.version}.dist-info"
    about.mkdir()
    for name in ("METADATA", "entry_points.txt"):
        (about / name).write_text(DISTRIBUTION.read_text(name))
    return folder


class Place:
    """An environment without us, and what runs in it; `paths` are put before all others."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        venv.create(folder / "venv", with_pip=False, symlinks=True)
        site = next((folder / "venv" / "lib").glob("python*")) / "site-packages"
        for entry in Path(sysconfig.get_path("purelib")).iterdir():
            if "xtf_plugin" not in entry.name:
                (site / entry.name).symlink_to(entry)
        (folder / "trl").write_text("from trl.cli import main\nmain()\n")
        tiny.save_base(folder / "model")
        tiny.save_rows(folder / "data/train.jsonl", tiny.problems(12))
        own = dict.fromkeys(["load_in_4bit", "use_peft", "lora_r", "lora_dropout", "lora_target_modules", "save_steps"])
        own |= {"gradient_accumulation_steps": 1, "max_steps": 1, "save_strategy": "no", "gradient_checkpointing": None}
        self.recipes = {
            with_block: recipe(folder, folder / name, xtf={"preset": "paper"} if with_block else None, **own)
            for name, with_block in (("plain", False), ("block", True))
        }
        self.sft = str(Path(importlib.util.find_spec("trl").origin).parent / "scripts" / "sft.py")
        self.servers: dict[bool, subprocess.Popen] = {}

    def python(self, *words: object, paths: tuple[Path, ...] = ()) -> subprocess.CompletedProcess:
        command = [str(self.folder / "venv/bin/python"), *map(str, words)]
        options = {"capture_output": True, "text": True, "timeout": 300}
        record("install", processes=1)
        return subprocess.run(command, cwd=self.folder, env=self.environment(paths), **options)

    def environment(self, paths=(), **more: str) -> dict[str, str]:
        own = {"PYTHONPATH": os.pathsep.join(map(str, paths)), "XTF_CACHE": str(self.folder / "cache")}
        own |= {"HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", **more}
        return {**{k: v for k, v in os.environ.items() if not k.startswith(("XTF_", "TORCH_"))}, **own}

    def train(self, *paths: Path, block: bool, script: str = "", forget=(), everything=True) -> tuple[int, str]:
        """Exit code and output of a run of a recipe in a forked process."""
        if everything not in self.servers:
            self.servers[everything] = subprocess.Popen(
                [self.folder / "venv/bin/python", "-c", SERVER, *["everything"] * everything],
                cwd=self.folder,  # from ours, `python -c` would find the package
                env=self.environment(TORCH_DEVICE_BACKEND_AUTOLOAD="0"),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            assert self.servers[everything].stdout.readline() == "ready\n"
        server, output = self.servers[everything], self.folder / "output"
        words = [script or self.sft, *(["sft"] if script else []), "--config", str(self.recipes[block])]
        case = {"paths": list(map(str, paths)), "words": words, "output": str(output), "forget": list(forget)}
        server.stdin.write(json.dumps(case) + "\n")
        server.stdin.flush()
        record("install", runs=1)
        return int(server.stdout.readline()), output.read_text()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    made = Place(tmp_path_factory.mktemp("place"))
    yield made
    for server in made.servers.values():
        server.communicate()


@pytest.fixture(scope="module")
def losses(place, tmp_path_factory):
    """Losses of stock runs and of an undamaged installation."""
    ours = copy_of_ours(tmp_path_factory.mktemp("complete"))
    stock, plain, block = place.train(block=False), place.train(ours, block=False), place.train(ours, block=True)
    assert [stock[0], plain[0], block[0]] == [0, 0, 0], block[1]
    assert set(loaded(plain[1])) == {f"xtf_plugin.{name}".rstrip(".") for name in LOADED} | {ENTRY.module}
    assert loss(stock[1]) == loss(plain[1]) != loss(block[1])
    return {False: loss(stock[1]), True: loss(block[1])}


def loss(output: str) -> str:
    (found,) = re.findall(r"'train_loss': '(.*?)'", output)
    return found


def loaded(output: str) -> list[str]:
    return output.rpartition("<loaded>")[2].split()


def fails_loudly(code: int, output: str, empty: str = "") -> bool:
    """Whether a run ends with an error and the next step; an empty module may be named later instead."""
    printed = output.rpartition("<torch>")[2]
    return code != 0 and ("pip install" in printed or f"module '{empty}' has no attribute" in printed)


def test_a_complete_or_removed_installation_is_silent(place, tmp_path):
    for paths in ((), (copy_of_ours(tmp_path),)):
        ended = place.python("-c", "import torch", paths=paths)
        assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
    code, output = place.train(block=True, script=str(place.folder / "trl"))
    assert code == 2 and "--xtf" in output, "stock TRL refuses the key where we are not installed"


def test_an_entry_point_that_is_left_over_breaks_nothing(place, tmp_path, losses):
    """The package was deleted by hand, its metadata were not."""
    shutil.rmtree(copy_of_ours(tmp_path) / "xtf_plugin")
    ended = place.python("-c", "import torch", paths=(tmp_path,))
    assert ended.returncode == 0, ended.stderr
    assert len(ended.stderr.splitlines()) <= 1
    code, output = place.train(tmp_path, block=False)
    assert code == 0 and loss(output) == losses[False]
    assert fails_loudly(*place.train(tmp_path, block=True))


def spoil(path: Path, damage: str) -> None:
    if damage == "missing":
        path.unlink()
    else:
        path.write_text("" if damage == "empty" else f"{path.read_text()}\n)(\n")


@pytest.mark.parametrize("module, damage", CASES)
def test_a_damaged_module(place, tmp_path, losses, module, damage):
    spoil(copy_of_ours(tmp_path) / module, damage)
    dotted = module.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
    if dotted.removeprefix("xtf_plugin").removeprefix(".") in LOADED:
        code, output = place.train(tmp_path, block=False)
        assert code == 0 and loss(output) == losses[False], output[-2000:]
        assert output.count("xtf-plugin could not patch TRL") <= 1
    code, output = place.train(tmp_path, block=True)
    applied = code == 0 and loss(output) == losses[True]  # nothing of it was needed
    assert applied or fails_loudly(code, output, dotted if damage == "empty" else ""), output[-2000:]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_boot_file_is_the_one_exception(place, tmp_path, damage):
    """PyTorch loads the entry point before any code of ours runs; its message names us and how to switch us off."""
    spoil(copy_of_ours(tmp_path) / f"{ENTRY.module}.py", damage)
    code, output = place.train(tmp_path, block=False, everything=False)
    assert code == 1 and "<torch>" not in output and loaded(output) == [ENTRY.module] * (damage == "empty")
    message = f"RuntimeError: Failed to load the backend extension: {ENTRY.name}."
    assert message in output and "TORCH_DEVICE_BACKEND_AUTOLOAD=0" in output.rpartition(message)[2], output[-2000:]
    if damage == "missing" or LONG:  # a real process
        assert message in place.python("-c", "import torch", paths=(tmp_path,)).stderr


STUBS = {"raises": "raise ImportError('a library is missing')", "old": "__version__ = '0.0.1'"}
BROKEN = [(package, kind) for package in ("trl", "transformers", "yaml") for kind in STUBS]
BROKEN += [(package, "raises") for package in ("accelerate", "peft", "datasets", "pyarrow", "pydantic", "rich") if LONG]


def stub(folder: Path, package: str, kind: str) -> Path:
    (folder / package).mkdir(parents=True)
    (folder / package / "__init__.py").write_text(STUBS[kind])
    return folder


@pytest.mark.parametrize("package, kind", BROKEN)
def test_a_package_that_is_broken_for_all(place, tmp_path, package, kind):
    """Stock fails by itself, with its own message; so does a run with us, block or none."""
    stubs, ours = stub(tmp_path / "stubs", package, kind), copy_of_ours(tmp_path)
    stock = place.train(stubs, block=False, everything=False)
    for block in (False, True):
        code, output = place.train(stubs, ours, block=block, everything=False)
        assert code and "<torch>" in output, output[-2000:]
        last = [text.partition("<loaded>")[0].strip().splitlines()[-1] for text in (stock[1], output)]
        assert (code, last[0]) == (stock[0], last[1]) or fails_loudly(code, output), output[-2000:]


@pytest.mark.parametrize("kind", STUBS)
@pytest.mark.parametrize("package", amount(["pydantic"], ["pydantic", "rich", "xxhash", "platformdirs"]))
def test_a_package_of_which_the_host_needs_less(place, tmp_path, losses, package, kind):
    """The host has imported what it needs of the package; what we import of it is missing."""
    stubs, ours = stub(tmp_path / "stubs", package, kind), copy_of_ours(tmp_path)
    code, output = place.train(stubs, ours, block=False, forget=[package])
    assert code == 0 and loss(output) == losses[False], output[-2000:]
    code, output = place.train(stubs, ours, block=True, forget=[package])
    applied = code == 0 and loss(output) == losses[True]  # it was not needed
    assert applied or fails_loudly(code, output, package if kind == "old" else ""), output[-2000:]


@pytest.mark.parametrize("version", [None, "1.4.0"])
def test_a_trl_that_is_too_old(place, tmp_path, losses, version):
    """By its metadata; and by its code, which knows no such parser and ignores unknown keys."""
    ours = copy_of_ours(tmp_path)
    if version:
        (tmp_path / "trl-1.4.0.dist-info").mkdir()
        (tmp_path / "trl-1.4.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: trl\nVersion: 1.4.0\n")
    else:
        (ours / "trl" / "scripts").mkdir(parents=True)
        for name in ("__init__.py", "scripts/__init__.py", "scripts/utils.py"):
            (ours / "trl" / name).write_text("class TrlParser: pass\n")
        (ours / "sft").write_text("import trl.scripts.utils\nprint({'train_loss': 'old'})\n")
    run = {"script": "" if version else str(ours / "sft"), "everything": bool(version)}
    code, output = place.train(ours, block=False, **run)
    assert code == 0 and loss(output) == (losses[False] if version else "old")
    code, output = place.train(ours, block=True, **run)
    assert fails_loudly(code, output) and code == 2 and "trl>=1.9" in output, output[-2000:]


@pytest.mark.skipif(not LONG, reason="real processes take ten seconds each; `make test-long` runs them")
@pytest.mark.parametrize("module", ["training.callback", "hosts.fail_closed"])
def test_the_real_command_with_a_module_missing(place, tmp_path, losses, module):
    (copy_of_ours(tmp_path) / "xtf_plugin" / f"{module.replace('.', '/')}.py").unlink()
    for block in (False, True):
        ended = place.python(place.folder / "trl", "sft", "--config", place.recipes[block], paths=(tmp_path,))
        output = ended.stdout + ended.stderr
        code, stock = ended.returncode, not block
        assert (code == 0 and loss(output) == losses[False]) if stock else fails_loudly(code, output), output[-2000:]
