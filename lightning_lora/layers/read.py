"""Parameters that are read, not called: attention that holds its projections itself, recurrent layers, experts.

The module that reads such a parameter (its *reader*) gets another class: while its forward runs, the parameter's place
holds the adapted weight. The adapters sit on a `ReadWeight`, a layer that stands for one parameter: what it is given is
that parameter, and what it returns is what the reader shall see. So everything that holds for layers holds here.
"""

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from typing_extensions import override

from lightning_lora.layers.lazy import lazily
from lightning_lora.layers.reading import facts_of, weights_read
from lightning_lora.layers.registry import adapts, registered_base
from lightning_lora.layers.stand_in import LoRAStandIn, Owner, StandIn, stand_ins
from lightning_lora.ops.stacks import add_product


class ReadWeight(StandIn):
    """Stands for a parameter: a matrix (out, in), or a stack of matrices (n, out, in).

    Args:
        reader: The module in whose forward it is read.
        holder: The module that has it: the reader, or a child of it.
        key: Its name there.
        name: Its name as the reader knows it.
    """

    def __init__(self, reader: nn.Module, holder: nn.Module, key: str, name: str) -> None:
        super().__init__(reader, holder, key, name)
        parameter = getattr(holder, key)  # FSDP is going to flatten it
        self.lora_shape: tuple[int, ...] = () if is_lazy(parameter) else tuple(parameter.shape)

    @property
    def transposed(self) -> bool:
        """Whether the matrices of a stack are stored as (in, out): transformers' experts say so, but for some."""
        holder = self.lora_place[1]
        said = self.said_transposed or any(cls.__name__ == "Llama4TextExperts" for cls in type(holder).__mro__)
        return len(self.lora_shape) == 3 and said

    @property
    def said_transposed(self) -> bool:
        """Whether the module says so: what PEFT goes by."""
        return bool(getattr(self.lora_place[1], "is_transposed", False))

    @override
    def forward(self, weight: Tensor) -> Tensor:
        return weight


class ReadLinear(ReadWeight):
    """One that is the weight of a dense linear map, so that "all-linear" means it."""


_STANDS_FOR: dict[Any, type[ReadWeight]] = {nn.Linear: ReadLinear, nn.Embedding: ReadWeight}


@adapts(f"{__name__}.ReadWeight")
class LoRARead(LoRAStandIn):
    """The weight is the input: W + Σ ΔW comes out, to be read.

    There is nothing that ``lora_dropout`` could drop, unless the weight is a stack: that is adapted only where it is
    multiplied (`lightning_lora.layers.lazy`).
    """

    lora_shape: tuple[int, ...]
    if TYPE_CHECKING:
        transposed: bool

    @override
    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if input.dim() == 3 and self.lora_mixture is None and (out := lazily(self, input)) is not None:
            return out
        return super().forward(input, *args, **kwargs)

    @override
    @staticmethod
    def lora_matrix_shape(layer: Any) -> tuple[int, ...]:
        *stack, rows, columns = layer.lora_shape
        return (*stack, columns, rows) if layer.transposed else (*stack, rows, columns)

    @override
    @staticmethod
    def lora_weight_name(name: str) -> str:
        return name

    @override
    def lora_parameter(self, key: str) -> tuple[nn.Module, str]:
        _, holder, own = self.lora_place
        return holder, own

    @override
    @classmethod
    def lora_peft_shapes(cls, layer: Any, r: int) -> dict[str, tuple[int, ...]]:
        *stack, rows, columns = cls.lora_matrix_shape(layer) if layer.said_transposed else layer.lora_shape
        ranks = r * (stack[0] if stack else 1)
        return {"lora_A.weight": (ranks, columns), "lora_B.weight": (rows, ranks)}

    @override
    def lora_as_matrix(self, weight: Tensor) -> Tensor:
        return weight.detach().mT if self.transposed else weight.detach()

    @override
    def lora_low_rank(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return A.mT @ B.mT if self.transposed else B @ A

    @override
    def lora_add(self, out: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
        left, right = (A.mT, B.mT) if self.transposed else (B, A)
        return add_product(out, left.to(out.dtype), right.to(out.dtype), scale)

    @override
    def lora_per_row(self, vector: Tensor) -> Tensor:
        return vector.unsqueeze(-2 if self.transposed else -1)

    @override
    def lora_drop(self, x: Tensor, p: float, training: bool) -> Tensor:
        return x


@adapts(f"{__name__}.ReadLinear")
class LoRAReadLinear(LoRARead):
    """One that "all-linear" means."""

    lora_dense_linear = True


class Reading(Owner):
    """A module in whose forward some parameters are adapted ones."""

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        sites = [site for site in read_weights(self) if getattr(site, "lora_active", ())]
        kept: list[tuple[nn.Module, str, Tensor]] = []
        try:
            for site in sites:
                _, holder, key = site.lora_place
                weight = getattr(holder, key)
                adapted = site(weight)
                kept.append((holder, key, weight))
                _put(holder, key, adapted)
            _reread(self)
            return super().forward(*args, **kwargs)
        finally:
            for holder, key, weight in kept:
                _put(holder, key, weight)
            _reread(self)


def read_weights(reader: nn.Module) -> list[ReadWeight]:
    """The parameters of a reader that have adapters."""
    return [site for site in stand_ins(reader) if isinstance(site, ReadWeight)]


def readable(module: nn.Module) -> list[ReadWeight]:
    """What stands for the weights that a module reads, and of whose layers it calls none."""
    keys = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
    own = keys if isinstance(module, nn.MultiheadAttention) else ()
    sites: list[ReadWeight] = [
        ReadLinear(module, module, key, key) for key in own if module._parameters.get(key) is not None
    ]
    for name, kind in read_layers(module).items():
        layer: Any = module._modules[name]
        sites.append(kind(module, layer, "weight", f"{name}.weight"))
    return sites


def read_layers(module: nn.Module) -> dict[str, type[ReadWeight]]:
    """The children of a module whose weight it reads with gradients, and never calls; what stands for such a weight."""
    found = {}
    plain: Any = getattr(type(module), "lora_plain_class", type(module))
    for name, with_gradients in weights_read(plain, facts_of(module, plain)).items() if module._modules else ():
        layer = module._modules.get(name)
        if with_gradients and layer is not None and layer._parameters.get("weight") is not None:
            if (kind := _STANDS_FOR.get(registered_base(type(layer)))) is not None:
                found[name] = kind
    return found


def _put(holder: nn.Module, key: str, value: Tensor) -> None:
    """Where the holder's forward will find it: FSDP keeps views of parameters before the parameters."""
    place: dict[str, Any] = vars(holder) if key in vars(holder) else holder._parameters
    place[key] = value


def _reread(reader: nn.Module) -> None:
    """Recurrent layers keep a list of their weights."""
    if isinstance(reader, nn.RNNBase):
        vars(reader)["_flat_weights"] = [getattr(reader, name, None) for name in reader._flat_weights_names]
