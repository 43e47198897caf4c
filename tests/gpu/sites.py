"""Layers as the fused products take them, what they compute by the equation in float64, and how far that is."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_lora.ops import kernels
from lightning_lora.ops.fused import fused_linears
from lightning_lora.ops.fused_dropout import fused_dora_dropout
from lightning_lora.ops.norms import merged_row_norms
from lightning_lora.ops.site import LowRank, Site, gain_of
from tests.gpu import DEVICE

LOW = (torch.bfloat16, torch.float16)
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


class Case(NamedTuple):
    """Layers with one input of a shape: how many outputs and which rank each has."""

    variant: str
    shape: tuple[int, ...]
    outs: tuple[int, ...]
    ranks: tuple[int, ...]
    p: float = 0.0  # a multiple of 2^-16, as which a CPU and the kernels take it
    bias: bool = True
    everywhere: bool = False  # dropout acts on the input of the frozen product too


class Made(NamedTuple):
    """An input and sites whose tensors are leaves."""

    x: Tensor
    sites: list[Site]

    def leaves(self) -> dict[str, Tensor]:
        named = {"x": self.x}
        for i, (_, bias, adapter) in enumerate(self.sites):
            of_site = {"bias": bias, "A": adapter.A, "B": adapter.B, "magnitude": adapter.magnitude}
            named |= {f"{key}{i}": value for key, value in of_site.items() if value is not None}
        return {key: value for key, value in named.items() if value.requires_grad}

    def doubled(self) -> "Made":
        """The same values in float64."""

        def double(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.detach().double().requires_grad_(t.requires_grad)

        sites = [
            Site(double(W), double(b), LowRank(double(a.A), double(a.B), a.scale, double(a.magnitude), double(a.norms)))
            for W, b, a in self.sites
        ]
        return Made(double(self.x), sites)


def make(case: Case, dtype: torch.dtype, weights: torch.dtype | None = None, needs_x: bool = True) -> Made:
    """x in a dtype, weights and biases in it or in another one, adapters in float32 at least, with scales that differ.

    Two rows of each merged weight are 0.
    """
    generator = torch.Generator().manual_seed(1)
    weights, masters = weights or dtype, torch.promote_types(dtype, torch.float32)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE)

    sites, columns = [], case.shape[-1]
    for i, (out, r) in enumerate(zip(case.outs, case.ranks, strict=True)):
        W = (normal(out, columns) / columns**0.5).to(weights)
        A, B = (normal(r, columns) / columns**0.5).to(masters), (normal(out, r) / r**0.5).to(masters)
        b = normal(out).to(weights).requires_grad_() if case.bias else None
        magnitude = norms = None
        scale = 3.0 / (i + 1)
        if case.variant == "dora":
            W[1:3], B[1:3] = 0, 0
            norms = merged_row_norms(W.double(), A.double(), B.double(), scale).to(masters)
            factors = torch.linspace(0.5, 1.5, out, dtype=masters, device=DEVICE)
            magnitude = torch.where(norms == 0, 0.3, norms * factors).requires_grad_()
        sites.append(Site(W, b, LowRank(A.requires_grad_(), B.requires_grad_(), scale, magnitude, norms)))
    return Made(normal(*case.shape).to(dtype).requires_grad_(needs_x), sites)


def fused(made: Made, case: Case) -> tuple[Tensor, ...]:
    """The outputs of the package."""
    if case.everywhere:
        return (fused_dora_dropout(made.x, made.sites[0], case.p),)
    return fused_linears(made.x, made.sites, case.p)


def equation(made: Made, case: Case, mask: Tensor | None) -> list[Tensor]:
    """The same by the equation, for what a mask keeps."""
    x, outs = made.x, []
    dropped = x if mask is None else x * (mask != 0).view(x.shape) / (1 - case.p)
    for W, bias, adapter in made.sites:
        seen = dropped if case.everywhere else x
        y = F.linear(seen, W) + adapter.scale * F.linear(F.linear(dropped, adapter.A), adapter.B)
        gain = adapter.gain() if adapter.norms is None else gain_of(adapter.magnitude, adapter.norms)
        y = y if gain is None else y * gain
        y = y + F.linear(x - dropped, W) if case.everywhere else y
        outs.append(y if bias is None else y + bias)
    return outs


def mask_of(out: Tensor, case: Case) -> Tensor | None:
    """The mask that was drawn, as it is kept for the backward pass."""
    return out.grad_fn.saved_tensors[1] if case.p else None


def gradients(outs, made: Made, dys) -> dict[str, Tensor]:
    """Those of all leaves."""
    leaves = made.leaves()
    return dict(zip(leaves, torch.autograd.grad(outs, [*leaves.values()], dys), strict=True))


def assert_near(got: Tensor, wanted: Tensor, tolerance: float, name: str = "") -> None:
    """By the norm of the difference, which is what low precision promises."""
    assert got.shape == wanted.shape, name
    assert got.isfinite().all(), name
    error, norm = (got.double() - wanted.double()).norm().item(), wanted.double().norm().item()
    assert error <= tolerance * norm, f"{name}: off by {error / max(norm, 1e-300):.2e} of it"


def assert_all_near(got: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    assert got.keys() == wanted.keys()
    for name, value in got.items():
        assert_near(value, wanted[name], tolerance, name)


def use_kernels(monkeypatch, used: bool) -> None:
    """Triton's kernels for inputs of any size, or none at all."""
    monkeypatch.setattr(kernels, "ENOUGH", 1 if used else 1 << 62)
