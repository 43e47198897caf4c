"""What a user asks for: plain, frozen values that a YAML file can hold.

Names and meanings are those of PEFT's ``LoraConfig`` wherever PEFT has the concept. Validation reports every problem
at once, before anything is changed.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from lightning_lora.errors import ConfigError, UnsupportedError, did_you_mean, raise_all

Patterns = str | list[str]

INITS = ("kaiming", "gaussian", "orthogonal", "pissa", "olora", "loftq", "eva")
KEYWORDS = ("all-linear", "attention", "mlp")


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    r"""Which layers get an adapter, and which.

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
        exclude_modules: The same forms. Naming a module excludes everything below it.
        target_parameters: Names of parameters that are read, not called.
        layers_to_transform: Indices of the numbered blocks to adapt, or a mapping from a tower to its indices:
            ``{"vision_tower": [0, 1], "language_model": [30, 31]}``. A tower that is not named is not adapted.
        rank_pattern: Ranks that differ from r: ``{pattern: rank}``. Of several matching patterns the first counts.
        alpha_pattern: Values that differ from lora_alpha, likewise.
        use_rslora: Scale by the square root of the rank.
        use_dora: Train the magnitude of each output row too.
        dora_dropout: ``"input"``: DoRA's dropout acts on the input of the base product too, as in PEFT and the paper
            (it costs a second base product); ``"lora"``: on the low-rank branch only.
        init_lora_weights: ``"kaiming"`` (PEFT's default), ``"gaussian"``, or an ``Init`` object.
        bias: ``"none"``, ``"all"`` or ``"lora_only"``.
        modules_to_save: ``"auto"`` trains in full the heads that lie outside the pretrained backbone; a list names
            modules (or parameters) to train in full; None trains adapters only.
        trainable_token_indices: Rows of the token embedding to train.

    Raises:
        ConfigError: With every problem found.
        UnsupportedError: For an argument whose feature is not built yet.

    Example:
        >>> LoRAConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]).scaling(r=4, lora_alpha=8.0)
        2.0
    """

    r: int = 8
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0
    target_modules: Patterns = "all-linear"
    exclude_modules: Patterns | None = None
    target_parameters: list[str] | None = None
    layers_to_transform: int | list[int] | dict[str, list[int]] | None = None
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    use_rslora: bool = False
    use_dora: bool = False
    dora_dropout: Literal["input", "lora"] = "input"
    init_lora_weights: str | Callable[..., Any] = "kaiming"
    bias: Literal["none", "all", "lora_only"] = "none"
    modules_to_save: Literal["auto"] | list[str] | None = "auto"
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None

    def __post_init__(self) -> None:
        for field in fields(self):  # own copies: a list that the caller changes later must not change the config
            value = getattr(self, field.name)
            if isinstance(value, (list, tuple, set)):
                object.__setattr__(self, field.name, sorted(value) if isinstance(value, set) else list(value))
            elif isinstance(value, Mapping):
                object.__setattr__(self, field.name, dict(value))
        raise_all(ConfigError, list(self._problems()), "LoRA")
        raise_all(UnsupportedError, list(self._unbuilt()), "LoRA")

    @property
    def variant(self) -> str:
        """The name of the adapter class: ``"lora"`` or ``"dora"``."""
        return "dora" if self.use_dora else "lora"

    def scaling(self, r: int, lora_alpha: float) -> float:
        """The factor s of a layer with this rank and alpha."""
        return lora_alpha / (math.sqrt(r) if self.use_rslora else r)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain types, for checkpoints; an ``Init`` object becomes its name."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        if not isinstance(self.init_lora_weights, str):
            values["init_lora_weights"] = type(self.init_lora_weights).__name__.lower()
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LoRAConfig":
        """The inverse of `to_dict`. Raises ConfigError for names that this version does not know."""
        known = [f.name for f in fields(cls)]
        unknown = [f"unknown field {k!r}.{did_you_mean(k, known)}" for k in values if k not in known]
        raise_all(ConfigError, unknown, "LoRA")
        return cls(**values)

    def _problems(self) -> Iterable[str]:
        if not _is_rank(self.r):
            yield f"r must be a positive integer, got {self.r!r}"
        if not _is_alpha(self.lora_alpha):
            yield f"lora_alpha must be finite and not 0 (the update is scaled by it), got {self.lora_alpha!r}"
        if not _is_number(self.lora_dropout) or not 0 <= self.lora_dropout < 1:
            yield f"lora_dropout must be in [0, 1), got {self.lora_dropout!r}"
        yield from _pattern_problems("target_modules", self.target_modules)
        if self.exclude_modules is not None:
            yield from _pattern_problems("exclude_modules", self.exclude_modules)
        yield from _index_problems(self.layers_to_transform)
        yield from _mapping_problems("rank_pattern", self.rank_pattern, "a positive integer", _is_rank)
        yield from _mapping_problems("alpha_pattern", self.alpha_pattern, "finite and not 0", _is_alpha)
        for flag in ("use_rslora", "use_dora"):
            if not isinstance(getattr(self, flag), bool):
                yield f"{flag} must be true or false, got {getattr(self, flag)!r}"
        yield from _choice_problems("dora_dropout", self.dora_dropout, ("input", "lora"))
        if self.dora_dropout == "lora" and not self.use_dora:
            yield "dora_dropout='lora' has no effect without use_dora=True"
        yield from _choice_problems("bias", self.bias, ("none", "all", "lora_only"))
        init: Any = self.init_lora_weights
        if not callable(init):
            hint = " (PEFT's True is 'kaiming' here)" if init is True else ""
            yield from (p + hint for p in _choice_problems("init_lora_weights", init, INITS))
        if self.modules_to_save not in ("auto", None):
            if isinstance(self.modules_to_save, str):
                hint = did_you_mean(self.modules_to_save, ["auto"]) or f" For one module: [{self.modules_to_save!r}]."
                yield f"modules_to_save must be 'auto', a list or None, got {self.modules_to_save!r}.{hint}"
            else:
                yield from _pattern_problems("modules_to_save", self.modules_to_save)

    def _unbuilt(self) -> Iterable[str]:
        if self.target_parameters is not None:
            yield "target_parameters is not built yet: adapters on parameters that are read, not called"
        if self.trainable_token_indices is not None:
            yield "trainable_token_indices is not built yet; modules_to_save can train the whole embedding"
        if self.bias != "none":
            yield f"bias={self.bias!r} is not built yet; use bias='none'"
        if isinstance(self.init_lora_weights, str) and self.init_lora_weights not in ("kaiming", "gaussian"):
            yield f"init_lora_weights={self.init_lora_weights!r} is not built yet; use 'kaiming' or 'gaussian'"


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """How the frozen base is quantised (QLoRA, arXiv:2305.14314, section 3).

    Args:
        mode: ``"nf4"``, ``"nf4-dq"`` (double quantisation), ``"fp4"``, ``"fp4-dq"`` or ``"int8"``.
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

    def __post_init__(self) -> None:
        problems = [
            *_choice_problems("mode", self.mode, ("nf4", "nf4-dq", "fp4", "fp4-dq", "int8")),
            *_choice_problems("compute_dtype", self.compute_dtype, (None, "float32", "bfloat16", "float16")),
            *_choice_problems("quant_storage", self.quant_storage, ("uint8", "float32", "bfloat16", "float16")),
        ]
        if not _is_int(self.blocksize) or self.blocksize < 32 or self.blocksize & (self.blocksize - 1):
            problems.append(f"blocksize must be a power of two of at least 32, got {self.blocksize!r}")
        if self.ignore_modules is not None:
            problems += _pattern_problems("ignore_modules", self.ignore_modules)
        raise_all(ConfigError, problems, "Quantization")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_rank(value: Any) -> bool:
    return _is_int(value) and value > 0


