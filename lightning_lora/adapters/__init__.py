"""One variant per file: the tensors of an adapter and the one equation, ``merged(W)``, that defines it."""

from lightning_lora.adapters.base import Adapter, unweighted
from lightning_lora.adapters.dora import DoRAAdapter
from lightning_lora.adapters.host import Host, Rows
from lightning_lora.adapters.lora import LoRAAdapter
from lightning_lora.adapters.low_rank import LowRankAdapter, variant, variant_class
from lightning_lora.adapters.token_rows import RowsAdapter, TiedRows, TokenRows

__all__ = [
    "Adapter",
    "DoRAAdapter",
    "Host",
    "LoRAAdapter",
    "LowRankAdapter",
    "Rows",
    "RowsAdapter",
    "TiedRows",
    "TokenRows",
    "unweighted",
    "variant",
    "variant_class",
]
