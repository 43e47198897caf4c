"""Each recipe trains in a real Trainer, is saved, comes back, and predicts; a broken-off epoch goes on bit for bit."""

import json
import math
import shutil

import lightning.pytorch as pl
import pytest
import torch
import transformers as tf
from lightning.pytorch.loggers import CSVLogger
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics.text import Perplexity, ROUGEScore, SacreBLEUScore

import lightning_lora as ll
from lightning_lora.recipes import DPO, CausalLM, Seq2SeqLM, SequenceClassifier, TextDataModule, dpo_loss
from lightning_lora.recipes.building import built, loaded
from lightning_lora.recipes.sharded import open_files
from tests.recipes import files

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*ckpt_path=.*:UserWarning", "ignore:Metric `SpearmanCorrcoef` will save:UserWarning"
)


def fit(module, data, steps: int = 12, lora=True, **options):
    ckpt_path = options.pop("ckpt_path", None)
    callbacks = [ll.LoRA(r=4, lora_alpha=8, lora_dropout=options.pop("dropout", 0.0))] if lora else []
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        callbacks=[*callbacks, *options.pop("callbacks", [])],
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        **{"logger": CSVLogger("logs"), **options},
    )
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return trainer


def assert_falls(values: list[float], by: float = 0.1) -> None:
    third = len(values) // 3
    assert sum(values[-third:]) < (1 - by) * sum(values[:third])


class Kept(CSVLogger):
    """Keeps all rows in memory too."""

    def __init__(self) -> None:
        super().__init__("logs")
        self.rows: list[dict] = []

    def log_metrics(self, metrics, step=None):
        self.rows.append(metrics)
        super().log_metrics(metrics, step)

    def losses(self) -> list[float]:
        return [row["train/loss"] for row in self.rows if "train/loss" in row]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("prompts", {}),
        ("prompts", {"packing": True, "max_length": 64, "batch_size": 2}),
        ("conversations", {}),
        ("text", {"max_length": 32}),
    ],
)
def test_causal_lm(kind, options, llama, chat_llama, tmp_path):
    records = [{"text": "Now and again. " * 12}] * 6 if kind == "text" else getattr(files, kind)()
    path, logger = files.jsonl(tmp_path / "a.jsonl", records), Kept()
    module = CausalLM(chat_llama if kind == "conversations" else llama, lr=0.03, compare_base=True, max_new_tokens=4)
    trainer = fit(module, TextDataModule(path, **{"batch_size": 4, "val_split": 0.2, **options}), logger=logger)
    assert_falls(logger.losses())
    found = trainer.callback_metrics
    assert found["val/loss"] < found["val_base/loss"]
    assert found["val/perplexity"] == pytest.approx(math.exp(found["val/loss"]), rel=1e-5)
    assert 0 <= found["val/token_accuracy"] <= 1

    again = ll.load_from_checkpoint(CausalLM, trainer.checkpoint_callback.best_model_path)
    assert isinstance(again.model, tf.LlamaForCausalLM)
    ids = torch.arange(3, 12)[None]
    torch.testing.assert_close(again.model(ids).logits, module.model.eval()(ids).logits, rtol=0, atol=0)
    (made,) = trainer.predict(module, datamodule=TextDataModule(predict=path, batch_size=len(records)))
    assert len(made) == len(records)
    assert all(set(row) == {"prompt", "prediction"} for row in made)


def test_perplexity_is_torchmetrics_own(llama, tmp_path):
    path = files.jsonl(tmp_path / "a.jsonl", files.prompts())
    module, data = CausalLM(llama), TextDataModule(path, val=path, batch_size=5)
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    (found,) = trainer.validate(module, datamodule=data, verbose=False)
    metric, hits, count = Perplexity(ignore_index=-100), 0, 0
    for batch in data.val_dataloader():
        logits = module.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.detach()
        labels = batch["labels"][:, 1:]
        metric.update(logits[:, :-1], labels)
        hits += int((logits[:, :-1].argmax(-1) == labels).sum())
        count += int((labels != -100).sum())
    assert found["val/perplexity"] == pytest.approx(float(metric.compute()), rel=1e-5)
    assert found["val/token_accuracy"] == pytest.approx(hits / count)


