"""The families of the table in docs/families.md: real architectures from tiny configs, and modules of torch."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn

from tests.helpers.families import ConvNet, classes, ids, pixels
from tests.layers.test_experts import FAMILIES as EXPERTS

SIZE = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {
    **SIZE,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
KV = {**TEXT, "num_key_value_heads": 2}


@dataclass(frozen=True)
class Family:
    """A model, a batch that gives a loss, and what of it is adapted."""

    build: Callable[[], nn.Module]
    batch: Callable[[Any], dict[str, Tensor]] = ids
    options: dict[str, Any] = field(default_factory=dict)

    def make(self) -> nn.Module:
        torch.manual_seed(0)
        return self.build()


def causal(config: Any) -> Callable[[], nn.Module]:
    return lambda: tf.AutoModelForCausalLM.from_config(config)


def classifier(config: Any) -> Callable[[], nn.Module]:
    config.num_labels = 3
    return lambda: tf.AutoModelForSequenceClassification.from_config(config)


def images(config: Any) -> Callable[[], nn.Module]:
    config.num_labels = 3
    return lambda: tf.AutoModelForImageClassification.from_config(config)


class Own(nn.Module):
    """A module of torch between two linears that are not adapted, with a loss."""

    def __init__(self, inner: nn.Module, call: Callable[[nn.Module, Tensor], Tensor], width: int = 16) -> None:
        super().__init__()
        self.inner, self.call, self.score = inner, call, nn.Linear(width, 3)

    def forward(self, x: Tensor, labels: Tensor) -> Any:
        logits = self.score(self.call(self.inner, x).flatten(1, -2).mean(1))
        return type("Output", (), {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits})


def sequence(model: Any) -> dict[str, Tensor]:
    return {"x": torch.randn(2, 5, 16), "labels": torch.tensor([0, 2])}


def own(inner: Callable[[], nn.Module], call: Callable[[nn.Module, Tensor], Tensor], **options: Any) -> Family:
    return Family(lambda: Own(inner(), call), sequence, {"modules_to_save": ["score"], **options})


def speech(model: Any) -> dict[str, Tensor]:
    return {"input_values": torch.randn(2, 400), "labels": torch.randint(3, 30, (2, 4))}


def pairs(model: Any) -> dict[str, Tensor]:
    tokens = torch.randint(3, 60, (2, 7))
    return {"input_ids": tokens, "pixel_values": torch.randn(2, 3, 16, 16), "return_loss": True}


def channels(model: nn.Module, x: Tensor) -> Tensor:
    return model(x.mT).mT


PARAMETERS = {"target_modules": [], "target_parameters": ["weight_*"]}
READ = {"batch_first": True, "dropout": 0.0}
CONV = {"target_modules": "inner"}
EXPERT = {"target_parameters": "experts"}
FAMILIES: dict[str, Family] = {
    "Llama": Family(causal(tf.LlamaConfig(**KV))),
    "Mistral": Family(causal(tf.MistralConfig(**KV))),
    "Qwen 2": Family(causal(tf.Qwen2Config(**KV))),
    "Qwen 3": Family(causal(tf.Qwen3Config(**KV, head_dim=16))),
    "Gemma 2": Family(causal(tf.Gemma2Config(**KV, head_dim=16))),
    "Gemma 3": Family(causal(tf.Gemma3TextConfig(**KV, head_dim=16))),
    "Phi-3": Family(causal(tf.Phi3Config(**KV))),
    "OLMo 2": Family(causal(tf.Olmo2Config(**KV))),
    "StableLM": Family(causal(tf.StableLmConfig(**KV))),
    "Starcoder 2": Family(causal(tf.Starcoder2Config(**KV))),
    "Falcon": Family(causal(tf.FalconConfig(vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=4))),
    "GPT-2": Family(causal(tf.GPT2Config(vocab_size=64, n_positions=64, n_embd=64, n_layer=2, n_head=4))),
    "GPT-NeoX": Family(causal(tf.GPTNeoXConfig(**TEXT))),
    "GPT-BigCode": Family(causal(tf.GPTBigCodeConfig(vocab_size=64, n_positions=64, n_embd=64, n_layer=2, n_head=4))),
    "BLOOM": Family(causal(tf.BloomConfig(vocab_size=64, hidden_size=64, n_layer=2, n_head=4))),
    "OPT": Family(causal(tf.OPTConfig(**{**TEXT, "ffn_dim": 64, "word_embed_proj_dim": 64}))),
    "Mamba": Family(causal(tf.MambaConfig(vocab_size=64, hidden_size=64, num_hidden_layers=2, state_size=8))),
    "BERT": Family(classifier(tf.BertConfig(**TEXT)), classes),
    "RoBERTa": Family(classifier(tf.RobertaConfig(**TEXT)), classes),
    "DistilBERT": Family(
        classifier(tf.DistilBertConfig(vocab_size=64, dim=64, hidden_dim=64, n_layers=2, n_heads=4)), classes
    ),
    "ALBERT": Family(classifier(tf.AlbertConfig(**TEXT, embedding_size=32)), classes),
    "ELECTRA": Family(classifier(tf.ElectraConfig(**TEXT, embedding_size=32)), classes),
    "DeBERTa-v2": Family(
        classifier(tf.DebertaV2Config(**TEXT, relative_attention=True, pos_att_type=["p2c", "c2p"])), classes
    ),
    "T5": Family(
        lambda: tf.T5ForConditionalGeneration(
            tf.T5Config(vocab_size=64, d_model=64, d_kv=16, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0)
        )
    ),
    "BART": Family(
        lambda: tf.BartForConditionalGeneration(
            tf.BartConfig(
                vocab_size=64, d_model=64, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
                decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64,
            )
        )
    ),
    "Mixtral": Family(causal(EXPERTS["mixtral"]()), options=EXPERT),
    "Qwen 2 MoE": Family(causal(EXPERTS["qwen2_moe"]()), options=EXPERT),
    "Qwen 3 MoE": Family(causal(EXPERTS["qwen3_moe"]()), options=EXPERT),
    "OLMoE": Family(causal(EXPERTS["olmoe"]()), options=EXPERT),
    "gpt-oss": Family(causal(EXPERTS["gpt_oss"]()), options=EXPERT),
    "Granite MoE": Family(causal(EXPERTS["granitemoe"]()), options=EXPERT),
    "DeepSeek-V3": Family(causal(EXPERTS["deepseek_v3"]()), options=EXPERT),
    "Llama 4": Family(causal(EXPERTS["llama4"]()), options=EXPERT),
    "ViT": Family(images(tf.ViTConfig(**SIZE, image_size=16, patch_size=4)), pixels),
    "DINOv2": Family(
        images(tf.Dinov2Config(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=4)),
        pixels,
    ),
    "ConvNeXt": Family(images(tf.ConvNextConfig(hidden_sizes=[16, 32], depths=[1, 1], num_stages=2)), pixels),
    "ResNet": Family(
        images(tf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")),
        pixels,
        {"target_modules": ["convolution"]},
    ),
    "CLIP": Family(
        lambda: tf.CLIPModel(
            tf.CLIPConfig(
                text_config={**TEXT}, vision_config={**SIZE, "image_size": 16, "patch_size": 4}, projection_dim=32
            )
        ),
        pairs,
    ),
    "wav2vec 2": Family(
        lambda: tf.Wav2Vec2ForCTC(
            tf.Wav2Vec2Config(
                **SIZE, vocab_size=32, conv_dim=(16, 16), conv_stride=(5, 2), conv_kernel=(10, 3),
                num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2, layerdrop=0.0, apply_spec_augment=False,
            )
        ),
        speech,
    ),
    "WavLM": Family(
        lambda: tf.WavLMForCTC(
            tf.WavLMConfig(
                **SIZE, vocab_size=32, conv_dim=(16, 16), conv_stride=(5, 2), conv_kernel=(10, 3),
                num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2, layerdrop=0.0, apply_spec_augment=False,
            )
        ),
        speech,
    ),
    "nn.MultiheadAttention": own(lambda: nn.MultiheadAttention(16, 4, batch_first=True), lambda m, x: m(x, x, x)[0]),
    "nn.TransformerEncoder": own(
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, **READ), 1), lambda m, x: m(x)
    ),
    "nn.TransformerDecoder": own(
        lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 4, 32, **READ), 1), lambda m, x: m(x, x)
    ),
    "nn.LSTM": own(lambda: nn.LSTM(16, 16, batch_first=True), lambda m, x: m(x)[0], **PARAMETERS),
    "nn.GRU": own(lambda: nn.GRU(16, 16, batch_first=True), lambda m, x: m(x)[0], **PARAMETERS),
    "nn.Bilinear": own(
        lambda: nn.Bilinear(16, 16, 16), lambda m, x: m(x, x), target_modules=[], target_parameters=["inner.weight"]
    ),
    "nn.Linear": own(lambda: nn.Linear(16, 16), lambda m, x: m(x)),
    "nn.Conv1d": own(lambda: nn.Conv1d(16, 16, 3, padding=1), channels, **CONV),
    "nn.Embedding": own(lambda: nn.Embedding(8, 16), lambda m, x: m((x[..., 0] * 3).long().clamp(0, 7)), **CONV),
    "nn.Conv2d": Family(ConvNet, pixels, {"target_modules": ["features.*"]}),
}  # fmt: skip
