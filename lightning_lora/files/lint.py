"""What others would refuse of a PEFT folder, or silently compute in another way: told before it is shipped.

Read from their sources: vLLM's ``vllm/lora`` (``peft_helper.py``, ``lora_model.py``, ``utils.py``) and
``vllm/config/lora.py``, llama.cpp's ``convert_lora_to_gguf.py`` and ``src/llama-adapter.h``, transformers'
``integrations/peft.py``.
"""

import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from typing_extensions import override

from lightning_lora.checks import choice_problems
from lightning_lora.errors import CheckpointError, ConfigError, UnsupportedError, listing, raise_all
from lightning_lora.formats.peft_config import CONFIG, field_problems, parse_config
from lightning_lora.formats.peft_names import PREFIX, PeftNames
from lightning_lora.formats.peft_tasks import HEADS
from lightning_lora.formats.peft_tokens import ROWS
from lightning_lora.formats.peft_write import WEIGHTS
from lightning_lora.formats.tensors import TensorFile
from lightning_lora.names import has_end, has_part, last_part

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)

_FACTORS = (".lora_A.weight", ".lora_B.weight")
_TABLES = (".lora_embedding_A", ".lora_embedding_B")
_VOCABULARY = ("embed_tokens", "lm_head")


@dataclass(frozen=True)
class Finding:
    """Something that a consumer of PEFT folders refuses, or computes otherwise. Prints as one line.

    Args:
        target: The consumer.
        layer: The layer or tensor; None if it is about the whole folder.
        message: What is wrong, and what to do.
    """

    target: str
    layer: str | None
    message: str

    @override
    def __str__(self) -> str:
        return f"{self.target}: {self.layer}: {self.message}" if self.layer else f"{self.target}: {self.message}"


class _Folder(NamedTuple):
    """What is in a PEFT folder: fields, and shapes by key."""

    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    max_lora_rank: int

    def layers(self, ends: tuple[str, ...]) -> dict[str, str]:
        """By layer the first of its keys with such an end."""
        found: dict[str, str] = {}
        for key in self.shapes:
            if end := next((end for end in ends if key.endswith(end)), None):
                found.setdefault(key.removeprefix(PREFIX).removesuffix(end), key)
        return found

    def ranks(self) -> dict[str, int]:
        """Those of the layers, by their tensors: not of parameters, which may be stacks of pairs."""
        keys, names = self.layers((_FACTORS[0], _TABLES[0])), PeftNames(self.config)
        if self.config.get("target_parameters"):
            keys = {layer: key for layer, key in keys.items() if names.is_target(layer)}
        return {layer: max(1, self.shapes[key][0]) for layer, key in keys.items() if self.shapes[key]}


_Check = Callable[[_Folder], Iterator[tuple[str | None, str]]]


def lint(folder: str | os.PathLike[str], target: str = "vllm", *, max_lora_rank: int = 16) -> list[Finding]:
    """Says what a consumer would refuse of a PEFT folder, or compute otherwise without a word.

    Args:
        folder: The folder.
        target: ``"vllm"``, ``"llama.cpp"`` (its converter to GGUF), ``"transformers"`` (``model.load_adapter``) or
            ``"peft"`` (the version that is installed).
        max_lora_rank: What vLLM is started with; 16 is its default.

    Returns:
        What there is to say; nothing if it is taken as it is.

    Raises:
        FileNotFoundError: If it is no PEFT folder.
        CheckpointError: If a file is damaged.
        ConfigError: If the target is unknown, or vLLM has no such rank.
        UnsupportedError: If it is an adapter of another kind than LoRA.
    """
    problems = [*choice_problems("target", target, tuple(_CHECKS))]
    if target == "vllm" and max_lora_rank not in VLLM_RANKS:
        problems.append(f"max_lora_rank must be one of {', '.join(map(str, VLLM_RANKS))}, got {max_lora_rank!r}")
    raise_all(ConfigError, problems, "lint")
    read = _read(Path(folder), max_lora_rank)
    return [Finding(target, layer, message) for layer, message in _CHECKS[target](read)]


def _read(folder: Path, max_lora_rank: int) -> _Folder:
    config = parse_config(folder)
    if config.get("peft_type") != "LORA":
        raise UnsupportedError(f"{folder} is of peft_type {config.get('peft_type')!r}: only LORA can be checked")
    raise_all(CheckpointError, field_problems(config), str(folder / CONFIG))
    shapes = {key: info.shape for key, info in TensorFile(folder / WEIGHTS).tensors.items()}
    return _Folder(config, shapes, max_lora_rank)


def _vllm(folder: _Folder) -> Iterator[tuple[str | None, str]]:
    config = folder.config
    if config.get("use_dora"):
        yield None, "it does not serve DoRA: make it a plain LoRA (ll.to_lora), or merge it"
    if saved := config.get("modules_to_save"):
        yield None, f"it serves no modules that are trained in full ({listing(saved, 3)}): merge the adapter"
    if (bias := config.get("bias") or "none") != "none":
        yield None, f"it serves no biases (bias={bias!r}): merge the adapter"
    ranks = folder.ranks()
    most = max([*ranks.values(), config["r"]])
    if most > folder.max_lora_rank:
        enough = next((rank for rank in VLLM_RANKS if rank >= most), None)
        way_out = f"start it with --max-lora-rank {enough}" if enough else "reduce it by ll.to_lora(model, rank)"
        yield None, f"rank {most} is more than max_lora_rank={folder.max_lora_rank}: {way_out}"
    for layer, wrong in _other_scales(config, ranks, own_rank=False):
        yield layer, f"it has one r and one lora_alpha for all layers, and would scale this one by {wrong}"
    for key, name in _unread(folder, _FACTORS + _TABLES):
        if not key.endswith(tuple(f".{name}.base_layer.weight" for name in _VOCABULARY)):
            yield name, "it refuses folders with such a tensor ('is unsupported LoRA weight')"
    for layer in folder.layers(_FACTORS + _TABLES):
        if last_part(layer) in _VOCABULARY:
            yield layer, "only models that name it among their embedding_modules have adapters on it: Llama does"
    yield from _not_linear(folder, "adapters on convolutions are refused ('expected target modules')")
    if config.get("target_parameters"):
        yield None, "target_parameters (experts) have a layout of their own there: merge the adapter"


