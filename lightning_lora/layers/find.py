"""The modules of a model without its adapters, found fast: switching between adapters takes little else."""

from collections.abc import Iterator

from torch import nn

from lightning_lora.layers.base import LoRALayer

CHILD = "_lora_weights"  # where a module keeps what stands for parameters that it reads: no part of any name


def told_by(model: nn.Module, method: str) -> nn.Module | None:
    """The module that a method returns (``get_input_embeddings``) which not every model has, or answers."""
    try:
        found: nn.Module | None = getattr(type(model), method)(model)
    except (AttributeError, NotImplementedError, TypeError):
        return None
    return found


def base_modules(model: nn.Module) -> list[nn.Module]:
    """A module and all below it, each once, without adapters."""
    found: dict[int, nn.Module] = {}
    waiting: list[nn.Module | None] = [model]
    while waiting:
        module = waiting.pop()
        if module is None or id(module) in found:
            continue
        found[id(module)] = module
        if children := module._modules:
            adapted = isinstance(module, LoRALayer)
            waiting += [child for key, child in reversed(children.items()) if not (adapted and key == "lora")]
    return [*found.values()]


def named_base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The same with names, each under its first one."""
    seen: set[int] = set()
    waiting: list[tuple[str, nn.Module | None]] = [("", model)]
    while waiting:
        name, module = waiting.pop()
        if module is None or id(module) in seen:
            continue
        seen.add(id(module))
        yield name, module
        if children := module._modules:
            adapted, prefix, below = (
                isinstance(module, LoRALayer),
                f"{name}." if name else "",
                reversed(children.items()),
            )
            waiting += [(prefix + key, child) for key, child in below if not (adapted and key == "lora")]


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALayer]]:
    """The layers with adapters, each once, under its first name; a parameter that is read under its own."""
    for name, module in named_base_modules(model):
        if isinstance(module, LoRALayer):
            yield name.replace(f"{CHILD}.", ""), module
