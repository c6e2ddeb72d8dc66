"""The process behind `tests.forked`: imports once, then begins every command in a fork of itself.

For each connection a fork of the server waits for the command, which is a fork of that one; it ends the command when
whoever asked for it is gone. Standard library alone, and no module of the tests: it runs in any environment.
"""

import array
import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import random
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import types

PRELOADED = """
    torch torch.utils.data torch.distributed transformers transformers.trainer transformers.trainer_callback
    transformers.integrations.bitsandbytes transformers.models.llama.modeling_llama transformers.models.auto
    datasets peft bitsandbytes accelerate accelerate.commands.launch pandas pyarrow.parquet pydantic rich.console
    typer yaml tqdm.auto xxhash platformdirs
    wandb numba pydantic_extra_types.language_code torch.distributed.fsdp torch.distributed.checkpoint
    torch.distributed.tensor.parallel torch.distributed.optim
""".split()
BIN = os.path.dirname(sys.executable)
# In place of the interpreter: asks the server, and is the command as far as signals and the exit code go.
SHIM = """#!{python} -IS
import array, json, os, socket, sys
words = ["python", *sys.argv[1:]]
known = len(words) > 1 and (words[1] in ("-m", "-c", "-u") or not words[1].startswith("-"))
connection = socket.socket(socket.AF_UNIX)
try:
    connection.connect({address!r} if known else "")
except OSError:
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
text = json.dumps({{"words": words, "env": dict(os.environ), "cwd": os.getcwd()}}).encode()
rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2]))
connection.sendmsg([len(text).to_bytes(8, "big")], [rights])
connection.sendall(text)
code = int(connection.recv(64) or 1)
if code < 0:
    os.kill(os.getpid(), -code)
os._exit(code)
"""


def receive(connection):
    """A command as `tests.forked.send` sent it: words, environment and folder, and its three files."""
    size, rights, _, _ = connection.recvmsg(8, socket.CMSG_SPACE(3 * 4))
    files = array.array("i")
    for _, _, data in rights:
        files.frombytes(data)
    text, left = b"", int.from_bytes(size, "big")
    while len(text) < left:
        text += connection.recv(left - len(text))
    return json.loads(text), list(files)


def wait(connection, child):
    """The exit code of the command, negative for a signal; it is ended if nobody waits for it any more."""
    process = os.pidfd_open(child)
    ready, _, _ = select.select([process, connection], [], [])
    if process not in ready:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGTERM)
            if not select.select([process], [], [], 5)[0]:
                os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class Popen(subprocess.Popen):
    """Scripts of this environment, whose first line names the interpreter, go to the server too."""

    def __init__(self, args, *rest, **options):
        if isinstance(args, (list, tuple)) and not options.get("executable"):
            args = through_the_shim(args)
        super().__init__(args, *rest, **options)


def execvp(file, args):
    execvpe(file, args, os.environ)


def execvpe(file, args, env, own=os.execvpe):
    words = through_the_shim([file, *args[1:]])
    own(words[0], words if words[0] != file else args, env)


def through_the_shim(words):
    first = os.fspath(words[0])
    named = first if os.sep in first else os.path.join(BIN, first)
    return [sys.executable, named, *words[1:]] if os.path.dirname(named) == BIN and is_script(named) else words


def is_script(path):
    try:
        with open(path, "rb") as file:
            line = file.readline()
    except OSError:
        return False
    return line.startswith(b"#!") and b"python" in line


def main_module(name, code, file=None):
    module = types.ModuleType("__main__")
    module.__builtins__ = __builtins__
    if file:
        module.__file__ = file
    sys.modules["__main__"] = module
    exec(compile(code, name, "exec"), module.__dict__)


def prepared(words):
    """Set `sys.argv` and `sys.path` as the interpreter does; what it runs then."""
    if not words[0].startswith(os.path.join(BIN, "python")) and words[0] != "python":
        words = ["python", *words]  # a script
    _, first, *rest = words
    if first == "-u":
        sys.stdout.reconfigure(write_through=True)
        return prepared(["python", *rest])
    if first == "-m":
        sys.argv, sys.path[:0] = ["-m", *rest[1:]], [os.getcwd()]
        return lambda: runpy._run_module_as_main(rest[0])
    if first == "-c":
        sys.argv, sys.path[:0] = ["-c", *rest[1:]], [""]
        return lambda: main_module("<string>", rest[0])
    sys.argv, sys.path[:0] = [first, *rest], [os.path.dirname(os.path.realpath(first))]
    with open(first, encoding="utf-8") as file:
        code = file.read()
    return lambda: main_module(first, code, first)


def command(request, files, made, shim):
    """Be the command; never returns."""
    for target, file in enumerate(files):
        os.dup2(file, target)
    for file in files:
        if file > 2:
            os.close(file)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update({**made, **request["env"]})
    random.seed()
    sys.modules["numpy"].random.seed()
    sys.executable, subprocess.Popen, os.execvp, os.execvpe = shim, Popen, execvp, execvpe
    extra = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = [*extra, *sys.path[1:]]
    importlib.invalidate_caches()
    code = 0
    try:
        run = prepared(request["words"])
        if any(os.path.exists(os.path.join(path, "sitecustomize.py")) for path in extra):
            sys.modules.pop("sitecustomize", None)
            importlib.import_module("sitecustomize")
        if os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD", "1") == "1":
            sys.modules["torch"]._import_device_backends()
        run()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if end.code is not None and not isinstance(end.code, int):
            sys.stderr.write(f"{end.code}\n")
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.flush()
    os._exit(code & 0xFF)


def save_in_one_process():
    """Let `datasets` save without a pool of one process, which is spawned and imports everything again: six seconds."""
    if kind := getattr(sys.modules.get("datasets"), "Dataset", None):
        own = kind.save_to_disk

        @functools.wraps(own)
        def save_to_disk(self, *args, num_proc=None, **options):
            return own(self, *args, num_proc=None if num_proc == 1 else num_proc, **options)

        kind.save_to_disk = save_to_disk


def serve(address):
    before = dict(os.environ)
    for name in PRELOADED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    save_in_one_process()
    assert "xtf_plugin" not in sys.modules and threading.active_count() == 1
    made = {name: value for name, value in os.environ.items() if before.get(name) != value}
    shim = os.path.join(os.path.dirname(address), "python")
    with open(shim, "w", encoding="utf-8") as file:
        file.write(SHIM.format(python=sys.executable, address=address))
    os.chmod(shim, 0o755)
    atexit._clear()
    gc.collect()
    gc.freeze()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    print("ready", flush=True)
    while True:
        ready, _, _ = select.select([listener, 0], [], [])
        if 0 in ready:  # whoever started this has ended
            return
        connection, _ = listener.accept()
        if not os.fork():
            listener.close()
            request, files = receive(connection)
            child = os.fork()
            if not child:
                connection.close()
                command(request, files, made, shim)
            for file in files:
                os.close(file)
            code = wait(connection, child)
            with contextlib.suppress(OSError):
                connection.sendall(str(code).encode())
            os._exit(0)
        connection.close()
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                time.sleep(0)


if __name__ == "__main__":
    serve(sys.argv[1])
