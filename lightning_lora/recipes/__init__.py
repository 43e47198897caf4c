"""Fine-tuning of language models from your own file: modules, data and what is told while they train."""

from lightning_lora.recipes.causal_lm import CausalLM
from lightning_lora.recipes.classifier import SequenceClassifier
from lightning_lora.recipes.data import TextDataModule
from lightning_lora.recipes.dpo import DPO, dpo_loss
from lightning_lora.recipes.language import LanguageModel
from lightning_lora.recipes.module import Recipe
from lightning_lora.recipes.seq2seq import Seq2SeqLM

__all__ = [
    "DPO",
    "CausalLM",
    "LanguageModel",
    "Recipe",
    "Seq2SeqLM",
    "SequenceClassifier",
    "TextDataModule",
    "dpo_loss",
]
