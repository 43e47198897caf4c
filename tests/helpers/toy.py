"""A small network of plain torch layers in a LightningModule that can be built anywhere and optimised in any way."""

import functools
from collections.abc import Callable
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

WIDTH = 16


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.q, self.o, self.drop = (
            nn.LayerNorm(WIDTH),
            nn.Linear(WIDTH, WIDTH),
            nn.Linear(WIDTH, WIDTH),
            nn.Dropout(0.1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.o(self.drop(torch.relu(self.q(self.norm(x)))))


class Counter(nn.Module):
    """Counts the batches that it trains on, in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Tensor
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen += 1
        return x


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def build(seed: int = 1) -> Net:
    """The pretrained network: the same values whenever and wherever it is built."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Net()


class Steps:
    """The steps of a classifier, for LightningModules of either package."""

    net: Any
    optimizers_: Callable[[Any], Any]

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.net(x.to(next(self.net.parameters()).dtype)), y)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(batch[0])

    def configure_optimizers(self) -> Any:
        return self.optimizers_(self)


def adamw_with_schedule(module: Any, eps: float = 1e-8) -> Any:
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, eps=eps)
    return {
        "optimizer": optimizer,
        "lr_scheduler": {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.9), "interval": "step"},
    }


def optimizers_for(precision: str) -> Callable[[Any], Any]:
    """The same; the usual eps is 0 in float16, which makes what is trained in full NaN."""
    return functools.partial(adamw_with_schedule, eps=1e-4 if precision == "16-true" else 1e-8)


class Lit(Steps, pl.LightningModule):
    """Builds its network in ``__init__``, in ``setup`` or in ``configure_model``."""

    def __init__(
        self,
        built: Literal["init", "setup", "configure_model", "meta"] = "init",
        seed: int = 1,
        optimizers_: Callable[[Any], Any] = adamw_with_schedule,
    ) -> None:
        super().__init__()
        self.save_hyperparameters("built", "seed")
        self.built, self.seed, self.optimizers_ = built, seed, optimizers_
        self.net = build(seed) if built == "init" else None
        if built == "meta":
            with torch.device("meta"):
                self.net = Net()

    def setup(self, stage: str) -> None:
        if self.built == "setup" and self.net is None:
            self.net = build(self.seed)

    def configure_model(self) -> None:
        if self.built == "configure_model" and self.net is None:
            self.net = build(self.seed)
        if self.built == "meta" and self.net.head.weight.is_meta:
            self.net.to_empty(device="cpu")
            self.net.load_state_dict(build(self.seed).state_dict(), strict=True)


def data(batch_size: int = 8, shuffle: bool = False, n: int = 32) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, WIDTH, generator=generator)
    return DataLoader(TensorDataset(x, x[:, :4].argmax(1)), batch_size=batch_size, shuffle=shuffle)
