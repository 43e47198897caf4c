"""Ranks and first values that come from batches of data."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed, nn

from lightning_lora.errors import ConfigError, TargetError, raise_all
from lightning_lora.inits import EVA, Kaiming, resolve
from lightning_lora.inject import initialise
from lightning_lora.inputs import counted, gradients, leaders, listening, rows
from lightning_lora.layers import LoRALayer, lora_layers
from lightning_lora.marks import merged_problems
from lightning_lora.names import clean
from lightning_lora.ops.sharded import all_objects, world_size
from lightning_lora.ops.sketch import GradientSketch
from lightning_lora.ops.spread import Share, spread
from lightning_lora.ops.streaming import PrincipalRows
from lightning_lora.settle import settle
from lightning_lora.state import require_adapter
from lightning_lora.targets import Plan, draft
from lightning_lora.undisturbed import undisturbed

GRADIENT_BATCHES = 8  # from which ranks are spread: what counts is which layers have large gradients, not their noise
GRADIENT_RHO = 4  # times its rank is what a layer may get
_END = object()

Step = Callable[[Any], Any]


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
        TargetError: If none of its linear layers is called, or the loss does not depend on them.

    Example:
        >>> from lightning_lora import LoRAConfig, inject
        >>> model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> _ = inject(model, LoRAConfig(r=4, init_lora_weights="eva", modules_to_save=None))
        >>> plan = initialise_from_data(model, [torch.randn(32, 16)])
        >>> sum(target.r for target in plan.targets)
        8
    """
    raise_all(ConfigError, merged_problems(model, "call ll.unmerge first"), "initialise_from_data")
    require_adapter(model, adapter_name)
    held = [layer.lora_adapters()[adapter_name] for _, layer in lora_layers(model) if adapter_name in layer.lora]
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
        for name, adapter in layer.lora_adapters().items()
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
    adapted = {clean(name): layer for name, layer in lora_layers(model) if adapter_name in layer.lora}
    linears = {name: layer for name, layer in adapted.items() if layer.lora_dense_linear}
    config = next(iter(adapted.values())).lora_adapters()[adapter_name].config
    init: Any = resolve(config.init_lora_weights)
    with undisturbed(model):
        if isinstance(init, EVA):
            ranks, found = _by_variance(linears, adapter_name, init, batches, step)
        else:
            ranks, found = _by_gradients(linears, adapter_name, batches, step), {}
    ranks = _of_first_rank(ranks)
    config = settle(model, adapter_name, ranks)
    if isinstance(init, EVA):
        _start(model, adapter_name, init, found)
    initialise(model)
    plan, _ = draft(model, config)
    return plan


def _by_variance(
    linears: Mapping[str, LoRALayer], adapter_name: str, init: EVA, batches: Iterable[Any], step: Step
) -> tuple[dict[str, int], dict[str, PrincipalRows]]:
    """Ranks, and the components of each layer's inputs."""
    r = {name: layer.lora_adapters()[adapter_name].r for name, layer in linears.items()}
    most = {name: min(init.most(r[name]), *layer.lora_matrix_shape(layer)) for name, layer in linears.items()}
    first: dict[str, str] = {}
    seen: dict[str, PrincipalRows] = {}
    likeness: dict[str, float] = {}
    mask: Tensor | None = None

    def hear(name: str, x: Tensor) -> None:
        before = seen[name].V
        seen[name].add(rows(x, mask))
        group = [r[other] for other, leader in first.items() if leader == name]
        likeness[name] = seen[name].likeness(before, max(group))

    for batch in _together(batches, init.batches, lambda: bool(likeness) and min(likeness.values()) >= init.tau):
        with torch.no_grad():
            if not first:
                first = _agreed(leaders(linears, partial(step, batch)))
                counts = {
                    leader: max(most[n] for n, own in first.items() if own == leader) for leader in first.values()
                }
                seen = {leader: PrincipalRows(count) for leader, count in counts.items()}
            mask = counted(batch, init.use_label_mask)
            with listening({leader: linears[leader] for leader in seen}, hear):
                step(batch)
    for leader in seen:
        seen[leader] = _merged(seen[leader])
    found = {name: seen[leader] for name, leader in first.items()}
    shares = {name: Share(found[name].shares(most[name])) for name in linears if name in found}
    return spread(shares, sum(r[name] for name in shares)), found


