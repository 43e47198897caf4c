"""What a user asks for: plain, frozen values that a YAML file can hold.

Names and meanings are those of PEFT's ``LoraConfig`` wherever PEFT has the concept. Validation reports every problem
at once, before anything is changed.
"""

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

from lightning_lora.checks import (
    MODES,
    choice_problems,
    flag_problems,
    index_problems,
    is_alpha,
    is_int,
    is_number,
    is_positive_int,
    mapping_problems,
    pattern_problems,
    saved_problems,
    token_problems,
)
from lightning_lora.errors import ConfigError, UnsupportedError, raise_all, unknown_fields

Patterns = str | list[str]

INITS: dict[str, Callable[..., Any]] = {}  # by name, filled by `lightning_lora.inits`


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    r"""Which layers get an adapter, and of what kind.

    A layer with weight :math:`W \in R^{d \times k}` computes :math:`(W + s B A) x`, with :math:`A \in R^{r \times k}`,
    :math:`B \in R^{d \times r}` and :math:`s = \alpha / r` (LoRA, arXiv:2106.09685, section 4.1), or
    :math:`s = \alpha / \sqrt{r}` with ``use_rslora`` (arXiv:2312.03732), or
    :math:`m (W + s B A) / \|W + s B A\|` per output row with ``use_dora`` (arXiv:2402.09353, section 4.1).

    Args:
        r: Rank of A and B.
        lora_alpha: Scale of the update, before it is divided by r (or by the square root of r).
        lora_dropout: Probability of dropout on the adapter's input, in [0, 1).
        target_modules: ``"all-linear"``, ``"attention"``, ``"mlp"``, a regex that matches whole module names, or a
            list of name suffixes, globs (``"layers.*.q_proj"``), regexes (``"re:..."``) and the three words above.
            Parts of fused projections have names too (``"qkv_proj.q"``). It may be empty where target_parameters or
            trainable_token_indices say what to train.
        exclude_modules: The same forms. Naming a module excludes everything below it.
        target_parameters: Parameters that are read, not called, by the same forms (``"attn.in_proj_weight"``,
            ``"lstm.weight_*"``), or ``"experts"``: the stacked weights of a mixture of experts. They come on top of
            target_modules.
        layers_to_transform: Indices of the numbered blocks to adapt, or a mapping from a tower to its indices:
            ``{"vision_tower": [0, 1], "language_model": [30, 31]}``. A tower that is not named is not adapted.
        rank_pattern: Ranks that differ from r: ``{pattern: rank}``. Of several matching patterns the first counts.
            ``"auto"`` spreads them by data, within the parameters that r everywhere would have (see
            `lightning_lora.initialise_from_data`).
        alpha_pattern: Values that differ from lora_alpha, likewise.
        use_rslora: Scale by the square root of the rank.
        use_dora: Train the magnitude of each output row too.
        dora_dropout: ``"input"``: DoRA's dropout acts on the input of the base product too, as in PEFT and the paper
            (it costs a second base product); ``"lora"``: on the low-rank branch only.
        dropout_mask: ``"joint"``: layers that a module calls with the same input (query, key and value) may drop the
            same of its values, which costs one mask for all; ``"module"``: each layer draws its own, as in PEFT.
        init_lora_weights: ``"kaiming"`` (PEFT's default), ``"gaussian"``, ``"orthogonal"``, ``"pissa"``, ``"olora"``,
            ``"loftq"`` (with a quantised base), ``"eva"`` (from batches of data), or an ``Init`` object with options.
        bias: Which biases are trained: ``"none"``, ``"all"`` of the model (as in PEFT in excluded modules too), or
            ``"lora_only"``: those of adapted layers.
        train_norms: Whether the weights and biases of LayerNorm, RMSNorm and GroupNorm are trained in full too.
        modules_to_save: ``"auto"`` trains in full the heads that lie outside the pretrained backbone; a list names
            modules (or parameters) to train in full; None trains adapters only.
        trainable_token_indices: Rows of the token embedding to train, as they are and one by one, the rest of the table
            frozen: tokens of the input embedding, or ``{name of an embedding: tokens}``. Where an output embedding is
            tied to it, it has the same rows. target_modules may be empty then.

    Raises:
        ConfigError: With every problem found.

    Example:
        >>> LoRAConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]).scaling(r=4, lora_alpha=8.0)
        2.0
    """

    method: ClassVar[str] = "LoRA"  # in messages

    r: int = 8
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0
    target_modules: Patterns = "all-linear"
    exclude_modules: Patterns | None = None
    target_parameters: Patterns | None = None
    layers_to_transform: int | list[int] | dict[str, list[int]] | None = None
    rank_pattern: dict[str, int] | Literal["auto"] | None = None
    alpha_pattern: dict[str, float] | None = None
    use_rslora: bool = False
    use_dora: bool = False
    dora_dropout: Literal["input", "lora"] = "input"
    dropout_mask: Literal["joint", "module"] = "joint"
    init_lora_weights: str | Callable[..., Any] = "kaiming"
    bias: Literal["none", "all", "lora_only"] = "none"
    train_norms: bool = False
    modules_to_save: Literal["auto"] | list[str] | None = "auto"
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None

    def __post_init__(self) -> None:
        for field in fields(self):  # own copies: a list that the caller changes later must not change the config
            value = getattr(self, field.name)
            if isinstance(value, (list, tuple, set)):
                object.__setattr__(self, field.name, sorted(value) if isinstance(value, set) else list(value))
            elif isinstance(value, Mapping):
                own = {key: list(item) if isinstance(item, tuple) else item for key, item in value.items()}
                object.__setattr__(self, field.name, own)
            elif field.name == "target_modules" and value is None and self._has_other_targets:  # as PEFT says it
                object.__setattr__(self, field.name, [])
        raise_all(ConfigError, list(self._problems()), "LoRA")

    @property
    def variant(self) -> str:
        """The name of the adapter class: ``"lora"`` or ``"dora"``."""
        return "dora" if self.use_dora else "lora"

    @property
    def ranks(self) -> dict[str, int]:
        """The ranks that differ from r, by pattern, as far as they are known."""
        return self.rank_pattern if isinstance(self.rank_pattern, dict) else {}

    @property
    def needs_data(self) -> bool:
        """Whether ranks or first factors come from batches of data."""
        return self.rank_pattern == "auto" or bool(getattr(self._init, "from_data", False))

    @property
    def _has_other_targets(self) -> bool:
        return bool(self.target_parameters or self.trainable_token_indices)

    @property
    def _init(self) -> Any:
        return INITS.get(self.init_lora_weights) if isinstance(self.init_lora_weights, str) else self.init_lora_weights

    def is_settled_in(self, other: "LoRAConfig") -> bool:
        """Whether another configuration is this one with the ranks that data gave it."""
        if not self.needs_data:
            return False
        ranks = ("rank_pattern", "alpha_pattern", "exclude_modules")
        own, others = ({k: v for k, v in c.to_dict().items() if k not in ranks} for c in (self, other))
        return own == others

    def scaling(self, r: int, lora_alpha: float) -> float:
        """The factor s of a layer with this rank and alpha."""
        return lora_alpha / (math.sqrt(r) if self.use_rslora else r)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain types of their own, for checkpoints; an ``Init`` object becomes its name."""
        values = {f.name: copy.deepcopy(getattr(self, f.name)) for f in fields(self) if f.name != "init_lora_weights"}
        init: Any = self.init_lora_weights
        name = init if isinstance(init, str) else getattr(init, "name", type(init).__name__)
        return {**values, "init_lora_weights": name}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LoRAConfig":
        """The inverse of `to_dict`. Raises ConfigError for fields that this version does not know.

        An initialisation that is not known here stays a name: the values come from the file.
        """
        raise_all(ConfigError, unknown_fields(values, [f.name for f in fields(cls)]), "LoRA")
        init = str(values.get("init_lora_weights", "kaiming"))
        return cls(**{**values, "init_lora_weights": init if init in INITS else NamedInit(init)})

    def _problems(self) -> Iterable[str]:
        if not is_positive_int(self.r):
            yield f"r must be a positive integer, got {self.r!r}"
        if not is_alpha(self.lora_alpha):
            yield f"lora_alpha must be finite and not 0 (the update is scaled by it), got {self.lora_alpha!r}"
        if not is_number(self.lora_dropout) or not 0 <= self.lora_dropout < 1:
            yield f"lora_dropout must be in [0, 1), got {self.lora_dropout!r}"
        if self.target_modules or not self._has_other_targets:
            yield from pattern_problems("target_modules", self.target_modules)
        if self.exclude_modules is not None:
            yield from pattern_problems("exclude_modules", self.exclude_modules)
        if self.target_parameters is not None:
            yield from pattern_problems("target_parameters", self.target_parameters)
        yield from index_problems(self.layers_to_transform)
        if self.rank_pattern != "auto":
            wanted = "a positive integer, or 'auto'"
            yield from mapping_problems("rank_pattern", self.rank_pattern, wanted, is_positive_int)
        elif getattr(self._init, "name", None) == "loftq":
            yield "rank_pattern='auto' needs a base that computes, and 'loftq' the ranks before it is packed: drop one"
        yield from mapping_problems("alpha_pattern", self.alpha_pattern, "finite and not 0", is_alpha)
        yield from flag_problems(use_rslora=self.use_rslora, use_dora=self.use_dora, train_norms=self.train_norms)
        yield from choice_problems("dora_dropout", self.dora_dropout, ("input", "lora"))
        yield from choice_problems("dropout_mask", self.dropout_mask, ("joint", "module"))
        if self.dora_dropout == "lora" and not self.use_dora:
            yield "dora_dropout='lora' has no effect without use_dora=True"
        yield from choice_problems("bias", self.bias, ("none", "all", "lora_only"))
        init: Any = self.init_lora_weights
        if isinstance(init, type):
            yield f"init_lora_weights must be a name or an object, got the class {init.__name__}: {init.__name__}()"
        elif not callable(init):
            hint = " (PEFT's True is 'kaiming' here)" if init is True else ""
            if isinstance(init, str) and init.startswith("pissa_niter_"):
                hint = f" (PEFT's {init} is lightning_lora.inits.PiSSA(niter={init.removeprefix('pissa_niter_')}) here)"
            yield from (p + hint for p in choice_problems("init_lora_weights", init, (*INITS,)))
        yield from saved_problems(self.modules_to_save)
        yield from token_problems(self.trainable_token_indices)


@dataclass(frozen=True)
class NamedInit:
    """The initialisation of an adapter from a file, where only its name is known. It can't be run."""

    name: str

    def __call__(self, *args: Any) -> Any:
        """Raises UnsupportedError."""
        raise UnsupportedError(f"init_lora_weights={self.name!r} is known by name only: load the adapter's values")


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """How the frozen base is quantised (QLoRA, arXiv:2305.14314, section 3).

    Args:
        mode: ``"nf4"``, ``"nf4-dq"`` (double quantisation), ``"fp4"``, ``"fp4-dq"`` or ``"int8"``, which has a scale
            for each row, and none of the options for 4 bits.
        compute_dtype: Dtype of the products; None follows the input.
        quant_storage: Dtype of the packed bytes.
        ignore_modules: Modules that stay dense.
        blocksize: Weights that share one scale.

    Raises:
        ConfigError: With every problem found.
    """

    mode: Literal["nf4", "nf4-dq", "fp4", "fp4-dq", "int8"] = "nf4-dq"
    compute_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    quant_storage: Literal["uint8", "float32", "bfloat16", "float16"] = "uint8"
    ignore_modules: list[str] | None = None
    blocksize: int = 64

    @classmethod
    def of(cls, spec: Any) -> "Quantization":
        """The settings that a mode alone stands for, or those that were given; else ConfigError."""
        if isinstance(spec, str):
            return cls(mode=spec)  # type: ignore[arg-type]
        if not isinstance(spec, Quantization):
            hint = f". Give ll.Quantization(**{spec!r})" if isinstance(spec, dict) else ""
            raise ConfigError(f"quantization must be one of {', '.join(MODES)} or a Quantization, got {spec!r}{hint}")
        return spec

    def __post_init__(self) -> None:
        problems = [
            *choice_problems("mode", self.mode, MODES),
            *choice_problems("compute_dtype", self.compute_dtype, (None, "float32", "bfloat16", "float16")),
            *choice_problems("quant_storage", self.quant_storage, ("uint8", "float32", "bfloat16", "float16")),
        ]
        if not is_int(self.blocksize) or not 32 <= self.blocksize <= 4096 or self.blocksize & (self.blocksize - 1):
            problems.append(f"blocksize must be a power of two from 32 to 4096, got {self.blocksize!r}")
        if self.mode == "int8":
            four_bit = {"compute_dtype": None, "quant_storage": "uint8", "blocksize": 64}
            given = [
                f"{name}={getattr(self, name)!r}" for name, unset in four_bit.items() if getattr(self, name) != unset
            ]
            problems += [f"mode='int8' has no {', '.join(given)}: leave that out"] if given else []
        if self.ignore_modules is not None:
            problems += pattern_problems("ignore_modules", self.ignore_modules)
        raise_all(ConfigError, problems, "Quantization")
