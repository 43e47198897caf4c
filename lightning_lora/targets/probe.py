"""Whether a layer can have an adapter, and whether an adapter on it would do what its equation says."""

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.nn.parameter import is_lazy

from lightning_lora.adapters import variant_class
from lightning_lora.config import LoRAConfig
from lightning_lora.inits import Stage, resolve
from lightning_lora.layers import (
    GAINED,
    LoRALayer,
    Part,
    ReadWeight,
    attach,
    detach,
    has_own_forward,
    is_without_gradients,
    kind_of,
    original_type,
    reaches_base_forward,
    registered_base,
)
from lightning_lora.ops.defaults import plain_defaults
from lightning_lora.ops.sharded import is_plain
from lightning_lora.quantization import is_quantized
from lightning_lora.targets.uncalled import read_instead, tied_to
from lightning_lora.targets.walk import Node

TOLERANCE = 0.02  # of the update's norm: layers may round to bfloat16
ROWS = 8  # of an embedding that is tried

_GAINED = frozenset(GAINED)
_BLIND = "{}.forward runs without gradients: an adapter would be dead"


class Probe:
    """Finds out which layers can have an adapter of a config. Remembers what it found for a class.

    Args:
        config: What is asked for.
    """

    def __init__(self, config: LoRAConfig) -> None:
        self._config = config
        self._own: dict[type, list[str]] = {}
        self._wrong: dict[type, str | None] = {}
        self._untried: dict[type, str | None] = {}

    def obstacle(self, node: Node) -> str | None:
        """Why an adapter on this layer would be wrong or dead; None when nothing is known to speak against it."""
        return self.unfit(node) or tied_to(node)

    def unfit(self, node: Node) -> str | None:
        """Why this layer cannot have an adapter of any kind; None when it can."""
        layer, cls = node.module, node.cls
        if isinstance(layer, ReadWeight):
            return _reader_problem(layer)
        if isinstance(layer, Part):
            return self._part_problem(layer)
        if (why := bypass(node)) is not None:
            return why
        if not isinstance(layer, LoRALayer) and (taken := self._taken(layer)):
            return f"it has an attribute {taken[0]!r} of its own"
        if layer._parameters.get("weight") is None:
            return "its weight is computed by a parametrization (weight_norm, spectral_norm, ...); remove that first"
        if is_quantized(layer):
            return None
        self._try(layer, cls)
        return self._wrong[cls]

    def _part_problem(self, part: Part) -> str | None:
        """What keeps the parts of a layer from having adapters; None when nothing is known to."""
        owner = part.lora_place[0]
        cls = original_type(owner)
        if has_own_forward(cls) and not is_quantized(owner):
            self._try(owner, cls)
        if "forward" in vars(owner) or (has_own_forward(cls) and (reaches_base_forward(cls) or self._wrong.get(cls))):
            return "the forward of its layer is one of its own, and may do more to the product"
        if self._config.needs_data:
            return "'eva' and rank_pattern='auto' look at whole layers: name the layer itself"
        if getattr(resolve(self._config.init_lora_weights), "stage", Stage.INJECTED) is Stage.PACKED:
            return "init_lora_weights='loftq' starts whole layers: name the layer itself"
        return None if owner._parameters.get("weight") is not None else "its weight is computed by a parametrization"

    def doubt(self, node: Node) -> str | None:
        """Why it is not known whether an adapter on this layer would do what it should."""
        return self._untried.get(node.cls)

    def _taken(self, layer: nn.Module) -> list[str]:
        """The names of what adapters add to a layer that it has already."""
        cls: Any = type(layer)
        if cls.__getattr__ is not nn.Module.__getattr__ or cls.__getattribute__ is not object.__getattribute__:
            return [name for name in GAINED if hasattr(layer, name)]
        if cls not in self._own:
            self._own[cls] = [name for name in GAINED if hasattr(cls, name)]
        own = (vars(layer), layer._parameters, layer._buffers, layer._modules)
        return self._own[cls] or [name for names in own for name in _GAINED.intersection(names)]

    def _try(self, layer: nn.Module, cls: type[nn.Module]) -> None:
        if cls not in self._wrong:
            wrong = untried = None
            if has_own_forward(cls) and not is_lazy(cast(Tensor, layer.weight)):
                try:
                    wrong = _BLIND.format(cls.__name__) if is_without_gradients(cls.forward) else None
                    with unset_fake_temporarily():  # numbers are compared
                        wrong = wrong or _difference(layer, cls, self._config)
                except Exception as error:  # whatever a user's forward may raise on a tensor that it is not made for
                    untried = f"{cls.__name__}.forward could not be tried on a small tensor ({_in_a_line(error)})"
            self._wrong[cls], self._untried[cls] = wrong, untried


def bypass(node: Node) -> str | None:
    """What keeps calls of this layer from reaching an adapter; None when nothing is known to."""
    if (why := read_instead(node)) is not None:
        return why
    if node.kind is None:
        return f"{node.cls.__name__} is no layer type that can have an adapter"
    if "_hf_hook" in vars(node.module):
        return (
            "its forward is that of accelerate's hooks, which bypasses an adapter: load the base without device_map "
            "(a Trainer places it, or model.to)"
        )
    if "forward" in vars(node.module):
        return "its forward was replaced on the instance, which bypasses an adapter"
    return None


def _reader_problem(site: ReadWeight) -> str | None:
    """What keeps a module from reading the adapted parameter; None when nothing is known to."""
    reader, holder, key = site.lora_place
    if "forward" in vars(reader):
        return "the forward of its module was replaced on the instance, which bypasses an adapter"
    if is_quantized(holder):
        return f"{type(holder).__name__} is packed, and its module reads it as it is"
    if holder._parameters.get(key) is None:
        return "it is computed by a parametrization (weight_norm, spectral_norm, ...); remove that first"
    return None


