"""Quantising, injecting, merging, switching, loading and saving, beside bitsandbytes and PEFT on the same things.

    python -m tests.benchmarks.adapters [--layers 24] [--hidden 1024] [--r 16] [--repeats 9] [--only switching]

A Llama in bfloat16 with adapters on all linears; two of them where one takes the place of another. Prints a table: how
many times our time the other's is. Both are timed in turn, on one thread: the median over the pairs, of CPU time
(``process_time``) and of wall time. PEFT writes no checksums, no card and no fingerprint of the base, and does not wait
for the disk; ours does all of that. Times are no tests: run it on a quiet machine.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from bitsandbytes import functional as F4
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import lightning_lora as ll
from lightning_lora.layers import lora_layers
from lightning_lora.quantization.packing import four_bits

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NAMES = ("korean", "coding")
SWITCHES = 10  # at a time: one alone is too short for the clock
Act = Callable[[], object]
Row = tuple[str, Act, Act, Act]  # what it is, ours, theirs, and what is not timed behind each pair


def llama(layers: int, hidden: int, intermediate: int, heads: int, vocabulary: int) -> nn.Module:
    """A Llama on the meta device."""
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers}
    config = tf.LlamaConfig(**sizes, num_attention_heads=heads, num_key_value_heads=heads, vocab_size=vocabulary)
    with torch.device("meta"):
        return tf.LlamaForCausalLM(config)


def base(layers: int, hidden: int) -> nn.Module:
    """A Llama with values that are cheap to make."""
    model = llama(layers, hidden, hidden * 11 // 4 // 64 * 64, 8, 512).to(torch.bfloat16).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02, generator=generator)
    return model.eval()


def config_of(r: int) -> ll.LoRAConfig:
    return ll.LoRAConfig(r=r, lora_alpha=r / 2, target_modules=TARGETS, modules_to_save=None)


def theirs_of(r: int) -> LoraConfig:
    return LoraConfig(r=r, lora_alpha=r / 2, target_modules=TARGETS)


def adapted(model: nn.Module, r: int) -> nn.Module:
    """Two adapters, as after training."""
    for name in NAMES:
        ll.inject(model, config_of(r), name)
    for _, layer in lora_layers(model):
        for adapter in layer.lora_adapters().values():
            nn.init.normal_(adapter.B, std=0.02)
    return model


def ratios(ours: Act, theirs: Act, repeats: int, undo: Act) -> tuple[float, float]:
    """Theirs over ours, in CPU and in wall time: medians of pairs. The first pair does not count."""
    found: list[tuple[float, float]] = []
    for _ in range(repeats + 1):
        times = []
        for act in (ours, theirs):
            start = time.process_time(), time.perf_counter()
            act()
            times.append((time.process_time() - start[0], time.perf_counter() - start[1]))
        undo()
        found.append((times[1][0] / times[0][0], times[1][1] / times[0][1]))
    cpu, wall = zip(*found[1:], strict=True)
    return statistics.median(cpu), statistics.median(wall)


def nothing() -> None:
    return


def quantising() -> Iterator[Row]:
    """A weight of 4096 x 4096."""
    W = torch.randn(4096, 4096, dtype=torch.bfloat16)
    for kind in ("nf4", "fp4"):
        yield (
            f"quantising to {kind.upper()} (bitsandbytes)",
            lambda kind=kind: four_bits(W, kind, False, 64, torch.uint8),
            lambda kind=kind: F4.quantize_4bit(W, quant_type=kind, blocksize=64),
            nothing,
        )


def injecting(name: str, make: Callable[[], nn.Module], r: int) -> Row:
    """Adapters on a bare model; taken off again behind each pair."""
    ours, bare = make(), [make()]
    wrapped: list[Any] = []

    def undo() -> None:
        ll.eject(ours)
        bare[:] = [wrapped.pop().unload()]
        bare[0].requires_grad_(True)

    theirs = lambda: wrapped.append(get_peft_model(bare[0], theirs_of(r)))  # noqa: E731
    return f"injecting, {name}", lambda: ll.inject(ours, config_of(r)), theirs, undo


def loading_fresh(folder: Path, make: Callable[[], nn.Module]) -> Row:
    """Into a bare model."""
    ours, bare = make(), [make()]
    wrapped: list[Any] = []

    def undo() -> None:
        ll.eject(ours)
        bare[:] = [wrapped.pop().unload()]

    theirs = lambda: wrapped.append(PeftModel.from_pretrained(bare[0], folder))  # noqa: E731
    return "loading, into a bare model", lambda: ll.load_adapter(ours, folder), theirs, undo


def merging_for_good(make: Callable[[], nn.Module], r: int) -> Row:
    """Each time of an adapter that is new on a base that is not."""
    ours, bare, wrapped = make(), [make()], list[Any]()

    def adapt() -> None:
        ll.inject(ours, config_of(r))
        wrapped[:] = [get_peft_model(bare[0], theirs_of(r))]

    def theirs() -> None:
        bare[:] = [wrapped[0].merge_and_unload()]

    adapt()
    return "merging for good", lambda: ll.merge_and_unload(ours), theirs, adapt


def with_two(make: Callable[[], nn.Module], r: int, folder: Path) -> Iterator[Row]:
    """What is done with a model that has two adapters."""
    ours = adapted(make(), r)
    ll.set_adapter(ours, "korean")
    for name in NAMES:
        ll.save_adapter(ours, folder / name, name)
    theirs = PeftModel.from_pretrained(make(), folder / "korean", adapter_name="korean").eval()
    theirs.load_adapter(folder / "coding", adapter_name="coding")
    theirs.set_adapter("korean")

    def forget() -> None:
        ll.delete_adapter(ours, "new")
        theirs.delete_adapter("new")

    def unmerge() -> None:
        ll.unmerge(ours)
        theirs.unmerge_adapter()

    def switch(act: Callable[[str], object]) -> Act:
        return lambda: [act(NAMES[(i + 1) % 2]) for i in range(SWITCHES)]

    def raw() -> None:
        with open(folder / "raw", "wb") as file:
            file.write(blob)
            file.flush()
            os.fsync(file.fileno())

    blob = bytes(size(folder / "korean"))
    coding, save = folder / "coding", lambda: ll.save_adapter(ours, folder / "ours", "korean")
    save_theirs = lambda: theirs.save_pretrained(folder / "theirs", selected_adapters=["korean"])  # noqa: E731
    yield "merging", lambda: ll.merge(ours), theirs.merge_adapter, unmerge
    yield "switching", switch(lambda name: ll.set_adapter(ours, name)), switch(theirs.set_adapter), nothing
    yield (
        "loading, into an adapter that is there",
        lambda: ll.load_adapter(ours, coding, "coding"),
        lambda: theirs.load_adapter(coding, adapter_name="coding"),
        nothing,
    )
    yield (
        "loading, beside others",
        lambda: ll.load_adapter(ours, coding, "new"),
        lambda: theirs.load_adapter(coding, adapter_name="new"),
        forget,
    )
    yield "saving", save, save_theirs, nothing
    yield "saving (a raw write that is flushed)", save, raw, nothing


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def rows(options: argparse.Namespace, folder: Path) -> Iterator[Row]:
    """All of them, one after the other: models are made when they are needed."""
    make = lambda: base(options.layers, options.hidden)  # noqa: E731
    yield from quantising()
    yield injecting("7B on the meta device", lambda: llama(32, 4096, 11008, 32, 32000), options.r)
    yield injecting(f"{options.layers} x {options.hidden}", make, options.r)
    yield merging_for_good(make, options.r)
    yield from with_two(make, options.r, folder)
    yield loading_fresh(folder / "korean", make)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("layers", 24), ("hidden", 1024), ("r", 16), ("repeats", 9)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--only", default="", help="the start of a row's name")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp())
    print("| theirs over ours | CPU | wall |\n| --- | --- | --- |")
    for name, ours, theirs, undo in rows(options, folder):
        if name.startswith(options.only):
            cpu, wall = ratios(ours, theirs, options.repeats, undo)
            print(f"| {name} | {cpu:.1f} | {wall:.1f} |", flush=True)
    if (folder / "theirs").exists():
        sizes = size(folder / "ours"), size(folder / "theirs" / "korean")
        print(f"\nSize of the folder, ours over theirs: {sizes[0] / sizes[1]:.3f}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
