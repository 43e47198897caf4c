"""Tensor functions without modules: the numerics live here."""
