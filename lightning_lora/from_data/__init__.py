"""Ranks and first values that come from batches of data."""