@pytest.mark.parametrize(("packing", "workers"), [(False, 0), (False, 1), (True, 0)])
def test_a_broken_off_epoch_goes_on_bit_for_bit(workers, packing, llama, tmp_path):
    """With dropout, shuffling a scheduler, and epochs that are counted: on from within the second one, in another Trainer."""
    path = files.jsonl(tmp_path / "a.jsonl", files.prompts(60 if packing else 24))
    options = {"packing": packing, "max_length": 64, "batch_size": 2 if packing else 4, "val_split": 0.2}

    def run(steps: int, workers: int = workers, **more):
        pl.seed_everything(3, verbose=False)
        logger, module = Kept(), CausalLM(llama, lr=0.01, schedule="constant")
        saver = pl.callbacks.ModelCheckpoint(dirpath=tmp_path / "saved", every_n_train_steps=8, save_top_k=-1)
        data = TextDataModule(path, num_workers=workers, **options)
        more |= {"callbacks": [saver], "limit_val_batches": 0, "limit_train_batches": 5, "max_epochs": 3}
        fit(module, data, steps, logger=logger, dropout=0.2, **more)
        return logger.losses(), {k: v.clone() for k, v in ll.adapter_state_dict(module).items()}

    whole, expected = run(13)
    if workers:
        assert whole == run(13, workers=0)[0]
    assert len(set(whole)) == 13
    first, _ = run(8)
    assert first == whole[:8]
    (saved,) = (tmp_path / "saved").glob("*step=8.ckpt")
    rest, found = run(13, ckpt_path=str(saved))
    assert rest == whole[8:]
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_sequence_classifier(bert, tmp_path):
    path, logger = files.jsonl(tmp_path / "a.jsonl", files.classes()), Kept()
    module = SequenceClassifier(bert, lr=0.01, compare_base=True)
    trainer = fit(module, TextDataModule(path, val=path, batch_size=8), 48, logger=logger)
    assert_falls(logger.losses())
    found = trainer.callback_metrics
    assert found["val/accuracy"] > found["val_base/accuracy"]
    assert {"val/macro_f1", "val/mcc", "val/loss"} <= found.keys()
    assert module.model.config.id2label == {0: "alpha", 1: "beta", 2: "gamma"}

    again = ll.load_from_checkpoint(SequenceClassifier, trainer.checkpoint_callback.best_model_path)
    assert again.labels == ["alpha", "beta", "gamma"]
    (made,) = trainer.predict(again, datamodule=TextDataModule(predict=path, batch_size=24))
    right = sum(row["prediction"] == record["label"] for row, record in zip(made, files.classes(), strict=True))
    assert right / 24 == pytest.approx(float(found["val/accuracy"]))


def test_classes_that_nobody_names_are_asked_for(bert):
    """Neither the recipe, nor the data."""
    fitter = pl.Trainer(max_steps=1, callbacks=[ll.LoRA(r=2)], accelerator="cpu", logger=False)
    with pytest.raises(ll.ConfigError, match="the classes are not known: give labels, or a TextDataModule"):
        fitter.fit(SequenceClassifier(bert), DataLoader([{}]))


def test_a_run_without_an_end_has_no_schedule(llama, tmp_path):
    path = files.jsonl(tmp_path / "a.jsonl", files.prompts())
    with pytest.raises(ll.ConfigError, match=r"the run has no end: give trainer.max_epochs or trainer.max_steps"):
        fit(CausalLM(llama), TextDataModule(path, batch_size=4), -1, max_epochs=-1)


def with_a_head(folder, labels):
    torch.manual_seed(0)
    sizes = {**files.SIZES, **files.IDS, **files.STRONG, "vocab_size": 320, "max_position_embeddings": 256}
    model = tf.BertForSequenceClassification(tf.BertConfig(**sizes, num_labels=labels))
    return files.saved(folder, model, files.make_tokenizer("bert")), model


