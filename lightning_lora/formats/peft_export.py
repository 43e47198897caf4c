"""An adapter of a model, seen as PEFT would have it: its configuration, its keys, its shapes."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from lightning_lora.adapters import LowRankAdapter
from lightning_lora.config import LoRAConfig
from lightning_lora.errors import listing
from lightning_lora.formats.peft_names import PREFIX, shortest_patterns, shortest_targets, suffixes
from lightning_lora.formats.peft_parameters import is_turned, parameter_fields, peft_modules, to_peft
from lightning_lora.formats.peft_parameters import problems as parameter_problems
from lightning_lora.formats.peft_parts import ExportedParts
from lightning_lora.formats.peft_refusals import breaks, refusals
from lightning_lora.formats.peft_root import peft_root
from lightning_lora.formats.peft_tasks import HEADS, task_of
from lightning_lora.formats.peft_tokens import ExportedRows
from lightning_lora.formats.tensors import all_finite
from lightning_lora.injection.copies import values_of
from lightning_lora.layers import LoRALayer, Part, ReadWeight, has_own_forward, original_type, reaches_base_forward
from lightning_lora.layers.conv1d import LoRAConv1D
from lightning_lora.names import ancestors, is_inside, is_within, joined, outermost
from lightning_lora.ops.sharded import gathered
from lightning_lora.state import low_rank_adapters
from lightning_lora.targets.kinds import is_pretrained
from lightning_lora.targets.walk import Node, nodes, own_parameters, parameter_owners

_OF_PEFT = ("lora_A", "lora_B", "lora_dropout", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
PARTS = ("A", "B", "magnitude")  # in the order of `lora_peft_shapes`


class Held(NamedTuple):
    """An adapter and what it sits on."""

    node: Node
    layer: LoRALayer
    adapter: LowRankAdapter


class Export:
    """An adapter of a model, seen as PEFT would have it.

    Args:
        model: The model.
        adapter_name: The adapter.
    """

    def __init__(self, model: nn.Module, adapter_name: str) -> None:
        self.adapter_name = adapter_name
        whole = nodes(model)
        self.prefix, self.root = peft_root(whole, adapter_name)
        self.tree = nodes(self.root) if self.prefix else whole
        held = {
            name: Held(node, node.module, node.module.lora_pairs()[adapter_name])
            for name, node in self.tree.items()
            if isinstance(node.module, LoRALayer) and adapter_name in node.module.lora_pairs()
        }
        self.layers = {name: each for name, each in held.items() if not isinstance(each.layer, Part)}
        self.config: LoRAConfig = low_rank_adapters(self.root)[adapter_name]
        outside = whole if self.prefix else {}
        self._lost = [
            joined(name, key)
            for name, node in outside.items()
            if not is_within(name, self.prefix)
            for key, _ in values_of(node.module, adapter_name)
        ]
        self.rows = ExportedRows(self.tree, adapter_name)
        on_parts = {name: (each.node, each.adapter) for name, each in held.items() if name not in self.layers}
        self.parts = ExportedParts(on_parts, self.config.use_rslora)
        self._owners = parameter_owners(self.tree)
        self._nodes = {name: held.node for name, held in self.layers.items()}
        self._names = peft_modules(self._nodes)
        self.in_full = dict(self._values_in_full())
        self.modules_to_save = self._whole_modules()

    def problems(self) -> Iterator[str]:
        """What of it PEFT would compute in another way, or can't have."""
        whole = [name for name in self.tree if any(is_within(name, outer) for outer in self.modules_to_save)]
        if shared := [name for name in (*self.layers, *self.parts.whole, *whole) if self.tree[name].aliases]:
            yield f"{listing(shared, 3)}: has several names in the model, and PEFT would adapt it under one of them"
        full = {id(tensor): key for key, tensor in self.in_full.items()}
        for name, held in self.layers.items():
            if (key := full.get(id(held.layer.weight))) is not None:
                yield f"{name}: its weight ({key}) is trained in full too, which PEFT would not load: do one of the two"
            kind = held.layer.lora_peft_problem(held.layer)
            cls = original_type(held.layer)
            if kind is None and has_own_forward(cls) and reaches_base_forward(cls) and not _is_known(held.layer):
                kind = f"in PEFT, what {cls.__name__}.forward does to the product would not be done to the update"
            if (why := kind or breaks(held.node)) is not None:
                yield f"{name}: {why}"
        yield from parameter_problems(self._nodes, self.config.use_dora)
        yield from self.rows.problems(bool(self.layers or self.parts.whole))
        if is_pretrained(self.root):
            yield from refusals(
                self.root, [n for n, node in self._nodes.items() if not isinstance(node.module, ReadWeight)]
            )
        if self._lost:
            yield f"{listing(self._lost, 3)} lie outside of the transformers model: keep them in a checkpoint"
        inside = [key for key in self.in_full if self._saving_module(key) is None and not self._is_bias(key)]
        for name in self.modules_to_save:
            if alike := [other for other in self._alike(name, self._short(name)) if other not in self.modules_to_save]:
                yield f"{name}: PEFT goes by ends of names, and would take {listing(alike, 3)} for it too"
        if inside:
            yield f"{listing(inside, 3)}: single parameters, trained in full; name the module in modules_to_save"

    def unfit(self, tensors: Mapping[str, Tensor] | None = None) -> Iterator[str]:
        """What no file should hold.

        Args:
            tensors: Those of `tensors`, where they are there already.
        """
        adapters = {n: held.adapter for n, held in self.layers.items()} | self.parts.adapters | self.rows.tables
        if waiting := [name for name, adapter in adapters.items() if not adapter.initialised]:
            yield f"{listing(waiting, 3)} have no values yet"
        found = self.tensors() if tensors is None else tensors.items()
        odd = [key for key, tensor in found if not all_finite(tensor)]
        if odd:
            yield f"{listing(odd, 3)} hold NaN or infinite values: the run diverged"

    def fields(self) -> dict[str, Any]:
        """Those of PEFT's ``LoraConfig``."""
        config: Any = getattr(self.root, "config", None) if is_pretrained(self.root) else None
        held, whole = [(name, each.adapter) for name, each in self.layers.items()], self.parts.whole
        r, ranks = shortest_patterns({n: a.update_rank for n, a in held} | {n: w.r for n, w in whole.items()})
        scales = {n: self._alpha(a) for n, a in held} | {n: w.lora_alpha for n, w in whole.items()}
        alpha, alphas = shortest_patterns(scales)
        others = [name for name, node in self.tree.items() if name and not isinstance(node.module, Part)]
        read = [name for name, node in self._nodes.items() if isinstance(node.module, ReadWeight)]
        parameters = parameter_fields(self._nodes, [name for names in self._owners.values() for name in names])
        return {
            "alpha_pattern": alphas,
            "base_model_name_or_path": getattr(config, "_name_or_path", None) or None,
            "bias": self.config.bias,
            "fan_in_fan_out": all(issubclass(kind, LoRAConv1D) for kind in self._kinds()),
            "lora_alpha": alpha,
            "lora_dropout": 0.0 if parameters else self.config.lora_dropout,  # PEFT has none there
            "modules_to_save": [self._short(name) for name in self.modules_to_save] or None,
            "r": r,
            "rank_pattern": ranks,
            "target_modules": shortest_targets([name for name in (*self.layers, *whole) if name not in read], others),
            **parameters,
            **self.rows.fields(self._short),
            "task_type": self._task(),
            "use_dora": self.config.use_dora,
            "use_rslora": self.config.use_rslora,
        }

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """By PEFT's keys, in PEFT's shapes."""
        for name, held in self.layers.items():
            A, B = held.adapter.update()
            magnitude = getattr(held.adapter, "magnitude", None)
            tensors = {"A": A, "B": B} | ({} if magnitude is None else {"magnitude": magnitude})
            values = dict(to_peft(held.node, part, gathered(tensor).detach()) for part, tensor in tensors.items())
            shapes = held.layer.lora_peft_shapes(held.layer, A.shape[-2])
            for part, (end, shape) in zip(PARTS, shapes.items(), strict=False):
                if part in values:
                    yield f"{PREFIX}{self._names[name]}.{end}", values[part].reshape(shape)
        for key, tensor in (*self.parts.tensors(), *self.rows.tensors()):
            yield f"{PREFIX}{key}", tensor
        for key, value in self.in_full.items():
            owner, _, own = key.rpartition(".")
            middle = "base_layer" if owner in {*self.layers, *self.parts.whole} else ""
            yield f"{PREFIX}{joined(owner, middle, own)}", gathered(value).detach()

    def record(self) -> dict[str, Any]:
        """What it takes to write the PEFT folder later, from tensors of the adapter alone."""
        shapes = {
            f"{PREFIX}{name}.{end}": list(shape)
            for name, held in self.layers.items()
            for end, shape in held.layer.lora_peft_shapes(held.layer, held.adapter.update_rank).items()
            if len(shape) > 2
        }
        parameters = {n: [self._names[n], is_turned(node)] for n, node in self._nodes.items() if self._names[n] != n}
        embeddings = [name for name, held in self.layers.items() if isinstance(held.layer, nn.Embedding)]
        return {
            "prefix": self.prefix,
            "fields": self.fields(),
            "shapes": shapes,
            "embeddings": embeddings,
            "parameters": parameters,
            "tied": self._tied(),
            "parts": {owner: joined.record() for owner, joined in self.parts.whole.items()},
            "noted": self.parts.noted(),
            "problems": [*self.problems(), *self.parts.problems()],
            "notes": self.notes(),
        }

    def notes(self) -> list[str]:
        """What who loads it should know."""
        notes = []
        adapters = [*(held.adapter for held in self.layers.values()), *self.parts.adapters.values()]
        if any(adapter.start_A is not None for adapter in adapters):
            notes.append(
                "Trained with twice the parameters frozen beside it (PiSSA, OLoRA or LoftQ); fits the clean base."
            )
        if self.config.use_dora:
            notes.append("vLLM does not serve DoRA: `ll.to_lora` converts it, or merge it.")
        return notes

    def _kinds(self) -> list[Any]:
        """The kinds of layers that PEFT would see."""
        return [type(each.layer) for each in self.layers.values()] + [self.tree[n].kind for n in self.parts.whole]

    def _alpha(self, adapter: LowRankAdapter) -> float:
        factor = 1.0 if adapter.start_A is None else 2**0.5 if self.config.use_rslora else 2.0
        alpha = adapter.lora_alpha * factor
        return int(alpha) if alpha == int(alpha) else alpha

    def _values_in_full(self) -> Iterator[tuple[str, Tensor]]:
        """By the name of the parameter or buffer; a tied one under all its names."""
        for name, node in self.tree.items():
            for key, value in values_of(node.module, self.adapter_name):
                parameter = node.module._parameters.get(key)
                for full in self._owners.get(id(parameter)) or [joined(name, key)]:
                    yield full, value

    def _task(self) -> str | None:
        """PEFT's name for the task; None where it would take a head for trained that is not."""
        task = task_of(self.root)
        ends = HEADS.get(task or "", ())
        heads = [name for name in self.tree if name.endswith(ends)] if ends else []
        frozen = [n for n in heads if not any(is_within(n, whole) for whole in self.modules_to_save)]
        return None if frozen else task

    def _tied(self) -> dict[str, list[str]]:
        """What is trained in full and has several names, by each: a checkpoint has it once."""
        names: dict[int, list[str]] = {}
        for key, value in self.in_full.items():
            names.setdefault(id(value), []).append(key)
        return {key: keys for keys in names.values() if len(keys) > 1 for key in keys}

    def _whole_modules(self) -> list[str]:
        """The outermost modules of which everything is trained in full; PEFT takes no containers for such."""
        own = {name: [f"{name}.{key}" for key, _ in own_parameters(node.module)] for name, node in self.tree.items()}
        in_part = [name for name, keys in own.items() if any(key not in self.in_full for key in keys)]
        owners = {key.rpartition(".")[0] for key in self.in_full if not self._is_bias(key)}
        outer = {name for owner in owners - {""} for name in ancestors(owner)}
        outer = {name for name in outer if not issubclass(self.tree[name].cls, (nn.ModuleList, nn.ModuleDict))}
        whole = [name for name in outer if not any(is_within(n, name) for n in in_part)]
        return sorted(outermost(whole))

    def _saving_module(self, key: str) -> str | None:
        return next((name for name in self.modules_to_save if is_inside(key, name)), None)

    def _is_bias(self, key: str) -> bool:
        owner, _, own = key.rpartition(".")
        return own == "bias" and (
            self.config.bias == "all" or (self.config.bias == "lora_only" and owner in self.layers)
        )

    def _short(self, name: str) -> str:
        """The shortest end of a module's name that no other module's name has, as PEFT compares them."""
        return next((end for end in suffixes(name) if not self._alike(name, end)), name)

    def _alike(self, name: str, end: str) -> list[str]:
        """Other modules whose names have an end, those of PEFT's own layers too."""
        return [other for other in (*self.tree, *_OF_PEFT) if other != name and other.endswith(end)]


def _is_known(layer: nn.Module) -> bool:
    """Whether PEFT does what a subclass of an embedding does: it scales the update of those with an ``embed_scale``."""
    return hasattr(layer, "embed_scale") or layer.lora_packed  # type: ignore[return-value]
