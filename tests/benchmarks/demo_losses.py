"""Bits per byte of the demonstration's task, with the base as it is and packed.

python -m tests.benchmarks.demo_losses [STEPS]
"""

import logging
import sys
import warnings

import lightning.pytorch as pl
from torch.utils.data import DataLoader

import lightning_lora as ll
from lightning_lora.demo.data import Windows, manual_prose
from lightning_lora.demo.module import ByteLM
from lightning_lora.inits import EVA

STARTS = {"orthogonal": "orthogonal", "eva": "eva", "eva, equal ranks": EVA(rho=1)}


def bits_per_byte(steps: int, **options: object) -> tuple[float, float]:
    """Held-out bits per byte before and after, as `lightning-lora demo` measures them."""
    pl.seed_everything(1, verbose=False)
    train, held_out = manual_prose()
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    lora = ll.LoRA(r=8, lora_alpha=16, **options)
    trainer = pl.Trainer(max_epochs=1, callbacks=[lora], enable_checkpointing=False, barebones=False, **quiet)
    module, data = ByteLM(), DataLoader(Windows(held_out), batch_size=64)
    before = trainer.test(module, data, verbose=False)[0]["bits_per_byte_held_out"]
    trainer.fit(module, DataLoader(Windows(train, steps * 16, seed=1), batch_size=16))
    return before, trainer.test(module, data, verbose=False)[0]["bits_per_byte_held_out"]


def main(steps: int = 250) -> None:
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    kinds = [("LoRA", {}), ("DoRA", {"use_dora": True})]
    runs = [(name, base, options) for name, options in kinds for base in (None, "int8", "nf4-dq", "fp4")]
    runs += [(init, base, {"init_lora_weights": init}) for init in ("pissa", "olora") for base in (None, "nf4-dq")]
    runs += [("loftq", "nf4-dq", {"init_lora_weights": "loftq"})]
    runs += [(name, None, {"init_lora_weights": init}) for name, init in STARTS.items()]
    runs += [("auto ranks", None, {"rank_pattern": "auto"}), ("norms too", None, {"train_norms": True})]
    rows = []
    for name, base, options in runs:
        before, after = bits_per_byte(steps, quantization=base, **options)
        rows.append(f"| {name} | {base or 'dense'} | {before:.4f} | {after:.4f} |")
    print("| | base | before | after |\n| --- | --- | --- | --- |", *rows, sep="\n")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
