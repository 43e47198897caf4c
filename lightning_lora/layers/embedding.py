"""nn.Embedding and its subclasses (scaled ones too)."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from lightning_lora.layers.base import LoRALayer
from lightning_lora.layers.registry import adapts

if TYPE_CHECKING:
    from lightning_lora.adapters import LowRankAdapter, Rows


@adapts("torch.nn.modules.sparse.Embedding")
class LoRAEmbedding(LoRALayer):
    """The table (tokens, dim) is the matrix (dim, tokens): A is (r, tokens), looked up; B is (dim, r).

    ``max_norm`` is applied to the adapted rows, out of place: the frozen table is never written to. Token ids can't
    be dropped, so ``lora_dropout`` has no effect here, as in PEFT.
    """

    lora_starts_as_told = False
    lora_has_rows = True

    @override
    @staticmethod
    def lora_matrix_shape(layer: Any) -> tuple[int, int]:
        return layer.embedding_dim, layer.num_embeddings

    @override
    @classmethod
    def lora_peft_shapes(cls, layer: Any, r: int) -> dict[str, tuple[int, ...]]:
        dim, tokens = cls.lora_matrix_shape(layer)
        return {"lora_embedding_A": (r, tokens), "lora_embedding_B": (dim, r), "lora_magnitude_vector.weight": (dim,)}

    @override
    @classmethod
    def lora_peft_problem(cls, layer: Any) -> str | None:
        if layer.max_norm is not None:
            return "PEFT limits the norm of the rows of A, and not of the adapted row"
        return None

    @override
    def lora_as_matrix(self, weight: Tensor) -> Tensor:
        return weight.detach().T

    @override
    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layer: Any = self
        out = super().forward(input, *args, **kwargs)
        if layer.max_norm is None:
            return out
        rows = out.detach()
        norms = torch.linalg.vector_norm(rows, layer.norm_type, dim=-1, keepdim=True)
        shrunk = rows * torch.where(norms > layer.max_norm, layer.max_norm / (norms + 1e-7), 1.0).to(rows.dtype)
        if not out.requires_grad:
            return shrunk
        return out + (shrunk - rows)  # as in torch, the gradient passes as if the row had had this norm before

    @override
    def lora_stored_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.lora_look_up(x, self.weight)

    @override
    def lora_low_rank(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return F.linear(self.lora_look_up(x, A.T), B)

    @override
    def lora_drop(self, x: Tensor, p: float, training: bool) -> Tensor:
        return x

    @override
    def lora_initial_factors(
        self, init: Callable[..., Any], W: Tensor, adapter: "LowRankAdapter"
    ) -> tuple[Tensor, Tensor, bool]:
        """A zero and B normal, whatever the initialisation, as in PEFT: a look-up of a random A is not small."""
        dim, tokens = self.lora_matrix_shape(self)
        return torch.zeros(adapter.r, tokens), torch.randn(dim, adapter.r, generator=adapter.generator()), False

    @override
    def lora_with_rows(self, x: Tensor, base: Tensor, out: Tensor, rows: "Rows") -> Tensor:
        layer: Any = self
        places, others = rows.places[x], len(rows.values)
        table = torch.cat([rows.values.to(out.dtype), out.new_zeros(1, out.shape[-1])])
        new = F.embedding(places, table, others, scale_grad_by_freq=layer.scale_grad_by_freq)
        trained = (places < others).unsqueeze(-1)
        if rows.share is None and out is base:
            return torch.where(trained, new, out)
        change = torch.where(trained, new - base, torch.zeros((), dtype=out.dtype, device=out.device))
        return out + (change if rows.share is None else change * rows.share.to(out.dtype))

    def lora_look_up(self, ids: Tensor, table: Any) -> Tensor:
        """Rows of a table of this kind."""
        layer: Any = self
        return F.embedding(ids, table, layer.padding_idx, scale_grad_by_freq=layer.scale_grad_by_freq)