@pytest.mark.parametrize("labels", [2, 3])
def test_a_base_that_has_a_head(labels, tmp_path):
    """One of another size is left, and a new one made; the rest of the base, and one of this size, are as they were."""
    path = files.jsonl(tmp_path / "a.jsonl", files.classes())
    base, before = with_a_head(tmp_path / "m", labels)
    module = SequenceClassifier(base, lr=0.01)
    trainer = fit(module, TextDataModule(path, val=path, batch_size=8), 3)
    assert module.model.classifier.weight.shape == (3, 32)
    own = module.model.state_dict()
    assert all(torch.equal(own[key], value) for key, value in before.bert.state_dict(prefix="bert.").items())
    again = ll.load_from_checkpoint(SequenceClassifier, trainer.checkpoint_callback.best_model_path)
    torch.testing.assert_close(again.model.classifier.weight, module.model.classifier.weight)
    drift = (module.model.classifier.weight - before.classifier.weight).abs().max() if labels == 3 else 0.0
    assert drift < 0.05


def test_a_base_that_is_not_what_its_configuration_says(tmp_path):
    path = files.jsonl(tmp_path / "a.jsonl", files.classes())
    base, _ = with_a_head(tmp_path / "m", 3)
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({**config, "vocab_size": 330}))
    with pytest.raises(ll.ConfigError, match=r"bert.embeddings.word_embeddings.weight: of another shape in its files"):
        fit(SequenceClassifier(base), TextDataModule(path, val=path))
    llama = files.llama(tmp_path / "l")
    config = json.loads((tmp_path / "l" / "config.json").read_text())
    (tmp_path / "l" / "config.json").write_text(json.dumps({**config, "vocab_size": 330}))
    with pytest.raises(ll.ConfigError, match="l can't be loaded as AutoModelForCausalLM"):
        fit(CausalLM(llama), TextDataModule(files.jsonl(tmp_path / "b.jsonl", files.prompts())))


def test_regression(bert, tmp_path):
    records = [{"text": f"about {files.WORDS[i % 4]}", "label": i % 4 - 1.5} for i in range(24)]
    path, logger = files.jsonl(tmp_path / "a.jsonl", records), Kept()
    module = SequenceClassifier(bert, regression=True, lr=0.01)
    trainer = fit(module, TextDataModule(path, val=path, batch_size=8), 36, logger=logger)
    assert_falls(logger.losses(), 0.2)
    assert trainer.callback_metrics["val/pearson"] > 0.5
    assert {"val/mae", "val/spearman"} <= trainer.callback_metrics.keys()
    (made,) = trainer.predict(module, datamodule=TextDataModule(predict=path, batch_size=24))
    assert isinstance(made[0]["prediction"], float)


@pytest.mark.parametrize("case", ["a layer", "lm_head", "pooler", "mean"])
def test_a_base_whose_files_lack_weights(case, llama, bert, tmp_path):
    """They would be random and frozen, in no checkpoint: each load would give another model."""
    classifies = case in ("pooler", "mean")
    folder = shutil.copytree(bert if classifies else llama, tmp_path / "m")
    lacks = {"a layer": "layers.1.mlp"}.get(case, "pooler" if classifies else case)
    weights = load_file(folder / "model.safetensors")
    kept = {key: value for key, value in weights.items() if lacks not in key}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    path = files.jsonl(tmp_path / "a.jsonl", files.classes() if classifies else files.prompts())
    options = {"pooling": "mean"} if case == "mean" else {}
    module = (SequenceClassifier if classifies else CausalLM)(str(folder), **options)
    if case == "mean":  # which runs no pooler
        assert fit(module, TextDataModule(path, val=path), 1).global_step == 1
        return
    said = rf"{lacks}.*: in none of its files, .* random.* give another base"
    with pytest.raises(ll.ConfigError, match=said):
        fit(module, TextDataModule(path, val=path), 1)
    if not classifies:  # as ranks read it that hold parts
        with pytest.raises(ll.ConfigError, match=said):
            built(module, open_files(str(folder))) or loaded(module)


