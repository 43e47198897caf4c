"""Why an adapter from a file can't be put into a model: found before anything is read or changed."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_lora.adapters import RowsAdapter, TiedRows
from lightning_lora.errors import did_you_mean, listing
from lightning_lora.formats.peft_parameters import from_peft
from lightning_lora.formats.peft_tokens import peft_rows_problem
from lightning_lora.formats.stored import StoredAdapter, StoredLayer
from lightning_lora.formats.tensors import FLOATS
from lightning_lora.injection.copies import tensors_of
from lightning_lora.layers import LoRALayer, StandIn, kind_of_layer, original_type
from lightning_lora.loading.heads import head_hint, size_hint
from lightning_lora.loading.missing import missing
from lightning_lora.loading.untrained import not_trained
from lightning_lora.loading.untying import untying
from lightning_lora.names import ancestors, joined
from lightning_lora.targets.choice import whole_and_parts
from lightning_lora.targets.parameters import parameter_sites
from lightning_lora.targets.probe import bypass, weight_problem
from lightning_lora.targets.tokens import tied_tables
from lightning_lora.targets.uncalled import tied_to
from lightning_lora.targets.walk import Node, nodes


class Found(NamedTuple):
    """A layer of the model, and what the file has for it."""

    node: Node
    stored: StoredLayer

    def values(self, layout: str) -> dict[str, Tensor]:
        """The tensors, in the shapes of an adapter's."""
        shape = kind_of_layer(self.node.module).lora_matrix_shape(self.node.module)
        if layout == "peft" and len(shape) == 3:
            return from_peft(self.node, {part: tensor.read() for part, tensor in self.stored.tensors.items()})
        return self.stored.read(*shape)


