"""train_norms and bias: the small tensors of the base that are trained beside adapters, in runs and in files."""

import warnings

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import PeftModel
from torch import nn

import lightning_lora as ll
from tests.helpers.families import FAMILIES
from tests.helpers.modules import Wrapped, one_batch, trainer

NAMES = ["llama", "gemma2", "gpt2", "bert", "t5", "vit"]


def of_norms(model: nn.Module) -> dict[str, torch.Tensor]:
    owners = [n for n, m in model.named_modules() if "Norm" in type(m).__name__]
    return {n: p for n, p in model.named_parameters() if n.rpartition(".")[0] in owners}


def run(name: str, folder=None, epochs: int = 1, resume=None, **options):
    family = FAMILIES[name]
    module = Wrapped(family.make)
    batch = family.batch(module.net)
    options = {"r": 3, "lora_alpha": 5, "train_norms": True, **options}
    callbacks = [ll.LoRA(**options)]
    if folder is not None:
        callbacks.append(ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1))
    fit = trainer(*callbacks, max_epochs=epochs)
    fit.fit(module, one_batch(batch, 3), ckpt_path=resume, weights_only=True if resume else None)
    return module, batch


@pytest.mark.filterwarnings("ignore:bias=.* trains nothing")
@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
@pytest.mark.parametrize("name", NAMES)
def test_norms_are_trained_and_travel(name, bias, tmp_path):
    """In full, with adapters, heads and biases; into PEFT, and back."""
    module, batch = run(name, bias=bias)
    base = FAMILIES[name].make()
    before, after = of_norms(base), of_norms(module.net)
    assert before
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[n], after[n]) for n in before)
    trained = {n for n, p in module.net.named_parameters() if p.requires_grad}
    others = trained - after.keys() - {n for n in trained if ".lora." in n or n.endswith(".bias")}
    assert all(any(n.startswith(f"{head}.") for head in FAMILIES[name].heads) for n in others)
    ll.save_adapter(module, tmp_path / "peft")
    logits = module.net.eval()(**batch).logits
    other = Wrapped(FAMILIES[name].make)
    ll.load_adapter(other, tmp_path / "peft")
    assert torch.equal(other.net.eval()(**batch).logits, logits)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        twin = PeftModel.from_pretrained(FAMILIES[name].make(), str(tmp_path / "peft")).eval()
    torch.testing.assert_close(twin(**batch).logits, logits, rtol=1e-4, atol=1e-5)
    with ll.disable_adapters(other):
        torch.testing.assert_close(other.net(**batch).logits, base.eval()(**batch).logits, rtol=1e-4, atol=1e-5)


def test_a_run_goes_on_with_its_norms(tmp_path):
    whole, _ = run("llama", tmp_path / "whole", epochs=2)
    again, _ = run("llama", epochs=2, resume=tmp_path / "whole" / "epoch=0.ckpt")
    own, other = ll.adapter_state_dict(whole), ll.adapter_state_dict(again)
    assert own.keys() == other.keys()
    assert any("layernorm" in key for key in own)
    assert all(torch.equal(own[key], other[key]) for key in own)
    loaded = ll.load_from_checkpoint(Wrapped, tmp_path / "whole" / "epoch=1.ckpt", build=FAMILIES["llama"].make)
    assert all(torch.equal(value, own[key]) for key, value in ll.adapter_state_dict(loaded).items())
    with pytest.raises(ll.CheckpointError, match="train_norms: True -> False"):
        run("llama", epochs=2, resume=tmp_path / "whole" / "epoch=0.ckpt", train_norms=False)


class Own(nn.Module):
    """Norms of torch's own, one without weights, one in a head, and what is no norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.group, self.batch = nn.Conv1d(1, 4, 3), nn.GroupNorm(2, 4), nn.BatchNorm1d(4)
        self.rms, self.plain = nn.RMSNorm(14), nn.LayerNorm(14, elementwise_affine=False)
        self.q = nn.Linear(14, 8)
        self.head = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 3))

    def forward(self, x):
        return self.head(self.q(self.plain(self.rms(self.batch(self.group(self.conv(x[:, None])))))).mean(1))


def test_what_is_excluded_keeps_its_norms():
    config = ll.LoRAConfig(
        target_modules=["q"], modules_to_save=None, train_norms=True, exclude_modules=["rms", "head"]
    )
    assert [saved.name for saved in ll.plan(Own(), config).modules_to_save] == ["group"]


def test_which_are_found():
    config = ll.LoRAConfig(target_modules=["q"], modules_to_save=["head"], train_norms=True, bias="all")
    plan = ll.plan(Own(), config)
    found = {saved.name: (saved.type, saved.parameters, saved.reason) for saved in plan.modules_to_save}
    assert found["group"] == ("GroupNorm", 8, "train_norms")
    assert found["rms"] == ("RMSNorm", 14, "train_norms")
    assert found["head"][2] == "modules_to_save"
    assert {n for n, (_, _, reason) in found.items() if reason == "train_norms"} == {"group", "rms"}
    assert {n for n, (_, _, reason) in found.items() if "bias" in reason} == {"conv.bias", "batch.bias", "q.bias"}
    assert plan.trainable_parameters == 8 * (14 + 8) + 8 + 14 + (16 + 27) + 4 + 4 + 8


def test_a_model_without_norms_says_so():
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8, elementwise_affine=False))
    with pytest.raises(
        ll.TargetError, match="train_norms: the model has no LayerNorm, RMSNorm or GroupNorm with weights"
    ):
        ll.inject(model, ll.LoRAConfig(train_norms=True, modules_to_save=None))
    with pytest.raises(ll.ConfigError, match="train_norms must be true or false, got 'yes'"):
        ll.LoRA(train_norms="yes")


def test_two_adapters_cannot_both_train_them():
    model = FAMILIES["llama"].make()
    ll.inject(model, ll.LoRAConfig(train_norms=True), "a")
    with pytest.raises(ll.ConfigError, match=r"trained in full with adapter 'a': leave it out of .*train_norms"):
        ll.inject(model, ll.LoRAConfig(train_norms=True), "b")
    ll.inject(model, ll.LoRAConfig(), "b")
    before = {n: p.clone() for n, p in of_norms(model).items()}
    ll.delete_adapter(model, "a")
    assert all(torch.equal(p, before[n]) and not p.requires_grad for n, p in of_norms(model).items())
