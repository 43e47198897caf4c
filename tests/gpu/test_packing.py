"""Packed weights: the codes of bitsandbytes, on whichever device they are packed, and wherever they are moved."""

import copy

import pytest
import torch
from bitsandbytes import functional as F4
from torch import nn

import lightning_lora as ll
from lightning_lora.quantization import dense
from tests.gpu import DEVICE, MARKS
from tests.gpu.packed import FOUR_BITS, Net, inputs, made, outcome, variants
from tests.gpu.sites import assert_near

# bitsandbytes says that it takes its slower product where rows end within a block of scales
pytestmark = [*MARKS, pytest.mark.filterwarnings("ignore:inner dimension:UserWarning")]


@pytest.mark.parametrize("blocksize", [64, 256])
@pytest.mark.parametrize("mode", FOUR_BITS)
@pytest.mark.parametrize("shape", [(48, 64), (1030, 1024), (33, 7)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_codes_are_those_of_bitsandbytes(shape, mode, blocksize, dtype):
    W = inputs(*shape, dtype=getattr(torch, dtype))
    kind, double = mode[:3], mode.endswith("dq")
    data, state = F4.quantize_4bit(W, blocksize=blocksize, quant_type=kind, compress_statistics=double)
    layer = nn.Linear(*shape[::-1], device=DEVICE, dtype=W.dtype)
    layer.weight.data.copy_(W)
    ll.quantize(model := nn.Sequential(layer), ll.Quantization(mode=mode, blocksize=blocksize))
    weight = model[0].weight
    assert torch.equal(weight.data, data)
    assert torch.equal(weight.quant_state.absmax, state.absmax)
    if double:
        assert torch.equal(weight.quant_state.offset, state.offset)
        assert torch.equal(weight.quant_state.state2.absmax, state.state2.absmax)
    if shape[1] % blocksize == 0:  # else see below
        assert torch.equal(dense(model[0]), F4.dequantize_4bit(data, state))
    assert (dense(model[0]) - W).norm() < 0.25 * W.norm()


def test_8_bits():
    W = inputs(33, 64)
    W[3], W[4] = 0, W[4] * 1e-6
    layer = nn.Linear(64, 33, device=DEVICE)
    layer.weight.data.copy_(W)
    ll.quantize(model := nn.Sequential(layer), "int8")
    error = (dense(model[0]) - W).abs().amax(1)
    assert (error <= 1.01 * W.abs().amax(1) / 254).all()


@pytest.mark.parametrize("mode", [*FOUR_BITS, "int8"])
def test_packed_here_and_on_a_cpu(mode):
    """Values beside a midpoint may be rounded to either side, and these are few."""
    here, there = (dense(made(mode, device=device).a).cpu() for device in (DEVICE, "cpu"))
    differ = (here - there).abs() > 1e-5 * there.abs().max()
    assert differ.double().mean() < 1e-2
    ll.quantize(moved := Net(), mode, device=DEVICE)
    assert all(t.device.type == DEVICE for t in (moved.a.weight, dense(moved.a)))


@pytest.mark.parametrize("columns", [48, 96, 160])
def test_rows_that_end_within_a_block(columns):
    """By the table of values: bitsandbytes takes other scales for them on some CPUs."""
    ll.quantize(model := nn.Sequential(nn.Linear(columns, 40, device=DEVICE)), "nf4")
    codes, state = model[0].weight.data.view(-1), model[0].weight.quant_state
    values = state.code[torch.stack([codes >> 4, codes & 15], 1).view(-1).long()]
    wanted = (values.view(-1, 64) * state.absmax[:, None]).view(40, columns)
    torch.testing.assert_close(dense(model[0]), wanted)
    torch.testing.assert_close(dense(model.cpu()[0]), wanted.cpu())


@pytest.mark.parametrize("mode", ["nf4-dq", "nf4", "fp4", "int8"])
@variants
def test_moves_keep_values(mode, options):
    """From the CPU to the device and back, before and after a step has been taken there."""
    model = made(mode, device="cpu", **options).eval()
    values = {name: dense(layer).clone() for name, layer in model.named_children()}
    x, twin = inputs(3, 128, device="cpu"), copy.deepcopy(model)
    wanted = model(x).detach()
    assert_near(model.to(DEVICE)(x.to(DEVICE)).detach().cpu(), wanted, 0.03 if mode == "int8" else 1e-4)
    for name, layer in model.named_children():
        torch.testing.assert_close(dense(layer).cpu(), values[name], rtol=1e-5, atol=1e-6)
    outcome(model, x.to(DEVICE))
    model.bfloat16().float().cpu()
    for name, layer in model.named_children():
        assert torch.equal(dense(layer), values[name]), name
    assert_near(model.eval()(x).detach(), wanted, 0.02)
    for name, p in twin.named_parameters():
        if p.requires_grad:
            assert p.device.type == "cpu", name
