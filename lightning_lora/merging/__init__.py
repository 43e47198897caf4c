"""Adapters into the base weights and out again."""
