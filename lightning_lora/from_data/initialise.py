"""Ranks and first values that come from batches of data."""

import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from lightning_lora.errors import ConfigError, listing, raise_all
from lightning_lora.from_data.ranks import Step, by_gradients, by_variance
from lightning_lora.from_data.settle import settle
from lightning_lora.from_data.undisturbed import undisturbed
from lightning_lora.inits import EVA, Kaiming, resolve
from lightning_lora.injection.inject import initialise
from lightning_lora.layers import lora_layers
from lightning_lora.marks import merged_problems
from lightning_lora.names import clean
from lightning_lora.ops.sharded import of_first_rank
from lightning_lora.ops.streaming import PrincipalRows
from lightning_lora.state import require_low_rank
from lightning_lora.targets import Plan, draft


def initialise_from_data(
    model: nn.Module,
    batches: Iterable[Any],
    adapter_name: str = "default",
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> Plan:
    r"""Gives an adapter the ranks and the first values that its configuration takes from data.

    ``init_lora_weights="eva"``
        As `lightning_lora.inits.EVA` says: A is what varies most in a layer's inputs, B is 0, and the ranks are spread
        by the variance that they explain.
    ``rank_pattern="auto"``, with another initialisation
        Ranks are spread by gradients. A step within the leading r directions of :math:`G = \partial L / \partial W`
        lowers the loss, to first order, by its size times :math:`\sum_{i \le r} \sigma_i(G)^2` (LoRA-GA,
        arXiv:2407.05000, section 3, takes those directions for A and B). So of all :math:`\sigma_i^2 / (d + k)`, what
        a parameter of a d×k layer gains, with G summed over 8 batches, the largest get a rank, until as many
        parameters are spent as r everywhere would take. Each layer keeps rank 1, and none gets more than 4r. G is not
        formed (`lightning_lora.ops.sketch.GradientSketch`). The values are drawn as by the initialisation then.

    In a Trainer run the callback does this with the Trainer's own train dataloader. The model is run in eval mode
    without adapters; modes, buffers, gradients and random generators are what they were behind it. Where processes
    work together, each goes through its own batches, all of them count, and all ranks get the same.

    Adapters on layers that get other ranks are new ones: make the optimizer behind this.

    Args:
        model: The model, after `inject`.
        batches: Batches on the model's device: a dataloader, a list. As many are taken as it takes.
        adapter_name: The adapter.
        forward: ``forward(model, batch)``; for ``rank_pattern="auto"`` it returns the loss, or something with a
            ``loss``. By default a mapping is unpacked into keyword arguments, of a tuple or list the first is taken.

    Returns:
        The plan with the ranks.

    Raises:
        ConfigError: For an adapter that is not there, needs no data or is trained already, and if there are no batches.
            If inputs or gradients are not finite.
        TargetError: If none of its linear layers is called, none of what they are called with varies, or the loss does
            not depend on them.

    Example:
        >>> from lightning_lora import LoRAConfig, inject
        >>> model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> _ = inject(model, LoRAConfig(r=4, init_lora_weights="eva", modules_to_save=None))
        >>> plan = initialise_from_data(model, [torch.randn(32, 16)])
        >>> sum(target.r for target in plan.targets)
        8
    """
    raise_all(ConfigError, merged_problems(model, "call ll.unmerge first"), "initialise_from_data")
    require_low_rank(model, adapter_name)
    held = [pairs[adapter_name] for _, layer in lora_layers(model) if adapter_name in (pairs := layer.lora_pairs())]
    if not held[0].config.needs_data:
        raise ConfigError(
            f"initialise_from_data: adapter {adapter_name!r} takes nothing from data: init_lora_weights='eva' or "
            "rank_pattern='auto' asks for it"
        )
    if not all(adapter.untouched for adapter in held):
        raise ConfigError(f"initialise_from_data: adapter {adapter_name!r} is trained already: delete it first")
    return fill_from_data(model, batches, adapter_name, partial(forward or _forward, model))


def waits_for_data(model: nn.Module, adapter_name: str) -> bool:
    """Whether an adapter has no values yet, and gets them from data."""
    return any(
        adapter.config.needs_data and not adapter.initialised
        for _, layer in lora_layers(model)
        for name, adapter in layer.lora_pairs().items()
        if name == adapter_name
    )


def fill_from_data(model: nn.Module, batches: Iterable[Any], adapter_name: str, step: Step) -> Plan:
    """What `initialise_from_data` does, without its checks.

    Args:
        model: The model.
        batches: The batches.
        adapter_name: The adapter.
        step: What is called with each.
    """
    adapted = {clean(name): layer for name, layer in lora_layers(model) if adapter_name in layer.lora_pairs()}
    linears = {name: layer for name, layer in adapted.items() if layer.lora_dense_linear}
    config = next(iter(adapted.values())).lora_adapters()[adapter_name].config
    init: Any = resolve(config.init_lora_weights)
    with undisturbed(model):
        if isinstance(init, EVA):
            ranks, found = by_variance(linears, adapter_name, init, batches, step)
        else:
            ranks, found = by_gradients(linears, adapter_name, batches, step), {}
    if unreached := [name for name in linears if name not in ranks]:
        warnings.warn(f"{listing(unreached)}: no batch reached them: they keep their rank", stacklevel=2)
    ranks = of_first_rank(ranks)
    config = settle(model, adapter_name, ranks)
    if isinstance(init, EVA):
        _start(model, adapter_name, init, found)
    initialise(model)
    plan, _ = draft(model, config)
    return plan


def _start(model: nn.Module, adapter_name: str, init: EVA, found: Mapping[str, PrincipalRows]) -> None:
    """A from the components; where there are none as by default."""
    for name, layer in lora_layers(model):
        adapter = layer.lora_pairs().get(adapter_name)
        if adapter is None:
            continue
        seen = found.get(clean(name))
        if seen is None or seen.S is None or seen.V is None:
            layer.lora_initialise(adapter, init=Kaiming())
        else:
            A = init.start(seen.S, seen.V, adapter.r, adapter.generator())
            B = torch.zeros(adapter.B.shape, device="cpu")
            layer.lora_initialise(adapter, init=lambda *args, A=A, B=B: (A, B))


def _forward(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch[0] if isinstance(batch, (tuple, list)) else batch)
