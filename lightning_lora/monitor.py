"""What adapters become while they are trained, for any Lightning logger."""

from collections.abc import Container, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_lora.adapters import LowRankAdapter
from lightning_lora.analysis.factor_grams import measure
from lightning_lora.checks import flag_problems, is_positive_int
from lightning_lora.errors import ConfigError, UnsupportedError, listing, no_adapter, raise_all
from lightning_lora.layers import LoRALayer, lora_layers
from lightning_lora.lightning_packages import CallbackBase
from lightning_lora.names import clean
from lightning_lora.ops.norms import accumulation_dtype, row_squares
from lightning_lora.ops.sharded import gathered, is_flattened, is_partitioned, is_plain
from lightning_lora.optim import held_by

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class _Site(NamedTuple):
    """An adapter, the layer that it is on, and the norms of that layer's rows, if it has magnitudes."""

    name: str
    adapter: LowRankAdapter
    norms: Tensor | None

    @property
    def magnitude(self) -> Tensor:
        """DoRA's m."""
        magnitude: Any = self.adapter.magnitude
        return torch.as_tensor(magnitude).detach()


class LoRAMonitor(CallbackBase):
    r"""Logs what each adapter has become, every so many optimizer steps.

    For each adapter, over its layers: ``effective_rank`` of :math:`\Delta W = s\,B A` (the mean), ``delta_norm``
    :math:`\|\Delta W\|_F`, ``A_norm``, ``B_norm``, and with DoRA ``magnitude_drift``
    :math:`\|m - \|W\|\| / \|\|W\|\|`, each norm over all layers together. They come from products of A and of B with
    themselves, (r, r), where these lie: ΔW is never formed, and nothing waits for a device in other steps.

    Values go to every logger of the Trainer, for the step that they belong to, and to ``trainer.callback_metrics``.
    (``self.log`` would write them only where they fall on ``log_every_n_steps``, and again in steps in which nothing
    was measured.) All ranks measure the same. Adapters in pieces (sharded ones, DeepSpeed's stage 3) are refused.

    Args:
        every_n_steps: How often.
        adapter_names: Which adapters; all that are trained by default.
        per_layer: Log each layer too, as ``lora/<adapter>/<layer>/<what>``.
        gradients: Log ``grad_norm`` too: of the adapter's gradients in that step, before they are clipped.
        updates: Log ``step_norm`` too: how far the step moved the adapter's tensors. Takes a copy of them in that step.

    Raises:
        ConfigError: With everything that is wrong with the arguments, or if a run has no such adapters.
        UnsupportedError: If adapters are in pieces.

    Example:
        >>> LoRAMonitor(every_n_steps=100).every_n_steps
        100
    """

    def __init__(
        self,
        every_n_steps: int = 50,
        adapter_names: list[str] | None = None,
        per_layer: bool = False,
        gradients: bool = False,
        updates: bool = False,
    ) -> None:
        flags = {"per_layer": per_layer, "gradients": gradients, "updates": updates}
        raise_all(ConfigError, _argument_problems(every_n_steps, adapter_names, flags), "LoRAMonitor")
        self.every_n_steps, self.adapter_names = every_n_steps, adapter_names
        self.per_layer, self.gradients, self.updates = per_layer, gradients, updates
        self._sites: dict[str, list[_Site]] = {}
        self._step, self._in_a_batch = 0, 1
        self._norms: dict[int, Tensor] = {}  # of gradients, by parameter
        self._before: dict[int, Tensor] = {}  # values before the step, by parameter

    @override
    def on_train_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Called when training begins. Finds the adapters."""
        found = _sites(pl_module, self.adapter_names, held_by(trainer.optimizers))
        if self.gradients and type(trainer.strategy).__name__ == "DeepSpeedStrategy":
            raise UnsupportedError("LoRAMonitor: DeepSpeed frees gradients before a step: leave gradients=True out")
        self._sites, self._step = found, trainer.global_step

    @override
    def on_before_optimizer_step(self, trainer: "Trainer", pl_module: "LightningModule", optimizer: Any) -> None:
        """Called before each step. Looks at gradients and keeps values, if this step is going to be logged."""
        in_a_batch = max(self._in_a_batch, len(trainer.optimizers))  # what is due is told when the batch ends
        if not (self.gradients or self.updates) or not self._is_due(trainer.global_step + in_a_batch):
            return
        own = held_by([optimizer])
        held = [p for sites in self._sites.values() for s in sites for p in s.adapter.parameters() if id(p) in own]
        if self.gradients:
            self._norms |= {id(p): _norm(p.grad) for p in held if p.grad is not None}
        if self.updates:
            self._before |= {id(p): p.detach().clone() for p in held if id(p) not in self._before}

    @override
    def on_train_batch_end(
        self, trainer: "Trainer", pl_module: "LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Called when a training batch ends. Logs, if a step of it is to be logged."""
        due, self._in_a_batch = self._is_due(trainer.global_step), trainer.global_step - self._step
        self._step = trainer.global_step
        if due:
            self._log(trainer)
        self._norms.clear()
        self._before.clear()

    def _log(self, trainer: "Trainer") -> None:
        values = {f"lora/{key}": value for name, sites in self._sites.items() for key, value in self._of(name, sites)}
        trainer.callback_metrics.update({key: torch.tensor(value) for key, value in values.items()})
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.fit_loop.epoch_loop._batches_that_stepped)

    @override
    def on_train_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Called when training ends."""
        self._forget()

    @override
    def on_exception(self, trainer: "Trainer", pl_module: "LightningModule", exception: BaseException) -> None:
        """Called when a run is broken off."""
        self._forget()

    def _forget(self) -> None:
        self._sites, self._step = {}, 0
        self._norms.clear()
        self._before.clear()

    def _is_due(self, step: int) -> bool:
        return bool(self._sites) and step // self.every_n_steps > self._step // self.every_n_steps

    @torch.no_grad()
    def _of(self, adapter_name: str, sites: list[_Site]) -> Iterator[tuple[str, float]]:
        """What is logged of an adapter: of its layers together, and of each if that is wanted."""
        table = measure([site.adapter for site in sites])
        norms = [(_norm(site.magnitude - m), _norm(m)) for site in sites if (m := site.norms) is not None]
        if norms:
            moved, whole = torch.stack([torch.stack(pair) for pair in norms]).double().cpu().T
            table["magnitude_drift"] = moved / whole.clamp_min(torch.finfo(whole.dtype).tiny)
        if self._norms:
            table["grad_norm"] = _together(sites, self._norms)
        if self._before:
            held = [p for site in sites for p in site.adapter.parameters() if id(p) in self._before]
            table["step_norm"] = _together(sites, {id(p): _norm(p - self._before[id(p)]) for p in held})
        for what, column in table.items():
            if what == "effective_rank":
                whole_value = column.mean()
            elif what == "magnitude_drift":
                whole_value = torch.linalg.vector_norm(moved) / torch.linalg.vector_norm(whole)
            else:
                whole_value = torch.linalg.vector_norm(column)
            yield f"{adapter_name}/{what}", float(whole_value)
            if self.per_layer:
                for site, value in zip(sites, column.tolist(), strict=True):
                    yield f"{adapter_name}/{site.name}/{what}", value


def _together(sites: list[_Site], norms: Mapping[int, Tensor]) -> Tensor:
    """By layer the norm of what its adapter's tensors have together."""
    columns = [[norms[id(p)] for p in site.adapter.parameters() if id(p) in norms] for site in sites]
    zero = next(iter(norms.values())).new_zeros(())
    return torch.stack([_norm(torch.stack(own)) if own else zero for own in columns]).double().cpu()


