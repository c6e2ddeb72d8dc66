"""Forked commands are what they are in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from tests import forked

ABOUT = """
import json, os, sys
print(json.dumps([sys.argv[1:], os.getcwd(), os.environ.get("XTF_ONE"), __name__, sys.path[0], "torch" in sys.modules]))
print("to stderr", file=sys.stderr)
"""
CHILDREN = """
import subprocess, sys
words = [sys.executable, "-u", "-c", "import sys; print(sys.argv, flush=True); sys.exit(3)", "a word"]
print(subprocess.run(words, capture_output=True, text=True))
sys.exit(subprocess.run(["accelerate", "no such command"], capture_output=True).returncode)
"""
CASES = {
    "code": ["-c", ABOUT.replace('"torch" in sys.modules', "0"), "--one", "two words"],
    "module": ["-m", "json.tool", "--no-such-option"],
    "an error": ["-c", "raise ValueError('no')"],
    "a message": ["-c", "import sys; sys.exit('told')"],
    "at exit": ["-c", "import atexit, sys; atexit.register(print, 'last'); sys.exit(7)"],
    "a signal": ["-c", "import os, signal; os.kill(os.getpid(), signal.SIGTERM)"],
}


def both(words, **options):
    """What becomes of a command, forked and in a process of its own."""
    env = {**os.environ, **options.pop("env", {})}
    given = [sys.executable, *words]
    own = subprocess.run(given, env=env, capture_output=True, text=True, **options)
    return forked.run(given, env=env, **options), own


@pytest.mark.parametrize("case", CASES)
def test_a_command_ends_as_in_a_process_of_its_own(tmp_path, case):
    found, own = both(CASES[case], cwd=tmp_path, env={"XTF_ONE": "1"})
    assert (found.returncode, found.stdout) == (own.returncode, own.stdout)
    assert found.stderr.splitlines()[-1:] == own.stderr.splitlines()[-1:]


def test_a_script_has_its_folder_in_its_path(tmp_path):
    (tmp_path / "script.py").write_text("import beside\nprint(beside.__file__, __file__, __name__)\n")
    (tmp_path / "beside.py").write_text("")
    found, own = both([tmp_path / "script.py"])
    assert found.stdout == own.stdout and str(tmp_path) in own.stdout


def test_what_it_imports_comes_from_its_own_path(tmp_path):
    """A `sitecustomize` too."""
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.stderr.write('customised')\n")
    (tmp_path / "xtf_plugin.py").write_text("mine = True\n")
    off = {"PYTHONPATH": str(tmp_path), "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    (tmp_path / "elsewhere").mkdir()
    found, own = both(["-c", "import xtf_plugin; print(xtf_plugin.mine)"], env=off, cwd=tmp_path / "elsewhere")
    assert (found.stdout, found.stderr) == (own.stdout, own.stderr) == ("True\n", "customised")


def test_the_hook_comes_and_imports_were_made():
    code = "import sys; print('torch' in sys.modules, 'xtf_plugin.hosts' in sys.modules, 'trl' in sys.modules)"
    assert forked.run([sys.executable, "-c", code]).stdout == "True True False\n"


def test_processes_that_it_starts(tmp_path):
    found = forked.run([sys.executable, "-c", CHILDREN], cwd=tmp_path)
    assert found.returncode == 2 and "['-c', 'a word']" in found.stdout and "returncode=3" in found.stdout


def test_a_command_that_takes_too_long_is_ended(tmp_path):
    code = f"import time\nfor _ in range(60): open({str(tmp_path / 'alive')!r}, 'a').write('x'); time.sleep(0.05)"
    with pytest.raises(subprocess.TimeoutExpired):
        forked.run([sys.executable, "-c", code], timeout=0.5)
    time.sleep(0.5)
    size = (tmp_path / "alive").stat().st_size
    time.sleep(0.5)
    assert (tmp_path / "alive").stat().st_size == size > 0
