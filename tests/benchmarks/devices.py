"""Two processes on the CPU, beside DDP and FSDP2 with PEFT: bytes, setup, steps and saves.

    python -m tests.benchmarks.devices [--layers 12] [--hidden 768] [--tokens 64] [--steps 8] [--rounds 6]
        [--what bytes save setup step]

A Llama with its own loss on random tokens, in float32, rank 16 on all linears, AdamW, all through Lightning's Trainer.
A round is one fit of each case, in turn, forwards and then backwards; what counts is the median over rounds of the
ratios within a round. The base is built before a fit, and PEFT's adapters on it too; ours are injected
within, and the setup is all from the start of ``Trainer.fit`` to ``on_train_start``.
Times are no tests: run it on a quiet machine.
"""

import argparse
import copy
import gc
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from contextlib import redirect_stdout
from typing import Any

import lightning.pytorch as pl
import torch
import transformers as tf
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from peft import LoraConfig, get_peft_model
from torch import distributed

import lightning_lora as ll
from tests.distributed.collectives import Counter

RANKS = 2
VOCABULARY = 32000
ADAPTER = {"r": 16, "lora_alpha": 32.0, "target_modules": "all-linear"}
CASES: dict[str, tuple[str, str]] = {  # name: strategy, adapters
    "DDP": ("ddp", "ours"),
    "DDP + PEFT": ("ddp", "peft"),
    "FSDP2": ("fsdp2", "ours"),
    "FSDP2, shard_adapters": ("fsdp2", "sharded"),
    "FSDP2 + PEFT": ("fsdp2", "peft"),
}

PAIRS = (
    ("DDP", "DDP + PEFT"),
    ("FSDP2", "FSDP2 + PEFT"),
    ("FSDP2, shard_adapters", "FSDP2 + PEFT"),
    ("FSDP2, shard_adapters", "FSDP2"),
)


class Lit(pl.LightningModule):
    """A user's module; under FSDP2 it shards itself, block by block."""

    def __init__(self, net: torch.nn.Module, peft: bool) -> None:
        super().__init__()
        self.net = get_peft_model(net, LoraConfig(**ADAPTER)) if peft else net
        self.sharded = False

    def configure_model(self) -> None:
        if self.sharded or not isinstance(self.trainer.strategy, ModelParallelStrategy):
            return
        from torch.distributed.fsdp import fully_shard

        self.sharded, mesh = True, self.device_mesh["data_parallel"]
        for module in self.net.modules():
            if type(module).__name__ == "LlamaDecoderLayer":
                fully_shard(module, mesh=mesh)
        fully_shard(self.net, mesh=mesh)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.net(input_ids=batch, labels=batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-4)


class Clock(pl.Callback):
    """When training started, and when each step began: a step is all between two of them."""

    def __init__(self) -> None:
        self.started, self.begun = 0.0, list[float]()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.started = time.perf_counter()

    def on_train_batch_start(self, *args: Any) -> None:
        self.begun.append(time.perf_counter())

    def step(self) -> float:
        """The median of all but the first two, in which states are made."""
        return statistics.median(b - a for a, b in zip(self.begun[2:], self.begun[3:], strict=False))


class Bytes(pl.Callback):
    """Counts the second step, and what is trained."""

    def __init__(self) -> None:
        self.found, self.trained = dict[str, int](), 0

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int) -> None:
        self.mode = Counter(self.found if index == 1 else {})
        self.mode.__enter__()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self.mode.__exit__(None, None, None)
        trained = [p for p in pl_module.parameters() if p.requires_grad]
        self.trained = sum(p.numel() * p.element_size() for p in trained)


class Saves(pl.Callback):
    """Saves in the run, behind its last step, in turn with a process that does so on one device."""

    def __init__(self, folder: str, rounds: int, options: argparse.Namespace) -> None:
        self.folder, self.rounds, self.options, self.ratios = folder, rounds, options, list[float]()
        self.sizes: tuple[int, int] = (0, 0)

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step < trainer.max_steps:
            return
        other = None
        if trainer.is_global_zero:
            sizes = [f"--{name}={getattr(self.options, name)}" for name in ("layers", "hidden", "tokens")]
            command = [sys.executable, "-m", "tests.benchmarks.devices", *sizes, "--alone", self.folder]
            env = {k: v for k, v in os.environ.items() if k not in PROCESS}
            other = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(self.rounds + 1):
            distributed.barrier()
            start = time.perf_counter()
            trainer.save_checkpoint(f"{self.folder}/two.ckpt")
            seconds = time.perf_counter() - start
            if other is not None:
                print("save", file=other.stdin, flush=True)
                self.ratios.append(seconds / float(answer(other.stdout)))
        distributed.barrier()
        del self.ratios[:1]
        if other is not None:
            other.stdin.close()
            other.wait()
            one, two = (os.path.getsize(f"{self.folder}/{name}.ckpt") for name in ("one", "two"))
            self.sizes = one, two


