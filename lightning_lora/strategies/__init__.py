"""Saving and loading adapters under a Lightning strategy: one file per kind of strategy, chosen by its class."""

from lightning_lora.strategies.base import StrategyAdapter, strategy_adapter

__all__ = ["StrategyAdapter", "strategy_adapter"]
