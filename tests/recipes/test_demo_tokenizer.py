"""The tokenizer of the model in the package: bytes, as the model has read them."""

from transformers import AutoTokenizer

from lightning_lora.demo.data import manual_prose
from lightning_lora.demo.make_tokenizer import main
from lightning_lora.demo.module import BASE


def test_tokens_are_bytes():
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    text = manual_prose()[1][:5000].decode() + "\tä€\x7f😀"
    assert tokenizer(text)["input_ids"] == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text
    assert (len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id) == (256, 0, 1)


def test_the_script_makes_the_files_that_are_there(tmp_path):
    main(str(tmp_path))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_text() == (BASE / name).read_text()
