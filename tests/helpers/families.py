"""Real transformers architectures from tiny configs: nothing is downloaded."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
DECODER = {
    **SMALL,
    "vocab_size": 61,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
KV = {"num_key_value_heads": 2}


def ids(model: nn.Module) -> dict[str, Tensor]:
    tokens = torch.randint(3, 61, (2, 7))
    return {"input_ids": tokens, "labels": tokens}


def classes(model: nn.Module) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(3, 61, (2, 7)), "labels": torch.tensor([0, 2])}


def pixels(model: nn.Module) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, 16, 16), "labels": torch.tensor([0, 2])}


def speech(model: nn.Module) -> dict[str, Tensor]:
    return {"input_features": torch.randn(2, 8, 40), "labels": torch.randint(3, 61, (2, 5))}


class ConvNet(nn.Module):
    """A plain torch network: convolutions, BatchNorm, dropout, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.1), nn.Conv2d(8, 8, 3, stride=2)
        )
        self.head = nn.Linear(8, 3)

    def forward(self, pixel_values: Tensor, labels: Tensor) -> Any:
        logits = self.head(self.features(pixel_values).mean((2, 3)))
        return type("Output", (), {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits})


@dataclass(frozen=True)
class Family:
    """A model, a batch, how many linears "all-linear" finds in it, and what is trained in full."""

    build: Callable[[], nn.Module]
    batch: Callable[[nn.Module], dict[str, Tensor]]
    linears: int
    heads: tuple[str, ...] = ()
    target_modules: Any = "all-linear"

    def make(self) -> nn.Module:
        torch.manual_seed(0)
        return self.build()


def _causal(config: Any) -> nn.Module:
    return tf.AutoModelForCausalLM.from_config(config)


FAMILIES = {
    "llama": Family(lambda: _causal(tf.LlamaConfig(**DECODER, **KV)), ids, 14),
    "qwen2-tied": Family(lambda: _causal(tf.Qwen2Config(**DECODER, **KV, tie_word_embeddings=True)), ids, 14),
    "gemma2": Family(lambda: _causal(tf.Gemma2Config(**DECODER, **KV, head_dim=8)), ids, 14),
    "gpt2": Family(
        lambda: _causal(tf.GPT2Config(vocab_size=61, n_positions=64, n_embd=32, n_layer=2, n_head=4)), ids, 8
    ),
    "opt": Family(
        lambda: _causal(
            tf.OPTConfig(**{**DECODER, "ffn_dim": 48, "word_embed_proj_dim": 32, "activation_dropout": 0.0})
        ),
        ids,
        12,
    ),
    "phi3": Family(lambda: _causal(tf.Phi3Config(**DECODER, **KV)), ids, 8),
    "mixtral": Family(
        lambda: _causal(tf.MixtralConfig(**DECODER, **KV, num_local_experts=4, num_experts_per_tok=2)), ids, 8
    ),
    "bert": Family(
        lambda: tf.BertForSequenceClassification(tf.BertConfig(**DECODER, num_labels=3)), classes, 13, ("classifier",)
    ),
    "roberta": Family(
        lambda: tf.RobertaForSequenceClassification(tf.RobertaConfig(**DECODER, num_labels=3)),
        classes,
        12,
        ("classifier",),
    ),
    "llama-classifier": Family(
        lambda: tf.LlamaForSequenceClassification(tf.LlamaConfig(**DECODER, **KV, num_labels=3)),
        classes,
        14,
        ("score",),
    ),
    "t5": Family(
        lambda: tf.T5ForConditionalGeneration(
            tf.T5Config(vocab_size=61, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
        ),
        ids,
        32,
    ),
    "vit": Family(
        lambda: tf.ViTForImageClassification(tf.ViTConfig(**SMALL, image_size=16, patch_size=4, num_labels=3)),
        pixels,
        12,
        ("classifier",),
    ),
    "whisper": Family(
        lambda: tf.WhisperForConditionalGeneration(
            tf.WhisperConfig(
                vocab_size=61,
                d_model=32,
                encoder_layers=2,
                decoder_layers=2,
                encoder_attention_heads=4,
                decoder_attention_heads=4,
                encoder_ffn_dim=48,
                decoder_ffn_dim=48,
                num_mel_bins=8,
                max_source_positions=20,
                max_target_positions=16,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
                decoder_start_token_id=1,
            )
        ),
        speech,
        32,
    ),
    "convnet": Family(ConvNet, pixels, 2, ("head",), target_modules=["features.*"]),
}


_STACK = {"layers": 1, "attention_heads": 4, "ffn_dim": 48}
_BART = {
    **{key: value for key, value in DECODER.items() if key not in SMALL},
    **{f"{stack}_{key}": size for stack in ("encoder", "decoder") for key, size in _STACK.items()},
    "d_model": 32,
}
_T5 = {"vocab_size": 61, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
_BART_ENDS = ["model.encoder.embed_tokens", "model.decoder.embed_tokens", "lm_head"]
_T5_ENDS = ["encoder.embed_tokens", "decoder.embed_tokens", "lm_head"]
_BERT_ENDS = ["bert.embeddings.word_embeddings", "cls.predictions.decoder"]

TIED: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "bart": (lambda: tf.BartForConditionalGeneration(tf.BartConfig(**_BART)), _BART_ENDS),
    "mbart": (lambda: tf.MBartForConditionalGeneration(tf.MBartConfig(**_BART)), _BART_ENDS),
    "pegasus": (lambda: tf.PegasusForConditionalGeneration(tf.PegasusConfig(**_BART)), _BART_ENDS),
    "bert": (lambda: tf.BertForMaskedLM(tf.BertConfig(**DECODER)), _BERT_ENDS),
    "t5": (lambda: tf.T5ForConditionalGeneration(tf.T5Config(**_T5)), _T5_ENDS),
    "umt5": (lambda: tf.UMT5ForConditionalGeneration(tf.UMT5Config(**_T5)), _T5_ENDS),
    "switch": (
        lambda: tf.SwitchTransformersForConditionalGeneration(
            tf.SwitchTransformersConfig(
                **_T5, num_decoder_layers=1, num_sparse_encoder_layers=0, num_sparse_decoder_layers=0
            )
        ),
        _T5_ENDS,
    ),
    "gpt2": (FAMILIES["gpt2"].build, ["transformer.wte", "lm_head"]),
    "llama": (
        lambda: _causal(tf.LlamaConfig(**DECODER, **KV, tie_word_embeddings=True)),
        ["model.embed_tokens", "lm_head"],
    ),
}
"""Models with the names of layers that share one weight, but for ``shared``, which nothing calls."""


def tied(name: str) -> nn.Module:
    """One of these, whose tables are no noise, and whose biases are not 0."""
    torch.manual_seed(0)
    model = TIED[name][0]().eval()
    for parameter in model.parameters():
        if parameter.dim() == 1 or len(parameter) == 61:
            nn.init.normal_(parameter)
    return model


@torch.no_grad()
def logits_of(model: nn.Module) -> Tensor:
    """Of a batch that suits these."""
    ids = torch.tensor([[5, 60, 7, 3]])
    whole = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    return model.eval()(input_ids=ids, **whole).logits
