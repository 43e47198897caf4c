"""Two nodes on loopback, started as torchrun, SLURM, Kubernetes and people start them."""

import os
import re
import shlex
import socket
from pathlib import Path

import pytest
import torch

import lightning_lora as ll
from tests.helpers import forks
from tests.helpers.nodes import ROOT, Ended, by_hand, free_port, run
from tests.helpers.toy import Lit

pytestmark = pytest.mark.gloo
MODULE = "tests.distributed.torchrun_run"
PAGE = ROOT / "docs" / "multi_node.md"


def torchrun(*script: str) -> list[list[str]]:
    shared = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--master-addr=127.0.0.1"]
    shared.append(f"--master-port={free_port()}")
    return [[*shared, f"--node-rank={rank}", *script] for rank in range(2)]


def slurm() -> list[dict[str, str]]:
    """What srun sets for ``--nodes=2 --ntasks-per-node=1``, with this host as both nodes."""
    shared = {
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NAME": "lora",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_NNODES": "2",
        "SLURM_NODELIST": socket.gethostbyname("localhost"),
        "SLURM_LOCALID": "0",
        "MASTER_PORT": str(free_port()),  # Lightning's own choice is 15000 and the last digits of the job
    }
    return [{**shared, "SLURM_PROCID": str(rank), "SLURM_NODEID": str(rank)} for rank in range(2)]


def pods() -> list[dict[str, str]]:
    """What the operator of a PyTorchJob sets, with KubeflowEnvironment in the script and no torchrun."""
    shared = {"PODS": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    return [{**shared, "RANK": str(rank)} for rank in range(2)]


def pods_with_torchrun() -> list[dict[str, str]]:
    """What the same operator sets for torchrun, which then needs no arguments."""
    shared = {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "1", "PET_MASTER_ADDR": "127.0.0.1"}
    shared["PET_MASTER_PORT"] = str(free_port())
    return [{**shared, "PET_NODE_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": "2"} for rank in range(2)]


def results(folder: Path, ends: list[Ended]) -> list[dict]:
    for end in ends:
        assert end.code == 0, end.output[-3000:]
    return [torch.load(folder / f"rank={rank}.pt", weights_only=True) for rank in range(2)]


def check(ranks: list[dict], environment: str, names: list[str]) -> None:
    assert [rank["environment"] for rank in ranks] == [environment] * 2
    assert [rank["node"] for rank in ranks] == [0, 1]
    gradients = sum(value.nbytes for value in ranks[0]["state"].values())  # as docs/multi_node.md computes them
    assert {size for rank in ranks for size in rank["sends"]} == {gradients}
    asks = 8 if environment == "SLURMEnvironment" else 0  # whether any rank is to be requeued: one number
    assert {size for rank in ranks for size in rank["reduced"][:3]} == {gradients + asks}  # the epoch has four
    assert [rank["writes"] for rank in ranks] == [names, []]  # once, and by rank 0


def test_torchrun_resumes_from_what_rank_0_wrote(tmp_path):
    whole = results(tmp_path, run(torchrun("-m", MODULE, str(tmp_path)), [{}, {}]))
    check(whole, "TorchElasticEnvironment", ["epoch=0.ckpt", "epoch=1.ckpt"])
    resumed = tmp_path / "resumed"
    resumed.mkdir()
    first = str(tmp_path / "epoch=0.ckpt")
    rest = results(resumed, run(torchrun("-m", MODULE, str(resumed), first), [{}, {}]))
    check(rest, "TorchElasticEnvironment", ["epoch=1.ckpt"])
    assert all(torch.equal(value, rest[0]["state"][key]) for key, value in whole[0]["state"].items())


@pytest.mark.parametrize(
    ("variables", "environment"),
    [
        (slurm, "SLURMEnvironment"),
        (pods, "KubeflowEnvironment"),
        (pods_with_torchrun, "TorchElasticEnvironment"),
        (by_hand, "LightningEnvironment"),
    ],
    ids=["slurm", "pods", "pods-torchrun", "by-hand"],
)
def test_other_launchers(tmp_path, variables, environment):
    if variables is pods_with_torchrun:
        ends = run(["-m", "torch.distributed.run", "-m", MODULE, str(tmp_path)], variables())
    else:
        ends = forks.run(MODULE, [tmp_path], variables())
    check(results(tmp_path, ends), environment, ["epoch=0.ckpt", "epoch=1.ckpt"])


@pytest.mark.parametrize(
    ("signals", "step"),
    [
        ({0: "backward 1", 1: "start 2"}, 2),
        ({0: "start 3", 1: "backward 3"}, 4),  # the last of an epoch
        ({1: "start 5"}, 6),
        ({1: "validation 8"}, 8),  # nothing is trained behind it
    ],
    ids=["between-steps", "end-of-epoch", "one-rank", "last-validation"],
)
def test_slurm_requeues_and_goes_on(tmp_path, signals, step):
    """Ranks that get the signal in different places save in one place, ask once, and go on bit for bit."""
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    (tmp_path / "scontrol").chmod(0o755)
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    signalled = [{**rank, **path, "SIGNAL": signals.get(i, "")} for i, rank in enumerate(slurm())]
    first = results(tmp_path, forks.run(MODULE, [tmp_path], signalled))
    assert "hpc_ckpt_1.ckpt" in first[0]["writes"]
    assert len(first[0]["writes"]) == 3
    assert first[1]["writes"] == []
    assert (tmp_path / "asked").read_text() == "requeue 4711\n"
    saved = torch.load(tmp_path / "hpc_ckpt_1.ckpt", weights_only=True)
    assert saved["global_step"] == step
    assert saved["state_dict"].keys() == first[0]["state"].keys()  # adapters, and nothing of the base
    assert len(saved["optimizer_states"][0]["state"]) == len(saved["state_dict"])
    assert len(saved["lightning_lora"]["rng"]) == 2
    for rank in first:
        states = [state for at, state in rank["saved"] if at == step]
        assert all(torch.equal(value, state[key]) for state in states for key, value in saved["state_dict"].items())
    rest = results(tmp_path, forks.run(MODULE, [tmp_path], slurm()))
    assert [rank["started"] for rank in rest] == ([step] * 2 if step < 8 else [0, 0])
    assert all(torch.equal(value, rest[0]["state"][key]) for key, value in first[0]["state"].items())


def test_the_commands_of_the_docs(tmp_path):
    """The page's script, started by the page's two commands: only the port is another."""
    page = PAGE.read_text()
    (script,) = re.findall(r"^```\{code-block\} python\n:caption: train.py\n\n(.*?)^```", page, re.M | re.S)
    (tmp_path / "train.py").write_text(script)
    (tmp_path / "my_project.py").write_text(
        "import atexit\n\nfrom torch.distributed import destroy_process_group\n\n"
        "from tests.helpers.toy import Lit as MyModule, data\n\ntrain_data = data(batch_size=4)\n"
        "atexit.register(destroy_process_group)  # NCCL's Lightning leaves itself; gloo may abort a process\n"
    )
    lines = re.findall(r"^torchrun (.*127\.0\.0\.1.*)$", page, re.M)
    assert len(lines) == 2
    port = str(free_port())
    commands = [["-m", "torch.distributed.run", *shlex.split(line.replace("29500", port))] for line in lines]
    for end in run(commands, [{}, {}], cwd=tmp_path):
        assert end.code == 0, end.output[-3000:]
    (checkpoint,) = (tmp_path / "runs").glob("*.ckpt")
    assert ll.adapters(ll.load_from_checkpoint(Lit, checkpoint))["default"].r == 16
