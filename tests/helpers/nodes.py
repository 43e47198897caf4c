"""Processes on this machine that play the nodes of a cluster, each with an environment of its own."""

import contextlib
import itertools
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
# What a launcher around these tests may have set, and what would be taken for theirs:
FOREIGN = ("SLURM_", "PET_", "MASTER_", "TORCHELASTIC_", "RANK", "WORLD_SIZE", "LOCAL_", "NODE_", "GROUP_")


class Ended(NamedTuple):
    """How a process ended, and when by the clock. ``code`` is None if it had to be stopped."""

    code: int | None
    ended: float
    output: str


# Below those that the system gives to connections, and others in each process of these tests: what is free now has to
# be free still when a run comes to bind it.
_PORTS = itertools.cycle(range(first := 10_000 + os.getpid() * 101 % 200 * 100, first + 100))


def free_port() -> int:
    for port in _PORTS:
        with socket.socket() as server, contextlib.suppress(OSError):
            server.bind(("127.0.0.1", port))
            return port
    raise AssertionError("a cycle ends")


def outer() -> dict[str, str]:
    """The variables of this process, for one that plays a node or starts ranks of its own."""
    variables = {key: value for key, value in os.environ.items() if not key.startswith(FOREIGN)}
    paths = os.pathsep.join([f"{ROOT}", *filter(None, [os.environ.get("PYTHONPATH")])])
    own = {"MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return {**variables, "PYTHONPATH": paths, **own}


def by_hand(nodes: int = 2) -> list[dict[str, str]]:
    """What someone sets who starts one process on each node without a launcher."""
    port = str(free_port())
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_RANK": "0"}
    return [{**shared, "NODE_RANK": str(rank)} for rank in range(nodes)]


def run(
    command: Sequence[str] | Sequence[Sequence[str]],
    environments: Sequence[Mapping[str, str]],
    cwd: Path = ROOT,
    timeout: float = 200,
) -> list[Ended]:
    """Starts a process for each environment, and waits until all have ended; what is left after a timeout is killed.

    Args:
        command: Arguments behind ``python``: the same for all, or one list for each.
        environments: Variables beside those of this process.
        cwd: Where the processes run.
        timeout: In seconds, for all together.
    """
    commands = [command] * len(environments) if isinstance(command[0], str) else command
    with ExitStack() as stack:  # files, not pipes: nobody has to read them for a process to go on
        files = [stack.enter_context(tempfile.TemporaryFile()) for _ in environments]
        processes = []
        for arguments, environment, file in zip(commands, environments, files, strict=True):
            kwargs = {"stdout": file, "stderr": subprocess.STDOUT, "start_new_session": True}
            processes.append(
                subprocess.Popen([sys.executable, *arguments], cwd=cwd, env={**outer(), **environment}, **kwargs)
            )
        ends = _wait(processes, timeout)
        outputs = []
        for file in files:
            file.seek(0)
            outputs.append(file.read().decode(errors="replace"))
    return [Ended(*end, output) for end, output in zip(ends, outputs, strict=True)]


def _wait(processes: Sequence["subprocess.Popen[bytes]"], timeout: float) -> list[tuple[int | None, float]]:
    """The code of each and when it ended."""
    start = time.monotonic()
    ended: dict[int, float] = {}
    while len(ended) < len(processes) and time.monotonic() - start < timeout:
        time.sleep(0.05)
        for rank, process in enumerate(processes):
            if process.poll() is not None:
                ended.setdefault(rank, time.time())
    codes = [process.poll() for process in processes]
    for process, code in zip(processes, codes, strict=True):
        if code is None:
            os.killpg(process.pid, signal.SIGKILL)  # it has a group of its own, with what it started
        process.wait()
    return [(code, ended.get(rank, time.time())) for rank, code in enumerate(codes)]
