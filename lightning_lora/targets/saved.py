"""modules_to_save: what is trained in full beside the adapters."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn
from torch.nn.parameter import is_lazy

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import listing
from lightning_lora.layers import base_modules, original_type
from lightning_lora.marks import is_lightning_module, was_trainable
from lightning_lora.methods.method import MethodConfig
from lightning_lora.names import is_within, joined, outermost
from lightning_lora.quantization import is_quantized
from lightning_lora.targets.patterns import parse, unmatched
from lightning_lora.targets.roles import Roles
from lightning_lora.targets.twins import meant
from lightning_lora.targets.walk import Node, own_parameters

_LISTS = (nn.ParameterList, nn.ParameterDict)
_NORMS = re.compile(r"(?i:rms|layer|group)_?Norm")


@dataclass(frozen=True, kw_only=True)
class SavedModule:
    """A module, or a single parameter, that is trained in full and saved in full."""

    name: str
    type: str
    parameters: int
    reason: str
    aliases: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """All names, the first one first."""
        return (self.name, *self.aliases)


def saved_modules(
    tree: dict[str, Node], config: LoRAConfig | MethodConfig, roles: Roles, problems: list[str]
) -> tuple[SavedModule, ...]:
    """The modules and bare parameters to train in full, by detection or by the user's list."""
    if config.modules_to_save is None:
        return ()
    parameters = _bare_parameters(tree)
    if isinstance(config.modules_to_save, str):
        wanted = {name: reason for name, reason in roles.heads.items() if name in tree or name in parameters}
    else:
        wanted = {}
        for pattern in parse(config.modules_to_save):
            hits = [n.name for n in tree.values() if n.name and any(pattern.matches(name) for name in n.names)]
            hits += [name for name in parameters if pattern.matches(name)]
            if not hits:
                problems.append(unmatched("modules_to_save", pattern, [*tree, *parameters]))
            wanted.update(dict.fromkeys(meant(hits, roles.twins, str), "modules_to_save"))
        wanted = {name: wanted[name] for name in outermost(wanted)}
    return tuple(filter(None, (_saved(name, why, tree, parameters, problems) for name, why in wanted.items())))


def norms(
    tree: dict[str, Node], config: LoRAConfig, saved: tuple[SavedModule, ...], problems: list[str]
) -> tuple[SavedModule, ...]:
    """The normalisations that are trained beside the adapters, but for those in modules that are trained in full."""
    if config.train_norms and not any(is_norm(node.cls, node.module) for node in tree.values()):
        problems.append("train_norms: the model has no LayerNorm, RMSNorm or GroupNorm with weights")
    taken = [name for module in saved for name in module.names]
    return tuple(
        SavedModule(
            name=node.name,
            type=node.cls.__name__,
            parameters=sum(parameter.numel() for _, parameter in own_parameters(node.module)),
            reason="train_norms",
            aliases=tuple(node.aliases),
        )
        for node in tree.values()
        if config.train_norms and is_norm(node.cls, node.module)
        if not any(is_within(node.name, outer) for outer in taken)
    )


def own_left(tree: dict[str, Node], config: LoRAConfig, saved: tuple[SavedModule, ...]) -> list[str]:
    """Notes on parameters of a LightningModule itself that stay frozen: weights of losses, say, which are new.

    Beside a transformers model they are heads. In plain torch code they may as well be part of what was pretrained.
    """
    root, taken = tree[""], [name for module in saved for name in module.names]
    if config.modules_to_save != "auto" or not is_lightning_module(root.module):
        return []
    lists = [node for node in tree.values() if "." not in node.name and issubclass(node.cls, _LISTS)]
    own = [
        joined(node.name, key)
        for node in (root, *lists)
        for key, _ in own_parameters(node.module)
        if was_trainable(node.module, key) and not any(is_within(joined(node.name, key), outer) for outer in taken)
    ]
    which = f"{listing(own, 3)}: of the LightningModule itself, and not trained"
    return [f"{which}: name it in modules_to_save if it is new (None is for adapters only)"] if own else []


def is_norm(cls: type[nn.Module], module: nn.Module) -> bool:
    """Whether it is a LayerNorm, RMSNorm or GroupNorm, of torch or of a model's own, with weights.

    Models of transformers have classes of their own (LlamaRMSNorm, T5LayerNorm): told by name, and by what they hold.
    """
    own = [parameter for _, parameter in own_parameters(module)]
    return (
        any(_NORMS.search(base.__name__) for base in cls.__mro__)
        and not any(True for _ in module.children())
        and bool(own)
        and all(parameter.dim() == 1 and parameter.is_floating_point() for parameter in own)
    )


def biases(
    tree: dict[str, Node], config: LoRAConfig, adapted: Iterable[Node], saved: tuple[SavedModule, ...]
) -> tuple[SavedModule, ...]:
    """The biases that are trained beside the adapters, but for those in modules that are trained in full."""
    found = {"none": (), "all": tree.values(), "lora_only": adapted}[config.bias]
    names = [name for module in saved for name in module.names]
    return tuple(
        SavedModule(name=name, type="Parameter", parameters=bias.numel(), reason=f"bias={config.bias!r}")
        for node in found
        if (bias := node.module._parameters.get("bias")) is not None and bias.is_floating_point()
        for name in [joined(node.name, "bias")]
        if not any(is_within(name, outer) for outer in names)
    )


def single_parameters(tree: dict[str, Node], names: Mapping[str, str]) -> tuple[SavedModule, ...]:
    """Parameters that are trained in full by themselves, by name with the reason; a tied one is under its first."""
    parameters = _bare_parameters(tree)
    return tuple(
        SavedModule(name=name, type="Parameter", parameters=parameters[name].numel(), reason=reason)
        for name, reason in names.items()
    )


def _bare_parameters(tree: dict[str, Node]) -> dict[str, nn.Parameter]:
    """All parameters by name."""
    return {
        joined(node.name, key): parameter for node in tree.values() for key, parameter in own_parameters(node.module)
    }


def _saved(
    name: str, reason: str, tree: dict[str, Node], parameters: dict[str, nn.Parameter], problems: list[str]
) -> SavedModule | None:
    if name not in tree:
        owned, kind, aliases = [parameters[name]], "Parameter", tuple[str, ...]()
    else:
        module = tree[name].module
        owned = list({id(p): p for m in base_modules(module) for _, p in own_parameters(m)}.values())
        kind, aliases = original_type(module).__name__, tuple(tree[name].aliases)
    inside = list(base_modules(tree[name].module)) if name in tree else []
    if not owned and not any({*m._buffers} - m._non_persistent_buffers_set for m in inside):  # a codebook has buffers
        problems.append(f"modules_to_save: {name} ({kind}) has no parameters to train")
        return None
    if any(is_lazy(p) for p in owned):
        problems.append(f"modules_to_save: {name} ({kind}) is a lazy layer without a shape: run one forward before")
        return None
    if packed := [type(m).__name__ for m in inside if is_quantized(m)]:
        problems.append(f"modules_to_save: {name} ({packed[0]}) is quantised, and can't be trained in full")
        return None
    if odd := [p.dtype for p in owned if not (p.is_floating_point() or p.is_complex())]:
        problems.append(f"modules_to_save: {name} ({kind}) has {odd[0]} parameters, which can't be trained")
        return None
    count = sum(p.numel() for p in owned)
    return SavedModule(name=name, type=kind, parameters=count, reason=reason, aliases=aliases)
