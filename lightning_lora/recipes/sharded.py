"""A base that no rank reads whole: built without memory for its weights, sharded, and filled with each rank's rows."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.errors import UnsupportedError
from lightning_lora.files.skeleton import names_in_files
from lightning_lora.formats.model_folder import CONFIG, INDEX, WEIGHTS, ModelFolder
from lightning_lora.formats.tensors import FLOATS
from lightning_lora.recipes.tokens import resolve

HALVES = (torch.float16, torch.bfloat16)
_OF_A_MODEL = [WEIGHTS, INDEX, "model-*-of-*.safetensors", CONFIG, "generation_config.json"]  # others hold it again


class Files:
    """The files of a base, of which each rank reads what it keeps.

    A rank holds its part of the base and, while it is filled, the rows of one tensor more: with W ranks 1/W of the
    base, where reading it first takes all of it on each. Files are mapped, so that other rows are never read.

    Args:
        folder: The files.
    """

    def __init__(self, folder: ModelFolder) -> None:
        self.folder = folder
        self.keys: Mapping[str, str] = {}

    @property
    def dtype(self) -> torch.dtype | None:
        """Of the first weights in the files, which stands for all of them; None if they hold no such."""
        return next((FLOATS[place.dtype] for place in self._places().values() if place.dtype in FLOATS), None)

    def build(self, auto_class: Any, config: Any, dtype: torch.dtype, **options: Any) -> Any:
        """The model, its weights on the meta device; those that no file has (a new head) are there, and initialised.

        Args:
            auto_class: The class of transformers that builds it.
            config: Its configuration.
            dtype: Of its weights.
            **options: For ``from_config``.

        Returns:
            The model; None if it can't be filled tensor by tensor: transformers then has to load it.
        """
        import transformers

        with parameters_on_meta():
            model = auto_class.from_config(config, dtype=dtype, **options)
        self.keys = names_in_files(model, self.folder)
        known = self._known(model)
        new = [m for m in model.modules() if not all(id(own) in known for own in m.parameters(recurse=False))]
        if not self._fits(model) or any(_holds_more(module, known) for module in new):
            return None
        for module in new:
            module.to_empty(device="cpu", recurse=False)
            model._init_weights(module)
        if (self.folder.path / "generation_config.json").is_file() and model.can_generate():
            model.generation_config = transformers.GenerationConfig.from_pretrained(self.folder.path)
        return model

    def map(self, model: Any) -> None:
        """Gives a model that was built the files themselves as its weights: nothing is read before it is used.

        So a base is packed with no more of it in memory than the layer that is being packed: pages of a file that were
        read can be dropped again.
        """
        self._assign(
            model, lambda key, own: nn.Parameter(self._read(key).to(own.dtype), requires_grad=own.requires_grad)
        )

    def fill(self, model: Any, device: torch.device) -> None:
        """Reads each rank's rows of each weight, behind ``fully_shard``.

        Args:
            model: As it was built.
            device: Where the weights go.
        """
        self._assign(model, lambda key, own: self._part(key, own, device))

    def _assign(self, model: Any, make: Callable[[str, Any], nn.Parameter]) -> None:
        made, known = dict[int, nn.Parameter](), self._known(model)  # weights that are tied stay so
        state = dict[str, Tensor]()
        for name, own in model.named_parameters(remove_duplicate=False):
            if own.is_meta and id(own) not in made:
                made[id(own)] = make(known[id(own)], own)
            if own.is_meta:
                state[name] = made[id(own)]
        for name, buffer in model.named_buffers():
            if name in self.keys:
                state[name] = self._read(self.keys[name]).to(buffer.dtype, copy=True)
        model.load_state_dict(state, strict=False, assign=True)

    def _read(self, key: str, rows: slice = slice(None)) -> Tensor:
        return self.folder.shard_of[key].read(key, rows)

    def _part(self, key: str, own: Any, device: torch.device) -> nn.Parameter:
        from torch.distributed.tensor import DTensor

        mesh = own.device_mesh
        rows = -(-own.shape[0] // mesh.size())  # as torch.chunk has it
        first = min(mesh.get_local_rank() * rows, own.shape[0])
        local = self._read(key, slice(first, first + rows)).to(device, own.dtype, copy=True)
        whole = DTensor.from_local(local, mesh, own.placements, run_check=False, shape=own.shape, stride=own.stride())
        return nn.Parameter(whole, requires_grad=own.requires_grad)

    def _known(self, model: Any) -> dict[int, str]:
        """By parameter the tensor in the files that it is, under one of its names."""
        named = model.named_parameters(remove_duplicate=False)
        return {id(own): self.keys[name] for name, own in named if name in self.keys}

    def _places(self) -> dict[str, Any]:
        return {key: shard.places[key] for key, shard in self.folder.shard_of.items()}

    def _fits(self, model: Any) -> bool:
        """Whether all of the base is in the files, tensor by tensor, in numbers and shapes of the model."""
        keeps = any(getattr(model, name, None) for name in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"))
        if keeps and model.dtype in HALVES:
            return False  # transformers leaves some of it in float32
        known = self._known(model)
        if not all(id(own) in known for own in model.base_model.parameters()):
            return False  # made of several tensors, or of another name
        places, state = self._places(), model.state_dict()
        return all(
            places[key].dtype in FLOATS and places[key].shape == tuple(state[name].shape)
            for name, key in self.keys.items()
        )


def _holds_more(module: nn.Module, known: Mapping[int, str]) -> bool:
    """Whether a module has other values than those that no file has."""
    return bool(module._buffers) or any(id(own) in known for own in module.parameters(recurse=False))


def open_files(base: str) -> Files | None:
    """The files of a base; None if transformers has to load it: quantised, not in safetensors, or not there.

    Raises:
        CheckpointError: If files are missing or damaged.
    """
    from huggingface_hub import snapshot_download

    path = resolve(base)
    try:
        folder = path if Path(path).is_dir() else snapshot_download(path, allow_patterns=_OF_A_MODEL)
        return Files(ModelFolder(folder))
    except (UnsupportedError, OSError, ValueError):
        return None


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """A context in which modules are built with weights on the meta device, and with their buffers as they are."""
    register = nn.Module.register_parameter

    def registered(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:  # one that is there already may be tied
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = registered  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
