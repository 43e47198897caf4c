"""The base model of an adapter as files: which tensors an adapter changes, and whether it is the adapter's base."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_lora.errors import CheckpointError, UnsupportedError, listing, raise_all
from lightning_lora.files.skeleton import names_in_files, skeleton
from lightning_lora.formats.fingerprint import compare, fingerprint, is_buffer, pack, unpack
from lightning_lora.formats.model_folder import ModelFolder
from lightning_lora.formats.peft_parameters import with_parameters
from lightning_lora.formats.shards import Shard
from lightning_lora.formats.stored import StoredAdapter
from lightning_lora.formats.tensors import FLOATS
from lightning_lora.layers import Part, kind_of_layer
from lightning_lora.loading.misfits import Misfits
from lightning_lora.merging.ties import FLAG, is_only_a_tie, loosened
from lightning_lora.ops.samples import sample
from lightning_lora.targets.tokens import tied_tables
from lightning_lora.targets.walk import nodes, parameter_owners


class Change(NamedTuple):
    """A weight that an adapter changes: its name in the model, and the one that it has, or is going to have, in a file.

    ``tied`` are the names of others that share it, and keep the values that it had.
    """

    adapter_name: str
    name: str
    key: str
    tied: tuple[str, ...] = ()


class BaseFiles:
    """A base model as files, seen with an adapter.

    Args:
        folder: The files.
        stored: The adapter.
        adapter_name: What it is called.

    Raises:
        CheckpointError: If the adapter does not fit, with every problem.
        UnsupportedError: If that can't be done without the model.
    """

    def __init__(self, folder: ModelFolder, stored: StoredAdapter, adapter_name: str) -> None:
        self.folder, source = folder, str(folder.path)
        self.model = skeleton(folder.config, source)
        self.keys = names_in_files(self.model, folder)
        tree = nodes(self.model)
        self._groups = {n: names for names in parameter_owners(tree).values() for n in names}
        names = {name for node in tree.values() for name in node.names} | self._groups.keys()
        self.stored = with_parameters(stored, tree) if stored.layout == "peft" else stored.relative_to(names)
        self.misfits = Misfits(self.model, self.stored, adapter_name)
        raise_all(CheckpointError, self.misfits.problems(), stored.source)
        if parts := [name for name, (node, _) in self.misfits.found.items() if isinstance(node.module, Part)]:
            way_out = "make a PEFT folder of it first (lightning-lora export)"
            raise UnsupportedError(f"{stored.source}: {listing(parts, 3)}: parts of layers: {way_out}")
        self.layers = {n: self._layer_change(n) for n in self.misfits.found if not self._is_other_end(n)}
        self.config = self._config()
        self.added = dict(self._added())
        raise_all(CheckpointError, self._missing(), source)
        raise_all(UnsupportedError, self._unsupported(), stored.source)

    def compare(self, allow_base_mismatch: bool) -> list[str]:
        """Checks that the files are what the adapter was trained on, as far as the adapter knows.

        Returns:
            What may differ and does.

        Raises:
            BaseMismatchError: If they are something else.
        """
        stored = self.stored
        if stored.base is None or allow_base_mismatch:
            return []
        trained = {each for name in stored.trained for each in self._groups.get(name, [name])}
        way_out = "allow that they differ (--allow-base-mismatch)"
        return compare(stored.base, self._fingerprint(), trained, source=stored.source, way_out=way_out)

    def places_of(self, name: str) -> list[str]:
        """The tensors in the merged files that hold a parameter or buffer, under all the names that share it."""
        names = self._groups.get(name, [name])
        return list(dict.fromkeys(key for n in names if (key := self._key(n)) is not None))

    def source_of(self, key: str) -> str:
        """The tensor in the files of the base that a tensor of the merged files is made of."""
        return self.added[key][1] if key in self.added else key

    def read(self, key: str) -> Tensor:
        """A tensor of the base by its name in a file."""
        return self.folder.shard_of[key].read(key)

    def _key(self, name: str) -> str | None:
        return name if name in self.added else self.keys.get(name)

    def _layer_change(self, layer_name: str) -> Change:
        node, stored = self.misfits.found[layer_name]
        kind = kind_of_layer(node.module)
        own = [kind.lora_weight_name(name) for name in node.names]
        ends = self._groups.get(own[0], ())
        tied = [] if stored.is_rows else [name for name in ends if name not in own]  # rows are those of every end
        own += ends if stored.is_rows else []
        key = next((self.keys[name] for name in own if name in self.keys), own[0])
        return Change(self.misfits.adapter_name, own[0], key, tuple(tied))

    def _is_other_end(self, layer_name: str) -> bool:
        """Whether it is rows of a table that the file has for another layer too."""
        node, stored = self.misfits.found[layer_name]
        return stored.is_rows and tied_tables(self.misfits.tree, node)[0] is not node

    def _config(self) -> dict[str, Any]:
        """The configuration of what is merged: with weights untied that were tied, if that says no more."""
        config = self.folder.config
        if not any(change.tied for change in self.layers.values()):
            return config
        parts = {key: part for key, part in config.items() if isinstance(part, dict) and part.get(FLAG)}
        untied = {**config, FLAG: False, **{key: {**part, FLAG: False} for key, part in parts.items()}}
        model: Any = self.model
        return untied if is_only_a_tie(type(model), model.config, self._made(untied).config) else config

    def _made(self, config: dict[str, Any]) -> Any:
        return skeleton(config, str(self.folder.path))

    def _added(self) -> Iterator[tuple[str, tuple[Shard, str]]]:
        """Tensors that no file has, since they were tied to one that is in a file, and are by themselves now."""
        changed = [change.name for change in self.layers.values() if change.tied]
        for names in loosened(self.model, self._made(self.config), changed) if changed else ():
            sources = [self.keys[name] for name in names if name in self.keys]
            for name in names if sources else ():
                if name not in self.keys:
                    yield name, (self.folder.shard_of[sources[0]], sources[0])

    def _missing(self) -> Iterator[str]:
        files = self.folder.shard_of
        lost = [change.name for change in self.layers.values() if change.key not in {*files, *self.added}]
        lost += [key for key in self.stored.in_full if not self.places_of(key)]
        if lost:
            yield (
                f"{listing(lost, 3)}: there is no such tensor in the files. Where transformers makes it of several "
                "when it loads them, go by Python: ll.load_adapter, then ll.analyze, or ll.merge_and_unload and "
                "save_pretrained"
            )
        written = {change.key for change in self.layers.values()}
        written |= {key for name in self.stored.in_full for key in self.places_of(name)}
        own = {key: tuple(tensor.shape) for key, tensor in self.model.state_dict().items()}
        for name, key in self.keys.items():
            place = files[key].places[key]
            if key in written and place.dtype not in FLOATS:
                yield f"{key} is {place.dtype} in the files, to which nothing can be added: give the dense model"
            elif key in written and place.shape != own[name]:
                yield f"{key} is {place.shape} in the files, and {own[name]} by their configuration"

    def _unsupported(self) -> Iterator[str]:
        if self.stored.init is not None:
            yield (
                f"init_lora_weights={self.stored.init!r} took a part out of each weight, and all of the weight tells "
                "which: load the adapter with ll.load_adapter, and save it with ll.save_adapter against the clean base"
            )

    def _fingerprint(self) -> dict[str, Any]:
        """That of the model, with values of the files."""
        made = fingerprint(self.model)
        described, samples = [], []
        for name, shape, dtype in unpack(made["parameters"]):
            key = next((self.keys[n] for n in self._groups.get(name, [name]) if n in self.keys), None)
            place = None if key is None else self.folder.shard_of[key].places[key]
            known = key is not None and place is not None and place.dtype in FLOATS
            if known and place is not None and not is_buffer(dtype):
                shape, dtype = list(place.shape), str(FLOATS[place.dtype]).removeprefix("torch.")
            described.append([name, shape, dtype])
            samples.append(sample(self.read(key) if known and key is not None else torch.empty(0)))
        stacked = torch.stack(samples) if samples else made["samples"]
        return {**made, "sha256": "", "parameters": pack(described), "samples": stacked}
