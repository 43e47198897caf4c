"""Makes the tokenizer of the demonstration's base: one token for each byte.

    python -m lightning_lora.demo.make_tokenizer [folder]

The model has 256 rows, one for each byte, and none for special tokens: bytes 0 and 1, which no text has, stand for the
end of a text and for padding.
"""

import sys
from typing import Any

from lightning_lora.demo.module import BASE

END, PAD = "<|end|>", "<|pad|>"


def main(folder: str = str(BASE)) -> None:
    """Writes ``tokenizer.json`` and its configuration."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    signs = _signs()
    vocabulary = {END: 0, PAD: 1, **{signs[byte]: byte for byte in range(2, 256)}}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    make: Any = PreTrainedTokenizerFast
    tokenizer = make(tokenizer_object=inner, eos_token=END, pad_token=PAD, model_max_length=1024)
    tokenizer.save_pretrained(folder)


def _signs() -> list[str]:
    """The sign by which byte-level tokenizers write each byte: itself if it can be seen, else one from U+0100 on."""
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("\xa1"), ord("\xac") + 1), *range(ord("\xae"), ord("\xff") + 1)]
    hidden = [byte for byte in range(256) if byte not in seen]
    return [chr(byte) if byte in seen else chr(256 + hidden.index(byte)) for byte in range(256)]


if __name__ == "__main__":
    main(*sys.argv[1:])
