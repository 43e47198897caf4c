"""Where adapters go: a pure function from a model and a config to a plan."""

from lightning_lora.targets.plan import Plan, SavedModule, Target, draft, plan

__all__ = ["Plan", "SavedModule", "Target", "draft", "plan"]
