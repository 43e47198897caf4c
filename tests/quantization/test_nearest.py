"""Our 4-bit codes on a CPU are those of bitsandbytes, to the bit."""

import pytest
import torch
from bitsandbytes import functional as F4
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_lora.quantization import nearest
from lightning_lora.quantization.nearest import quantize_4bit
from lightning_lora.quantization.packing import four_bits

KINDS = ("nf4", "fp4")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)


def same(W: torch.Tensor, kind: str, blocksize: int) -> bool:
    found = quantize_4bit(W, kind, blocksize)
    assert found is not None
    codes, state = F4.quantize_4bit(W, blocksize=blocksize, quant_type=kind, compress_statistics=False)
    assert torch.equal(found[1].isnan(), state.absmax.isnan())
    return torch.equal(found[0], codes.view(-1)) and torch.equal(found[1].nan_to_num(-1), state.absmax.nan_to_num(-1))


def bounds(kind: str) -> torch.Tensor:
    values = F4.get_4bit_type(kind, device="cpu").sort().values
    return (values[1:] + values[:-1]) / 2


@st.composite
def weights(draw: st.DrawFn) -> tuple[torch.Tensor, str, int]:
    """Blocks of which many values are midpoints or beside one, times any scale; odd ends, zeros, infinities and NaN."""
    kind, dtype, blocksize = draw(st.sampled_from(KINDS)), draw(st.sampled_from(DTYPES)), draw(st.sampled_from(BLOCKS))
    n, seed = draw(st.integers(1, 3 * blocksize + 65)), draw(st.integers(0, 1 << 30))
    generator = torch.Generator().manual_seed(seed)
    at = torch.randint(15, (n,), generator=generator)
    middles = bounds(kind)[at]
    sides = torch.randint(-1, 2, (n,), generator=generator).float()
    middles = torch.where(sides == 0, middles, torch.nextafter(middles, sides * torch.inf))
    scale = 2.0 ** draw(st.floats(-130, 127))
    if draw(st.booleans()):  # of powers of two, by which dividing is exact
        scale = 2.0 ** round(torch.tensor(scale).log2().item())
    W = torch.where(torch.rand(n, generator=generator) < draw(st.sampled_from((0.0, 0.5, 1.0))), middles, 0.0)
    W += torch.randn(n, generator=generator) * draw(st.sampled_from((0.0, 0.3))) * (W == 0)
    W[torch.randint(n, (1 + n // blocksize,), generator=generator)] = draw(st.sampled_from((1.0, -1.0)))
    W *= scale
    for value in draw(st.lists(st.sampled_from((torch.inf, -torch.inf, torch.nan, 1e-45, -0.0, 3.4e38)), max_size=3)):
        W[draw(st.integers(0, n - 1))] = value
    if draw(st.booleans()):
        W[: draw(st.integers(0, n))] = 0.0
    return W.to(dtype), kind, blocksize


@settings(deadline=None, max_examples=400, derandomize=True, database=None)
@given(weights())
def test_the_same_as_bitsandbytes(drawn):
    assert same(*drawn)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_value_of_sixteen_bits(kind, dtype):
    """Each with a scale of its own beside it, and all of them with one scale."""
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    W = bits.view(dtype) if dtype != torch.float32 else bits.view(torch.bfloat16).float()
    W = W[W.isfinite()].repeat_interleave(31)
    W = torch.cat([W.view(-1, 31), torch.full((len(W) // 31, 1), 1.0, dtype=dtype)], 1)
    assert same(W, kind, 32)
    assert same(W.clamp(-1, 1), kind, 4096)


@pytest.mark.parametrize("kind", KINDS)
def test_every_float_beside_a_midpoint(kind):
    """As far as a cell reaches, and over its ends, in steps of one float."""
    ints = bounds(kind).view(torch.int32)[:, None] + torch.arange(-3000, 3001, dtype=torch.int32)
    W = ints.view(torch.float32).nan_to_num(1.0, 1.0, -1.0).clamp(-1, 1).reshape(-1)
    W = torch.cat([W, W.new_zeros(-len(W) % 31)]).view(-1, 31)
    assert same(torch.cat([W, torch.ones(len(W), 1)], 1), kind, 32)


@pytest.mark.parametrize("n", [1, 2, 63, 64, 65, 4097, (1 << 17) - 64, (1 << 17) + 1, (1 << 18) + 65])
def test_sizes_about_a_piece(n):
    assert all(same(torch.randn(n).to(dtype), kind, 64) for dtype in DTYPES for kind in KINDS)
    W = torch.randn(n)
    W[n // 2] = torch.inf
    assert same(W, "nf4", 64)


def test_threads_and_defaults_do_not_matter():
    W, threads = torch.randn(300, 1000), torch.get_num_threads()
    found = quantize_4bit(W, "nf4", 64)
    nearest._codes.cache_clear()
    torch.set_default_dtype(torch.bfloat16)
    torch.set_num_threads(1)
    try:
        with torch.device("meta"):
            again = quantize_4bit(W, "nf4", 64)
        packed = four_bits(W, "nf4", True, 64, torch.uint8)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_num_threads(threads)
    assert all(map(torch.equal, found, again))
    assert torch.equal(packed.quant_state.code, F4.get_4bit_type("nf4", device="cpu"))
    assert torch.equal(
        F4.dequantize_4bit(packed.data, packed.quant_state),
        F4.dequantize_4bit(*F4.quantize_4bit(W, quant_type="nf4", compress_statistics=True)),
    )


@pytest.mark.parametrize("double", [False, True])
def test_another_bitsandbytes_is_believed(monkeypatch, double):
    """One that rounds differently on midpoints: its own codes are taken."""
    real = F4.quantize_4bit

    def shifted(A, *args, **kwargs):
        return real(A * (1 + 2**-22), *args, **kwargs)

    W, kept = torch.randn(65, 33), (nearest._codes, nearest._agrees)
    monkeypatch.setattr(F4, "quantize_4bit", shifted)
    nearest._agrees.cache_clear()
    try:
        assert quantize_4bit(W, "nf4", 64) is None
        packed = four_bits(W, "nf4", double, 64, torch.uint8)
        codes, state = shifted(W, quant_type="nf4", blocksize=64, compress_statistics=double)
        assert torch.equal(packed.data, codes)
        assert torch.equal(packed.quant_state.absmax, state.absmax)
    finally:
        nearest._agrees.cache_clear()
    assert kept == (nearest._codes, nearest._agrees)
