"""How much is trained, of how much, in how many bytes."""

from dataclasses import dataclass
from math import prod
from typing import Any

from torch import nn
from typing_extensions import override

from lightning_lora.layers import base_modules
from lightning_lora.marks import trained_in_full
from lightning_lora.ops.masters import Masters


@dataclass(frozen=True)
class Size:
    """Parameters and their bytes in memory."""

    parameters: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class Summary:
    """Counts of a model, each parameter once: shared and tied ones too, packed 4-bit ones as what they stand for.

    Args:
        base: Frozen parameters.
        adapters: Parameters of adapters.
        in_full: Parameters of modules that are trained in full.
        trainable: What has ``requires_grad``.
    """

    base: Size
    adapters: Size
    in_full: Size
    trainable: int

    @property
    def total(self) -> int:
        """How many parameters there are, those of the adapters included."""
        return self.base.parameters + self.adapters.parameters + self.in_full.parameters

    @property
    def percent(self) -> float:
        """The trainable part of all, in percent."""
        return 100 * self.trainable / self.total if self.total else 0.0

    @override
    def __str__(self) -> str:
        parts = [("base", self.base), ("adapters", self.adapters), ("trained in full", self.in_full)]
        sizes = ", ".join(f"{name} {format_bytes(part.bytes)}" for name, part in parts if part.bytes)
        return f"trainable {self.trainable:,} of {self.total:,} parameters ({self.percent:.4g} %); {sizes}"


def summary(model: nn.Module) -> Summary:
    """Counts the parameters of a model, also on the meta device.

    Example:
        >>> from lightning_lora import LoRAConfig, inject
        >>> model = nn.Sequential(nn.Linear(1024, 1024, bias=False))
        >>> _ = inject(model, LoRAConfig(r=8))
        >>> summary(model).trainable
        16384
    """
    counts = {"base": [0, 0], "adapters": [0, 0], "in_full": [0, 0]}
    in_full, seen, trainable = trained_in_full(base_modules(model)), set[int](), 0
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is None or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            kind = "in_full" if id(parameter) in in_full else "base"
            part = counts["adapters" if isinstance(module, Masters) else kind]
            part[0] += (numel := _numel(parameter))
            part[1] += parameter.numel() * parameter.element_size()
            trainable += numel * parameter.requires_grad
    return Summary(**{name: Size(*values) for name, values in counts.items()}, trainable=trainable)


def parameters_in(module: nn.Module) -> int:
    """How many parameters a module has, each once, packed ones as what they stand for."""
    return sum(map(_numel, module.parameters()))


def format_bytes(size: float) -> str:
    """A size in powers of 1000, as disks and papers count.

    >>> format_bytes(4_330_000)
    '4.33 MB'
    """
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            break
        size, unit = size / 1000, {"B": "kB", "kB": "MB", "MB": "GB", "GB": "TB"}[unit]
    return f"{size:.3g} {unit}"


def _numel(parameter: Any) -> int:
    """The number of weights that a parameter stands for: bitsandbytes packs two 4-bit weights into a byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else prod(state.shape)
