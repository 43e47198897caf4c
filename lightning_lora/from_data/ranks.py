"""Which ranks and first values batches of data speak for."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_lora.errors import ConfigError, TargetError, raise_all
from lightning_lora.from_data.components import Components
from lightning_lora.from_data.inputs import counted, gradients
from lightning_lora.inits import EVA
from lightning_lora.layers import LoRALayer
from lightning_lora.ops.finite import is_finite
from lightning_lora.ops.sharded import all_objects, of_any_rank, world_size
from lightning_lora.ops.sketch import GradientSketch
from lightning_lora.ops.spread import Share, spread
from lightning_lora.ops.streaming import PrincipalRows

GRADIENT_BATCHES = 8  # from which ranks are spread: what counts is which layers have large gradients, not their noise
GRADIENT_RHO = 4  # times its rank is what a layer may get
_END = object()

Step = Callable[[Any], Any]


def by_variance(
    linears: Mapping[str, LoRALayer], adapter_name: str, init: EVA, batches: Iterable[Any], step: Step
) -> tuple[dict[str, int], dict[str, PrincipalRows]]:
    """Ranks by the variance that components of inputs explain, and these components, by layer (see `EVA`).

    Args:
        linears: The layers.
        adapter_name: The adapter on them.
        init: The options.
        batches: The batches.
        step: What is called with each.
    """
    r = {name: layer.lora_adapters()[adapter_name].r for name, layer in linears.items()}
    most = {name: min(init.most(r[name]), *layer.lora_matrix_shape(layer)) for name, layer in linears.items()}
    components = Components(linears, r, most)
    for batch in _together(batches, init.batches, lambda: components.settled(init.tau)):
        with torch.no_grad():
            components.take(batch, step, counted(batch, init.use_label_mask))
    found = components.merged()
    shares = {name: Share(found[name].shares(most[name])) for name in linears if name in found}
    ranks = spread(shares, sum(r[name] for name in shares))
    if not any(ranks.values()):
        raise TargetError(
            "initialise_from_data: what the batches give the layers does not vary (one row, or rows that are all the "
            "same), so that there are no components to start from: give it more of the data"
        )
    return ranks, found


def by_gradients(
    linears: Mapping[str, LoRALayer], adapter_name: str, batches: Iterable[Any], step: Step
) -> dict[str, int]:
    """Ranks by what parameters gain from the gradients (see `lightning_lora.initialise_from_data`).

    Args:
        linears: The layers.
        adapter_name: The adapter on them.
        batches: The batches.
        step: What is called with each; gives the loss.
    """
    r = {name: layer.lora_adapters()[adapter_name].r for name, layer in linears.items()}
    shape = {name: layer.lora_matrix_shape(layer) for name, layer in linears.items()}
    most = {name: min(GRADIENT_RHO * r[name], *shape[name]) for name in linears}
    sketches = {
        name: GradientSketch(
            shape[name][0], shape[name][1], 2 * most[name] + 8, linears[name].lora_adapters()[adapter_name].seed
        )
        for name in linears
    }

    odd: list[str] = []

    def take(name: str, x: Tensor, delta: Tensor) -> None:
        if is_finite(x) and is_finite(delta):
            sketches[name].add(x, delta)
        else:
            odd.append(f"the inputs of {name}, or gradients of its outputs, are not finite in a batch")

    for batch in _together(batches, GRADIENT_BATCHES, lambda: False):
        with torch.enable_grad(), gradients(linears, take):
            loss = _loss_of(step(batch))
            if loss is None or not loss.requires_grad:
                raise TargetError(
                    f"rank_pattern='auto' needs a loss that depends on the adapted layers, and got {_shown(loss)}: "
                    "training_step (or forward=...) has to return it"
                )
            torch.autograd.backward(loss)
        raise_all(ConfigError, of_any_rank(odd[:1]), "initialise_from_data")
    each = all_objects([name for name, sketch in sketches.items() if sketch.Y is not None])
    reached = [name for name in each[0] if all(name in other for other in each)]
    if not reached:
        raise TargetError("initialise_from_data: the batches reach none of the linear layers that have an adapter")
    gains = {name: [s * s for s in sketches[name].singular_values(most[name])] for name in reached}
    shares = {name: Share(gains[name], sum(shape[name]), least=1) for name in reached}
    return spread(shares, sum(r[name] * sum(shape[name]) for name in reached))


def _together(batches: Iterable[Any], most: int, enough: Callable[[], bool]) -> Iterator[Any]:
    """Batches as long as every process has one, not all of them have enough, and there were not too many."""
    iterator, count = iter(batches), 0
    while count < most:
        batch = next(iterator, _END)
        states = all_objects((batch is _END, enough()))
        if any(ended for ended, _ in states) or all(done for _, done in states):
            break
        yield batch
        count += 1
    if not count:
        raise ConfigError("initialise_from_data: there is no batch" + " on some rank" * (world_size() > 1))


def _loss_of(result: Any) -> Tensor | None:
    loss = result.get("loss") if isinstance(result, Mapping) else getattr(result, "loss", result)
    return loss if isinstance(loss, Tensor) and loss.numel() == 1 else None


def _shown(loss: Tensor | None) -> str:
    return "no scalar" if loss is None else "one that needs no gradient"