def test_a_decoder_as_classifier_needs_a_pad_token(tmp_path):
    """Without one a decoder could not tell where a text ends: refused; by name it works."""
    folder = files.llama(tmp_path / "m")
    settings = json.loads((tmp_path / "m" / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    (tmp_path / "m" / "tokenizer_config.json").write_text(json.dumps(settings))
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({**config, "pad_token_id": None}))
    path = files.jsonl(tmp_path / "a.jsonl", files.classes())
    with pytest.raises(ll.ConfigError, match=r"has no pad_token, which SequenceClassifier needs .*data.pad_token"):
        fit(SequenceClassifier(folder), TextDataModule(path, val=path))
    trainer = fit(SequenceClassifier(folder, lr=0.03), TextDataModule(path, val=path, pad_token="<unk>"), 3)
    assert trainer.global_step == 3


def test_seq2seq(t5, tmp_path):
    path, logger = files.jsonl(tmp_path / "a.jsonl", files.prompts()), Kept()
    module = Seq2SeqLM(t5, lr=0.03, max_new_tokens=4)
    trainer = fit(module, TextDataModule(path, batch_size=8, val_split=0.2), 18, logger=logger)
    assert_falls(logger.losses())
    assert {"val/loss", "val/rouge1", "val/rouge2", "val/rougeL", "val/bleu"} <= trainer.callback_metrics.keys()
    (made,) = trainer.predict(module, datamodule=TextDataModule(predict=path, batch_size=24))
    assert made[1]["prompt"] == "Say beta 1."
    again = ll.load_from_checkpoint(Seq2SeqLM, trainer.checkpoint_callback.best_model_path)
    assert isinstance(again.model, tf.T5ForConditionalGeneration)
    (repeated,) = trainer.predict(again, datamodule=TextDataModule(predict=path, batch_size=24))
    assert repeated == made


def test_the_dpo_loss_is_equation_7():
    chosen, rejected, ref_chosen, ref_rejected = torch.randn(4, 5, dtype=torch.float64) * 3
    ratio = (chosen.exp() / ref_chosen.exp()).log() - (rejected.exp() / ref_rejected.exp()).log()
    expected = -torch.log(1 / (1 + torch.exp(-0.3 * ratio)))
    torch.testing.assert_close(dpo_loss(chosen, rejected, ref_chosen, ref_rejected, 0.3), expected)


def test_dpo(llama, tmp_path):
    path, logger = files.jsonl(tmp_path / "a.jsonl", files.preferences()), Kept()
    module = DPO(llama, lr=0.03, beta=0.5)
    trainer = fit(module, TextDataModule(path, batch_size=8, val_split=0.2), 18, logger=logger)
    assert logger.losses()[0] == pytest.approx(math.log(2), rel=1e-5)  # the policy starts as its reference
    assert_falls(logger.losses())
    assert trainer.callback_metrics["val/accuracy"] > 0.5
    assert trainer.callback_metrics["val/margin"] > 0


def test_dpos_reference_is_the_base_alone(llama, tmp_path):
    """In float64, beside a second model that has never seen an adapter."""
    path = files.jsonl(tmp_path / "a.jsonl", files.preferences(4))
    module, data = DPO(llama, dtype="float64", beta=0.5), TextDataModule(path, val=path, batch_size=4)
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    trainer.validate(module, datamodule=data, verbose=False)
    ll.inject(module, ll.LoRAConfig(r=4, lora_alpha=8))
    for name, parameter in module.named_parameters():
        if name.endswith(".B"):
            torch.nn.init.normal_(parameter, std=0.2)
    batch, base = next(iter(data.val_dataloader())), tf.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float64)

    def sums(model, prefix):
        ids, labels = batch[f"{prefix}input_ids"], batch[f"{prefix}labels"]
        logits = model(input_ids=ids, attention_mask=batch[f"{prefix}attention_mask"]).logits
        found = logits.log_softmax(-1)[:, :-1].gather(2, labels[:, 1:].clamp(min=0)[..., None]).squeeze(2)
        return (found * (labels[:, 1:] != -100)).sum(1)

    policy, reference = ([sums(model, prefix) for prefix in ("", "rejected_")] for model in (module.model, base))
    logits = 0.5 * ((policy[0] - reference[0]) - (policy[1] - reference[1]))
    loss, told = module.loss(batch)
    torch.testing.assert_close(loss, -torch.nn.functional.logsigmoid(logits).mean(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(told["accuracy"], (logits > 0).double().mean())


def test_dpo_without_adapters_has_no_reference(llama, tmp_path):
    path = files.jsonl(tmp_path / "a.jsonl", files.preferences())
    with pytest.raises(ll.ConfigError, match=r"DPO: the reference is the model without its adapters.*add ll.LoRA"):
        fit(DPO(llama), TextDataModule(path), lora=False)


def test_dpo_has_no_base_to_compare_with(llama):
    """The base is the reference: what was asked for would be silently left out."""
    with pytest.raises(ll.ConfigError, match=r"DPO: compare_base=True would tell nothing: .*: leave compare_base out"):
        DPO(llama, compare_base=True)


def test_options_of_the_model(llama, tmp_path):
    path = files.jsonl(tmp_path / "a.jsonl", files.prompts())
    module = CausalLM(
        llama,
        dtype="bfloat16",
        attn_implementation="eager",
        gradient_checkpointing=True,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.5),
    )
    trainer = fit(module, TextDataModule(path, batch_size=4), 2)
    assert module.model.dtype is torch.bfloat16
    assert module.model.config._attn_implementation == "eager"
    assert module.model.is_activation_checkpointing
    assert isinstance(trainer.optimizers[0], torch.optim.SGD)


def test_the_default_optimizer_is_one_kernel_with_warmup(llama, tmp_path):
    path = files.jsonl(tmp_path / "a.jsonl", files.prompts())
    rates = []

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer, *args):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    trainer = fit(CausalLM(llama, lr=0.1, warmup=0.2), TextDataModule(path, batch_size=2), 10, callbacks=[Watch()])
    (optimizer,) = trainer.optimizers
    assert optimizer.defaults["fused"]
    assert rates[:3] == pytest.approx([0, 0.05, 0.1])
    assert rates[3:] == sorted(rates[3:], reverse=True)


