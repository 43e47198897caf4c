"""A transformers model on disk: its configuration, and which safetensors file has which tensor."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lightning_lora.errors import CheckpointError, UnsupportedError, listing, raise_all
from lightning_lora.formats.peft_config import CONFIG as ADAPTER_CONFIG
from lightning_lora.formats.shards import Shard

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"

_OTHER_WEIGHTS = (  # ends of files that hold weights of the base, or say where they are
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack", ".gguf", ".onnx",
    ".onnx_data", ".tflite", ".ot", ".index.json",
)  # fmt: skip


class ModelFolder:
    """A transformers model on disk.

    Args:
        folder: The folder.

    Attributes:
        path: The folder.
        config: What its ``config.json`` says.
        shards: Its safetensors files.
        shard_of: By tensor the file that has it.

    Raises:
        FileNotFoundError: If there is no such model.
        CheckpointError: If files are missing or damaged, with all of them.
        UnsupportedError: If it is quantised, or has no safetensors files.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.path = Path(folder)
        if not (self.path / CONFIG).is_file():
            what = f"holds no {CONFIG}" if self.path.is_dir() else "does not exist"
            raise FileNotFoundError(f"{self.path} {what}: give the folder of a transformers model")
        self.config = _json(self.path / CONFIG)
        raise_all(UnsupportedError, self._unsupported(), str(self.path))
        self.index = None if (self.path / WEIGHTS).is_file() else _json(self.path / INDEX)
        opened = {name: _opened(self.path / name) for name in self._names()}
        self.shards = [shard for shard in opened.values() if isinstance(shard, Shard)]
        problems = [problem for problem in opened.values() if isinstance(problem, str)]
        raise_all(CheckpointError, [*problems, *(() if problems else self._disagreements())])
        self.shard_of = {key: shard for shard in self.shards for key in shard.places}

    def copy_others(self, target: Path) -> list[str]:
        """Copies all that is no weight (tokenizer, configurations, code) and tells what weights were left out."""
        left, own = [], {CONFIG, INDEX, *(shard.path.name for shard in self.shards)}
        for path in sorted(self.path.iterdir()):
            if path.name.startswith(".") or path.name in own:
                continue
            if path.is_dir():
                shutil.copytree(path, target / path.name, ignore=_weights)
                left += [f"{path.name}/{p.name}" for p in sorted(path.rglob("*")) if p.name.endswith(_OTHER_WEIGHTS)]
            elif path.name.endswith(_OTHER_WEIGHTS):
                left.append(path.name)
            else:
                shutil.copyfile(path, target / path.name)
        return left

    def write_index(self, target: Path, shards: Iterable[Shard]) -> None:
        """Writes which file has which tensor, if there are several files."""
        if self.index is None:
            return
        files = {key: shard.path.name for shard in shards for key in shard.places}
        new = [shard.places[key] for shard in shards for key in shard.places if key not in self.shard_of]
        metadata = dict(self.index.get("metadata") or {})
        for name, more in (
            ("total_size", sum(place.end - place.begin for place in new)),
            ("total_parameters", sum(place.numel for place in new)),
        ):
            if isinstance(metadata.get(name), int):
                metadata[name] += more
        index = {**self.index, "metadata": metadata, "weight_map": dict(sorted(files.items()))}
        (target / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def write_config(self, target: Path, config: dict[str, Any]) -> None:
        """Writes the configuration; the very file if nothing in it changed."""
        if config == self.config:
            shutil.copyfile(self.path / CONFIG, target / CONFIG)
        else:
            (target / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def _unsupported(self) -> Iterator[str]:
        parts = [self.config, *(part for part in self.config.values() if isinstance(part, dict))]
        for part in parts:
            if quantization := part.get("quantization_config") or part.get("compression_config"):
                method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
                yield (
                    f"the base is quantised ({method}), and its files hold packed weights: give the dense model that "
                    "it was made from, which the adapter fits as well"
                )
                break
        if (self.path / ADAPTER_CONFIG).is_file():
            yield f"it holds {ADAPTER_CONFIG}, by which transformers loads an adapter too: give the model alone"
        if not (self.path / WEIGHTS).is_file() and not (self.path / INDEX).is_file():
            pickled = [*self.path.glob("pytorch_model*.bin")]
            hint = f"{pickled[0].name} is a pickle: load it and save it with save_pretrained" if pickled else "none"
            yield f"it holds neither {WEIGHTS} nor {INDEX} ({hint})"

    def _names(self) -> list[str]:
        if self.index is None:
            return [WEIGHTS]
        files = self.index.get("weight_map")
        if not isinstance(files, dict) or not files or not all(isinstance(name, str) for name in files.values()):
            raise CheckpointError(f"{self.path / INDEX} has no weight_map of tensors to files")
        names = sorted(set(files.values()))
        if odd := [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]:
            raise CheckpointError(
                f"{self.path / INDEX} names {listing(odd, 3)}, which is no safetensors file beside it"
            )
        return names

    def _disagreements(self) -> Iterator[str]:
        if self.index is None:
            return
        found = {key: shard.path.name for shard in self.shards for key in shard.places}
        files = self.index["weight_map"]
        if odd := [key for key in {**files, **found} if files.get(key) != found.get(key)]:
            yield f"{self.path / INDEX} and the files beside it differ: {listing(odd, 3)}"
        if sum(len(shard.places) for shard in self.shards) > len(found):
            yield f"{self.path}: several files hold the same tensor"


def _opened(path: Path) -> Shard | str:
    try:
        return Shard(path)
    except (FileNotFoundError, CheckpointError) as error:
        return str(error)


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, not a mapping")
    return value


def _weights(folder: str, names: list[str]) -> set[str]:
    return {name for name in names if name.startswith(".") or name.endswith(_OTHER_WEIGHTS)}
