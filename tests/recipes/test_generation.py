"""What is put behind prompts: where it ends, and that a row's text is its own, whatever else is in its batch."""

import copy
import json
import re
import shlex
import shutil
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import transformers as tf
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file, save_file

import lightning_lora as ll
from lightning_lora.cli import main
from lightning_lora.recipes import CausalLM, Seq2SeqLM, SequenceClassifier, TextDataModule
from lightning_lora.recipes.generation import generate_texts, generation_options, generation_problems
from lightning_lora.recipes.module import Recipe
from lightning_lora.recipes.report import Report
from lightning_lora.recipes.samples import Samples
from lightning_lora.recipes.serve import open_adapter, stream
from tests.recipes import files


def gpt2(folder: Path) -> str:
    """A model whose positions are learnt: it fails at the first one that it does not have."""
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "vocab_size": 320}
    return files.saved(folder, tf.GPT2LMHeadModel(tf.GPT2Config(**sizes, **files.IDS)), files.make_tokenizer())


def ids_of(tokenizer, text: str) -> dict:
    return dict(tokenizer(text, return_tensors="pt"))


@pytest.mark.parametrize("where", ["one", "several", "tokenizer", "nowhere"])
def test_texts_end_where_the_model_or_the_tokenizer_says(where, llama, tmp_path):
    """Gemma's turns end with another token than its texts, and only generation_config.json names it."""
    base, tokenizer = tf.AutoModelForCausalLM.from_pretrained(llama), files.make_tokenizer()
    inputs, options = ids_of(tokenizer, "delta"), {"max_new_tokens": 8, "do_sample": False}
    width = inputs["input_ids"].shape[1]
    free = base.generate(**inputs, **options, eos_token_id=None)[0, width:].tolist()
    end = free[3]
    assert end not in free[:3]
    base.generation_config.eos_token_id = {"one": end, "several": [2, end], "tokenizer": [319]}.get(where)
    if where == "tokenizer":
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    folder = files.saved(tmp_path / "base", base, tokenizer)

    module = CausalLM(folder)
    module.configure_model()
    (made,) = generate_texts(module, ids_of(module.tokenizer, "delta"), 8)
    expected = module.tokenizer.decode(free if where == "nowhere" else free[:4], skip_special_tokens=True)
    assert made["prediction"] == expected
    if where in ("one", "several"):
        again = tf.AutoModelForCausalLM.from_pretrained(folder)
        own = again.generate(**inputs, **options)[0, width:]
        assert tokenizer.decode(own, skip_special_tokens=True) == expected

    adapted = copy.deepcopy(module.model)
    ll.inject(adapted, ll.LoRAConfig(r=2))
    ll.save_adapter(adapted, tmp_path / "adapter")
    opened = open_adapter(str(tmp_path / "adapter"), folder)
    assert stream(*opened, "delta", max_new_tokens=8) == expected
    (other,) = generate_texts(module, ids_of(module.tokenizer, "delta"), 8, eos_token_id=free[1])
    assert other["prediction"] == tokenizer.decode(free[:2], skip_special_tokens=True)


def test_a_text_of_an_encoder_and_a_decoder_is_all_that_the_decoder_says(t5):
    """It does not lie behind its prompt, and takes none of the room that a prompt has."""
    module = Seq2SeqLM(t5)
    module.configure_model()
    inputs = ids_of(module.tokenizer, "delta echo delta echo delta echo")
    length = inputs["input_ids"].shape[1]
    assert length > 4
    module.tokenizer.model_max_length = length + 1
    options = {"eos_token_id": None, "suppress_tokens": module.tokenizer.all_special_ids}
    own = module.model.eval().generate(**inputs, max_new_tokens=4, do_sample=False, **options)
    (made,) = generate_texts(module, inputs, 4, **options)
    assert made["prediction"] == module.tokenizer.decode(own[0], skip_special_tokens=True) != ""


