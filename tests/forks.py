"""Python in processes of their own that need not import torch again: forks of one process that only did that.

A test's program runs as ``python -c``, ``python -m`` or ``python script`` would run it, a second or two sooner.
"""

import atexit
import json
import os
import subprocess
import sys

SERVER = """
import json, os, signal, sys, time
import torch
paths = [p for p in sys.path if p]

def become(argv, cwd, env, timeout_s):
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    signal.alarm(timeout_s)
    for fd, name in ((0, os.devnull), (1, "stdout"), (2, "stderr")):
        given = os.open(os.path.join(folder, name) if fd else name, os.O_WRONLY | os.O_CREAT if fd else os.O_RDONLY)
        os.dup2(given, fd)
    first = os.path.dirname(os.path.abspath(argv[0])) if argv[0] not in ("-c", "-m") else os.getcwd()
    sys.path[:] = [first, *filter(None, env.get("PYTHONPATH", "").split(os.pathsep)), *paths]

for line in sys.stdin:
    folder, argv, *rest = json.loads(line)
    child = os.fork()
    if not child:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    os._exit(0)
become(argv, *rest)
import runpy, types
if argv[0] == "-c":
    sys.argv = ["-c", *argv[2:]]
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    exec(compile(argv[1], "<string>", "exec"), main.__dict__)
elif argv[0] == "-m":
    sys.argv = argv[1:]
    runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
else:
    sys.argv = argv
    runpy.run_path(argv[0], run_name="__main__")
"""
_server = None


def can(environment):
    """Whether a fork is as good as a new process: not for what is read before torch is imported."""
    before = {name for name in environment if not name.startswith(("FUSED_OPS_", "ATEN_CPU_CAPABILITY", "COLUMNS"))}
    same = all(environment[name] == os.environ.get(name) for name in before)
    return sys.platform == "linux" and same and "FUSED_OPS_SANITIZE" not in os.environ


def run(folder, arguments, cwd, environment, timeout_s):
    """As subprocess.run of this Python; the output goes through files in the folder."""
    global _server
    if _server is None or _server.poll() is not None:
        pipe = subprocess.PIPE
        env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        _server = subprocess.Popen([sys.executable, "-c", SERVER], stdin=pipe, stdout=pipe, text=True, env=env)
        atexit.register(_server.communicate)  # closes its input, and it ends
    request = [str(folder), list(map(str, arguments)), str(cwd or os.getcwd()), environment, timeout_s]
    _server.stdin.write(json.dumps(request) + "\n")
    _server.stdin.flush()
    status = int(_server.stdout.readline())
    said = ((folder / name).read_text() for name in ("stdout", "stderr"))
    return subprocess.CompletedProcess(arguments, status, *said)
