# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Python commands in processes that have torch, Pyro, ArviZ and matplotlib loaded, which takes seconds of each fresh one.

Each command runs in a fork of one process that has imported ``LIBRARIES``, and nothing else, and has no thread:
``multiprocessing``'s fork server. Nothing of ``pyro_cpa`` is loaded, and what one command does no other one sees. What a
fresh interpreter holds after an import is not tested so (``test_architecture.py``), nor what ``-W`` does.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["WarmPython", "run_warm", "two_ranks"]

TESTS = Path(__file__).parent
LIBRARIES = [
    "torch.distributed",
    "torch._dynamo",  # which the first optimiser of a process imports
    "pyro",
    "numba",
    "arviz",
    "pandas",
    "scipy.stats",
    "matplotlib.pyplot",
    "sklearn.ensemble",
    "ipykernel.kernelapp",
]
# Without a fork server, as on Windows, each command starts cold.
SERVER = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
CONTEXT: Any = multiprocessing.get_context(SERVER)
CONTEXT.set_forkserver_preload(LIBRARIES)


class WarmPython:
    """A running ``python ARGUMENTS``, a script with its arguments or ``-m`` and a module with its, like a ``Popen``.

    It leads a session of its own, so that its process group is itself and the processes that it starts.
    """

    stdin = stdout = stderr = None

    def __init__(
        self,
        *arguments: str,
        env: Mapping[str, str] = os.environ,
        cwd: str | Path | None = None,
        output: tuple[str, str] | None = None,
    ) -> None:
        started, starting = CONTEXT.Pipe(duplex=False)
        self.args = arguments
        self._process = CONTEXT.Process(
            target=_interpret, args=(arguments, dict(env), str(cwd or Path.cwd()), output, starting)
        )
        self._process.start()
        self.pid = self._process.pid
        starting.close()
        started.poll(None)  # until the session is there, or the process is gone
        started.close()

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()


def run_warm(*arguments: str, timeout: float = 600, **options: Any) -> subprocess.CompletedProcess[str]:
    """``subprocess.run([sys.executable, *arguments], capture_output=True, text=True)``."""
    with tempfile.TemporaryDirectory() as folder:
        files = os.path.join(folder, "stdout"), os.path.join(folder, "stderr")
        process = WarmPython(*arguments, output=files, **options)
        try:
            code = process.wait(timeout)
        finally:
            process.kill()
        out, err = (Path(file).read_text() for file in files)
    return subprocess.CompletedProcess(arguments, code, out, err)


def two_ranks(script: Path, *arguments: str) -> list[WarmPython]:
    """Two processes of a script, told of each other by the variables that torchrun sets."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    shared |= {"GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "none"}
    shared |= {"PYTHONPATH": str(TESTS.parent), "OMP_NUM_THREADS": "1"}
    return [
        WarmPython(str(script), *arguments, env=os.environ | shared | {"RANK": rank, "LOCAL_RANK": rank})
        for rank in "01"
    ]


def _interpret(
    arguments: tuple[str, ...], env: dict[str, str], cwd: str, output: tuple[str, str] | None, starting: Any
) -> None:
    """What the interpreter does with its command line."""
    os.setsid()
    starting.close()
    for number, file in zip((1, 2), output or (), strict=False):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    if "matplotlib" in sys.modules and "MPLBACKEND" in env:
        sys.modules["matplotlib"].rcParams["backend"] = env["MPLBACKEND"]  # read at its import
    folders = env.get("PYTHONPATH", "").split(os.pathsep)
    # Without what pytest put there for the tests.
    sys.path[:] = [
        *filter(None, folders),
        *(path for path in sys.path if TESTS not in Path(path, "x").parents),
    ]
    first, *rest = arguments
    if first == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(arguments)
        sys.path.insert(0, str(Path(first).parent))
        runpy.run_path(first, run_name="__main__")
