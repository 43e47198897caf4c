"""Saving, loading, switching and merging adapters, beside PEFT on the same ones.

    python -m tests.benchmarks.adapters [--layers 32] [--hidden 1024] [--r 16] [--repeats 7]

A Llama in bfloat16 with two adapters on all linears. Prints a table of ratios, ours over theirs: the median over pairs
that are taken in turn. PEFT writes no checksums, no card and no fingerprint of the base, and does not wait for the disk;
ours does all of that. Times are no tests: run it on a quiet machine.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import transformers as tf
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import lightning_lora as ll
from lightning_lora.layers import lora_layers

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NAMES = ("korean", "coding")


def base(layers: int, hidden: int) -> nn.Module:
    """A Llama with values that are cheap to make."""
    sizes = {"hidden_size": hidden, "intermediate_size": hidden * 11 // 4 // 64 * 64, "num_hidden_layers": layers}
    config = tf.LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=8, vocab_size=512)
    with torch.device("meta"):
        model = tf.LlamaForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02, generator=generator)
    return model.eval()


def adapted(model: nn.Module, r: int) -> nn.Module:
    """Two adapters, as after training."""
    for name in NAMES:
        ll.inject(model, ll.LoRAConfig(r=r, lora_alpha=r / 2, target_modules=TARGETS, modules_to_save=None), name)
    for _, layer in lora_layers(model):
        for adapter in layer.lora_adapters().values():
            nn.init.normal_(adapter.B, std=0.02)
    return model


def ratio(ours: Callable[[], object], theirs: Callable[[], object], repeats: int, undo: Callable[[], object]) -> float:
    """The median of pairs; ``undo`` is not timed."""
    ratios = []
    for _ in range(repeats + 1):
        times = []
        for act in (ours, theirs):
            start = time.perf_counter()
            act()
            times.append(time.perf_counter() - start)
            undo()
        ratios.append(times[0] / times[1])
    return statistics.median(ratios[1:])


def unloading(layers: int, hidden: int, config: LoraConfig, repeats: int) -> float:
    """``merge_and_unload`` of both: each time of an adapter that is new on a base that is not."""
    ours, theirs = base(layers, hidden), base(layers, hidden)
    pair: list[nn.Module] = []

    def adapt() -> None:
        ll.inject(ours, ll.LoRAConfig(r=config.r, target_modules=TARGETS, modules_to_save=None))
        pair[:] = [ours, get_peft_model(theirs, config)]

    def undo() -> None:
        if not ll.adapters(ours):
            adapt()

    adapt()
    acts = (lambda: pair[1].merge_and_unload(), lambda: ll.merge_and_unload(pair[0]))
    return 1 / ratio(*acts, repeats, undo)


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("layers", 32), ("hidden", 1024), ("r", 16), ("repeats", 7)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    folder = Path(tempfile.mkdtemp())
    ours = adapted(base(options.layers, options.hidden), options.r)
    ll.set_adapter(ours, "korean")
    for name in NAMES:
        ll.save_adapter(ours, folder / name, name)
    config = LoraConfig(r=options.r, lora_alpha=options.r / 2, target_modules=TARGETS)
    theirs = get_peft_model(base(options.layers, options.hidden), config, adapter_name="korean")
    theirs.delete_adapter("korean")
    theirs = PeftModel.from_pretrained(theirs.unload(), folder / "korean", adapter_name="korean").eval()
    theirs.load_adapter(folder / "coding", adapter_name="coding")
    theirs.set_adapter("korean")

    def nothing() -> None:
        return

    def forget() -> None:
        if "new" in ll.adapters(ours):
            ll.delete_adapter(ours, "new")
        if "new" in theirs.peft_config:
            theirs.delete_adapter("new")

    def unmerge() -> None:
        if any(layer.lora_active == () for _, layer in lora_layers(ours)):
            ll.unmerge(ours)
        theirs.unmerge_adapter()

    def raw() -> None:
        blob = bytes(size(folder / "korean"))
        with open(folder / "raw", "wb") as file:
            file.write(blob)
            file.flush()
            os.fsync(file.fileno())

    def switch(act: Callable[[str], object]) -> Callable[[], object]:
        names = iter([*reversed(NAMES)] * (options.repeats + 2))
        return lambda: act(next(names))

    save = lambda: ll.save_adapter(ours, folder / "ours", "korean")  # noqa: E731
    rows = {
        "saving": (save, lambda: theirs.save_pretrained(folder / "theirs", selected_adapters=["korean"]), nothing),
        "saving, over a raw write": (save, raw, nothing),
        "loading": (
            lambda: ll.load_adapter(ours, folder / "coding", "new"),
            lambda: theirs.load_adapter(folder / "coding", adapter_name="new"),
            forget,
        ),
        "switching": (switch(lambda n: ll.set_adapter(ours, n)), switch(theirs.set_adapter), nothing),
        "merging": (lambda: ll.merge(ours), lambda: theirs.merge_adapter(), unmerge),
    }
    print("| | ours over PEFT's |\n| --- | --- |")
    for name, (act, other, undo) in rows.items():
        print(f"| {name} | {ratio(act, other, options.repeats, undo):.2f} |", flush=True)
    print(
        f"| merging for good | {unloading(options.layers, options.hidden, config, options.repeats):.2f} |", flush=True
    )
    files = size(folder / "ours"), size(folder / "theirs" / "korean")
    print(f"| size of the folder | {files[0] / files[1]:.3f} |")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