def weight_problem(node: Node) -> str | None:
    """What is wrong with the weight of a layer that is to be adapted; None when nothing is."""
    layer: Any = node.module.lora_place[0] if isinstance(node.module, Part) else node.module
    weight: Any = getattr(layer, "weight", None)
    if is_lazy(weight):
        return f"{node.name} is a lazy layer without a shape: run one forward before adapters are added"
    if weight is None or is_quantized(layer):
        return None
    if weight.layout is not torch.strided:
        return f"{node.name} has a sparse weight ({weight.layout}): make it dense, or name it in exclude_modules"
    if not weight.is_floating_point():
        what = "complex" if weight.is_complex() else "integer"
        return f"{node.name} has a {what} weight ({weight.dtype}), to which an adapter can't add: use exclude_modules"
    if isinstance(layer, nn.Linear) and weight.dim() == 2 and len(weight) != layer.out_features and is_plain(weight):
        return (  # transformers' resize of Marian leaves it so
            f"{node.name} has a weight of {len(weight)} rows and says out_features={layer.out_features}: set "
            "out_features to what is there"
        )
    return None


@torch.no_grad()
def _difference(layer: nn.Module, cls: type[nn.Module], config: LoRAConfig) -> str | None:
    """Compares the forward with an adapter and the forward with the merged weight, on a copy with random values."""
    kind, base = kind_of(cls), registered_base(cls)
    assert kind is not None
    with torch.random.fork_rng(devices=[]), plain_defaults():
        torch.manual_seed(0)  # the same verdict on every rank and in every run
        probe = _copy_for_probing(layer, base)
        inputs = _small_inputs(probe, base)
        if not isinstance(before := cls.forward(probe, inputs[0]), Tensor):
            return f"{cls.__name__}.forward returns {type(before).__name__}, not a tensor"
        plain = _outputs(probe, inputs)
        adapter = variant_class(config.variant)(
            kind.lora_matrix_shape(probe), r=2, lora_alpha=1.0, config=LoRAConfig(), seed=0,
            dtype=torch.float32, device=torch.device("cpu"),
        )  # fmt: skip
        for parameter in adapter.parameters():
            parameter.normal_()
        adapter.initialised = True
        attach(probe, "probe", adapter)
        merged = torch.empty_like(probe.weight)
        probe.lora_put(merged, probe.lora_as_matrix(merged).copy_(adapter.merged(probe.lora_matrix())))
        with torch.enable_grad():
            if not type(probe).forward(probe, inputs[0]).requires_grad:
                return _BLIND.format(cls.__name__)
        adapted = _outputs(probe, inputs)
        detach(probe, "probe")
        probe._parameters["weight"] = nn.Parameter(merged, requires_grad=False)
        expected = _outputs(probe, inputs)
    for before, got, wanted in zip(plain, adapted, expected, strict=True):
        if got.shape != wanted.shape or not (got - wanted).norm() <= TOLERANCE * (wanted - before).norm():
            return f"{cls.__name__}.forward with an adapter would not be its forward with the merged weight"
    return None


def _outputs(probe: nn.Module, inputs: list[Tensor]) -> list[Tensor]:
    """What it gives for each input in eval and in train mode, always with the same random numbers."""
    outputs = []
    for probe.training in (False, True):
        torch.manual_seed(1)
        outputs += [type(probe).forward(probe, x).clone() for x in inputs]
    return outputs


def _copy_for_probing(layer: nn.Module, base: type[nn.Module]) -> Any:
    """A copy on the CPU with random weights that shares nothing that a forward could write to."""
    probe: Any = copy.copy(layer)
    vars(probe).update({key: value.copy() for key, value in vars(layer).items() if isinstance(value, dict)})
    if isinstance(layer, LoRALayer):
        del probe._modules["lora"], vars(probe)["lora_active"]
        probe = _plain(probe)
    if base is nn.Embedding:
        probe.num_embeddings = min(probe.num_embeddings, ROWS)
        probe.padding_idx = None
        probe._parameters["weight"] = torch.empty(probe.num_embeddings, probe.embedding_dim)
    for tensors in (probe._parameters, probe._buffers):
        for key, tensor in tensors.items():
            if tensor is not None:
                tensors[key] = _stand_in(tensor)
    for key, parameter in probe._parameters.items():
        probe._parameters[key] = parameter if parameter is None else nn.Parameter(parameter, requires_grad=False)
    for key, child in probe._modules.items():
        probe._modules[key] = child if child is None else copy.deepcopy(child).cpu()
    return probe


def _plain(probe: Any) -> Any:
    plain = object.__new__(original_type(probe))
    vars(plain).update(vars(probe))
    return plain


def _stand_in(tensor: Tensor) -> Tensor:
    if tensor.is_floating_point():
        return torch.randn(tensor.shape)
    return torch.zeros(tensor.shape, dtype=tensor.dtype) if tensor.is_meta else tensor.detach().cpu().clone()


def _small_inputs(layer: Any, base: type[nn.Module]) -> list[Tensor]:
    """Inputs of several sizes: what a forward does to them first (norms, clamps) shows at some of these."""
    if base is nn.Embedding:
        return [torch.arange(2)[None]]
    if hasattr(layer, "kernel_size"):
        sides = [d * (k - 1) + 1 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        x = torch.randn(2, layer.in_channels, *sides)
    else:
        x = torch.randn(8, layer.in_features if hasattr(layer, "in_features") else layer.weight.shape[0])
    return [x, 0.1 * x, 10 * x]


def _in_a_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:160]
