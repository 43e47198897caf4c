"""One variant per file: the tensors of an adapter and the one equation, ``merged(W)``, that defines it."""

from lightning_lora.adapters.base import Adapter, variant, variant_class
from lightning_lora.adapters.dora import DoRAAdapter
from lightning_lora.adapters.host import Host
from lightning_lora.adapters.lora import LoRAAdapter

__all__ = ["Adapter", "DoRAAdapter", "Host", "LoRAAdapter", "variant", "variant_class"]
