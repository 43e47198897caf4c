"""Ways to train one model, each followed once, and what shares their bytes."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_lora.analysis.memory_count import Step
from lightning_lora.analysis.memory_optimizer import optimizer_bytes
from lightning_lora.analysis.memory_step import Way, follow
from lightning_lora.analysis.memory_strategy import Parts, Share, share_of_each


@dataclass(frozen=True)
class Run:
    """A way to train, and what shares the bytes of it."""

    way: Way
    optimizer: str
    strategy: str
    devices: int

    def options(self) -> dict[str, Any]:
        """In plain types."""
        way, config = self.way, self.way.config
        return {
            "adapter": "none" if config is None else config.variant,
            "r": None if config is None else config.r,
            "quantization": None if way.quantization is None else way.quantization.mode,
            "precision": way.precision,
            "optimizer": self.optimizer,
            "batch_size": way.batch_size,
            "seq_len": way.seq_len,
            "gradient_checkpointing": way.gradient_checkpointing,
            "attn_implementation": way.attn_implementation,
            "strategy": self.strategy,
            "devices": self.devices,
        }


class Steps:
    """Steps of one model, each way followed once."""

    def __init__(self, model: nn.Module, example_inputs: Any) -> None:
        self.model, self.example_inputs = model, example_inputs
        self._known: dict[str, Step] = {}

    def of(self, way: Way) -> Step:
        """The step of a way."""
        key = repr(way)
        if key not in self._known:
            self._known[key] = follow(self.model, way, self.example_inputs)
        return self._known[key]

    def parts(self, run: Run) -> Parts:
        """What each device has, by what it is for."""
        return self.share(run).parts

    def share(self, run: Run) -> Share:
        """What each device has."""
        step = self.of(run.way)
        return share_of_each(step, optimizer_bytes(run.optimizer, step.trained), run.strategy, run.devices)
