"""What a layer with adapters is."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_lora.adapters.low_rank import LowRankAdapter
from lightning_lora.errors import ConfigError
from lightning_lora.inits import Stage, resolve
from lightning_lora.layers.starting import first_factors, init_name, start_misfit
from lightning_lora.marks import MERGED
from lightning_lora.names import joined
from lightning_lora.ops.defaults import plain_defaults
from lightning_lora.ops.dropout import dropout
from lightning_lora.ops.norms import accumulation_dtype
from lightning_lora.ops.sharded import gathered, is_flattened, is_partitioned, is_sharded
from lightning_lora.ops.stacks import add_product

if TYPE_CHECKING:
    from lightning_lora.adapters import Adapter, Rows

    Base = nn.Module
else:
    Base = object


class Mixture(NamedTuple):
    """A batch whose samples have different adapters: how many there are, and which of them each adapter has."""

    samples: int
    rows: dict[str, Tensor]


class LoRALayer(Base):
    """A layer with adapters, by name, in ``lora``; those in ``lora_active`` take part in its forward.

    Subclasses are mixins, one per layer type. They say how the layer's weight is seen as a matrix and how its kind of
    product is taken with a low-rank matrix. All that a layer gains is called ``lora...``, so that nothing hides what
    a user's class or its children are called.
    """

    lora_plain_class: ClassVar[type[nn.Module]]
    lora_dense_linear: ClassVar[bool] = False  # what "all-linear" means
    lora_is_part: ClassVar[bool] = False  # of a weight that other layers have parts of too
    lora_has_rows: ClassVar[bool] = False  # the rows of the weight are those of tokens, and can be trained one by one
    lora_packed: bool = False  # the weight can't be read without unpacking it
    lora_starts_as_told: ClassVar[bool] = True  # by init_lora_weights

    lora_absorbed: tuple[str, ...] = ()  # adapters whose first factors are taken out of the stored weight

    lora_mixture: "Mixture | None" = None  # which adapter each sample of a batch has

    lora: nn.ModuleDict
    lora_active: tuple[str, ...]

    @override
    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base = out = self.lora_base_forward(input, *args, **kwargs)
        if self.lora_mixture is not None:
            return self.lora_mixed(self.lora_mixture, input, base, *args, **kwargs)
        for name in self.lora_active:
            out = self.lora[name](self, input, base, out, *args, **kwargs)
        return out

    def lora_mixed(self, mixture: "Mixture", input: Tensor, base: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The output for a batch in which samples have adapters of their own: each as in a batch by itself."""
        if not mixture.rows:
            return base
        if len(input) != mixture.samples:
            raise ConfigError(
                f"mixed_batch: {mixture.samples} samples were assigned, and a {type(self).lora_plain_class.__name__} "
                f"is given {len(input)}: name an adapter for each row of its first dimension"
            )
        parts = []
        for name, index in mixture.rows.items():
            part = base[index]
            parts.append(self.lora[name](self, input[index], part, part, *args, **kwargs))
        return base.index_copy(0, torch.cat(list(mixture.rows.values())), torch.cat(parts))

    def lora_adapters(self) -> dict[str, "Adapter"]:
        """The adapters by name."""
        return dict(self._modules["lora"]._modules)  # type: ignore[union-attr, arg-type]

    def lora_pairs(self) -> dict[str, LowRankAdapter]:
        """Those of them that are low-rank pairs."""
        return {n: a for n, a in self.lora_adapters().items() if isinstance(a, LowRankAdapter)}

    def lora_base_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The forward of the layer as it was, with what was taken out of the stored weight."""
        out = self.lora_stored_forward(x, *args, **kwargs)
        for name in self.lora_absorbed:
            adapter: Any = self.lora[name]
            A, B = adapter.start(x)
            out = self.lora_add(out, x, A, B, adapter.scaling)
        return out

    def lora_stored_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The forward with the stored weight."""
        out = super().forward(x, *args, **kwargs)
        if not isinstance(out, Tensor):
            cls = type(self).lora_plain_class.__name__
            raise TypeError(
                f"{cls}.forward returned {type(out).__name__}; an adapter needs a Tensor. Name this layer in "
                "exclude_modules."
            )
        return out

    def lora_is_whole(self) -> bool:
        """Whether this process has the whole weight, now."""
        weight: Any = self.weight
        return not (is_sharded(weight) or is_flattened(weight) or is_partitioned(weight))

    @staticmethod
    def lora_matrix_shape(layer: Any) -> tuple[int, ...]:
        """(out, in) of a layer's weight seen as a matrix, with adapters or without; of a stack (n, out, in)."""
        raise NotImplementedError

    @staticmethod
    def lora_weight_name(name: str) -> str:
        """The name of the weight of a layer of this name."""
        return joined(name, "weight")

    def lora_parameter(self, key: str) -> tuple[nn.Module, str]:
        """The module that has a parameter of this layer, and what it is called there."""
        return self, key

    @classmethod
    def lora_peft_shapes(cls, layer: Any, r: int) -> dict[str, tuple[int, ...]]:
        """How PEFT keeps A, B and the magnitude for such a layer: the ends of their keys, in this order, and shapes.

        PEFT writes the magnitude without ``.weight`` and reads it in both ways; transformers' ``load_adapter`` leaves
        it out, without a word, unless it has that end.
        """
        rows, columns = cls.lora_matrix_shape(layer)
        return {"lora_A.weight": (r, columns), "lora_B.weight": (rows, r), "lora_magnitude_vector.weight": (rows,)}

    @classmethod
    def lora_peft_problem(cls, layer: Any) -> str | None:
        """Why an adapter on this layer would compute something else in PEFT; None when it would not."""
        return None

    def lora_matrix(self) -> Tensor:
        """The weight as that matrix, with what was taken out of the stored one: then a copy, in float32 at least."""
        W = self.lora_stored_matrix()
        for name in self.lora_absorbed:
            adapter: Any = self.lora[name]
            W = W.to(accumulation_dtype(W, adapter.A))
            A, B = adapter.start(W)
            W = add_product(W, B, A, adapter.scaling)
        return W

    def lora_stored_matrix(self) -> Tensor:
        """The stored weight as that matrix."""
        weight: Any = self.weight
        return self.lora_as_matrix(weight)

    def lora_as_matrix(self, weight: Tensor) -> Tensor:
        """A tensor shaped like the weight, as that matrix: a view, or else a copy that `lora_put` takes."""
        return weight.detach()

    def lora_put(self, weight: Tensor, matrix: Tensor) -> None:
        """Writes what `lora_as_matrix` gave of a weight back into it, where that was a copy."""

    def lora_low_rank(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """The layer's own kind of product of x with the matrix B A."""
        raise NotImplementedError

    def lora_add(self, out: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
        """``out`` plus scale times that product."""
        return torch.add(out, self.lora_low_rank(x, A, B).to(out.dtype), alpha=scale)

    def lora_per_row(self, vector: Tensor) -> Tensor:
        """A vector (out,) in the shape that broadcasts over the layer's output."""
        return vector

    def lora_bias_per_row(self) -> Tensor | None:
        """The bias in that shape, or None."""
        bias = getattr(self, "bias", None)
        return None if bias is None else self.lora_per_row(bias)

    def lora_drop(self, x: Tensor, p: float, training: bool) -> Tensor:
        """Dropout on an adapter's input."""
        return dropout(x, p, training)

    def lora_rows(self, index: Tensor) -> Tensor:
        """Rows of the weight, on every rank, where they are those of tokens (``lora_has_rows``)."""
        weight: Any = self.weight
        return gathered(weight.detach())[index]

    def lora_with_rows(self, x: Tensor, base: Tensor, out: Tensor, rows: "Rows") -> Tensor:
        """``out`` with what other rows in place of the weight's make of x."""
        raise NotImplementedError

    def lora_initialise(
        self, adapter: LowRankAdapter, device: torch.device | None = None, init: Callable[..., Any] | None = None
    ) -> None:
        """Gives an adapter on this layer its first values.

        Args:
            adapter: The adapter.
            device: Where to work them out; where the weight is by default.
            init: The initialisation; that of the adapter's config by default.
        """
        W, init = self.lora_matrix(), init or resolve(adapter.config.init_lora_weights)
        if getattr(init, "stage", Stage.INJECTED) > Stage.INJECTED:
            W = gathered(W) if device is None else gathered(W).to(device)
        with plain_defaults():
            A, B, of_the_weight = self.lora_initial_factors(init, W, adapter)
        adapter.initialise(W, A, B, of_the_weight)

    def lora_initial_factors(
        self, init: Callable[..., Any], W: Tensor, adapter: LowRankAdapter
    ) -> tuple[Tensor, Tensor, bool]:
        """The first A and B, and whether they are a part of the weight: what the initialisation says."""
        factors = first_factors(init, W, adapter)
        shapes = [tuple(factor.shape) for factor in factors]
        if shapes != [tuple(adapter.A.shape), tuple(adapter.B.shape)]:
            wanted = f"{tuple(adapter.A.shape)} and {tuple(adapter.B.shape)}"
            raise ValueError(f"{init_name(init)} must return tensors A and B of shapes {wanted}, and gave {shapes}")
        return *factors, getattr(init, "of_the_weight", False)

    def lora_give_back(self) -> None:
        """Puts what was taken out of the stored weight into it again, rounded."""
        W, weight = self.lora_matrix(), self.weight
        assert isinstance(weight, Tensor)
        self.lora_put(weight, self.lora_as_matrix(weight).copy_(W))
        self.lora_absorbed = ()

    @override
    def extra_repr(self) -> str:
        return ", ".join(filter(None, [super().extra_repr(), f"lora_active={list(self.lora_active)}"]))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LoRALayer":
        """What a merge keeps moves and is cast with the layer."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if (kept := vars(self).get(MERGED)) is not None:
            kept._apply(fn)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """A new weight is told to the adapters on it, and refused while it would overwrite a merged one."""
        loads = [key for key in self._parameters if prefix + key in state_dict]
        if loads and MERGED in vars(self):
            args[-1].append(f"adapters are merged into {prefix.rstrip('.')}: call ll.unmerge before loading weights")
            return
        for name in self.lora_absorbed:
            keys = [f"{prefix}lora.{name}.{key}" for key in ("A", "start_A", "start_B")]
            if keys[0] in state_dict and (why := start_misfit(self, name, *map(state_dict.get, keys[1:]))) is not None:
                args[-1].append(f"{prefix.rstrip('.')}: {why}")
        super()._load_from_state_dict(state_dict, prefix, *args)
        weight: Any = self.weight
        if "weight" in loads and not weight.is_meta:
            self.lora_follow()

    def lora_follow(self) -> None:
        """The weight has got other values: what adapters derive from it they derive again."""
        for name, adapter in self.lora_adapters().items():
            again = adapter.start_A is not None and adapter.untouched and name not in self.lora_absorbed
            if again and isinstance(adapter, LowRankAdapter):
                self.lora_initialise(adapter)
            else:
                adapter.follow(self)


GAINED = ("lora", "lora_active", *(name for name in dir(LoRALayer) if name.startswith("lora_")))
