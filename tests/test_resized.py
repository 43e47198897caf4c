"""Tables that were resized: what their new rows hold is in no file of the base."""

import warnings

import pytest
import torch
import transformers as tf

import lightning_lora as ll
from tests.helpers.families import FAMILIES
from tests.helpers.modules import Wrapped, one_batch, trainer


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def folder(request, tmp_path):
    model = FAMILIES["llama"].make()
    config = tf.LlamaConfig.from_dict({**model.config.to_dict(), "tie_word_embeddings": request.param})
    torch.manual_seed(0)
    tf.LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    return tmp_path / "base", config.vocab_size, request.param


def resized(folder, more: int = 2):
    model = tf.LlamaForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(model.config.vocab_size + more, mean_resizing=False)
    return model


def test_new_rows_that_stay_frozen_are_told(folder, tmp_path):
    path, size, is_tied = folder
    new = [size, size + 1]
    tables = ["model.embed_tokens"] if is_tied else ["model.embed_tokens", "lm_head"]
    model = resized(path)

    def told(**options) -> list[str]:
        return [n for n in ll.plan(model, ll.LoRAConfig(**options)).notes if "stay as they were drawn" in n]

    (note,) = told()
    assert note.startswith(
        f"{', '.join(reversed(tables))}: resized from {size} rows to {size + 2}, of which the new ones stay"
    )
    assert f"'embed_tokens': [{size}, ...]" in note
    assert ("lm_head" in note) is not is_tied
    assert len(told(trainable_token_indices=new)) == (not is_tied)
    assert len(told(trainable_token_indices=new[:1])) == 1
    assert len(told(modules_to_save=["embed_tokens"], exclude_modules=["lm_head"])) == (not is_tied)
    assert not told(modules_to_save=["embed_tokens", "lm_head"])
    assert not told(modules_to_save=["model.embed_tokens.weight", "lm_head.weight"])
    if not is_tied:
        assert not told(trainable_token_indices={"embed_tokens": new, "lm_head": new})
    model.save_pretrained(tmp_path / "other")
    model = tf.LlamaForCausalLM.from_pretrained(tmp_path / "other")
    assert not told()


def test_a_model_whose_files_are_gone_says_nothing(folder):
    path, *_ = folder
    model = resized(path)
    (path / "config.json").unlink()
    assert not [note for note in ll.plan(model, ll.LoRAConfig()).notes if "resized" in note]


def test_what_is_advised_loads_into_another_resize(folder, tmp_path):
    path, size, is_tied = folder
    new = [size, size + 1]
    tokens = new if is_tied else {"embed_tokens": new, "lm_head": new}
    options = {"r": 2, "target_modules": ["q_proj"], "trainable_token_indices": tokens, "modules_to_save": None}
    torch.manual_seed(1)
    module = Wrapped(lambda: resized(path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*(val_dataloader|LeafSpec|workers|rows of tokens|never moved|in eval mode)")
        run = trainer(ll.LoRA(**options), max_steps=2)
        run.fit(module, one_batch({"input_ids": torch.tensor([[3, *new, 4]]), "labels": torch.tensor([[3, *new, 4]])}))
    run.save_checkpoint(tmp_path / "a.ckpt")
    other = resized(path)
    ll.load_adapter(other, tmp_path / "a.ckpt")
    ids = torch.tensor([[1, *new]])
    torch.testing.assert_close(other.eval()(ids).logits, module.net.eval()(ids).logits)