def test_a_head_on_the_mean_of_all_tokens(bert, tmp_path):
    """The head is found, trained in full, saved, and comes back; padding does not count."""
    path, logger = files.jsonl(tmp_path / "a.jsonl", files.classes()), Kept()
    module = SequenceClassifier(bert, pooling="mean", lr=0.03)
    trainer = fit(module, TextDataModule(path, val=path, batch_size=8), 18, logger=logger)
    assert_falls(logger.losses())
    again = ll.load_from_checkpoint(SequenceClassifier, trainer.checkpoint_callback.best_model_path).eval()
    batch = next(iter(trainer.datamodule.val_dataloader()))
    row = {key: value[:1, : int(batch["attention_mask"][0].sum())] for key, value in batch.items() if key != "labels"}
    with torch.no_grad():
        torch.testing.assert_close(again.outputs(batch), module.eval().outputs(batch))
        torch.testing.assert_close(again.outputs(batch)[:1], again.outputs(row), rtol=1e-4, atol=1e-5)


def test_a_constant_rate_is_warmed_up_too_and_weights_decay(llama, tmp_path):
    path, rates = files.jsonl(tmp_path / "a.jsonl", files.prompts()), []

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer, *args):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    module = CausalLM(llama, lr=0.1, warmup=0.4, schedule="constant", weight_decay=0.3)
    trainer = fit(module, TextDataModule(path, batch_size=2), 5, callbacks=[Watch()])
    assert rates == pytest.approx([0, 0.05, 0.1, 0.1, 0.1])
    groups = trainer.optimizers[0].param_groups
    assert all(group["weight_decay"] == 0.3 for group in groups)
    trained = {id(p) for p in module.parameters() if p.requires_grad}
    assert {id(p) for group in groups for p in group["params"]} == trained
    assert CausalLM(llama, warmup=1.0).warmup == 1