class Misfits:
    """Compares an adapter from a file with a model.

    Args:
        root: What names in the file are relative to.
        stored: The adapter.
        adapter_name: What it is going to be called.
    """

    def __init__(self, root: nn.Module, stored: StoredAdapter, adapter_name: str) -> None:
        self.stored, self.adapter_name = stored, adapter_name
        self.tree = parameter_sites(nodes(root), stored.layers)
        self.by_name = {name: node for node in self.tree.values() for name in node.names}
        self.found = {n: Found(self.by_name[n], layer) for n, layer in stored.layers.items() if n in self.by_name}
        self.held = {
            name: node.module
            for name, node in self.tree.items()
            if isinstance(node.module, LoRALayer) and adapter_name in node.module.lora
        }
        self.own_tensors: Mapping[str, Tensor] = {
            joined(name, key): tensor
            for node in (self.tree.values() if stored.in_full or stored.modules_to_save else ())
            for name in node.names
            for key, tensor in tensors_of(node.module).items()
        }

    def problems(self) -> Iterator[str]:
        """Everything that is wrong."""
        if unknown := [name for name in self.stored.layers if name not in self.found]:
            hint = did_you_mean(unknown[0], self.by_name) if self.found else " It is of another model: give its base"
            yield f"the model has no {listing(unknown, 3)}.{hint}"
        yield from self._shared()
        if both := whole_and_parts([found.node for found in self.found.values()]):
            yield (
                f"{listing(both, 3)} would have adapters as a whole and in parts: take the others off by "
                "ll.delete_adapter, or load it into another copy of the base"
            )
        for name, found in self.found.items():
            yield from (f"{name}: {problem}" for problem in self._of_layer(found))
        held = {node.name: stored for node, stored in self.found.values()}
        in_full = [self.own_tensors[key] for key in self.stored.in_full if key in self.own_tensors]
        yield from missing(self.stored, self.tree, held, in_full)
        yield from self._in_full()
        yield from self._other_adapter()

    def _shared(self) -> Iterator[str]:
        """A module with two names has one adapter here; in PEFT it has it where it is called by one of them."""
        for name, (node, _) in self.found.items():
            others = [other for other in node.names if other != name]
            if both := [other for other in others if other in self.found]:
                yield (
                    f"{name} and {both[0]} are one layer, and the file has an adapter for each. If a resize of token "
                    "tables has made them one, ll.inject on these targets before it keeps them apart"
                )
            elif others and self.stored.layout == "peft" and self.stored.base is None:
                yield f"{name} is {others[0]} too, where PEFT leaves it as it is"

    def _of_layer(self, found: Found) -> Iterator[str]:
        node, layer = found
        kind = kind_of_layer(node.module)
        if kind is None or (why := bypass(node) or weight_problem(node)) is not None:
            yield f"a {original_type(node.module).__name__} can't have an adapter" if kind is None else str(why)
            return
        if layer.is_rows:
            yield from self._of_rows(node, layer)
            return
        if (why := tied_to(node)) is not None:
            yield why
        wanted = {"A", "B", "magnitude"} if self.stored.options["use_dora"] else {"A", "B"}
        wanted |= {"start_A", "start_B"} if "start_A" in layer.tensors else set()
        if layer.tensors.keys() != wanted:
            yield f"needs {', '.join(sorted(wanted))}, and the file has {', '.join(sorted(layer.tensors))}"
        shapes = self._shapes(node, layer)
        for part, tensor in layer.tensors.items():
            as_many = part == "magnitude" and torch.Size(tensor.shape).numel() == torch.Size(shapes[part]).numel()
            if tensor.shape != shapes[part] and not as_many:
                yield f"{part} is {tensor.shape} in the file, and {shapes[part]} here (r={layer.r})"
            if tensor.dtype not in FLOATS.values():
                yield f"{part} is {str(tensor.dtype).removeprefix('torch.')}, which no adapter is"
        if self.stored.init is not None and kind.lora_packed:
            yield f"is quantised, and what {self.stored.init!r} takes out of a weight needs the dense one"

    def _of_rows(self, node: Node, layer: StoredLayer) -> Iterator[str]:
        """What is wrong with rows of a token table."""
        module, tensor = node.module, layer.tensors["rows"]
        if node.kind is None or not node.kind.lora_has_rows or layer.tensors.keys() != {"rows"}:
            yield f"the file has rows of tokens for it ({', '.join(sorted(layer.tensors))}), and it can't have those"
            return
        table: Any = module.weight
        if tensor.shape != (len(layer.tokens), table.shape[1]) or tensor.dtype not in FLOATS.values():
            yield (
                f"rows are {tensor.shape} in the file, for {len(layer.tokens)} tokens in its configuration, and a row "
                f"has {table.shape[1]} values here"
            )
        if outside := [str(token) for token in layer.tokens if token >= len(table)]:
            yield (
                f"has {len(table)} rows, and the file's are of the tokens {listing(outside, 3)}: call "
                "model.resize_token_embeddings(len(tokenizer)) before it is loaded"
            )
        ends = tied_tables(self.tree, node)
        for end in ends if self.stored.layout == "peft" and self.stored.base is None else ():
            if (why := peft_rows_problem(end.module)) is not None:
                yield f"{why} ({end.name}): merge it there"
        if odd := [end.name for end in ends if end.kind is None or not end.kind.lora_has_rows]:
            yield f"{listing(odd)} has the same table, and can't have rows of its own"
        if ends[0] is not node and ends[0].name not in {found.node.name for found in self.found.values()}:
            how = untying(self.tree, [f"{node.name}.weight"])
            yield f"the file changes its rows, and not those of {ends[0].name}, which has the same table: {how}"

    def _shapes(self, node: Node, layer: StoredLayer) -> dict[str, tuple[int, ...]]:
        kind = kind_of_layer(node.module)
        if self.stored.layout == "peft":
            A, B, magnitude = (*kind.lora_peft_shapes(node.module, layer.r).values(), ())[:3]
        else:
            *stack, rows, columns = kind.lora_matrix_shape(node.module)
            A, B, magnitude = (*stack, layer.r, columns), (*stack, rows, layer.r), (*stack, rows)
        return {"A": A, "B": B, "magnitude": magnitude, "start_A": A, "start_B": B}

    def _in_full(self) -> Iterator[str]:
        own = self.own_tensors
        if lacking := [key for key in self.stored.in_full if key not in own]:
            hint = head_hint(self.stored, self.tree, lacking)
            yield f"the model has no {listing(lacking, 3)}, which the file has in full: {hint}"
        for key, tensor in self.stored.in_full.items():
            if key not in own:
                continue
            if own[key].shape != tensor.shape:
                hint = size_hint(self.tree, own[key], tensor.shape)
                yield f"{key} is {tensor.shape} in the file, and {tuple(own[key].shape)} in the model{hint}"
            elif tensor.dtype != own[key].dtype and not (
                tensor.dtype in FLOATS.values() and own[key].is_floating_point()
            ):
                dtypes = [str(dtype).removeprefix("torch.") for dtype in (tensor.dtype, own[key].dtype)]
                yield f"{key} is {dtypes[0]} in the file, and {dtypes[1]} in the model"
        if self.stored.layout == "peft":
            yield from self._half_tied()
        saved = self.saved_modules()
        absent = [key for key in own if key not in self.stored.in_full and not saved.isdisjoint(ancestors(key))]
        if absent:
            names = listing(self.stored.modules_to_save, 3)
            yield f"modules_to_save names {names}, and the file has no {listing(absent, 3)}"

    def tied(self) -> Iterator[dict[str, bool]]:
        """For tensors with several names in the model, of which the file has one in full: those, and which it has.

        But for those of which it has nothing but the frozen tables that PEFT writes beside adapters on embeddings.
        """
        groups: dict[int, dict[str, bool]] = {}
        for node in self.tree.values() if self.stored.in_full else ():
            for key, tensor in tensors_of(node.module).items():
                names = [joined(name, key) for name in node.names]
                held = next((name for name in names if name in self.stored.in_full), None)
                groups.setdefault(id(tensor), {})[held or names[0]] = held is not None
        saved = self.saved_modules()
        frozen = {key for key in self.stored.tables if key.rpartition(".")[0] not in saved}
        for group in groups.values():
            if len(group) > 1 and not frozen.issuperset(key for key, held in group.items() if held):
                yield group

    def tied_problems(self, in_full: Mapping[str, Tensor]) -> Iterator[str]:
        """Tensors in the file that differ, and are one in the model."""
        for group in self.tied():
            first, *others = [name for name, held in group.items() if held]
            if odd := [name for name in others if not torch.equal(in_full[first], in_full[name])]:
                how = untying(self.tree, odd)
                yield f"{listing(odd)} and {first} differ in the file, and are tied in the model: {how}"

    def _half_tied(self) -> Iterator[str]:
        for group in self.tied():
            if not all(group.values()):
                there, lacking = ([name for name, held in group.items() if held is wanted] for wanted in (True, False))
                yield (
                    f"{listing(there)} is tied to {listing(lacking)} in the model, and the file has one without the "
                    f"other: {untying(self.tree, lacking)}"
                )

    def saved_modules(self) -> set[str]:
        """The modules that ``modules_to_save`` names, as PEFT compares names."""
        ends, tree = tuple(self.stored.modules_to_save), self.tree
        return {n for n, node in tree.items() if n and n.endswith(ends) and not isinstance(node.module, StandIn)}

    def _other_adapter(self) -> Iterator[str]:
        """Where the model's own adapter of that name is not the file's."""
        if not self.held:
            return
        names = {found.node.name for found in self.found.values()}
        tied = {n for n, layer in self.held.items() if isinstance(layer.lora_adapters()[self.adapter_name], TiedRows)}
        names |= tied
        sides = (("not on", names - self.held.keys()), ("also on", self.held.keys() - names))
        if odd := [f"{how} {listing(sorted(more), 3)}" for how, more in sides if more]:
            yield (
                f"the model's adapter {self.adapter_name!r} is {' and '.join(odd)}: give the target_modules and "
                "exclude_modules that the file's was made with, or call ll.load_adapter with another adapter_name"
            )
        brought = {key: tensor for key, tensor in self.own_tensors.items() if key in self.stored.in_full}
        config = next(iter(self.held.values())).lora_adapters()[self.adapter_name].config
        yield from not_trained(self.stored, self.tree, config, self.adapter_name, brought)
        variant = "dora" if self.stored.options["use_dora"] else "lora"
        for name, found in self.found.items():
            if (layer := self.held.get(found.node.name)) is None or not found.stored.r:
                continue
            adapter, stored = layer.lora_adapters()[self.adapter_name], found.stored
            if stored.is_rows or isinstance(adapter, RowsAdapter):
                own = adapter.tokens if isinstance(adapter, RowsAdapter) else ()
                yield from [] if own == stored.tokens else [f"{name}: other rows of tokens in the file than here"]
                continue
            old = f"{variant}, r={stored.r}, scale {self.stored.scaling(stored):g}"
            new = f"{adapter.variant}, r={adapter.r}, scale {adapter.scaling:g}"
            if old != new:
                yield f"{name}: {old} in the file -> {new} in the model"
