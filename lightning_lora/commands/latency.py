"""``lightning-lora latency``: what an adapter costs in inference, merged or not, on your own shapes."""

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_lora.commands.arguments import Commands, existing, existing_folder, positive_int
from lightning_lora.commands.models import add_adapter_options, config_of, is_unasked
from lightning_lora.errors import ConfigError, first_line, raise_all

if TYPE_CHECKING:
    from lightning_lora.analysis.latency import Latency

_DTYPES = ("float32", "bfloat16", "float16")


def add(commands: Commands) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser(
        "latency",
        help="time a model without an adapter, with it, and with it merged",
        description="Times forward passes of a transformers model without an adapter, with it, and with it merged, "
        "and how long switching, merging and unmerging take; of DoRA also what it is with its norms kept, as texts are "
        "generated (dora_caching). All are timed in turn, round by round, and compared "
        "within a round: medians of ratios, with the middle half of them. Without ADAPTER one with random values is "
        "made, of the rank and on the layers that are asked for.",
        epilog="example: lightning-lora latency adapters/prose --base models/llama --batch-size 1 --seq-len 1 128",
    )
    parser.add_argument("adapter", metavar="ADAPTER", nargs="?", type=existing, help="a PEFT folder or a checkpoint")
    parser.add_argument("--adapter", metavar="NAME", dest="adapter_name", help="which, of a checkpoint with several")
    parser.add_argument("--base", metavar="DIR", type=existing_folder, required=True, help="the transformers model")
    parser.add_argument("--batch-size", type=positive_int, default=1, help="samples (default: %(default)s)")
    parser.add_argument(
        "--seq-len", type=positive_int, nargs="+", default=[128], help="tokens of each, one or more (default: 128)"
    )
    parser.add_argument("--rounds", type=positive_int, default=15, help="how often (default: %(default)s)")
    parser.add_argument("--dtype", choices=_DTYPES, default="float32", help="of the weights (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 (default: %(default)s)")
    add_adapter_options(parser)
    parser.add_argument("--json", action="store_true", dest="as_json", help="print one JSON object")
    parser.set_defaults(run=run)


def run(
    adapter: Path | None,
    adapter_name: str | None,
    base: Path,
    batch_size: int,
    seq_len: list[int],
    rounds: int,
    dtype: str,
    device: str,
    as_json: bool,
    **options: Any,
) -> None:
    """Runs it."""
    from lightning_lora.analysis.latency import measure_latency

    config = config_of(options)
    if adapter is not None and not is_unasked(config):
        raise ConfigError(f"{adapter} has ranks and layers of its own: leave the options of an adapter out, or ADAPTER")
    if adapter is None and adapter_name is not None:
        raise ConfigError(f"--adapter {adapter_name} is one of a file with several: give that file (ADAPTER)")
    model = _loaded(base, dtype, device)
    if adapter is None:
        _random(model, config)
    else:
        _read(model, adapter, adapter_name)
    found = [measure_latency(model, batch_size, length, rounds) for length in seq_len]
    if as_json:
        print(json.dumps([each.to_dict() for each in found], sort_keys=True))
    else:
        print("\n".join(line for each in found for line in _lines(each)))


def _loaded(base: Path, dtype: str, device: str) -> Any:
    import torch

    from lightning_lora.commands.models import described_model
    from lightning_lora.recipes.building import load_base

    cls: Any = type(described_model(str(base)))
    try:
        place = torch.device(device)
        torch.empty(1, device=place)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        raise ConfigError(f"--device {device} can't be used ({first_line(error)})") from error
    return load_base(cls, str(base), dtype=getattr(torch, dtype)).to(place).eval()


def _read(model: Any, adapter: Path, adapter_name: str | None) -> None:
    from lightning_lora.loading.load import read_stored
    from lightning_lora.loading.placement import place
    from lightning_lora.switching.switch import set_adapter

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what it was trained on: times don't depend on values
        stored = read_stored(adapter, adapter_name)
        raise_all(ConfigError, stored.name_problems(adapter_name))
        for name in ("one", "other"):
            place(model, stored, name, allow_base_mismatch=True, dtype=None)
    set_adapter(model, "one")


def _random(model: Any, config: Any) -> None:
    import torch

    from lightning_lora.injection.inject import inject
    from lightning_lora.layers import lora_layers
    from lightning_lora.switching.switch import set_adapter

    for name in ("one", "other"):
        inject(model, config, name)
    generator = torch.Generator().manual_seed(0)
    for _, layer in lora_layers(model):
        for adapter in layer.lora_pairs().values():
            adapter.B.data.copy_(torch.randn(adapter.B.shape, generator=generator) / adapter.B.shape[0])
    set_adapter(model, "one")


def _lines(found: "Latency") -> Iterator[str]:
    yield f"batch {found.batch_size}, {found.seq_len} tokens"
    yield f"  {'forward':<12}{'ms':>10}  of the base, by the median (and the middle half) of ratios"
    for timing in found.forward:
        spread = f"{timing.ratio:.3f} ({timing.low:.3f} to {timing.high:.3f})" if timing.name != "base" else "1"
        yield f"  {timing.name:<12}{1e3 * timing.seconds:>10.3f}  {spread}"
    for timing in found.others:
        middle = f"({1e3 * timing.low:.3f} to {1e3 * timing.high:.3f})"
        yield f"  {timing.name:<12}{1e3 * timing.seconds:>10.3f}  {middle}"
