"""What a user needs to decide: counts and bytes."""

from lightning_lora.analysis.summary import Summary, summary

__all__ = ["Summary", "summary"]