def _llama_cpp(folder: _Folder) -> Iterator[tuple[str | None, str]]:
    config = folder.config
    if config.get("use_dora"):
        yield None, "it knows no DoRA: make it a plain LoRA (ll.to_lora), or merge it"
    if not config.get("base_model_name_or_path"):
        yield None, "base_model_name_or_path is not set: call convert_lora_to_gguf.py with --base FOLDER"
    for key, name in _unread(folder, _FACTORS + _TABLES):
        if key.endswith(".base_layer.weight"):
            continue
        if "_layernorm" in key or ".norm" in key:
            yield name, "a norm that is trained in full is written, and ignored when it is loaded: merge the adapter"
        elif "magnitude" not in name:
            yield name, "the converter stops at tensors that are no factors: merge the adapter"
    ranks = folder.ranks()
    if config.get("use_rslora"):
        yield None, "it knows no use_rslora, and would scale by lora_alpha / r: ll.to_lora gives a scale of 1, or merge"
        config = {**config, "use_rslora": False}
    for layer, wrong in _other_scales(config, ranks, own_rank=True):
        yield layer, f"it has one lora_alpha for all layers, and would scale this one by {wrong}"
    for layer in folder.layers(_FACTORS + _TABLES):
        if last_part(layer) == "lm_head":
            yield layer, "it is refused where the base's is tied to the embeddings ('is ignored in base model')"
    if config.get("fan_in_fan_out"):
        yield None, "it transposes the factors of GPT-2's Conv1D as if they were its weights: merge the adapter"
    yield from _not_linear(folder, "the converter takes factors of two dimensions only")
    if config.get("target_parameters"):
        yield None, "it knows no target_parameters (experts): merge the adapter"


def _transformers(folder: _Folder) -> Iterator[tuple[str | None, str]]:
    if importlib.util.find_spec("peft") is None:
        yield None, "load_adapter needs PEFT, which is not installed here"
    for key in folder.shapes:
        if key.endswith(".lora_magnitude_vector"):
            name = key.removeprefix(PREFIX).removesuffix(".lora_magnitude_vector")
            yield name, "its magnitude is left out without a word: the key has to end in .lora_magnitude_vector.weight"


def _peft(folder: _Folder) -> Iterator[tuple[str | None, str]]:
    if importlib.util.find_spec("peft") is None:
        yield None, "it is not installed here, so its fields could not be compared: pip install 'lightning-lora[peft]'"
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import peft
    heads = HEADS.get(str(folder.config.get("task_type")), ())
    if heads and not any(f".{head}." in key for key in folder.shapes for head in heads):
        yield (
            None,
            (
                f"with task_type={folder.config['task_type']!r} it expects a {' or '.join(heads)} in the folder, and "
                "fails on models that have one: set task_type to null"
            ),
        )
    known = {*peft.LoraConfig.__dataclass_fields__, "peft_version"}
    for name, value in folder.config.items():
        if name not in known and value not in (None, False, [], {}, ""):
            yield None, f"PEFT {peft.__version__} has no field {name!r} (here {value!r:.60}) and ignores it: update it"
    for key, name in _unread(folder, (*_FACTORS, *_TABLES, ".lora_magnitude_vector", ".lora_magnitude_vector.weight")):
        saved = folder.config.get("modules_to_save") or ()
        inside = any(has_part(name, part) for part in saved) or ".base_layer." in key
        inside = inside or (has_end(key, ROWS) and bool(folder.config.get("trainable_token_indices")))
        if not inside and not (name.endswith(".bias") and folder.config.get("bias") in ("all", "lora_only")):
            yield name, "no field of the configuration says what it is, so that it is not loaded"


def _other_scales(config: dict[str, Any], ranks: dict[str, int], own_rank: bool) -> Iterator[tuple[str, str]]:
    """Layers whose scale is not what follows from the one ``lora_alpha``, and from r or the layer's own rank."""
    names, alphas = PeftNames(config), config.get("alpha_pattern") or {}
    power = 0.5 if config.get("use_rslora") else 1.0
    r, alpha = config["r"], float(config["lora_alpha"])
    for layer, rank in ranks.items():
        right = float(names.value(alphas, layer, alpha)) / rank**power
        there = alpha / (rank if own_rank else r) ** power
        if abs(right - there) > 1e-6 * abs(right):
            yield layer, f"{there:g} instead of {right:g}"


def _unread(folder: _Folder, ends: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Keys that have none of these ends, and the names that they stand for."""
    for key in folder.shapes:
        if not key.endswith(ends):
            yield key, key.removeprefix(PREFIX)


def _not_linear(folder: _Folder, message: str) -> Iterator[tuple[str, str]]:
    for layer, key in folder.layers(_FACTORS[:1]).items():
        if len(folder.shapes[key]) > 2:
            yield layer, message


_CHECKS: dict[str, _Check] = {
    "vllm": _vllm,
    "llama.cpp": _llama_cpp,
    "transformers": _transformers,
    "peft": _peft,
}
