"""Where kernels of our own are taken, and what is said where they can't be."""

import sys
import warnings

import pytest
import torch

from lightning_lora.ops import fused_lora, kernels
from lightning_lora.ops.fused import fused_linears
from lightning_lora.ops.launches import FEW, starts_count
from lightning_lora.ops.passes import PLAIN, Passes
from lightning_lora.ops.selection import passes_for
from lightning_lora.ops.site import LowRank, Site

DEVICE = torch.device("cuda", 0)


@pytest.fixture
def on_a_new_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    kernels._work.cache_clear()
    yield
    kernels._work.cache_clear()


class Large:
    """What is asked of an input."""

    def __init__(self, numel=1 << 22, dtype=torch.bfloat16, device=DEVICE):
        self.device, self.dtype, self._numel = device, dtype, numel

    def numel(self):
        return self._numel


def test_a_cpu_takes_torchs_operations():
    passes = passes_for(torch.empty(2048, 2048, dtype=torch.bfloat16), 16)
    assert type(passes) is Passes


@pytest.mark.parametrize(
    ("given", "ranks", "taken"),
    [
        ({}, 16, True),
        ({"dtype": torch.float16}, 64, True),
        ({"dtype": torch.float32}, 16, False),
        ({"numel": 1 << 20}, 16, False),
        ({}, 65, False),
        ({"device": torch.device("cpu")}, 16, False),
    ],
)
def test_what_they_are_for(monkeypatch, given, ranks, taken):
    monkeypatch.setattr(kernels, "_work", lambda device: True)
    assert kernels.usable(Large(**given), ranks) is taken
    with kernels.disabled():
        with kernels.disabled():
            assert not kernels.usable(Large(**given), ranks)
        assert not kernels.usable(Large(**given), ranks)
    assert kernels.usable(Large(**given), ranks) is taken


def test_with_dropout_alone_they_are_for_larger_inputs(monkeypatch):
    """DoRA's passes are more than those of dropout, which is what kernels have to save in a step of LoRA."""
    monkeypatch.setattr(kernels, "_work", lambda device: True)
    asked, low_rank = [], LowRank(torch.randn(3, 8), torch.randn(4, 3), 2.0)
    monkeypatch.setattr(fused_lora, "passes_for", lambda x, *how: asked.append(how) or PLAIN)
    fused_linears(torch.randn(2, 8, requires_grad=True), [Site(torch.randn(4, 8), None, low_rank)], 0.5)
    ((ranks, times),) = asked
    assert not kernels.usable(Large(8 * kernels.ENOUGH - 1), ranks, times)
    assert kernels.usable(Large(8 * kernels.ENOUGH), ranks, times)
    assert kernels.usable(Large(kernels.ENOUGH), ranks)


def test_where_they_do_not_work_is_said_once(on_a_new_gpu, monkeypatch):
    monkeypatch.setitem(sys.modules, "lightning_lora.ops.triton_kernels", None)
    with pytest.warns(UserWarning, match=r"Triton's kernels don't work here .*torch's own.*LIGHTNING_LORA_KERNELS=0"):
        assert not kernels.usable(Large(), 16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not kernels.usable(Large(), 16)


def test_they_can_be_left_out(on_a_new_gpu, monkeypatch):
    monkeypatch.setenv(kernels.SWITCH, "0")
    assert not kernels.usable(Large(), 16)


def test_an_older_gpu_has_none(on_a_new_gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not kernels.usable(Large(), 16)


def test_a_gpu_of_amd_has_none(on_a_new_gpu, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.2")
    assert not kernels.usable(Large(), 16)


def test_small_steps_are_those_of_a_gpu():
    x, weight = torch.empty(2, 3, 4), torch.empty(5, 4)
    assert not starts_count(x, weight)
    on_gpu = Large(2 * 3 * 4, torch.float32)
    assert starts_count(on_gpu, weight)
    assert not starts_count(on_gpu, weight.bfloat16())
    assert not starts_count(on_gpu, lambda dtype, gain: weight)
    assert not starts_count(Large(FEW, torch.float32), weight)
