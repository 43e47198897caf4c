"""Adapters from files into a model: all of it, or nothing."""