def test_what_is_measured_of_classes(bert, tmp_path):
    """Over all texts, whatever batches they are in; classes that are not as frequent as each other."""
    records = [{"text": f"about {files.WORDS[i % 4]} " * (1 + i % 3), "label": "abc"[min(i % 5, 2)]} for i in range(22)]
    path = files.jsonl(tmp_path / "a.jsonl", records)
    module, data = SequenceClassifier(bert, dtype="float64"), TextDataModule(path, val=path, predict=path, batch_size=8)
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    (found,) = trainer.validate(module, datamodule=data, verbose=False)
    with torch.no_grad():
        outputs = torch.cat([module.eval().outputs(batch) for batch in data.val_dataloader()])
    labels, made = torch.tensor(["abc".index(record["label"]) for record in records]), outputs.argmax(-1)
    right = made == labels
    f1 = [2 * (right & (labels == c)).sum() / ((made == c).sum() + (labels == c).sum()) for c in range(3)]
    assert found["val/loss"] == pytest.approx(float(F.cross_entropy(outputs, labels)), rel=1e-6)
    assert found["val/accuracy"] == pytest.approx(float(right.double().mean()))
    assert found["val/macro_f1"] == pytest.approx(float(sum(f1) / 3))
    rows = [row for batch in trainer.predict(module, datamodule=data) for row in batch]
    assert [row["probability"] for row in rows] == pytest.approx(outputs.softmax(-1).amax(-1).tolist(), abs=1e-5)
    assert [row["prediction"] for row in rows] == ["abc"[c] for c in made.tolist()]
    assert [row["text"] for row in rows] == [record["text"] for record in records]


def test_what_is_measured_of_numbers(bert, tmp_path):
    records = [{"text": f"about {files.WORDS[i % 4]} " * (1 + i % 3), "label": 2.0 ** (i % 7)} for i in range(22)]
    path = files.jsonl(tmp_path / "a.jsonl", records)
    module, data = SequenceClassifier(bert, regression=True), TextDataModule(path, val=path, batch_size=8)
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    (found,) = trainer.validate(module, datamodule=data, verbose=False)
    with torch.no_grad():
        outputs = torch.cat([module.eval().outputs(batch) for batch in data.val_dataloader()])
    labels = torch.tensor([record["label"] for record in records])

    def ranks(values):
        return torch.stack([((values < v).sum() + ((values == v).sum() - 1) / 2) for v in values])

    assert found["val/loss"] == pytest.approx(float((outputs - labels).square().mean()), rel=1e-5)
    assert found["val/mae"] == pytest.approx(float((outputs - labels).abs().mean()), rel=1e-5)
    for name, pair in (("pearson", (outputs, labels)), ("spearman", (ranks(outputs), ranks(labels)))):
        assert found[f"val/{name}"] == pytest.approx(float(torch.corrcoef(torch.stack(pair))[0, 1]), abs=1e-4)


