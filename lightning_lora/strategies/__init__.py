"""Saving and loading adapters under a Lightning strategy: one file per kind of strategy, chosen by its class."""

from lightning_lora.strategies import ddp, deepspeed, fsdp, model_parallel  # noqa: F401  (each registers what it handles)
from lightning_lora.strategies.base import Options, StrategyAdapter
from lightning_lora.strategies.registry import strategy_adapter

__all__ = ["Options", "StrategyAdapter", "strategy_adapter"]
