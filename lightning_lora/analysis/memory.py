"""Will it fit? What training a model with adapters takes, before a weight is loaded."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import nn

from lightning_lora.analysis.memory_advice import cheaper_ways
from lightning_lora.analysis.memory_cards import card_bytes, card_problem
from lightning_lora.analysis.memory_estimate import MemoryEstimate
from lightning_lora.analysis.memory_inputs import positions_problem, transformers_model
from lightning_lora.analysis.memory_optimizer import optimizer_bytes, optimizer_name, optimizer_problem
from lightning_lora.analysis.memory_run import Run, Steps
from lightning_lora.analysis.memory_step import Way
from lightning_lora.analysis.memory_strategy import STRATEGIES, Parts
from lightning_lora.checks import choice_problems, is_positive_int
from lightning_lora.config import LoRAConfig, Quantization
from lightning_lora.errors import ConfigError, LightningLoRAError, raise_all

PRECISIONS = (None, "32-true", "bf16-true", "16-true", "bf16-mixed", "16-mixed")


def estimate_memory(
    model: nn.Module,
    config: LoRAConfig | None,
    quantization: str | Quantization | None = None,
    optimizer: str | type = "adamw",
    batch_size: int = 1,
    seq_len: int = 1024,
    strategy: str = "ddp",
    devices: int = 1,
    *,
    gradient_checkpointing: bool = False,
    precision: str | None = None,
    attn_implementation: str | None = None,
    card: float | str | None = None,
    compare: bool = False,
    example_inputs: Any = None,
) -> MemoryEstimate:
    r"""Estimates what each device needs to train a model, without a weight in memory.

    A copy of the model, on shapes alone, gets its adapters as in a run, and a forward and a backward pass of it are
    followed operation by operation: what autograd and the functions here keep, and what is there at most. The peak is

    .. math:: \text{weights} + \text{optimizer states} + \max(\text{forward} + \text{gradients}, \text{backward})

    since Lightning frees the gradients of the last step between the two passes. Weights are counted as they are stored:
    of a quantised layer 4.5 bits each (``nf4``), 4.127 (``nf4-dq``) or 8 and a scale for each row (QLoRA,
    arXiv:2305.14314, section 3). What several devices share is worked out from that by formulas.

    Args:
        model: On any device, the meta device among them; it is only read. Without adapters.
        config: The adapters; None for training the whole model.
        quantization: A mode or a `Quantization`. Layers that are quantised already count as they are.
        optimizer: Its name or class: "adamw", "adam", "sgd", "sgd_momentum", "adafactor", "lion", and bitsandbytes'
            "adamw8bit", "adam8bit", "lion8bit", "paged_adamw", "paged_adamw8bit".
        batch_size: Samples on each device.
        seq_len: Tokens of each; images and sounds are as large as the model takes them.
        strategy: "ddp", "fsdp", "fsdp2" (ModelParallelStrategy), "deepspeed_stage_1", "_2" or "_3".
        devices: How many there are.
        gradient_checkpointing: Whether blocks run again in the backward pass.
        precision: As a Trainer's: "bf16-true", say; None leaves dtypes as they are, without autocast.
        attn_implementation: As in transformers: "eager", "sdpa"; None leaves it as it is.
        card: What it is to fit on: GiB, ``"24GiB"``, or a name (``"rtx4090"``, ``"h100"``).
        compare: Whether to give full fine-tuning, LoRA and QLoRA beside it.
        example_inputs: A batch as the model's forward takes it, for others than transformers models: a tensor, a
            tuple, or a dict of keyword arguments. Its values don't matter.

    Returns:
        The estimate.

    Raises:
        ConfigError: With every argument that is wrong.
        TargetError: As in `plan`.
        UnsupportedError: If the model can't be copied, or its forward looks at values.

    Example:
        >>> import torch
        >>> with torch.device("meta"):
        ...     model = nn.Sequential(nn.Linear(4096, 4096), nn.Linear(4096, 4096))
        >>> estimate = estimate_memory(model, LoRAConfig(r=8), "nf4-dq", example_inputs=torch.empty(32, 4096))
        >>> round(8 * sum(layer.bytes for layer in estimate.layers) / (2 * 4096 * 4096), 2)
        4.13
    """
    problems = list(
        _problems(model, config, optimizer, batch_size, seq_len, strategy, devices, precision, card, example_inputs)
    )
    settings = None
    try:
        settings = None if quantization is None else Quantization.of(quantization)
    except ConfigError as error:
        problems += error.problems
    raise_all(ConfigError, problems, "estimate_memory")
    run = Run(
        way=Way(
            config=config,
            quantization=settings,
            batch_size=batch_size,
            seq_len=seq_len,
            gradient_checkpointing=gradient_checkpointing,
            precision=precision,
            attn_implementation=attn_implementation,
        ),
        optimizer=optimizer_name(optimizer) or "",
        strategy=strategy,
        devices=devices,
    )
    steps = Steps(model, example_inputs)
    step, share, size = steps.of(run.way), steps.share(run), None if card is None else card_bytes(card)
    found = MemoryEstimate(
        parts=share.parts,
        phases=share.phases,
        setup=step.base + step.in_full + step.largest if settings is not None else 0,
        host=step.dense + step.in_full,
        paged=optimizer_bytes(run.optimizer, step.trained).paged,
        parameters=step.parameters,
        trainable=step.trainable,
        layers=step.layers,
        options=run.options() | ({} if example_inputs is None else {"batch_size": None, "seq_len": None}),
        card=size,
        compared=_compared(steps, run) if compare else {},
    )
    return found if found.fits in (None, True) else replace(found, changes=tuple(cheaper_ways(steps, run, size or 0)))


def _compared(steps: Steps, run: Run) -> dict[str, Parts]:
    """Full fine-tuning, LoRA and QLoRA, as far as they can be had of this model."""
    config, settings = run.way.config or LoRAConfig(), run.way.quantization or Quantization()
    ways = {
        "full fine-tuning": replace(run.way, config=None, quantization=None),
        "LoRA": replace(run.way, config=config, quantization=None),
        f"QLoRA {settings.mode}": replace(run.way, config=config, quantization=settings),
    }
    found = {}
    for name, way in ways.items():
        try:
            found[name] = steps.parts(replace(run, way=way))
        except LightningLoRAError:
            continue  # of a model that is packed already, or whose linears are all heads
    return found


def _problems(
    model: Any,
    config: Any,
    optimizer: Any,
    batch_size: Any,
    seq_len: Any,
    strategy: Any,
    devices: Any,
    precision: Any,
    card: Any,
    example_inputs: Any,
) -> Iterator[str]:
    if config is not None and not isinstance(config, LoRAConfig):
        yield f"config must be a LoRAConfig, or None for training the whole model, got {type(config).__name__}"
    if (problem := optimizer_problem(optimizer)) is not None:
        yield problem
    for name, value in (("batch_size", batch_size), ("seq_len", seq_len), ("devices", devices)):
        if not is_positive_int(value):
            yield f"{name} must be a positive integer, got {value!r}"
    yield from choice_problems("strategy", strategy, STRATEGIES)
    yield from choice_problems("precision", precision, PRECISIONS)
    if (problem := card_problem(card)) is not None:
        yield problem
    if not isinstance(model, nn.Module):
        yield f"model must be an nn.Module, got {type(model).__name__}"
    elif example_inputs is None and (root := transformers_model(model)) is not None:
        if (problem := positions_problem(root, seq_len)) is not None:
            yield problem