def test_what_fills_rows_up(llama):
    """What the tokenizer says; without that an end of texts, and without any of them the first token."""
    model, tokenizer = tf.AutoModelForCausalLM.from_pretrained(llama), files.make_tokenizer()
    for pad, own, of_model, filled in ((5, 7, 9, 5), (None, 7, 9, 7), (None, None, [9, 8], 9), (None, None, None, 0)):
        tokenizer.pad_token = None if pad is None else tokenizer.convert_ids_to_tokens(pad)
        tokenizer.eos_token = None if own is None else tokenizer.convert_ids_to_tokens(own)
        model.generation_config.eos_token_id = of_model
        assert generation_options(model, tokenizer, {})["pad_token_id"] == filled
    model.generation_config.do_sample = True  # as some chat models have it: without its being asked for, all is greedy
    assert generation_options(model, tokenizer, {}) == {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert generation_options(model, tokenizer, {"pad_token_id": 3, "do_sample": True}) == {
        "do_sample": True,
        "eos_token_id": None,
        "pad_token_id": 3,
    }


def test_options_that_generate_takes():
    fine = {"num_return_sequences": 1, "num_beams": 2, "temperature": 0.5, "logits_processor": None}
    assert [*generation_problems(fine)] == []
    for name, value in (("num_return_sequences", 2), ("return_dict_in_generate", True)):
        (problem,) = generation_problems({name: value})
        assert problem.startswith(f"generation: {name}={value} gives more than one text for each prompt")


def test_samples_are_taken_every_so_many_steps(llama, tmp_path):
    """Once behind a step, however many batches it takes, and not again where a run goes on from it."""
    path = files.jsonl(tmp_path / "a.jsonl", files.prompts(8))
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    saver = {"every_n_train_steps": 4, "save_top_k": -1, "filename": "{step}"}
    for steps, checkpoint, found in ((5, None, [2, 4]), (6, tmp_path / "step=4.ckpt", [2, 4, 6])):
        callbacks = [
            ll.LoRA(r=2),
            Samples(["hi"], every_n_steps=2, max_new_tokens=1),
            ModelCheckpoint(tmp_path, **saver),
        ]
        trainer = pl.Trainer(
            max_steps=steps, accumulate_grad_batches=2, callbacks=callbacks, default_root_dir=tmp_path, **options
        )
        trainer.fit(CausalLM(llama), datamodule=TextDataModule(path, batch_size=2), ckpt_path=checkpoint)
        lines = (tmp_path / "samples.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == found


def test_what_makes_no_texts_has_no_samples(llama):
    module = SequenceClassifier(llama, labels=["no", "yes"])
    with pytest.raises(ll.UnsupportedError, match=r"samples: SequenceClassifier makes no texts: leave samples.prompts"):
        Samples(["hi"]).setup(pl.Trainer(logger=False), module, "fit")
    Samples(["hi"]).setup(pl.Trainer(logger=False), module, "validate")
    Samples().setup(pl.Trainer(logger=False), module, "fit")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_text_does_not_depend_on_the_batch_of_its_prompt(family, llama, tmp_path):
    """In float64; prompts that leave room for all, for some and for hardly any of what is asked for."""
    base = llama if family == "llama" else gpt2(tmp_path / "gpt2")
    tokenizer = files.make_tokenizer()
    records = [{"prompt": "Say"}, *({"prompt": "a " * n} for n in (200, 246, 250, 300)), {"prompt": "Say beta"}]
    lengths = [len(tokenizer(record["prompt"])["input_ids"]) for record in records]
    assert lengths[1] + 12 < 256 > lengths[3] > lengths[2] > 256 - 12
    path, texts = files.jsonl(tmp_path / "a.jsonl", records), []
    for size in (1, len(records)):
        module, calls = CausalLM(base, dtype="float64", max_new_tokens=12), []
        module.configure_model()
        own = module.model.generate
        module.model.generate = lambda *args, own=own, calls=calls, **options: (
            calls.append(options["input_ids"].shape) or own(*args, **options)
        )
        trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
        found = trainer.predict(module, datamodule=TextDataModule(predict=path, batch_size=size))
        texts.append([row for batch in found for row in batch])
    assert texts[0] == texts[1]
    assert [row["prompt"] for row in texts[1][:4]] == [record["prompt"] for record in records[:4]]
    assert [len(shape) and shape[0] for shape in sorted(calls, key=lambda shape: shape[1])] == [3, 1, 1, 1]
    shown = tokenizer(texts[1][0]["prediction"], add_special_tokens=False)["input_ids"]
    assert len(shown) >= 10  # not cut by the longest prompt


@pytest.mark.parametrize(
    ("template", "prompts", "message"),
    [
        ("{context}: {prompt}", ["hi"], r"samples: a prompt alone .*'context' is no column; there are prompt.* Leave"),
        (None, ["hi", "there"], None),
        ("{context}: {prompt}", None, None),
    ],
)
def test_samples_that_can_not_be_put_are_refused_before_the_model_is_built(
    template, prompts, message, llama, tmp_path, monkeypatch
):
    rows = [{"context": f"c {i}", **record} for i, record in enumerate(files.prompts(8))]
    path = files.jsonl(tmp_path / "a.jsonl", rows)
    samples = Samples(prompts, every_n_steps=1, max_new_tokens=2)
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(max_steps=2, callbacks=[ll.LoRA(r=2), samples], default_root_dir=tmp_path, **options)
    module, data = CausalLM(llama), TextDataModule(path, val=path, batch_size=4, prompt_template=template)
    if message is None:
        trainer.fit(module, datamodule=data)
        said = tmp_path / "samples.jsonl"
        found = [json.loads(line)["prompt"] for line in said.read_text().splitlines()] if said.exists() else []
        assert found == 2 * (prompts or [])
        return
    monkeypatch.setattr(Recipe, "configure_model", None)
    with pytest.raises(ll.ConfigError, match=message):
        trainer.fit(module, datamodule=data)


@pytest.mark.parametrize("kind", ["text", "prompt"])
def test_samples_are_put_as_what_was_learnt(kind, chat_llama, tmp_path, capsys):
    """Plain texts go on as they are, and prompts within the chat template; so says the command that a run names."""
    records = {"text": [{"text": f"It is {i} today."} for i in range(8)], "prompt": files.prompts(8)}[kind]
    path, samples = files.jsonl(tmp_path / "a.jsonl", records), Samples(["It is"], every_n_steps=9)
    trainer = pl.Trainer(
        max_steps=1, callbacks=[ll.LoRA(r=2), samples, Report()], accelerator="cpu", logger=False,
        default_root_dir=tmp_path, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    module = CausalLM(chat_llama)
    trainer.fit(module, datamodule=TextDataModule(path, val=path, batch_size=4))
    asked = module.tokenizer.apply_chat_template(
        [{"role": "user", "content": "It is"}], tokenize=False, add_generation_prompt=True
    )
    assert samples._shown == [{"text": ("It is", False), "prompt": (asked, True)}[kind]]
    (command,) = re.findall("use it: lightning-lora generate (.*)", capsys.readouterr().out)
    assert shlex.split(command)[1:] == [*{"text": ["--prompt-template", "{prompt}"]}.get(kind, []), "--prompt", "..."]
    main(["generate", *shlex.split(command), "--max-new-tokens", "1"])


def test_a_base_that_holds_an_adapter_is_refused(llama, tmp_path, capsys):
    """Transformers would load both: what was said would be neither's."""
    model = tf.AutoModelForCausalLM.from_pretrained(llama)
    ll.inject(model, ll.LoRAConfig(r=2))
    ll.save_adapter(model, tmp_path / "adapter")
    shutil.copytree(llama, tmp_path / "both")
    for file in (tmp_path / "adapter").iterdir():
        shutil.copy(file, tmp_path / "both")
    with pytest.raises(SystemExit) as caught:
        main(["generate", "adapter", "--base", "both", "--prompt", "hi"])
    assert caught.value.code == 1
    said = capsys.readouterr().err
    assert "both, the base of adapter, holds adapter_config.json" in said
    assert "give the model alone (--base)" in said
    main(["generate", "both", "--base", llama, "--prompt", "hi", "--max-new-tokens", "2"])
    with pytest.raises(SystemExit):
        main(["generate", "adapter", "--base", llama, "--prompt", "hi", "--prompt-template", "hello"])
    assert "prompt_template must name a column in braces" in capsys.readouterr().err


def test_a_base_that_lacks_its_head_writes_nothing(llama, tmp_path):
    """transformers fills it with random values, other ones each time."""
    folder = shutil.copytree(llama, tmp_path / "base")
    module = CausalLM(llama)
    module.configure_model()
    ll.inject(module.model, ll.LoRAConfig(r=2))
    ll.save_adapter(module.model, tmp_path / "adapter")
    weights = load_file(folder / "model.safetensors")
    save_file(
        {k: v for k, v in weights.items() if k != "lm_head.weight"}, folder / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ll.ConfigError, match="lm_head.weight: in none of its files, so they would be random"):
        open_adapter(str(tmp_path / "adapter"), str(folder))


def test_every_rank_asks_where_samples_go(llama, tmp_path, monkeypatch):
    """Lightning answers together: a rank that did not ask would leave the others waiting."""
    asked, log_dir = [], pl.Trainer.log_dir.fget
    monkeypatch.setattr(pl.Trainer, "log_dir", property(lambda self: asked.append(self.global_step) or log_dir(self)))
    path = files.jsonl(tmp_path / "a.jsonl", files.prompts(8))
    samples = Samples(["hi"], every_n_steps=1, max_new_tokens=2)
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(max_steps=2, callbacks=[ll.LoRA(r=2), samples], default_root_dir=tmp_path, **options)
    monkeypatch.setattr(pl.Trainer, "is_global_zero", False)
    trainer.fit(CausalLM(llama), datamodule=TextDataModule(path, val=path, batch_size=4))
    assert asked[-2:] == [1, 2]
    assert not (tmp_path / "samples.jsonl").exists()
