"""Tensors in parts, on three ranks: rows that don't divide evenly, several dtypes, batches."""

import pytest
import torch
from torch import distributed, multiprocessing, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from lightning_lora.ops import sharded
from lightning_lora.ops.samples import sample, sample_each
from lightning_lora.strategies.gradients import clip_by_norm
from tests.helpers import forks

pytestmark = pytest.mark.gloo
RANKS = 3


def check(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,))
    generator = torch.Generator().manual_seed(1)
    wholes = [torch.randn(*shape, generator=generator) for shape in ((7, 5), (2, 3), (6, 4), (1,), (8,), (4, 9))]
    wholes += [torch.randn(5, 3, generator=generator).bfloat16(), torch.arange(7)]
    placements = [Shard(0)] * 5 + [Shard(1)] + [Shard(0)] * 2
    parts = [distribute_tensor(w, mesh, [p], src_data_rank=None) for w, p in zip(wholes, placements, strict=True)]
    parts.append(distribute_tensor(wholes[0], mesh, [Replicate()], src_data_rank=None))
    wholes.append(wholes[0])
    for batch in (1, 20, 1 << 24):
        sharded.BATCH = batch
        found = sharded.gathered_all([*parts, wholes[2]])
        assert all(torch.equal(a, b) for a, b in zip(found, [*wholes, wholes[2]], strict=True)), batch
    for ours, whole in zip(sample_each([*parts, wholes[2]]), [*wholes, wholes[2]], strict=True):
        torch.testing.assert_close(ours, sample(whole), rtol=0, atol=0, equal_nan=True)
    for part, whole in zip(parts, wholes, strict=True):
        empty = torch.zeros_like(part)
        sharded.copy_whole_(empty, whole)
        assert torch.equal(sharded.gathered(empty), whole)
    for dtype in (torch.float32, torch.float64):
        parameters = [nn.Parameter(part.to(dtype)) for part in parts[:6]]
        gradients = [2 * whole.to(dtype) for whole in wholes[:6]]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = distribute_tensor(gradient, mesh, parameter.placements, src_data_rank=None)
        with CommDebugMode() as seen:
            clip_by_norm(parameters, 1.5)
        assert seen.get_total_counts() == 1  # for all of them together
        factor = 1.5 / (nn.utils.get_total_norm(gradients) + 1e-6)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            torch.testing.assert_close(sharded.gathered(parameter.grad), gradient * factor)
    distributed.destroy_process_group()


def test_gathering_and_sampling(tmp_path):
    forks.serve()
    multiprocessing.start_processes(check, (str(tmp_path),), nprocs=RANKS, start_method="forkserver")
