"""The data module: splits, caches, what each device gets, and what is refused before a model is loaded."""

import functools
import json
import shutil
import warnings
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

import lightning_lora as ll
from lightning_lora import ConfigError
from lightning_lora.recipes import CausalLM, Seq2SeqLM, SequenceClassifier, TextDataModule
from lightning_lora.recipes.order import EpochSampler
from lightning_lora.recipes.packing import Packed
from lightning_lora.recipes.tokens import check_length, context_of
from tests.helpers.toy import Lit
from tests.recipes import files

CLASSES = (EpochSampler, functools.partial(torch.utils.data.DistributedSampler, shuffle=True))


class Unloaded(CausalLM):
    """Whose model must never be asked for."""

    def configure_model(self) -> None:
        raise AssertionError("the model was loaded")


class UnloadedClassifier(SequenceClassifier):
    def configure_model(self) -> None:
        raise AssertionError("the model was loaded")


def refusal(module, data) -> str:
    trainer = pl.Trainer(accelerator="cpu", max_epochs=1, logger=False, enable_progress_bar=False)
    with pytest.raises(ConfigError) as caught:
        trainer.fit(module, datamodule=data)
    return str(caught.value)


def ready(base: str, path: str, **options) -> TextDataModule:
    data = TextDataModule(path, base=base, **{"kind": "prompt", **options})
    data.setup("fit")
    return data


@pytest.fixture
def path(tmp_path) -> str:
    return files.jsonl(tmp_path / "a.jsonl", files.prompts(40))


def test_a_split_is_the_same_in_every_run_and_leaves_nothing_out(llama, path):
    train, val = (ready(llama, path, val_split=0.2).examples(name) for name in ("train", "val"))
    assert (len(train), len(val)) == (32, 8)
    assert sorted([*train.indices, *val.indices]) == list(range(40))
    assert torch.equal(ready(llama, path, val_split=0.2).examples("val").indices, val.indices)
    assert not torch.equal(ready(llama, path, val_split=0.2, seed=1).examples("val").indices, val.indices)
    assert len(ready(llama, path, val_split=1e-9).examples("val")) == 1
    whole = ready(llama, path, val_split=0)
    assert len(whole.examples("train")) == 40
    assert whole.val_dataloader() == []
    both = ready(llama, path, val=path)
    assert len(both.examples("train")) == len(both.examples("val")) == 40


def test_tokens_are_made_once_for_what_they_depend_on(llama, path, tmp_path, monkeypatch):
    def cached() -> set[str]:
        return {p.parent.name for p in (tmp_path / "cache").rglob("store.json")}

    ready(llama, path)
    before = cached()
    assert len(before) == 1
    monkeypatch.setattr("lightning_lora.recipes.sources.Encoder", None)  # from the cache, or not at all
    assert len(ready(llama, path).stores["train"]) == 40
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    ready(llama, path, max_length=32)
    ready(llama, path, prompt_template="{prompt} =>")
    with Path(path).open("a") as file:
        file.write(json.dumps(files.prompts(1)[0]) + "\n")
    assert len(ready(llama, path).stores["train"]) == 41
    assert len(cached()) == 4


@pytest.mark.parametrize("name", ["labels.values", "input_ids.ends", "store.json"])
@pytest.mark.parametrize("change", ["cut", "emptied", "gone"])
def test_damaged_tokens_are_made_again(name, change, llama, path, tmp_path):
    before = [example["labels"].tolist() for example in ready(llama, path).stores["train"]]
    (file,) = (tmp_path / "cache").rglob(name)
    content = file.read_bytes()
    if change == "gone":
        file.unlink()
    else:
        file.write_bytes(content[:-4] if change == "cut" else b"")
    again = ready(llama, path).stores["train"]
    assert [example["labels"].tolist() for example in again] == before
    assert file.read_bytes() == content
    assert [*file.parent.parent.iterdir()] == [file.parent]


def test_each_epoch_has_an_order_of_its_own_and_each_device_its_part(llama, path):
    loader = ready(llama, path, val_split=0).train_dataloader()
    orders = []
    for epoch in (0, 1):
        loader.sampler.set_epoch(epoch)
        orders.append(list(loader.sampler))
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(40))
    for devices in (2, 3):  # as torch has it, some twice where they can't be shared out
        samplers = [cls(range(40), devices, rank, seed=5) for rank in range(devices) for cls in CLASSES]
        own = [list(sampler) for sampler in samplers]
        assert own[::2] == own[1::2]
        assert {*range(40)} == {index for part in own for index in part}
    before = torch.get_rng_state()
    next(iter(loader))
    assert torch.equal(torch.get_rng_state(), before)


