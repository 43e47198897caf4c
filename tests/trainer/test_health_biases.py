"""Biases of which some move nothing: they are trained for being there, and are no reason to break a run off."""

import warnings
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
import transformers as tf
from torch import nn
from torch.utils.data import DataLoader

import lightning_lora as ll
from lightning_lora.comparators import BitFit
from lightning_lora.training.ways_out import PATIENCE
from tests.helpers.modules import Wrapped, trainer

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 32,
    "max_position_embeddings": 16,
}
UNMOVED = "biases that training does not change, and that stay as they are"


class Embedder(nn.Module):
    """The mean of what BERT makes of tokens: its pooler is called, and nobody reads what it gives."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = tf.BertModel(tf.BertConfig(**SIZES))

    def forward(self, input_ids, labels):
        made = self.model(input_ids).last_hidden_state.mean(1)
        return SimpleNamespace(loss=nn.functional.mse_loss(made, labels))


def embedder() -> nn.Module:
    return Embedder()


def tagger() -> nn.Module:
    """Biases are what they are in pretrained models: not 0."""
    torch.manual_seed(0)
    model = tf.BertForTokenClassification(tf.BertConfig(**SIZES, num_labels=3))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model


class Trained(Wrapped):
    def configure_optimizers(self):
        return torch.optim.SGD((p for p in self.parameters() if p.requires_grad), lr=0.1, momentum=0.9)


def fit(module: Wrapped, callback, labels: torch.Tensor, steps: int) -> dict[str, torch.Tensor]:
    """What it was before, by name."""
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    torch.manual_seed(1)
    batch = {"input_ids": torch.randint(0, 32, (4, 8)), "labels": labels}
    trainer(callback, max_steps=steps, max_epochs=-1).fit(module, DataLoader([batch] * 10, batch_size=None))
    return before


@pytest.mark.parametrize("callback", [ll.LoRA(r=2, bias="all", target_modules=["query"]), BitFit()])
def test_a_pooler_that_nobody_reads(callback):
    module = Wrapped(embedder)
    with pytest.warns(UserWarning, match=rf"net\.model\.pooler\.dense\.bias: {UNMOVED}") as told:
        before = fit(module, callback, torch.randn(4, 16), 12)
    assert sum(UNMOVED in str(each.message) for each in told) == 1
    after = dict(module.named_parameters())
    moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert "net.model.encoder.layer.0.output.dense.bias" in moved
    assert "net.model.pooler.dense.bias" not in moved


@pytest.mark.parametrize(
    "callback",
    [ll.LoRA(r=2, bias="lora_only", target_modules=["query", "key", "value"]), ll.LoRA(r=2, bias="all"), BitFit()],
)
def test_keys_of_which_softmax_takes_no_notice(callback):
    """Their gradient is what rounding leaves of 0, and SGD's step is rounded away."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", f".*{UNMOVED}")
        fit(Trained(tagger), callback, torch.randint(0, 3, (4, 8)), PATIENCE + 5)


def test_where_no_bias_moves_the_run_is_broken_off():
    class Detached(Embedder):
        def forward(self, input_ids, labels):
            return SimpleNamespace(loss=super().forward(input_ids, labels).loss.detach().requires_grad_())

    with pytest.raises(ll.DeadAdapterError, match=f"called in {PATIENCE} steps in which nothing had a gradient"):
        fit(Wrapped(Detached), BitFit(), torch.randn(4, 16), PATIENCE + 5)


def test_a_bias_beside_its_weight_is_no_such(monkeypatch):
    """A head that is trained in full and not reached breaks a run off, with its bias."""

    class Headed(Embedder):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(16, 16)

        def forward(self, input_ids, labels):
            self.head(torch.ones(1, 16))
            return super().forward(input_ids, labels)

    with pytest.raises(
        ll.DeadAdapterError, match=r"net\.head\.bias, net\.head\.weight|net\.head\.weight, net\.head\.bias"
    ):
        fit(Wrapped(Headed), ll.LoRA(r=2, target_modules=["query"]), torch.randn(4, 16), 3)


def test_a_bias_that_is_not_finite_breaks_the_run_off(recwarn):
    """Where others move too: it is not told as one that rests."""

    class Net(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.head = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8)), nn.Linear(8, 1)

        def training_step(self, batch, index):
            if index == 0:
                self.net[0].bias.register_hook(lambda gradient: gradient * torch.nan)
            return self.head(self.net(batch)).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e-2)

    lora = ll.LoRA(r=2, target_modules=["2"], bias="all", modules_to_save=None)
    with pytest.raises(ll.DeadAdapterError, match=r"net\.0\.bias.*not finite any more"):
        trainer(lora, max_epochs=1).fit(Net(), DataLoader(torch.randn(12, 8), batch_size=2))
    assert not any(UNMOVED in str(each.message) for each in recwarn)
