"""Putting adapters onto a model, and taking them off again."""
