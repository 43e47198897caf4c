"""What is written is what the safetensors library would write, with our entry in its header."""

import copy
import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lightning_lora as ll
from lightning_lora.formats.tensor_write import DIGEST, META, NAMES, write_tensors
from lightning_lora.formats.tensors import TensorFile, all_finite

ENTRY = {"step": None, "notes": ["ü", {"b": "line\n", "a": 1.5}]}


def tensors() -> dict[str, torch.Tensor]:
    """Every dtype, odd sizes, odd names, tied ones, transposed ones, and parts of others."""
    whole = torch.randn(10, 6)
    found = {
        f'{dtype!s} {shape} "ü': torch.randint(0, 2, shape).to(dtype)
        for dtype in NAMES
        for shape in ((3, 5), (0, 4), (), (7,))
    }
    return {**found, "z": whole, "a": whole, "transposed": whole.T, "part": whole[3:5], "long": torch.randn(700, 300)}


def test_the_bytes_are_those_of_the_library(tmp_path):
    held = tensors()
    write_tensors(tmp_path / "ours", held, ENTRY)
    plain = {key: tensor.clone().contiguous() for key, tensor in held.items()}
    digests = {
        k: hashlib.sha256(t.view(-1).view(torch.uint8).numpy() if t.numel() else b"").hexdigest()
        for k, t in plain.items()
    }
    text = json.dumps({**ENTRY, "sha256": digests}, sort_keys=True, separators=(",", ":"))
    save_file(
        plain, tmp_path / "theirs", {"format": "pt", META: text, DIGEST: hashlib.sha256(text.encode()).hexdigest()}
    )
    ours, theirs = ((tmp_path / name).read_bytes() for name in ("ours", "theirs"))
    size = int.from_bytes(theirs[:8], "little")
    assert ours[:8] == theirs[:8]
    assert json.loads(ours[8 : 8 + size]) == json.loads(theirs[8 : 8 + size])
    assert list(json.loads(ours[8 : 8 + size])) == list(json.loads(theirs[8 : 8 + size]))
    assert ours[8 + size :] == theirs[8 + size :]


def test_the_same_tensors_are_the_same_bytes(tmp_path):
    held = tensors()
    for name, order in (("one", held), ("other", dict(reversed(held.items())))):
        write_tensors(tmp_path / name, order, ENTRY)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()


def test_tensors_that_are_read_from_the_same_file(tmp_path):
    """They lie in the file's pages, which shall not change or go under them."""
    path, held = tmp_path / "file", {"a": torch.randn(600, 500), "b": torch.randn(600, 500)}
    write_tensors(path, held, ENTRY)
    write_tensors(path, {"b": load_file(path)["a"], "a": load_file(path)["b"]}, ENTRY)
    file = TensorFile(path)
    assert torch.equal(file.read("a"), held["b"])
    assert torch.equal(file.read("b"), held["a"])


def test_dtypes_that_the_format_does_not_have(tmp_path):
    with pytest.raises(ll.UnsupportedError, match="x is torch.complex128, which a safetensors file can't hold"):
        write_tensors(tmp_path / "file", {"x": torch.zeros(2, dtype=torch.complex128)}, {})
    assert not (tmp_path / "file").exists()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_finite_values_whose_sum_is_not(dtype):
    largest = torch.full((33, 5), torch.finfo(dtype).max, dtype=dtype)
    assert all_finite(largest)
    assert all_finite(torch.cat([largest, -largest]))
    assert all_finite(largest[:0])
    assert all_finite(torch.full((3,), 7))
    for odd in (torch.inf, -torch.inf, torch.nan):
        for values in (largest.clone(), torch.zeros_like(largest)):
            values[17, 3] = odd
            assert not all_finite(values)
    values = torch.zeros_like(largest)
    values[0, 0], values[1, 1] = torch.inf, -torch.inf
    assert not all_finite(values)


@pytest.mark.parametrize("dtype", NAMES, ids=str)
def test_buffers_of_every_dtype_there_and_back(dtype, tmp_path):
    """Of a module that is trained in full."""

    def build():
        model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
        model[1].register_buffer("codes", torch.zeros(3).to(dtype))
        model[1].register_buffer("none", torch.zeros(0, 3).to(dtype))
        return model

    model, codes = build(), torch.tensor([0.0, 1.0, 1.0]).to(dtype)
    again = copy.deepcopy(model)
    ll.inject(model, ll.LoRAConfig(r=2, target_modules=["0"], modules_to_save=["1"]))
    model[1].codes = codes.clone()
    ll.save_adapter(model, tmp_path / "adapter")
    ll.load_adapter(again, tmp_path / "adapter")
    assert again[1].codes.dtype == dtype
    assert torch.equal(again[1].codes.view(torch.uint8), codes.view(torch.uint8))
