"""Real tokenizer files, tiny models of real architectures, and data files, in a folder."""

import functools
import json
from pathlib import Path

import torch
import transformers as tf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from lightning_lora.demo.data import manual_prose

SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
STRONG = {"initializer_range": 0.1}  # outputs that adapters can move
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


@functools.cache
def trained() -> str:
    """A byte-level BPE of 320 tokens, learnt from the prose of Python's manual."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [*SPECIAL.values(), "<|user|>", "<|assistant|>", "<|system|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([manual_prose()[0][:60_000].decode()], trainer)
    return tokenizer.to_str()


def make_tokenizer(kind: str = "causal", chat: bool = False) -> tf.PreTrainedTokenizerFast:
    inner = Tokenizer.from_str(trained())
    if kind in ("bert", "t5"):
        inner.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    elif kind == "causal":
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=256, **SPECIAL)
    tokenizer.chat_template = CHAT if chat else None
    return tokenizer


def llama(folder: Path, chat: bool = False, **changes) -> str:
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        **{
            **SIZES,
            **IDS,
            **STRONG,
            "vocab_size": 320,
            "max_position_embeddings": 256,
            "num_key_value_heads": 2,
            **changes,
        }
    )
    return saved(folder, tf.LlamaForCausalLM(config), make_tokenizer(chat=chat))


def bert(folder: Path) -> str:
    torch.manual_seed(0)
    model = tf.BertModel(tf.BertConfig(**SIZES, **IDS, **STRONG, vocab_size=320, max_position_embeddings=256))
    return saved(folder, model, make_tokenizer("bert"))


def t5(folder: Path) -> str:
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    config = tf.T5Config(**sizes, vocab_size=320, decoder_start_token_id=0, pad_token_id=0, eos_token_id=2)
    return saved(folder, tf.T5ForConditionalGeneration(config), make_tokenizer("t5"))


def saved(folder: Path, model, tokenizer) -> str:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def jsonl(path: Path, records: list[dict]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


WORDS = ["alpha", "beta", "gamma", "delta"]


def prompts(n: int = 24) -> list[dict]:
    return [{"prompt": f"Say {WORDS[i % 4]} {i}.", "response": f" {WORDS[i % 4]} {i}!"} for i in range(n)]


def conversations(n: int = 24) -> list[dict]:
    turn = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day"}]
    return [
        {"messages": [*turn, *({"role": m, "content": f"{WORDS[i % 4]} {i}"} for m in ("user", "assistant"))]}
        for i in range(n)
    ]


def classes(n: int = 24) -> list[dict]:
    return [{"text": f"about {WORDS[i % 3]} number {i}", "label": WORDS[i % 3]} for i in range(n)]


def preferences(n: int = 24) -> list[dict]:
    return [{"prompt": f"Say {i}.", "chosen": f" good {i}", "rejected": f" bad {i} indeed"} for i in range(n)]
