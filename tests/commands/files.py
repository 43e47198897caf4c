"""Adapters and bases on disk, as commands meet them."""

import copy
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file
from torch import Tensor, nn

import lightning_lora as ll
from lightning_lora.cli import main
from tests.helpers.families import FAMILIES
from tests.helpers.layers import randomise
from tests.helpers.modules import Wrapped, one_batch, trainer


def adapted(base: nn.Module, name: str = "default", seed: int = 3, **options) -> nn.Module:
    """A copy with an adapter as after training: all that is trained is far from where it started."""
    model = copy.deepcopy(base)
    ll.inject(model, ll.LoRAConfig(**{"r": 4, "lora_alpha": 6, **options}), name)
    randomise(model, seed)
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in model.named_parameters():
        if parameter.requires_grad and ".lora." not in key:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return model.eval()


def fitted(folder: Path, family: str, **options) -> Wrapped:
    """A LightningModule after two steps, with its checkpoint ``run.ckpt`` in a folder."""
    made = FAMILIES[family]
    module = Wrapped(made.make)
    saver = ModelCheckpoint(folder, filename="run")
    config = {"r": 4, "lora_alpha": 6, "target_modules": made.target_modules, **options}
    run = trainer(ll.LoRA(**config), saver)
    run.fit(module, one_batch(made.batch(module.net)))
    return module


def tensors(folder: Path) -> dict[str, Tensor]:
    """All that is in a folder's safetensors files."""
    return {key: value for path in sorted(folder.glob("*.safetensors")) for key, value in load_file(path).items()}


def assert_same_tensors(one: Path, other: Path) -> None:
    first, second = tensors(one), tensors(other)
    assert first.keys() == second.keys()
    odd = [key for key in first if first[key].dtype != second[key].dtype or not torch.equal(first[key], second[key])]
    assert not odd


def assert_same_files(one: Path, other: Path) -> None:
    """Byte for byte."""
    assert {path.name for path in one.iterdir()} == {path.name for path in other.iterdir()}
    odd = [path.name for path in one.iterdir() if path.read_bytes() != (other / path.name).read_bytes()]
    assert not odd


def run(*arguments: object) -> None:
    """A command that succeeds."""
    main([str(argument) for argument in arguments])


def fails(code: int, capsys, *arguments: object) -> str:
    """A command that exits with a code: what it says on stderr, and nothing but that."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    written = capsys.readouterr()
    assert caught.value.code == code, written.err
    assert "Traceback" not in written.err
    return written.err
