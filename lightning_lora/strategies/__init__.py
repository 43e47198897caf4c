"""One Lightning strategy per file: how adapters are saved and loaded there."""

from lightning_lora.strategies.base import StrategyAdapter, strategy_adapter

__all__ = ["StrategyAdapter", "strategy_adapter"]
