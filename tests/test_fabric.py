"""Loops in Lightning Fabric: the same numbers as without it, and files with adapters alone."""

import pytest
import torch
from lightning.fabric import Fabric
from safetensors.torch import load_file

import lightning_lora as ll
from tests.distributed.fabric_run import CONFIG, fit, network
from tests.helpers import forks
from tests.helpers.toy import data

PRECISIONS = ["64-true", "32-true", "bf16-mixed", "bf16-true"]


def batches():
    return [(x[:8], y[:8]) for x, y in data(batch_size=8)]


def in_plain_torch(dtype):
    net = network()
    ll.inject(net, CONFIG)
    net.to(dtype)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2)
    for x, y in batches():
        torch.nn.functional.cross_entropy(net(x.to(dtype)).float(), y).backward()  # as Fabric gives them
        torch.nn.utils.clip_grad_norm_([p for p in net.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return ll.adapter_state_dict(net)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_loop_of_fabric(precision, tmp_path):
    net = network()
    base = {key: value.clone() for key, value in net.state_dict().items()}
    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
    model, _ = fit(fabric, net, batches())
    found = ll.adapter_state_dict(net)
    assert found.keys() == ll.adapter_state_dict(model).keys()  # the wrapper's own names are left out
    dtype = torch.float64 if precision == "64-true" else torch.float32
    assert {value.dtype for key, value in found.items() if ".lora." in key} == {dtype}
    expected = in_plain_torch(dtype)
    close = 1e-10 if precision == "64-true" else 1e-6 if precision == "32-true" else 0.05
    torch.testing.assert_close(found, expected, rtol=0, atol=close, check_dtype=False)
    own = net.state_dict()
    assert all(torch.equal(own[key], value.to(own[key].dtype)) for key, value in base.items() if key not in found)

    fabric.save(tmp_path / "a.ckpt", {"adapter": found})
    again = network()
    ll.inject(again, CONFIG)
    wrapped = fabric.setup(again)
    again.load_state_dict(fabric.load(tmp_path / "a.ckpt")["adapter"])
    x = batches()[0][0]
    torch.testing.assert_close(wrapped.eval()(x), model.eval()(x))


@pytest.mark.gloo
def test_two_processes(tmp_path):
    """Each with half of a batch: adapters are equal, and those of one process with all of it."""
    forks.finish("tests.distributed.fabric_run", [tmp_path], forks.ranks(2))
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close(first, in_plain_torch(torch.float64), rtol=0, atol=1e-10)
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert torch.equal(saved["base_model.model.blocks.1.o.lora_B.weight"], first["blocks.1.o.lora.default.B"])
