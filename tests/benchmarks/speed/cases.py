"""What all variants of one comparison share: the base, and the adapters on it."""

from dataclasses import dataclass
from typing import Literal

import torch

Base = Literal["bf16", "fp32", "fp64", "nf4-dq"]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64, "nf4-dq": torch.bfloat16}
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True)
class Size:
    """A Llama and a batch for it.

    Args:
        hidden: Width.
        layers: Number of blocks.
        inter: Width inside the MLP.
        vocab: Number of token ids.
        heads: Attention heads.
        batch: Sequences in a batch.
        tokens: Tokens in a sequence.
    """

    hidden: int
    layers: int
    inter: int
    vocab: int = 8192
    heads: int = 8
    batch: int = 4
    tokens: int = 256


SIZES = {
    "small": Size(hidden=512, layers=8, inter=1408),
    "wide": Size(hidden=2048, layers=1, inter=5632),
    "two": Size(hidden=512, layers=2, inter=1408),  # of "small", two layers: for what takes long
    "7b": Size(hidden=4096, layers=2, inter=11008, heads=32, tokens=2048),  # two blocks of a Llama-2-7B
    "7b-one": Size(hidden=4096, layers=1, inter=11008, heads=32, tokens=2048),
    "1b": Size(hidden=2048, layers=4, inter=5632, heads=16, tokens=1024),
    "1b-two": Size(hidden=2048, layers=2, inter=5632, heads=16, tokens=1024),
    "tiny": Size(hidden=64, layers=2, inter=128, vocab=97, heads=4, batch=2, tokens=16),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A base, and the adapters on all its linears. The scale, lora_alpha / r, is 2: a scale of 1 hides work.

    Args:
        size: The model and the batch.
        base: Dtype of the base; of ``"nf4-dq"`` what isn't packed is bfloat16.
        device: Where it is.
        r: Rank.
        dropout: Probability.
        dora: Whether magnitudes are trained too.
        low_rank: Whether our DoRA drops on the low-rank branch only; PEFT always drops the input of the base product too.
    """

    size: Size
    base: Base = "bf16"
    device: str = "cpu"
    r: int = 16
    dropout: float = 0.0
    dora: bool = False
    low_rank: bool = False

    @property
    def lora_alpha(self) -> int:
        """Twice the rank."""
        return 2 * self.r

    @property
    def tokens(self) -> int:
        """Tokens in a batch."""
        return self.size.batch * self.size.tokens

    def ids(self) -> torch.Tensor:
        """The batch, (batch, tokens): the same in every call."""
        shape = (self.size.batch, self.size.tokens)
        return torch.randint(0, self.size.vocab, shape, generator=torch.Generator().manual_seed(1)).to(self.device)
