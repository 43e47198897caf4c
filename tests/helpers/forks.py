"""Processes that are there at once: forks of a server that has imported torch, Lightning and transformers.

Each runs what ``python -m MODULE`` runs, as a process with an environment, a ``__main__``, an output and a group of its
own. Only the imports are not its own: they take some seconds for each process, in which nothing is tested.
"""

import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from multiprocessing import connection, forkserver
from pathlib import Path

from tests.helpers.nodes import ROOT, Ended, free_port, outer

# What a run takes seconds to import. None of it starts a thread, which would be missing in a fork.
IMPORTS = [
    "lightning.pytorch.cli",
    "lightning_lora.recipes",
    "bitsandbytes",
    "deepspeed",  # where it is installed
    "peft",
    "torchdata.stateful_dataloader",
    "transformers.models.llama.modeling_llama",
    "transformers.models.mixtral.modeling_mixtral",
]

_context = multiprocessing.get_context("forkserver")


def serve() -> None:
    """Starts the server if there is none: also that of ``start_processes(..., start_method="forkserver")`` of torch."""
    _context.set_forkserver_preload(IMPORTS)
    before = dict(os.environ)
    _become(outer())
    try:
        forkserver.ensure_running()
    finally:
        _become(before)


def ranks(devices: int) -> list[dict[str, str]]:
    """What Lightning sets for the processes that it starts on one node."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "NODE_RANK": "0"}
    return [{**shared, "WORLD_SIZE": str(devices), "LOCAL_RANK": str(rank)} for rank in range(devices)]


def run(
    module: str,
    arguments: Sequence[object],
    environments: Sequence[Mapping[str, str]],
    cwd: Path = ROOT,
    timeout: float = 250,
) -> list[Ended]:
    """Runs a module once for each environment, all at the same time; what is left after a timeout is killed.

    Args:
        module: Its name, or the path of a script.
        arguments: The rest of the command line.
        environments: Variables beside those of this process.
        cwd: Where the processes run.
        timeout: In seconds, for all together.
    """
    serve()
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, str(i)) for i in range(len(environments))]
        processes = [
            _context.Process(
                target=_main, args=(module, [*map(str, arguments)], {**outer(), **environment}, str(cwd), str(file))
            )
            for environment, file in zip(environments, files, strict=True)
        ]
        for process in processes:
            process.start()
        ends = _wait(processes, timeout)
        outputs = [file.read_text(errors="replace") if file.exists() else "" for file in files]
    return [Ended(*end, output) for end, output in zip(ends, outputs, strict=True)]


def finish(*arguments, **options) -> str:
    """As `run`, of processes that end well.

    Returns:
        What all of them said.
    """
    ends = run(*arguments, **options)
    for end in ends:
        assert end.code == 0, "\n".join(f"{other.code}: {other.output[-3000:]}" for other in ends)
    return "".join(end.output for end in ends)


def _become(environment: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)


def _main(module: str, arguments: list[str], environment: dict[str, str], cwd: str, output: str) -> None:
    os.setsid()
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(file, stream.fileno())
        stream.reconfigure(line_buffering=True)
    _become(environment)
    os.chdir(cwd)

    from lightning.fabric.utilities.rank_zero import _get_rank, rank_zero_only

    rank_zero_only.rank = _get_rank() or 0  # Lightning reads it when it is imported
    sys.argv = [module, *arguments]
    if module.endswith(".py"):
        sys.path.insert(0, str(Path(module).parent))
        runpy.run_path(module, run_name="__main__")
    else:
        runpy.run_module(module, run_name="__main__", alter_sys=True)


def _wait(processes: Sequence[multiprocessing.process.BaseProcess], timeout: float) -> list[tuple[int | None, float]]:
    """The code of each and when it ended."""
    limit = time.monotonic() + timeout
    running = {process.sentinel: process for process in processes}
    ended: dict[multiprocessing.process.BaseProcess, float] = {}
    while running and (left := limit - time.monotonic()) > 0:
        for sentinel in connection.wait([*running], left):
            ended[running.pop(sentinel)] = time.time()
    codes = [process.exitcode for process in processes]
    for process in running.values():
        os.killpg(process.pid, signal.SIGKILL)  # it has a group of its own, with what it started
    for process in processes:
        process.join()
        process.close()
    now = time.time()
    return [(code, ended.get(process, now)) for process, code in zip(processes, codes, strict=True)]