def _by_gradients(
    linears: Mapping[str, LoRALayer], adapter_name: str, batches: Iterable[Any], step: Step
) -> dict[str, int]:
    """Ranks."""
    r = {name: layer.lora_adapters()[adapter_name].r for name, layer in linears.items()}
    shape = {name: layer.lora_matrix_shape(layer) for name, layer in linears.items()}
    most = {name: min(GRADIENT_RHO * r[name], *shape[name]) for name in linears}
    sketches = {
        name: GradientSketch(
            shape[name][0], shape[name][1], 2 * most[name] + 8, linears[name].lora_adapters()[adapter_name].seed
        )
        for name in linears
    }

    def take(name: str, x: Tensor, delta: Tensor) -> None:
        sketches[name].add(x, delta)

    for batch in _together(batches, GRADIENT_BATCHES, lambda: False):
        with torch.enable_grad(), gradients(linears, take):
            loss = _loss_of(step(batch))
            if loss is None or not loss.requires_grad:
                raise TargetError(
                    f"rank_pattern='auto' needs a loss that depends on the adapted layers, and got {_shown(loss)}: "
                    "training_step (or forward=...) has to return it"
                )
            torch.autograd.backward(loss)
    reached = _agreed({name: name for name, sketch in sketches.items() if sketch.Y is not None})
    gains = {name: [s * s for s in sketches[name].singular_values(most[name])] for name in reached}
    shares = {name: Share(gains[name], sum(shape[name]), least=1) for name in reached}
    return spread(shares, sum(r[name] * sum(shape[name]) for name in reached))


def _start(model: nn.Module, adapter_name: str, init: EVA, found: Mapping[str, PrincipalRows]) -> None:
    """A from the components; where there are none as by default."""
    without = []
    for name, layer in lora_layers(model):
        adapter = layer.lora_adapters().get(adapter_name)
        if adapter is None:
            continue
        seen = found.get(clean(name))
        if seen is None or seen.S is None or seen.V is None:
            layer.lora_initialise(adapter, init=Kaiming())
            without.append(name)
        else:
            A = init.start(seen.S, seen.V, adapter.r, adapter.generator())
            B = torch.zeros(adapter.B.shape, device="cpu")
            layer.lora_initialise(adapter, init=lambda *args, A=A, B=B: (A, B))


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


def _agreed(found: dict[str, str]) -> dict[str, str]:
    """What every process has found of the layers, and so can be worked out together."""
    each = all_objects(found)
    shared = {name: leader for name, leader in each[0].items() if all(other.get(name) == leader for other in each)}
    shared = {name: leader for name, leader in shared.items() if leader in shared}
    if not shared:
        raise TargetError("initialise_from_data: the batches reach none of the linear layers that have an adapter")
    return shared


def _merged(seen: PrincipalRows) -> PrincipalRows:
    """The rows of all processes: the same on each, to the bit."""
    first, *others = all_objects(seen.cpu())
    for other in others:
        first.merge(other)
    return _of_first_rank(first)  # type: ignore[no-any-return]


def _of_first_rank(value: Any) -> Any:
    if world_size() == 1:
        return value
    values = [value]
    distributed.broadcast_object_list(values, src=0)
    return values[0]


def _forward(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch[0] if isinstance(batch, (tuple, list)) else batch)


def _loss_of(result: Any) -> Tensor | None:
    loss = result.get("loss") if isinstance(result, Mapping) else getattr(result, "loss", result)
    return loss if isinstance(loss, Tensor) and loss.numel() == 1 else None


def _shown(loss: Tensor | None) -> str:
    return "no scalar" if loss is None else "one that needs no gradient"
