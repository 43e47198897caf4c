"""Packing a dense weight in pieces: bitsandbytes on a CPU takes many times the weight for its temporaries."""

import torch
from bitsandbytes import functional as F4
from bitsandbytes.nn import Int8Params, Params4bit
from torch import Tensor, nn

from lightning_lora.ops.defaults import float32_by_default
from lightning_lora.quantization.nearest import quantize_4bit, values

PIECE = 1 << 16  # weights that are packed at a time on a CPU; whole blocks, of any size


def four_bits(W: Tensor, kind: str, double: bool, blocksize: int, storage: torch.dtype) -> nn.Parameter:
    """The same as `bitsandbytes.functional.quantize_4bit`, without its temporaries of many times the weight."""
    flat = W.contiguous().view(-1)
    codes, absmax = quantize_4bit(flat, kind, blocksize) or _by_bitsandbytes(flat, kind, blocksize)
    state = F4.QuantState(absmax, W.shape, values(kind, W.device), blocksize, kind, W.dtype)
    if double:  # the scales themselves in 8 bits, in blocks of 256 (section 3, "Double Quantization")
        state.offset, state.nested = absmax.mean(), True
        with float32_by_default():
            state.absmax, state.state2 = F4.quantize_blockwise(absmax - state.offset, blocksize=256)
    packed: nn.Parameter = Params4bit(
        codes.view(storage).unsqueeze(1),
        quant_state=state,
        blocksize=blocksize,
        compress_statistics=double,
        quant_type=kind,
        quant_storage=storage,
        bnb_quantized=True,
    )
    return packed


def eight_bits(W: Tensor) -> nn.Parameter:
    """Rows in 8 bits, with one scale each (section 2.1, "vector-wise")."""
    CB = torch.empty(W.shape, dtype=torch.int8, device=W.device)
    SCB = torch.empty(len(W), dtype=torch.float32, device=W.device)
    step = max(1, PIECE // W.shape[1]) if W.device.type == "cpu" else len(W)
    for start in range(0, len(W), step):
        rows = slice(start, start + step)
        w = W[rows].float()  # float16, in which bitsandbytes does this, has too small a range
        SCB[rows] = w.abs().amax(1)
        CB[rows] = (w * (127 / SCB[rows].clamp_min(torch.finfo(torch.float32).tiny))[:, None]).round_().to(torch.int8)
    packed: nn.Parameter = Int8Params(CB, requires_grad=False, has_fp16_weights=False, CB=CB, SCB=SCB)
    return packed


def _by_bitsandbytes(flat: Tensor, kind: str, blocksize: int) -> tuple[Tensor, Tensor]:
    """Packed codes and scales, in pieces on a CPU."""
    step = PIECE if flat.device.type == "cpu" else max(1, flat.numel())
    pieces = [
        F4.quantize_4bit(piece, blocksize=blocksize, compress_statistics=False, quant_type=kind)
        for piece in torch.split(flat, step)
    ]
    return torch.cat([codes.view(-1) for codes, _ in pieces]), torch.cat([state.absmax for _, state in pieces])
