"""What a user needs to decide: counts and bytes before a run, and what an adapter has learnt after it."""

from lightning_lora.analysis.against_weight import AgainstWeight
from lightning_lora.analysis.analyze import analyze, analyze_files
from lightning_lora.analysis.intruders import Intruders
from lightning_lora.analysis.results import Analysis, Comparison, LayerAnalysis
from lightning_lora.analysis.subspaces import LayerComparison, subspace_similarity
from lightning_lora.analysis.summary import Summary, summary

__all__ = [
    "AgainstWeight",
    "Analysis",
    "Comparison",
    "Intruders",
    "LayerAnalysis",
    "LayerComparison",
    "Summary",
    "analyze",
    "analyze_files",
    "subspace_similarity",
    "summary",
]