PROCESS = ("LOCAL_RANK", "NODE_RANK", "GLOBAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def answer(lines: Any) -> str:
    """The next line that is for us."""
    return next(line for line in lines if line.startswith("saved ")).split()[1]


class Alone(pl.Callback):
    """The other process: saves whenever it is told to."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step < trainer.max_steps:
            return
        for _ in sys.stdin:
            start = time.perf_counter()
            trainer.save_checkpoint(f"{self.folder}/one.ckpt")
            print(f"saved {time.perf_counter() - start}", file=sys.__stdout__, flush=True)


def base(options: argparse.Namespace) -> torch.nn.Module:
    """The same on every rank."""
    torch.manual_seed(0)
    hidden = options.hidden
    sizes = {"hidden_size": hidden, "intermediate_size": hidden * 8 // 3, "num_hidden_layers": options.layers}
    config = tf.LlamaConfig(**sizes, num_attention_heads=12, num_key_value_heads=12, vocab_size=VOCABULARY)
    return tf.LlamaForCausalLM(config).train()


def fit(
    net: torch.nn.Module, strategy: str, adapters: str, options: argparse.Namespace, steps: int, *callbacks: pl.Callback
) -> dict[str, float]:
    """One run on a copy of the base."""
    torch.manual_seed(1)
    lit = Lit(copy.deepcopy(net), adapters == "peft")
    clock = Clock()
    own = [ll.LoRA(**ADAPTER, shard_adapters=True if adapters == "sharded" else None)]
    strategies = {
        "ddp": DDPStrategy,
        "fsdp2": lambda: ModelParallelStrategy(data_parallel_size=RANKS, tensor_parallel_size=1),
        "alone": lambda: "auto",
    }
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1 if strategy == "alone" else RANKS,
        strategy=strategies[strategy](),
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*(own if adapters in ("ours", "sharded") else []), clock, *callbacks],
    )
    ids = torch.randint(0, VOCABULARY, (RANKS * steps, options.tokens))
    loader = torch.utils.data.DataLoader(ids, batch_size=1)
    if distributed.is_initialized():
        distributed.barrier()
    start = time.perf_counter()
    with redirect_stdout(sys.stderr):  # the plans that our callback prints
        trainer.fit(lit, loader)
    result = {"setup": clock.started - start}
    if steps > 3:
        result["step"] = clock.step()
    del trainer, lit
    gc.collect()
    return result


def rounds(net: torch.nn.Module, options: argparse.Namespace, number: int, steps: int) -> list[dict[str, Any]]:
    """What `fit` measures of each case, by round."""
    orders = [list(CASES)[:: 1 if i % 2 == 0 else -1] for i in range(number)]
    return [{name: fit(net, *CASES[name], options, steps) for name in order} for order in orders]


def spread(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def say(line: str) -> None:
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        print(line, flush=True)


def count(net: torch.nn.Module, options: argparse.Namespace) -> None:
    """Prints what a step sends."""
    say(
        "| bytes of a step | trained | all-reduced | all-gathered | reduce-scattered |\n| --- | --- | --- | --- | --- |"
    )
    for name, case in {**CASES, "DDP, everything trained": ("ddp", "none")}.items():
        counter = Bytes()
        fit(net, *case, options, 2, counter)
        found = [
            sum(size for kind, size in counter.found.items() if part in kind.replace("_", ""))
            for part in ("allreduce", "allgather", "reducescatter")
        ]
        say(f"| {name} | {counter.trained:,} | {' | '.join(f'{size:,}' for size in found)} |")


def save(net: torch.nn.Module, options: argparse.Namespace) -> None:
    """Prints how long a save takes."""
    say("\n| save under FSDP2, over one device | ratio |\n| --- | --- |")
    for name in ("FSDP2", "FSDP2, shard_adapters"):
        with tempfile.TemporaryDirectory() as folder:
            saves = Saves(folder, 3 * options.rounds, options)
            fit(net, *CASES[name], options, 2, saves)
            one, two = saves.sizes
            say(f"| {name} | {spread(saves.ratios or [0.0])}, {two:,} bytes beside {one:,} |")


def compare(what: str, taken: list[dict[str, Any]]) -> None:
    """Prints ratios, and the seconds behind them."""
    say(f"\n| {what} | |\n| --- | --- |")
    for a, b in PAIRS:
        say(f"| {a}, over {b} | {spread([r[a][what] / r[b][what] for r in taken])} |")
    for name in CASES:
        say(f"| {name}: seconds | {statistics.median(r[name][what] for r in taken):.2f} |")


def main() -> None:
    """Prints tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("layers", 12), ("hidden", 768), ("tokens", 64), ("steps", 8), ("rounds", 6)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--what", nargs="+", default=["bytes", "save", "setup", "step"])
    parser.add_argument("--alone", metavar="FOLDER", help="what the script starts for saves on one device")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    net = base(options)
    if options.alone:
        fit(net, "alone", "ours", options, 2, Alone(options.alone))
        return
    say(f"{sum(p.numel() * p.element_size() for p in net.parameters()):,} bytes in the base\n")
    rounds(net, options, 1, 1)  # processes start, and memory is there
    if "bytes" in options.what:
        count(net, options)
    if "save" in options.what:
        save(net, options)
    if "setup" in options.what:  # to on_train_start
        compare("setup", rounds(net, options, 2 * options.rounds, 1))
    if "step" in options.what:
        compare("step", rounds(net, options, options.rounds, options.steps))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
