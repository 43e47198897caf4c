"""Where adapters go: a pure function from a model and a config to a plan."""

from lightning_lora.targets.plan import Plan, Target, draft, plan
from lightning_lora.targets.saved import SavedModule

__all__ = ["Plan", "SavedModule", "Target", "draft", "plan"]
