"""LoRA on convolutions: a network that knows the digits 0 to 4 learns 5 to 9.

    pip install scikit-learn
    python examples/digits.py

The images are real, and come with scikit-learn. The network is trained in full on one half of the classes; then its
convolutions are frozen, and get adapters beside a new head.
"""

import sys

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

import lightning_lora as ll


class Digits(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU()),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
        )
        self.head = nn.Linear(32, 5)
        self.accuracy = MulticlassAccuracy(5)

    def forward(self, images):
        return self.head(self.features(images).mean((2, 3)))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def test_step(self, batch, batch_idx):
        self.accuracy(self(batch[0]), batch[1])
        self.log("accuracy", self.accuracy)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def halves(first: int) -> tuple[DataLoader, DataLoader]:
    """Images of five classes, to train and to test."""
    images, labels = (torch.tensor(part) for part in load_digits(return_X_y=True))
    chosen = (labels >= first) & (labels < first + 5)
    data = TensorDataset(images[chosen].view(-1, 1, 8, 8).float() / 16, labels[chosen] - first)
    train, test = torch.utils.data.random_split(data, [0.7, 0.3], torch.Generator().manual_seed(1))
    return DataLoader(train, 32, shuffle=True), DataLoader(test, 256)


def run(module: Digits, data: tuple[DataLoader, DataLoader], epochs: int, *callbacks: pl.Callback) -> float:
    quiet = {f"enable_{part}": False for part in ("checkpointing", "model_summary", "progress_bar")}
    trainer = pl.Trainer(accelerator="cpu", max_epochs=epochs, logger=False, callbacks=[*callbacks], **quiet)
    trainer.fit(module, data[0])
    return trainer.test(module, data[1], verbose=False)[0]["accuracy"]


def main(epochs: int = 8) -> None:
    pl.seed_everything(1)
    module, known, new = Digits(), halves(0), halves(5)
    print(f"0 to 4, trained in full: {run(module, known, epochs):.1%}")
    module.head.reset_parameters()
    for name, lora in {"no adapters": 0, "LoRA, r=4": 4}.items():
        adapted = Digits()
        adapted.load_state_dict(module.state_dict())
        adapted.features.requires_grad_(lora > 0)
        callbacks = [ll.LoRA(r=lora, lora_alpha=8, target_modules=["features.*"])] if lora else []
        accuracy = run(adapted, new, epochs, *callbacks)
        count = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        print(f"5 to 9, new head and {name}: {accuracy:.1%} with {count:,} parameters")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