def test_workers_share_the_batches_of_one(llama, path):
    """In the same order, none twice, and none left out, of files that each worker maps."""
    loaders = [ready(llama, path, num_workers=n, batch_size=3).train_dataloader() for n in (0, 2)]
    batches = [[batch["input_ids"].tolist() for batch in loader] for loader in loaders]
    assert batches[0] == batches[1]
    assert len({str(row) for batch in batches[1] for row in batch}) == 38


def test_without_torchdata_a_warning_says_what_is_lost(llama, path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torchdata.stateful_dataloader", None)
    with pytest.warns(UserWarning, match=r"will not go on with the next batch: pip install 'lightning-lora\[data\]'"):
        loader = ready(llama, path).train_dataloader()
    assert len(list(loader)) == 5


def test_batches_are_padded_and_masked(llama, path):
    batch = next(iter(ready(llama, path, batch_size=8).train_dataloader()))
    lengths = batch["attention_mask"].sum(1)
    assert len(lengths.unique()) > 1
    assert all((row[n:] == 0).all() for row, n in zip(batch["input_ids"], lengths, strict=True))
    assert all((row[n:] == -100).all() for row, n in zip(batch["labels"], lengths, strict=True))


def test_everything_wrong_with_the_arguments_is_told_at_once():
    with pytest.raises(ConfigError, match="5 problems") as caught:
        TextDataModule(overlong="cut", batch_size=0, val_split=1, max_length=-1)
    assert [p.split()[0] for p in caught.value.problems] == ["overlong", "batch_size", "max_length", "val_split", "no"]
    with pytest.raises(ConfigError, match=r"labels must differ from each other"):
        TextDataModule("a.jsonl", labels=["a", "a"])
    with pytest.raises(ConfigError, match=r"labels must differ from each other"):
        SequenceClassifier("demo", labels=["1", "1.0"])


def test_files_are_refused_before_the_model_is_loaded(llama, bert, tmp_path):
    path = tmp_path / "a.jsonl"
    assert "does not exist" in refusal(Unloaded(llama), TextDataModule(str(path)))
    path.write_text('{"prompt": "a", "response": "b"}\n{"prompt": "a"\n')
    assert f"{path}:2: broken JSON" in refusal(Unloaded(llama), TextDataModule(str(path)))
    files.jsonl(path, [{"question": "a", "answer": "b"}])
    said = refusal(Unloaded(llama), TextDataModule(str(path)))
    assert "Unloaded needs messages or prompt and response or text: name them: columns={prompt: question, " in said
    files.jsonl(path, files.prompts())
    said = refusal(Unloaded(llama), TextDataModule(str(path), max_length=4))
    assert said.endswith("nothing is left of 24 examples within 4 tokens: raise data.max_length, or shorten them")
    files.jsonl(path, files.conversations())
    template = "{% for m in messages %}{{ m.content }}{% generation %}{% endgeneration %}{% endfor %}"
    marking = shutil.copytree(llama, tmp_path / "marking")
    (marking / "chat_template.jinja").write_text(template)
    said = refusal(Unloaded(str(marking)), TextDataModule(str(path)))
    assert "raise data.max_length, or shorten them (or {% generation %} in the chat template marks nothing)" in said
    assert "max_length=512, but" in refusal(Unloaded(llama), TextDataModule(str(path), max_length=512))
    assert "pad_token 'PAD' is none of the tokens" in refusal(
        Unloaded(llama), TextDataModule(str(path), pad_token="PAD")
    )
    files.jsonl(path, [{"text": "x", "label": "a"}] * 3)
    said = refusal(UnloadedClassifier(bert), TextDataModule(str(path)))
    assert "has one class only ('a'): there is nothing to tell apart" in said
    files.jsonl(path, [*files.classes(), {"text": "x", "label": "omega"}])
    said = refusal(UnloadedClassifier(bert, labels=["alpha", "beta", "gamma"]), TextDataModule(str(path)))
    assert f"{path}:25: 'label' is 'omega', which is none of the 3 classes alpha, beta, gamma" in said
    val = files.jsonl(tmp_path / "val.jsonl", [{"text": "x", "label": "omega"}])
    train = files.jsonl(tmp_path / "train.jsonl", files.classes())
    assert f"{val}:1: 'label' is 'omega'" in refusal(UnloadedClassifier(bert), TextDataModule(train, val=val))


def test_models_are_refused_before_they_are_loaded(llama, path, tmp_path):
    assert "no model 'no/where': neither" in refusal(Unloaded("no/where"), TextDataModule(path))
    assert "is no model: it has no config.json" in refusal(Unloaded(str(tmp_path)), TextDataModule(path))
    mixed = tmp_path / "mixed"
    files.llama(mixed)
    (mixed / "config.json").write_text(
        (mixed / "config.json").read_text().replace('"vocab_size": 320', '"vocab_size": 300')
    )
    said = refusal(Unloaded(str(mixed)), TextDataModule(path))
    assert "has 320 tokens, the model 300: they don't belong together" in said
    for file in mixed.glob("tokenizer*"):
        file.unlink()
    assert "no tokenizer in" in refusal(Unloaded(str(mixed)), TextDataModule(path))
    said = refusal(Lit(), TextDataModule(path))
    assert "the module is no recipe: say base" in said


def test_a_template_has_a_column():
    with pytest.raises(ConfigError, match=r"prompt_template must name a column in braces, like {prompt}: got 'Say it'"):
        TextDataModule("a.jsonl", prompt_template="Say it")


def test_a_template_of_prompts_where_there_are_none(llama, bert, tmp_path):
    """What is predicted would be put as nothing was that was learnt."""
    kinds = ((llama, "messages", files.conversations()), (llama, "text", [{"text": "one two"}] * 4))
    for base, kind, rows in (*kinds, (bert, "classification", files.classes())):
        path = files.jsonl(tmp_path / f"{kind}.jsonl", rows)
        data = TextDataModule(path, base=base, kind=kind, prompt_template="Question: {prompt}")
        with pytest.raises(ConfigError, match="prompt_template says how a prompt is put, and .*: leave data.prompt_t"):
            data.setup("fit")


def test_a_test_reads_the_file_of_the_test_alone(bert, tmp_path):
    path = files.jsonl(tmp_path / "a.jsonl", files.classes())
    data = TextDataModule("gone.jsonl", test=path, base=bert, kind="classification", labels=["alpha", "beta", "gamma"])
    data.setup("test")
    assert [*data.stores] == ["test"]
    with pytest.raises(ConfigError, match=r"gone\.jsonl does not exist"):
        data.setup("fit")


def test_packing_is_not_for_an_encoder(t5, tmp_path):
    """Its examples would see each other, and responses would lose their first tokens."""
    path = files.jsonl(tmp_path / "a.jsonl", files.prompts())
    said = refusal(Seq2SeqLM(t5), TextDataModule(path, packing=True, max_length=64))
    assert "packing is for causal language models: leave data.packing out" in said


def test_packing_is_for_causal_models(bert, tmp_path):
    path = files.jsonl(tmp_path / "a.jsonl", files.classes())
    data = TextDataModule(path, base=bert, kind="classification", packing=True)
    with pytest.raises(ConfigError, match="packing is for causal language models"):
        data.setup("fit")


def test_rows_are_packed_whatever_was_asked_for_before(llama, path):
    data = ready(llama, path, packing=True, max_length=64)
    assert len(data.examples("val")) == 2
    assert isinstance(data.examples("train"), Packed)


@pytest.mark.parametrize(
    ("stage", "sources", "message"),
    [
        ("predict", {"train": "a.jsonl"}, "predict needs a file: give data.predict"),
        ("fit", {"val": "a.jsonl"}, "fit needs a file: give data.train"),
        ("validate", {"predict": "a.jsonl"}, "validate has nothing to measure: give data.val, or data.train with"),
        ("validate", {"train": "a.jsonl", "val_split": 0}, "validate has nothing to measure: give data.val, or"),
        ("test", {"train": "a.jsonl", "val_split": 0}, "test has nothing to measure: give data.test, give data.val"),
    ],
)
def test_a_stage_that_would_do_nothing_is_refused(stage, sources, message, llama, path):
    trainer = pl.Trainer(accelerator="cpu", max_epochs=1, logger=False)
    with pytest.raises(ConfigError, match=message):
        getattr(trainer, stage)(Unloaded(llama), datamodule=TextDataModule(**sources))


@pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero:UserWarning")
@pytest.mark.parametrize(("split", "limit"), [(0, 1.0), (0.2, 0)])
def test_callbacks_that_would_wait_for_a_validation_are_refused(split, limit, llama, path):
    callbacks = [EarlyStopping("val/loss"), ModelCheckpoint(monitor="val/loss"), ModelCheckpoint(filename="last")]
    options = {"accelerator": "cpu", "max_steps": 1, "logger": False, "enable_progress_bar": False}
    trainer = pl.Trainer(callbacks=callbacks, limit_val_batches=limit, **options)
    said = "nothing is measured while this run trains, and EarlyStopping .val/loss., ModelCheckpoint .val/loss. would"
    with pytest.raises(ConfigError, match=said):
        trainer.fit(Unloaded(llama), datamodule=TextDataModule(path, val_split=split))
    trainer = pl.Trainer(callbacks=[ll.LoRA(r=2), callbacks[-1]], limit_val_batches=limit, **options)
    trainer.fit(CausalLM(llama), datamodule=TextDataModule(path, val_split=split))


@pytest.mark.parametrize(
    ("options", "measures"),
    [
        ({"max_steps": 2}, False),
        ({"max_steps": 3}, True),
        ({"max_steps": 4, "check_val_every_n_epoch": 2}, False),
        ({"max_epochs": 1, "check_val_every_n_epoch": 2}, False),
        ({"max_steps": 1, "val_check_interval": 0.5}, False),
        ({"max_steps": 2, "val_check_interval": 0.5}, True),
        ({"max_steps": 1, "val_check_interval": 8, "check_val_every_n_epoch": None}, False),
        ({"max_steps": 1, "limit_train_batches": 2}, True),
    ],
)
def test_a_run_that_ends_before_it_is_measured_is_refused(options, measures, llama, tmp_path):
    """Of 6 batches, 3 steps an epoch: EarlyStopping ends one that was never measured with an error, behind its last step."""
    path = files.jsonl(tmp_path / "b.jsonl", files.prompts(30))
    module, data = CausalLM(llama), TextDataModule(path, val_split=0.2, batch_size=4)
    silent = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    options = {"accelerator": "cpu", "accumulate_grad_batches": 2, "num_sanity_val_steps": 0, **silent, **options}
    trainer = pl.Trainer(callbacks=[ll.LoRA(r=2), EarlyStopping("val/loss")], **options)
    if measures:
        trainer.fit(module, datamodule=data)
        assert "val/loss" in trainer.callback_metrics
    else:
        with pytest.raises(ConfigError, match=r"nothing is measured .* raise trainer.max_steps or max_epochs, or"):
            trainer.fit(module, datamodule=data)


@pytest.mark.parametrize("name", ["val", "test"])
def test_held_out_examples_that_are_trained_on_are_told(name, llama, tmp_path):
    path, other = (files.jsonl(tmp_path / f"{i}.jsonl", files.prompts(8)[i:]) for i in range(2))
    copy = shutil.copy(path, tmp_path / "copy.jsonl")
    stage = {"val": "fit", "test": "test"}[name]
    with pytest.warns(UserWarning, match=f"data.{name} has the examples of data.train: what is measured"):
        TextDataModule(path, **{name: str(copy)}, base=llama, kind="prompt").setup(stage)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TextDataModule(path, **{name: other}, base=llama, kind="prompt").setup(stage)


@pytest.mark.parametrize(
    ("labels", "expected", "numbers"),
    [
        ([10, 2, 1], ["1", "2", "10"], [2, 1, 0]),
        ([1, "-1", 0], ["-1", "0", "1"], [2, 0, 1]),
        ([1, 1.0, "1.0", "0.0", 0], ["0", "1"], [1, 1, 1, 0, 0]),
        (["²", "1", "01"], ["01", "1", "²"], [2, 1, 0]),
        ([0.5, "1.5", 10], ["0.5", "1.5", "10"], [0, 1, 2]),
        ([True, False, True], ["false", "true"], [1, 0, 1]),
    ],
)
def test_numbers_as_classes_keep_their_order(labels, expected, numbers, bert, tmp_path):
    path = files.jsonl(tmp_path / "a.jsonl", [{"text": "x", "label": label} for label in labels])
    data = TextDataModule(path, base=bert, kind="classification", val_split=0)
    data.setup("fit")
    assert data.labels == expected
    assert [int(example["label"]) for example in data.stores["train"]] == numbers
    again = TextDataModule(path, base=bert, kind="classification", val_split=0, labels=[*reversed(expected)])
    again.setup("fit")
    last = len(expected) - 1
    assert [int(example["label"]) for example in again.stores["train"]] == [last - number for number in numbers]


def test_classes_in_another_order_are_refused(bert, tmp_path):
    """Of the data, or of a checkpoint: a classifier's outputs would stand for other ones."""
    path, names = files.jsonl(tmp_path / "a.jsonl", files.classes()), ["alpha", "beta", "gamma"]
    said = refusal(UnloadedClassifier(bert, labels=names), TextDataModule(path, labels=names[::-1]))
    assert "data.labels are gamma, beta, alpha and model.labels alpha, beta, gamma: the order numbers" in said
    said = refusal(UnloadedClassifier(bert, regression=True), TextDataModule(path, labels=names))
    with pytest.raises(ll.ConfigError, match=r"these examples have no classes, got data\.labels=\['alpha'"):
        TextDataModule(path, base=bert, kind="text", labels=names).setup("fit")
    yes = files.jsonl(tmp_path / "yes.jsonl", [{"text": "x", "label": True}])
    assert "the label is True: regression needs numbers" in refusal(
        UnloadedClassifier(bert, regression=True), TextDataModule(yes, val_split=0)
    )
    assert "regression has no classes, got data.labels=['alpha', 'beta', 'gamma']: leave them out" in said
    data = TextDataModule(path, val=path, batch_size=12)
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(max_steps=1, callbacks=[ll.LoRA(r=2)], **options)
    trainer.fit(SequenceClassifier(bert), datamodule=data)
    trainer.save_checkpoint("a.ckpt")
    with pytest.raises(ConfigError, match="model.labels gamma, beta, alpha"):
        trainer.validate(SequenceClassifier(bert, labels=names[::-1]), datamodule=data)
    other = pl.Trainer(callbacks=[ll.LoRA(r=2)], **options)
    with pytest.raises(ll.CheckpointError, match="the checkpoint's classes are alpha, beta, gamma, and here gamma"):
        other.validate(
            SequenceClassifier(bert, labels=names[::-1]), datamodule=TextDataModule(val=path), ckpt_path="a.ckpt"
        )


def test_a_data_module_is_read_anew_for_another_recipe(llama, bert, tmp_path):
    """Another model has other tokens, and other classes."""
    path = files.jsonl(
        tmp_path / "a.jsonl", [{**p, **c} for p, c in zip(files.prompts(), files.classes(), strict=True)]
    )
    data = TextDataModule(path, val_split=0.25, batch_size=4)
    trainer = functools.partial(pl.Trainer, accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False)
    for module in (SequenceClassifier(bert), CausalLM(llama), SequenceClassifier(bert)):
        trainer(enable_progress_bar=False, limit_val_batches=0, callbacks=[ll.LoRA(r=2)]).fit(module, datamodule=data)
        assert data.tokenizer.get_vocab() == module.tokenizer.get_vocab()
        assert ("labels" in data.stores["train"].fields) == isinstance(module, CausalLM)
        assert (data.labels is None) == isinstance(module, CausalLM)


def test_evaluation_may_have_batches_of_its_own_size(llama, path):
    def sizes(**options):
        data = ready(llama, path, batch_size=8, val_split=0.2, **options)
        return [len(next(iter(loader))["input_ids"]) for loader in (data.train_dataloader(), data.val_dataloader())]

    assert sizes() == [8, 8]
    assert sizes(eval_batch_size=3) == [8, 3]
    with pytest.raises(ConfigError, match="eval_batch_size must be a positive integer, got 0"):
        TextDataModule("a.jsonl", eval_batch_size=0)


def test_one_example_is_trained_on_and_not_held_out(llama, tmp_path):
    data = ready(llama, files.jsonl(tmp_path / "one.jsonl", files.prompts(1)), val_split=0.9)
    assert len(data.examples("train")) == 1
    assert data.val_dataloader() == []


def test_tokens_are_kept_where_it_is_said(llama, path, tmp_path):
    ready(llama, path, cache_dir=str(tmp_path / "own"))
    assert len([*(tmp_path / "own").rglob("store.json")]) == 1
    assert not (tmp_path / "cache").exists()


def test_how_long_an_example_may_be_where_nobody_says():
    """As long as both model and tokenizer allow, and never as long as a model that sees a book."""
    tokenizer, config = files.make_tokenizer(), files.tf.LlamaConfig(max_position_embeddings=256)
    assert context_of(config, tokenizer) == 256
    tokenizer.model_max_length = 128
    assert context_of(config, tokenizer) == 128
    tokenizer.model_max_length = int(1e30)  # of a tokenizer that does not know
    assert context_of(config, tokenizer) == 256
    assert [check_length(None, context, "base") for context in (128, 131_072, None)] == [128, 2048, 2048]
    assert check_length(4096, 131_072, "base") == check_length(4096, None, "base") == 4096