def test_what_is_measured_of_generated_texts(t5, tmp_path):
    """Each validation anew, of all texts and tokens; and of the base apart from the adapted model."""
    records = [{"prompt": f"Say {i}.", "response": " alpha beta gamma delta" * (1 + i % 3)} for i in range(7)]
    path = files.jsonl(tmp_path / "a.jsonl", records)

    class Says(Seq2SeqLM):
        said = " alpha beta gamma delta it is"

        def predict_step(self, batch, batch_idx):
            return [{"prediction": self.said} for _ in batch["labels"]]

    module, data = Says(t5, compare_base=True), TextDataModule(path, val=path, batch_size=3)
    module.configure_model()
    ll.inject(module, ll.LoRAConfig(r=4, lora_alpha=8))
    for name, parameter in module.named_parameters():
        if name.endswith(".B"):
            torch.nn.init.normal_(parameter, std=0.5)
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    (found,), (again,) = (trainer.validate(module, datamodule=data, verbose=False) for _ in range(2))
    assert found == again
    with torch.no_grad():
        batches = [(float(module.eval().loss(b)), int((b["labels"] != -100).sum())) for b in data.val_dataloader()]
    expected = sum(loss * n for loss, n in batches) / sum(n for _, n in batches)
    assert found["val/loss"] == pytest.approx(expected, rel=1e-5) != pytest.approx(found["val_base/loss"], rel=1e-3)
    made, wanted = [Says.said] * 7, [record["response"] for record in records]
    rouges = ("rouge1", "rouge2", "rougeL")
    scores = ROUGEScore(rouge_keys=rouges)(made, wanted)
    assert {key for key in found if key.startswith("val/")} == {f"val/{key}" for key in ("loss", "bleu", *rouges)}
    for key in rouges:
        assert found[f"val/{key}"] == pytest.approx(float(scores[f"{key}_fmeasure"]))
    assert found["val/bleu"] == pytest.approx(float(SacreBLEUScore()(made, [[text] for text in wanted])))


def test_what_dpo_tells_of_rewards(llama, tmp_path):
    """In float64, over batches of another size each; a policy that has not moved is never right."""
    path = files.jsonl(tmp_path / "a.jsonl", files.preferences(5))
    module, data = DPO(llama, dtype="float64", beta=0.5), TextDataModule(path, val=path, batch_size=4)
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    (found,) = trainer.validate(module, datamodule=data, verbose=False)
    assert found["val/accuracy"] == found["val/margin"] == 0
    data.eval_batch_size = 5
    batch = next(iter(data.val_dataloader()))
    with torch.no_grad():
        reference = module.eval().log_probabilities(batch)
    ll.inject(module, ll.LoRAConfig(r=4, lora_alpha=8))
    for name, parameter in module.named_parameters():
        if name.endswith(".B"):
            torch.nn.init.normal_(parameter, std=0.2)
    with torch.no_grad():
        policy = module.eval().log_probabilities(batch)
    rewards = [0.5 * (own - ref) for own, ref in zip(policy, reference, strict=True)]
    data.eval_batch_size = 4
    (found,) = trainer.validate(module, datamodule=data, verbose=False)
    wanted = {"chosen": rewards[0], "rejected": rewards[1], "margin": rewards[0] - rewards[1]}
    wanted["loss"] = -torch.nn.functional.logsigmoid(wanted["margin"])
    for key, value in wanted.items():
        assert found[f"val/{key}"] == pytest.approx(float(value.mean()), rel=1e-5)


def test_dpo_turns_the_bases_dropout_off():
    config = tf.GPT2Config(resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1, summary_first_dropout=0.2)
    DPO("none").adjust(config)
    assert config.resid_pdrop == config.embd_pdrop == config.attn_pdrop == config.summary_first_dropout == 0
    assert config.layer_norm_epsilon > 0
    with pytest.raises(ll.ConfigError, match="DPO: beta must be a positive number, got 0"):
        DPO("none", beta=0)


def test_what_a_classifier_says_is_float32_at_least(bert):
    batch = {"input_ids": torch.arange(3, 12)[None], "attention_mask": torch.ones(1, 9, dtype=torch.long)}
    for dtype, expected in (("bfloat16", torch.float32), ("float64", torch.float64)):
        module = SequenceClassifier(bert, labels=["a", "b"], dtype=dtype)
        module.configure_model()
        assert module.outputs(batch).dtype is expected
    with pytest.raises(ll.ConfigError, match="regression has no classes, got labels="):
        SequenceClassifier(bert, labels=["a", "b"], regression=True)