def _norm(tensor: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(tensor.detach(), dtype=accumulation_dtype(tensor))
    return norm


def _argument_problems(every_n_steps: Any, adapter_names: Any, flags: Mapping[str, Any]) -> Iterator[str]:
    if not is_positive_int(every_n_steps):
        yield f"every_n_steps must be a number of steps, got {every_n_steps!r}"
    names = adapter_names if isinstance(adapter_names, list) else []
    if adapter_names is not None and not (names and all(isinstance(name, str) for name in names)):
        yield f"adapter_names must be a list of names or null, got {adapter_names!r}"
    yield from flag_problems(**flags)


def _sites(model: nn.Module, adapter_names: list[str] | None, in_run: Container[int]) -> dict[str, list[_Site]]:
    """The layers of each adapter that is watched: of all that the run trains, if none is named.

    Raises:
        ConfigError: If there is no such adapter.
        UnsupportedError: If one is in pieces.
    """
    found: dict[str, list[tuple[str, LoRALayer, LowRankAdapter]]] = {}
    for name, layer in lora_layers(model):
        for adapter_name, adapter in layer.lora_pairs().items():
            if adapter.A.requires_grad or id(adapter.A) in in_run or adapter_names is not None:
                found.setdefault(adapter_name, []).append((clean(name), layer, adapter))
    problems = [no_adapter(name, found) for name in adapter_names or () if name not in found]
    if not found:
        problems = [
            "the model has no adapters with A and B that are trained: add ll.LoRA(...) to the callbacks, or leave the "
            "monitor out where rows of tokens are all that is trained"
        ]
    raise_all(ConfigError, problems, "LoRAMonitor")
    chosen = {name: found[name] for name in adapter_names or found}
    held = [each for sites in chosen.values() for each in sites]
    split = [name for name, _, adapter in held if not (is_plain(adapter.A) and is_plain(adapter.B))]
    split += [name for name, layer, adapter in held if hasattr(adapter, "magnitude") and _is_away(layer)]
    if split:
        raise UnsupportedError(
            f"LoRAMonitor: {listing(split, 3)}: this rank has a part only of the adapter, or of the weight that its "
            "magnitude belongs to: leave the monitor out (or shard_adapters=True), and call lightning-lora analyze on "
            "checkpoints"
        )
    return {
        name: [_Site(n, adapter, _row_norms(layer, adapter)) for n, layer, adapter in sites]
        for name, sites in chosen.items()
    }


def _is_away(layer: LoRALayer) -> bool:
    weight: Any = layer.weight
    return is_flattened(weight) or is_partitioned(weight)


def _row_norms(layer: LoRALayer, adapter: LowRankAdapter) -> Tensor | None:
    r""":math:`\|W\|` by row: what a magnitude starts from."""
    if not hasattr(adapter, "magnitude"):
        return None
    W = layer.lora_matrix()
    return gathered(row_squares(W, accumulation_dtype(W, adapter.A)).sqrt())
