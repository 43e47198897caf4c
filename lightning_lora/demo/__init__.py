"""The demonstration: a small language model, shipped with the package, is adapted from code to English prose."""
