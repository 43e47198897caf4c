"""Runs of the real Trainer: alone and beside LoRA, in either order; checkpoints; what is refused."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI

import lightning_lora as ll
from lightning_lora.comparators import BitFit, Bottleneck, PrefixTuning, PromptTuning
from lightning_lora.recompute import let_run_again
from lightning_lora.training.compatibility import check_compatibility
from tests.comparators.methods import CALLBACKS, Lit, batch
from tests.helpers.modules import one_batch, trainer


def run(tmp_path, *callbacks, family="bert", epochs=2, module=None, **options):
    """A fit; its module and the checkpoint of its last epoch."""
    module = Lit(family) if module is None else module
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, enable_version_counter=False)
    pl.seed_everything(1, verbose=False)
    trainer(*callbacks, saver, max_epochs=epochs, **options).fit(
        module, one_batch(batch(family)), ckpt_path=options.pop("ckpt_path", None)
    )
    return module, torch.load(tmp_path / f"epoch={epochs - 1}.ckpt", weights_only=True)


@pytest.mark.parametrize("name", CALLBACKS)
def test_a_run_trains_the_method_and_the_head_alone(tmp_path, name):
    """Also from an optimizer that was made before; the checkpoint has the same, and resumes bit for bit."""
    base = {key: tensor.clone() for key, tensor in Lit().state_dict().items()}
    losses: list[float] = []

    class Early(Lit):
        def __init__(self) -> None:
            super().__init__()
            self.made = torch.optim.AdamW(self.parameters(), lr=1e-2)  # as LightningCLI does

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            losses.append(float(loss.detach()))
            return loss

        def configure_optimizers(self):
            return self.made

    callback = CALLBACKS[name]()
    module, saved = run(tmp_path, callback, module=Early(), epochs=3)
    assert losses[-1] < losses[0]
    trained = {key for key, p in module.named_parameters() if p.requires_grad}
    held = {id(p) for group in module.made.param_groups for p in group["params"]}
    assert held == {id(p) for key, p in module.named_parameters() if key in trained}
    assert saved["state_dict"].keys() == trained == ll.adapter_state_dict(module).keys()
    assert {"net.classifier.weight", "net.classifier.bias"} < trained
    own = trained - {"net.classifier.weight", "net.classifier.bias"}
    assert all(("bias" in key) if name == "bitfit" else (".lora_added." in key) for key in own)
    for key, tensor in module.state_dict().items():
        if key not in trained:
            assert torch.equal(tensor, base[key]), key
        elif key in base:
            assert not torch.equal(tensor, base[key]), key
    again = Early()
    saver = ModelCheckpoint(tmp_path / "again", filename="last", enable_version_counter=False)
    torch.manual_seed(123)  # another start
    trainer(CALLBACKS[name](), saver, max_epochs=3).fit(
        again, one_batch(batch("bert")), ckpt_path=tmp_path / "epoch=0.ckpt"
    )
    resumed = torch.load(tmp_path / "again" / "last.ckpt", weights_only=True)
    for key, tensor in saved["state_dict"].items():
        assert torch.equal(resumed["state_dict"][key], tensor), key
    assert list(ll.adapters(again)) == [callback.adapter_name]


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("name", ["bitfit", "bottleneck", "prefix", "prompt"])
def test_beside_lora_in_either_order(tmp_path, name, order):
    callbacks = [ll.LoRA(r=2, lora_alpha=3, target_modules="attention"), CALLBACKS[name]()][::order]
    module, saved = run(tmp_path, *callbacks)
    own = "bias" if name == "bitfit" else f".lora_added.{callbacks[::order][1].adapter_name}."
    kinds = (".lora.default.", own, "classifier.")
    assert all(any(kind in key for key in saved["state_dict"]) for kind in kinds)
    assert all(any(kind in key for kind in kinds) for key in saved["state_dict"])
    assert {**ll.adapters(module)}.keys() == {"default", callbacks[::order][1].adapter_name}
    loaded = ll.load_from_checkpoint(Lit, tmp_path / "epoch=1.ckpt")
    inputs = batch("bert")
    module.eval(), loaded.eval()
    assert torch.equal(loaded.net(**inputs).logits, module.net(**inputs).logits)
    with ll.disable_adapters(loaded):
        assert not torch.equal(loaded.net(**inputs).logits, module.net(**inputs).logits)
    trainer(*callbacks).validate(Lit(), one_batch(inputs), ckpt_path=tmp_path / "epoch=1.ckpt", verbose=False)


def test_the_longest_of_several_runs_goes_on_in_one_module(tmp_path):
    module = Lit("llama")
    loop = trainer(Bottleneck(bottleneck_size=4), PrefixTuning(num_virtual_tokens=2), max_epochs=1)
    loop.fit(module, one_batch(batch("llama")))
    before = {key: tensor.clone() for key, tensor in ll.adapter_state_dict(module).items()}
    loop.fit_loop.max_epochs = 2
    loop.fit(module, one_batch(batch("llama")))
    after = ll.adapter_state_dict(module)
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[key], after[key]) for key in before)


def test_yaml_names_the_callbacks(monkeypatch):
    monkeypatch.setattr("sys.argv", ["program"])
    arguments = ["fit", "--trainer.callbacks+=lightning_lora.comparators.PrefixTuning"]
    arguments += ["--trainer.callbacks.num_virtual_tokens=2", "--trainer.callbacks.prefix_projection=true"]
    arguments += [
        "--trainer.callbacks+=lightning_lora.comparators.Bottleneck",
        "--trainer.callbacks.placement=pfeiffer",
    ]
    arguments += ["--optimizer=torch.optim.AdamW", "--trainer.accelerator=cpu", "--trainer.max_epochs=1"]
    arguments += ["--trainer.logger=false", "--trainer.enable_progress_bar=false", "--model.family=llama"]

    class Model(Lit):
        def train_dataloader(self):
            return one_batch(batch("llama"))

        configure_optimizers = pl.LightningModule.configure_optimizers

    cli = LightningCLI(Model, args=arguments, save_config_callback=None, seed_everything_default=1)
    assert list(ll.adapters(cli.model)) == ["prefix", "bottleneck"]
    (optimizer,) = cli.trainer.optimizers
    trained = {id(p) for p in cli.model.parameters() if p.requires_grad}
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == trained


def test_what_does_not_fit_is_refused(tmp_path):
    run(tmp_path, PrefixTuning(num_virtual_tokens=3), epochs=1)
    path = tmp_path / "epoch=0.ckpt"
    data = one_batch(batch("bert"))
    for callback, words in {
        PrefixTuning(num_virtual_tokens=4): "num_virtual_tokens: 3 -> 4",
        PromptTuning(num_virtual_tokens=3, adapter_name="prefix"): "method: 'prefix_tuning' -> 'prompt_tuning'",
        PrefixTuning(num_virtual_tokens=3, adapter_name="other"): "adapters prefix -> other",
        ll.LoRA(r=2, adapter_name="prefix"): "method: 'prefix_tuning' -> None",
        PrefixTuning(num_virtual_tokens=3, modules_to_save=None): "not in the model: net.classifier",
    }.items():
        module = Lit()
        with pytest.raises(ll.CheckpointError, match=words):
            trainer(callback).validate(module, data, ckpt_path=path, verbose=False)
    other = Lit()
    torch.nn.init.normal_(other.net.bert.pooler.dense.weight)
    with pytest.raises(ll.BaseMismatchError, match="other values"):
        trainer(PrefixTuning(num_virtual_tokens=3)).validate(other, data, ckpt_path=path, verbose=False)
    with pytest.raises(ll.UnsupportedError, match=r"adapter 'prefix' is prefix_tuning: .*load_from_checkpoint"):
        ll.load_adapter(Lit(), path)


def test_a_base_checkpoint_starts_a_new_run(tmp_path):
    base = Lit()
    torch.nn.init.normal_(base.net.bert.pooler.dense.weight)
    full = trainer(max_epochs=0)
    full.strategy.connect(base)
    full.save_checkpoint(tmp_path / "base.ckpt")
    module = Lit()
    trainer(Bottleneck()).fit(module, one_batch(batch("bert")), ckpt_path=tmp_path / "base.ckpt")
    assert torch.equal(module.net.bert.pooler.dense.weight, base.net.bert.pooler.dense.weight)


def test_dead_tensors_are_named(tmp_path):
    """What is called and gives no gradient, and what is in no optimizer."""

    class Cut(Lit):
        def training_step(self, batch, batch_idx):
            hidden = self.net.bert(batch["input_ids"]).last_hidden_state.detach()
            return self.net.classifier(hidden[:, 0]).square().mean()

    with pytest.raises(ll.DeadAdapterError, match=r"lora_added.bottleneck.D.*called, but no gradient"):
        run(tmp_path, Bottleneck(), module=Cut())

    class Partial(Lit):
        def configure_optimizers(self):
            return torch.optim.SGD(self.net.classifier.parameters(), lr=0.1)

    with pytest.raises(ll.DeadAdapterError, match="lora_added.prompt.embedding"):
        run(tmp_path, PromptTuning(), module=Partial())


def test_what_is_switched_off_is_not_trained(tmp_path):
    module = Lit()
    ll.inject(module, ll.LoRAConfig(r=2, modules_to_save=None))
    ll.inject(module, PrefixTuning().config, "prefix")
    ll.set_adapter(module, "default")
    with pytest.raises(ll.DeadAdapterError, match="adapter 'prefix' is not active"):
        run(tmp_path, PrefixTuning(), module=module)


def test_a_prefix_and_checkpointed_activations(tmp_path):
    """transformers would drop the cache, and the prefix in it, with no more than a warning."""
    with pytest.raises(ll.UnsupportedError, match="gradient_checkpointing: prefix_tuning lives in the cache"):
        run(tmp_path, ll.LoRA(r=2, gradient_checkpointing=True), PrefixTuning())
    module = Lit("llama")
    let_run_again(module.net)
    with pytest.raises(ll.UnsupportedError, match="prefix_tuning lives in the cache"):
        run(tmp_path, PrefixTuning(), module=module, family="llama")
    for name in ("prompt", "bottleneck"):
        plain, checkpointed = Lit("llama"), Lit("llama")
        let_run_again(checkpointed.net.train())
        values = [run(tmp_path / name, CALLBACKS[name](), module=m, family="llama")[1] for m in (plain, checkpointed)]
        for key, tensor in values[0]["state_dict"].items():
            torch.testing.assert_close(values[1]["state_dict"][key], tensor)


def test_strategies_that_are_not_built():
    callback = Bottleneck()
    run = trainer(callback, strategy=pl.strategies.ModelParallelStrategy())
    with pytest.raises(ll.UnsupportedError, match="bottleneck: not built for ModelParallelStrategy"):
        check_compatibility(run, [callback], Lit())  # what the callback calls, before there are other processes


def test_arguments_are_checked_together():
    with pytest.raises(ll.ConfigError, match="6 problems") as error:
        Bottleneck(
            reduction_factor=0, bottleneck_size=-1, non_linearity="rleu", placement="houlsbi", adapter_name="a b"
        )
    assert "Did you mean 'houlsby'" in str(error.value)
    for make, words in {
        lambda: PrefixTuning(num_virtual_tokens=0, encoder_hidden_size=3): "(?s)positive integer.*no effect without",
        lambda: PromptTuning(prompt_tuning_init="text"): "(?s)needs prompt_tuning_init_text.*needs tokenizer_name",
        lambda: PromptTuning(prompt_tuning_init_text="x"): "no effect without prompt_tuning_init='TEXT'",
        lambda: BitFit(bias="some", modules_to_save="head"): "(?s)bias must be one of.*modules_to_save must be",
        lambda: Bottleneck(reduction_factor=4, bottleneck_size=2): "say the same",
    }.items():
        with pytest.raises(ll.ConfigError, match=words):
            make()