def _is_alpha(value: Any) -> bool:
    return _is_number(value) and math.isfinite(value) and value != 0


def _mapping_problems(name: str, mapping: Any, wanted: str, is_right: Callable[[Any], bool]) -> Iterable[str]:
    if not isinstance(mapping, dict):
        if mapping is not None:
            yield f"{name} must map patterns to values, got {mapping!r}"
        return
    for key, value in mapping.items():
        if not isinstance(key, str) or not key:
            yield f"{name} holds {key!r}, which is no pattern"
        elif key.startswith("re:"):
            yield from _regex_problems(name, key[3:])
        if not is_right(value):
            yield f"{name}[{key!r}] must be {wanted}, got {value!r}"


def _choice_problems(name: str, value: Any, choices: tuple[Any, ...]) -> Iterable[str]:
    if value not in choices:
        hint = did_you_mean(value, [c for c in choices if c]) if isinstance(value, str) else ""
        yield f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}.{hint}"


def _regex_problems(name: str, regex: str) -> Iterable[str]:
    try:
        re.compile(regex)
    except re.error as error:
        yield f"{name}: {regex!r} is not a valid regex: {error}"


def _pattern_problems(name: str, patterns: Any) -> Iterable[str]:
    if isinstance(patterns, str) and patterns:
        if patterns not in KEYWORDS:
            hint = did_you_mean(patterns, KEYWORDS) if not re.search(r"[.*\\(\[|]", patterns) else ""
            yield from (p + hint for p in _regex_problems(name, patterns))
    elif not patterns or not isinstance(patterns, list):
        yield f"{name} is empty or no pattern: {patterns!r}. Give 'all-linear', a regex, or a list of names"
    else:
        for item in patterns:
            if not isinstance(item, str) or not item:
                yield f"{name} holds {item!r}, which is not a name"
            elif item.startswith("re:"):
                yield from _regex_problems(name, item[3:])


def _index_problems(layers: Any) -> Iterable[str]:
    towers = layers if isinstance(layers, dict) else {"": [layers] if _is_int(layers) else layers}
    if layers is None:
        return
    for tower, indices in towers.items():
        where = f"layers_to_transform[{tower!r}]" if tower else "layers_to_transform"
        if not isinstance(indices, list) or not indices or not all(_is_int(i) and i >= 0 for i in indices):
            yield f"{where} must hold layer indices (0, 1, ...), got {indices!r}"
    if not towers:
        yield "layers_to_transform is empty"
