"""Files that are damaged, hostile, or of something else: refused at once, in bounded memory, and nothing is changed."""

import base64
import copy
import hashlib
import json
import os
import pickle
import shutil
import socket
import struct
import sys
import time
import warnings
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import lightning_lora as ll
from lightning_lora.formats import files
from lightning_lora.formats.tensor_write import DIGEST, META, write_tensors
from lightning_lora.layers import lora_layers
from tests.helpers.families import FAMILIES
from tests.helpers.layers import randomise
from tests.helpers.modules import Wrapped, one_batch, trainer

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
OPTIONS = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], "use_dora": True}
KEY = "base_model.model.model.layers.0.self_attn.q_proj.{}"
A, B, MAGNITUDE = (KEY.format(end) for end in ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector.weight"))
SECONDS, MEMORY = 2.0, 64 << 20


# ---- what is loaded, and into what ----------------------------------------------------------------------------------------


def build() -> nn.Module:
    return FAMILIES["llama"].make().eval()


def with_adapter(name: str, **options: object) -> nn.Module:
    model = build()
    ll.inject(model, ll.LoRAConfig(**{**OPTIONS, "modules_to_save": ["lm_head"], **options}), name)
    randomise(model, seed=7)
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """The same adapter, written here and by PEFT: that has no checksums, and does not say of which base it is."""
    folder = tmp_path_factory.mktemp("folders")
    ll.save_adapter(with_adapter("default"), folder / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = get_peft_model(build(), LoraConfig(**OPTIONS, modules_to_save=["lm_head"]))
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
        theirs.save_pretrained(folder / "peft")
    return {name: folder / name for name in ("ours", "peft")}


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    """A bare model, one that has another adapter, and one whose adapter would get the values."""
    return {"bare": build(), "other": with_adapter("other").train(), "same": with_adapter("default")}


def picture(model: nn.Module) -> dict[str, object]:
    """Everything about a model that loading could change."""
    return {
        "values": {key: value.clone() for key, value in model.state_dict().items()},
        "objects": {key: id(value) for key, value in model.named_parameters()},
        "classes": {name: type(module) for name, module in model.named_modules()},
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "trained": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "modes": {name: module.training for name, module in model.named_modules()},
        "adapters": ll.adapters(model),
        "active": {name: layer.lora_active for name, layer in lora_layers(model)},
        "random": {"state": torch.get_rng_state()},
    }


@contextmanager
def unchanged(model: nn.Module):
    """Within this context a model stays what it is, bit for bit."""
    before = picture(model)
    yield
    after = picture(model)
    for part in ("values", "random"):
        old, new = before.pop(part), after.pop(part)
        assert list(old) == list(new)
        assert not [key for key in old if not torch.equal(old[key], new[key])]
    assert before == after


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) << 10


@contextmanager
def limited():
    """Within this context at most two seconds of a processor and 64 MiB are used."""
    measured = Path("/proc/self/clear_refs").exists()
    if measured:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
        before = resident("VmRSS")
    started = time.process_time()
    yield
    assert time.process_time() - started < SECONDS
    assert not measured or resident("VmHWM") - before < MEMORY


def refused(
    models: dict[str, nn.Module],
    source: str | Path,
    message: str | None,
    error: type[Exception] = ll.CheckpointError,
    **options: object,
) -> None:
    """Refused for every model, with this error and no subclass of it, naming the file."""
    for model in models.values():
        with unchanged(model), limited(), pytest.raises(error, match=message) as caught:
            ll.load_adapter(model, source, **options)
        assert caught.type is error
        assert str(source) in str(caught.value)
        assert len(str(caught.value)) < 4000


# ---- how files are damaged ----------------------------------------------------------------------------------------------


def contents(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(folder / WEIGHTS, "pt") as file:
        return {key: file.get_tensor(key) for key in sorted(file.keys())}, file.metadata() or {}


def retensor(folder: Path, change) -> None:
    """Other tensors, in a file that is right in itself: where it was written here, with the checksums of these."""
    tensors, metadata = contents(folder)
    change(tensors)
    if META in metadata:
        entry = json.loads(metadata[META])
        del entry["sha256"]
        write_tensors(folder / WEIGHTS, tensors, entry)
    else:
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / WEIGHTS, metadata)


def header(folder: Path) -> tuple[dict, bytes]:
    data = (folder / WEIGHTS).read_bytes()
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def reheader(folder: Path, text: str | bytes, data: bytes | None = None, size: int | None = None) -> None:
    text = text.encode() if isinstance(text, str) else text
    data = header(folder)[1] if data is None else data
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text) if size is None else size) + text + data)


def change_header(change):
    def damage(folder: Path) -> None:
        fields, _ = header(folder)
        change(fields)
        reheader(folder, json.dumps(fields))

    return damage


def change_entry(change):
    """Our own entry in the metadata, with the digest that it needs."""

    def damage(folder: Path) -> None:
        fields, _ = header(folder)
        text = change(json.loads(fields["__metadata__"][META]))
        text = text if isinstance(text, str) else json.dumps(text)
        fields["__metadata__"] = {META: text, DIGEST: hashlib.sha256(text.encode()).hexdigest()}
        reheader(folder, json.dumps(fields))

    return damage


def entry(**fields: object):
    return change_entry(lambda old: {**old, **fields})


def config(**fields: object):
    def damage(folder: Path) -> None:
        old = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**old, **fields}))

    return damage


def without(*names: str):
    def damage(folder: Path) -> None:
        old = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({key: value for key, value in old.items() if key not in names}))

    return damage


def text_of(file: str, content: str | bytes):
    return lambda folder: (folder / file).write_bytes(content.encode() if isinstance(content, str) else content)


def tensors(**changes):
    """By the end of a key of one layer, what becomes of the tensor; None takes it out."""
    ends = {"A": A, "B": B, "magnitude": MAGNITUDE}

    def damage(folder: Path) -> None:
        def change(values: dict[str, torch.Tensor]) -> None:
            for name, function in changes.items():
                key = next(k for k in (ends[name], ends[name].removesuffix(".weight")) if k in values)
                value = values.pop(key)
                if function is not None:
                    values[key] = function(value)

        retensor(folder, change)

    return damage


def renamed(old: str, new: str):
    return lambda folder: retensor(folder, lambda values: values.update({new: values.pop(old)}))


def added(**values: torch.Tensor):
    return lambda folder: retensor(folder, lambda held: held.update({KEY.format(k): v for k, v in values.items()}))


def with_first(value: float):
    def change(tensor: torch.Tensor) -> torch.Tensor:
        changed = tensor.clone()
        changed.view(-1)[0] = value
        return changed

    return change


def cut(part: float, more: int = 0):
    def damage(folder: Path) -> None:
        data = (folder / WEIGHTS).read_bytes()
        (folder / WEIGHTS).write_bytes(data[: int(len(data) * part) + more])

    return damage


def flipped(file: str, where) -> None:
    def damage(folder: Path) -> None:
        data = bytearray((folder / file).read_bytes())
        position = where(data) if callable(where) else where
        data[position] ^= 1 << (position % 8)
        (folder / file).write_bytes(data)

    return damage


def case(folder: Path, tmp_path: Path, damage) -> Path:
    target = tmp_path / "adapter"
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    damage(target)
    return target


# ---- the file with the tensors ------------------------------------------------------------------------------------------

DAMAGED = "is damaged, or no safetensors file"
FILES = {
    "empty": (text_of(WEIGHTS, ""), DAMAGED),
    "3-bytes": (text_of(WEIGHTS, b"\x01\x02\x03"), DAMAGED),
    "length-only": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:8]), DAMAGED),
    "cut-in-the-header": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:100]), DAMAGED),
    "cut-at-a-third": (cut(1 / 3), DAMAGED),
    "cut-in-the-tensors": (cut(0.9), DAMAGED),
    "cut-at-the-end": (cut(1.0, -1), DAMAGED),
    "trailing-byte": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes() + b"\0"), DAMAGED),
    "trailing-page": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes() + b"x" * 4096), DAMAGED),
    "zeros": (lambda f: (f / WEIGHTS).write_bytes(bytes((f / WEIGHTS).stat().st_size)), DAMAGED),
    "a-pickle": (lambda f: torch.save({"a": torch.ones(3)}, f / WEIGHTS), DAMAGED),
    "a-text": (text_of(WEIGHTS, "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"), DAMAGED),
    "header-of-64-bits": (lambda f: reheader(f, "{}", size=(1 << 64) - 1), DAMAGED),
    "header-of-63-bits": (lambda f: reheader(f, "{}", size=1 << 63), DAMAGED),
    "header-of-100-MB": (lambda f: reheader(f, "{}", size=100_000_000), DAMAGED),
    "header-of-70-MB": (lambda f: os.truncate(f / WEIGHTS, reheader(f, "{}", size=70_000_000) or 80_000_000), DAMAGED),
    "header-of-50-MB": (lambda f: reheader(f, "{}", size=50_000_000), DAMAGED),
    "header-of-0": (lambda f: reheader(f, "", size=0), DAMAGED),
    "header-no-json": (lambda f: reheader(f, "{'a'}", b""), DAMAGED),
    "header-no-utf8": (lambda f: reheader(f, b'{"\xff": 1}', b""), DAMAGED),
    "header-a-list": (lambda f: reheader(f, "[]", b""), DAMAGED),
    "header-nested": (lambda f: reheader(f, '{"a":' * 100_000 + "1" + "}" * 100_000, b""), DAMAGED),
    "header-nested-lists": (lambda f: reheader(f, '{"a":' + "[" * 100_000, b""), DAMAGED),
    "header-without-tensors": (lambda f: reheader(f, "{}", b""), "holds no adapter"),
    "metadata-no-texts": (lambda f: reheader(f, '{"__metadata__": {"a": [1]}}', b""), DAMAGED),
    "metadata-nested": (lambda f: reheader(f, '{"__metadata__":' + "[" * 100_000, b""), DAMAGED),
    "offsets-negative": (change_header(lambda h: h[A].update(data_offsets=[-8, 0])), DAMAGED),
    "offsets-backwards": (change_header(lambda h: h[A].update(data_offsets=h[A]["data_offsets"][::-1])), DAMAGED),
    "offsets-beyond": (change_header(lambda h: h[A].update(data_offsets=[1 << 40, (1 << 40) + 512])), DAMAGED),
    "offsets-of-64-bits": (change_header(lambda h: h[A].update(data_offsets=[0, (1 << 64) - 1])), DAMAGED),
    "offsets-of-70-bits": (change_header(lambda h: h[A].update(data_offsets=[0, 1 << 70])), DAMAGED),
    "offsets-overlap": (change_header(lambda h: h[A].update(data_offsets=h[B]["data_offsets"])), DAMAGED),
    "offsets-three": (change_header(lambda h: h[A].update(data_offsets=[0, 1, 2])), DAMAGED),
    "shape-negative": (change_header(lambda h: h[A].update(shape=[-4, -32])), DAMAGED),
    "shape-overflows": (change_header(lambda h: h[A].update(shape=[1 << 63, 2])), DAMAGED),
    "shape-larger": (change_header(lambda h: h[A].update(shape=[8, 32])), DAMAGED),
    "dtype-unknown": (change_header(lambda h: h[A].update(dtype="F31")), DAMAGED),
    "dtype-of-another-size": (change_header(lambda h: h[A].update(dtype="F16")), DAMAGED),
}


@pytest.mark.parametrize("kind", ["ours", "peft"])
@pytest.mark.parametrize(("damage", "message"), FILES.values(), ids=FILES)
def test_files_that_are_no_safetensors_files(folders, models, tmp_path, kind, damage, message):
    refused(models, case(folders[kind], tmp_path, damage), message)


def test_cut_anywhere(folders, models, tmp_path):
    target = case(folders["ours"], tmp_path, lambda folder: None)
    data = (target / WEIGHTS).read_bytes()
    for length in range(0, len(data), len(data) // 40):
        (target / WEIGHTS).write_bytes(data[:length])
        refused({"bare": models["bare"]}, target, DAMAGED)


def test_a_bit_anywhere(folders, models, tmp_path):
    """In the header, and in every tensor at its beginning, in its middle and at its end."""
    target = case(folders["ours"], tmp_path, lambda folder: None)
    fields, values = header(target)
    data = (target / WEIGHTS).read_bytes()
    start = len(data) - len(values)
    places = [*range(0, start, start // 60)]
    for name, place in fields.items():
        if name != "__metadata__":
            begin, end = place["data_offsets"]
            places += [start + begin, start + (begin + end) // 2, start + end - 1]
    for place in places:
        damaged = bytearray(data)
        damaged[place] ^= 1 << place % 8
        (target / WEIGHTS).write_bytes(damaged)
        refused({"bare": models["bare"]}, target, None)


def test_a_bit_in_a_file_of_peft_can_make_values_infinite(folders, models, tmp_path):
    def damage(folder: Path) -> None:
        fields, values = header(folder)
        key = next(key for key in fields if key.endswith("layers.1.mlp.down_proj.lora_B.weight"))
        changed = bytearray(values)
        changed[fields[key]["data_offsets"][0] + 3] |= 0x7F
        changed[fields[key]["data_offsets"][0] + 2] |= 0x80
        reheader(folder, json.dumps(fields), bytes(changed))

    target = case(folders["peft"], tmp_path, damage)
    refused(models, target, "layers.1.mlp.down_proj.lora_B.weight holds NaN or infinite values")


def test_a_key_twice_in_the_header(folders, models, tmp_path):
    def damage(folder: Path) -> None:
        fields, _ = header(folder)
        text = json.dumps(fields)
        reheader(folder, text[:-1] + f', "{A}": {json.dumps(fields[B])}}}')

    refused(models, case(folders["ours"], tmp_path, damage), DAMAGED)


def test_a_header_with_too_many_tensors(folders, models, tmp_path):
    def damage(folder: Path) -> None:
        name = '"{}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
        reheader(folder, "{" + ",".join(name.format(i) for i in range(300_000)) + "}", b"")

    target = case(folders["peft"], tmp_path, damage)
    started = time.process_time()
    with unchanged(models["bare"]), pytest.raises(ll.CheckpointError, match="it has 300,000 tensors"):
        ll.load_adapter(models["bare"], target)
    assert time.process_time() - started < SECONDS


# ---- tensors ------------------------------------------------------------------------------------------------------------

TENSORS = {
    "A-nan": (tensors(A=with_first(float("nan"))), "q_proj.lora_A.weight holds NaN or infinite values"),
    "B-inf": (tensors(B=with_first(float("inf"))), "q_proj.lora_B.weight holds NaN or infinite values"),
    "magnitude-inf": (tensors(magnitude=with_first(-float("inf"))), "magnitude_vector.* holds NaN or infinite values"),
    "A-int8": (tensors(A=lambda t: t.to(torch.int8)), "A is int8, which no adapter is"),
    "B-int64": (tensors(B=lambda t: t.long()), "B is int64, which no adapter is"),
    "A-bool": (tensors(A=lambda t: t > 0), "A is bool, which no adapter is"),
    "A-float8": (tensors(A=lambda t: t.to(torch.float8_e4m3fn)), "A is float8_e4m3fn, which no adapter is"),
    "A-complex": (tensors(A=lambda t: t.to(torch.complex64)), "A is complex64, which no adapter is"),
    "B-too-large": (tensors(B=lambda t: with_first(1e300)(t.double())), "B is too large for float32"),
    "A-transposed": (tensors(A=lambda t: t.T.contiguous()), r"A is \(32, 4\) in the file, and \(4, 32\) here \(r=4\)"),
    "B-transposed": (tensors(B=lambda t: t.T.contiguous()), r"B is \(4, 32\) in the file, and \(32, 4\) here"),
    "both-transposed": (tensors(A=lambda t: t.T.contiguous(), B=lambda t: t.T.contiguous()), "2 problems"),
    "A-of-another-rank": (tensors(A=lambda t: t[:2]), r"A is \(2, 32\) in the file, and \(4, 32\) here"),
    "A-empty": (tensors(A=lambda t: t[:0]), r"A is \(0, 32\) in the file"),
    "A-scalar": (tensors(A=lambda t: t[0, 0].clone()), r"A is \(\) in the file"),
    "A-of-five-dimensions": (tensors(A=lambda t: t.reshape(1, 1, 4, 32, 1)), r"A is \(1, 1, 4, 32, 1\) in the file"),
    "magnitude-shorter": (tensors(magnitude=lambda t: t[:-1]), r"magnitude is \(31,\) in the file, and \(32,\) here"),
    "A-missing": (tensors(A=None), r"q_proj: needs A, B, magnitude, and the file has B, magnitude"),
    "magnitude-missing": (tensors(magnitude=None), r"q_proj: needs A, B, magnitude, and the file has A, B"),
    "layer-missing": (tensors(A=None, B=None, magnitude=None), r"target_modules names model.layers.0.self_attn.q_proj"),
    "renamed": (renamed(A, A.replace("q_proj", "q_prok")), "the model has no .*q_prok. Did you mean .*q_proj'"),
    "of-a-layer-beyond": (renamed(A, A.replace("layers.0", "layers.9")), "the model has no model.layers.9"),
    "of-a-layer-without": (renamed(A, A.replace("q_proj", "rotary")), "the model has no"),
    "of-no-layer": (
        renamed(A, A.replace("self_attn.q_proj", "input_layernorm")),
        "a LlamaRMSNorm can't have an adapter",
    ),
    "extra": (
        added(**{"lora_C.weight": torch.ones(3)}),
        "the model has no .*lora_C.weight, which the file has in full",
    ),
    "extra-in-full": (added(weight=torch.ones(3, 3)), r"q_proj.weight is \(3, 3\) in the file, and \(32, 32\)"),
    "embedding-for-a-linear": (added(lora_embedding_A=torch.ones(4, 32)), "has two tensors for A"),
    "two-magnitudes": (
        lambda folder: retensor(
            folder,
            lambda values: values.update(
                {MAGNITUDE: torch.ones(32), MAGNITUDE.removesuffix(".weight"): torch.ones(32)}
            ),
        ),
        "q_proj has two tensors for magnitude",
    ),
    "head-shorter": (
        lambda folder: retensor(
            folder, lambda v: v.update({(k := next(k for k in v if "lm_head" in k)): v[k][:-1].contiguous()})
        ),
        r"lm_head.weight is \(60, 32\) in the file, and \(61, 32\) in the model: call model.resize",
    ),
    "head-missing": (
        lambda folder: retensor(folder, lambda v: v.pop(next(k for k in v if "lm_head" in k))),
        "modules_to_save names lm_head, and the file has no lm_head.weight",
    ),
    "head-int64": (
        lambda folder: retensor(folder, lambda v: v.update({(k := next(k for k in v if "lm_head" in k)): v[k].long()})),
        "lm_head.weight is int64 in the file, and float32 in the model",
    ),
    "head-float8": (
        lambda folder: retensor(
            folder, lambda v: v.update({(k := next(k for k in v if "lm_head" in k)): v[k].to(torch.float8_e5m2)})
        ),
        "lm_head.weight is float8_e5m2 in the file, and float32 in the model",
    ),
    "head-complex": (
        lambda folder: retensor(
            folder, lambda v: v.update({(k := next(k for k in v if "lm_head" in k)): v[k].to(torch.complex64)})
        ),
        "lm_head.weight is complex64 in the file",
    ),
    "head-nan": (
        lambda folder: retensor(
            folder, lambda v: v.update({(k := next(k for k in v if "lm_head" in k)): v[k] * float("nan")})
        ),
        "lm_head.weight holds NaN or infinite values",
    ),
    "head-too-large": (
        lambda folder: retensor(
            folder, lambda v: v.update({(k := next(k for k in v if "lm_head" in k)): v[k].double() * 1e200})
        ),
        "lm_head.weight is too large for float32",
    ),
    "nothing-left": (lambda folder: retensor(folder, lambda values: values.clear()), "holds no adapter"),
}


@pytest.mark.parametrize("kind", ["ours", "peft"])
@pytest.mark.parametrize(("damage", "message"), TENSORS.values(), ids=TENSORS)
def test_tensors_that_do_not_fit(folders, models, tmp_path, kind, damage, message):
    refused(models, case(folders[kind], tmp_path, damage), message)


@pytest.mark.parametrize("change", [lambda v: v.pop(A), lambda v: v.update(more=torch.ones(1))])
def test_tensors_that_come_and_go_without_checksums(folders, models, tmp_path, change):
    """Written anew by somebody who keeps the metadata."""

    def damage(folder: Path) -> None:
        values, metadata = contents(folder)
        change(values)
        save_file(values, folder / WEIGHTS, metadata)

    refused(models, case(folders["ours"], tmp_path, damage), "does not hold what was written: .* differ")


def test_other_values_under_the_same_checksums(folders, models, tmp_path):
    def damage(folder: Path) -> None:
        values, metadata = contents(folder)
        save_file({**values, A: values[A] + 1}, folder / WEIGHTS, metadata)

    target = case(folders["ours"], tmp_path, damage)
    refused(models, target, r"q_proj.lora_A.weight is not what was written \(its SHA-256 differs\)")


# ---- what the file says of itself -----------------------------------------------------------------------------------------


def bomb(size: int) -> str:
    packer = zlib.compressobj(9)
    parts = [packer.compress(b" " * (1 << 20)) for _ in range(size >> 20)]
    return base64.b64encode(b"".join([*parts, packer.flush()])).decode()


def base(**fields: object):
    return change_entry(lambda old: {**old, "base": {**old["base"], **fields}})


BASE = "what it says of its base can't be read"
ENTRIES = {
    "no-json": (change_entry(lambda old: "{"), DAMAGED),
    "a-list": (change_entry(lambda old: "[]"), DAMAGED),
    "empty": (change_entry(lambda old: ""), DAMAGED),
    "null": (change_entry(lambda old: "null"), DAMAGED),
    "nested": (change_entry(lambda old: "[" * 100_000), DAMAGED),
    "nested-fields": (change_entry(lambda old: '{"a":' * 100_000), DAMAGED),
    "a-huge-number": (change_entry(lambda old: '{"format": ' + "1" * 5000 + "}"), DAMAGED),
    "no-checksums": (change_entry(lambda old: {k: v for k, v in old.items() if k != "sha256"}), DAMAGED),
    "checksums-a-list": (entry(sha256=[1]), DAMAGED),
    "checksums-of-others": (entry(sha256={}), "does not hold what was written"),
    "checksums-numbers": (
        change_entry(lambda old: {**old, "sha256": dict.fromkeys(old["sha256"], 1)}),
        "is not what was",
    ),
    "format-99": (entry(format=99), "is of format 99, this version reads 1: install a newer lightning-lora"),
    "format-nested": (entry(format=[[[[1]]]]), "is of format"),
    "no-format": (entry(format=None), "is of format None"),
    "no-configuration": (entry(peft=None), "does not say with which configuration it was written"),
    "configuration-a-list": (entry(peft=["r"]), "does not say with which configuration it was written"),
    "own-configuration-a-list": (entry(config=["r"]), WEIGHTS),
    "own-configuration-unknown-field": (entry(config={"rank": 3}), "unknown field 'rank'"),
    "own-configuration-wrong": (entry(config={"r": "8"}), "r must be a positive integer"),
    "own-configuration-huge-alpha": (entry(config={"lora_alpha": 10**400}), WEIGHTS),
    "own-configuration-no-regex": (entry(config={"target_modules": "(((("}), "is not a valid regex"),
    "name-with-separators": (
        entry(adapter_name="../../etc/passwd"),
        "calls the adapter '../../etc/passwd', which is no",
    ),
    "name-a-number": (entry(adapter_name=3), "calls the adapter 3, which is no name"),
    "name-a-list": (entry(adapter_name=["default"]), r"calls the adapter \['default'\], which is no name"),
    "name-of-a-method": (entry(adapter_name="keys"), "calls the adapter 'keys', which is no name"),
    "starts-of-unknown-layers": (
        entry(starts=["model.layers.7"]),
        "model.layers.7 is noted to have started with a part .*copy the folder again",
    ),
    "starts-a-number": (entry(starts=7), "says that 7 started"),
    "starts-lists": (entry(starts=[["model"]]), r"says that \[\['model'\]\] started"),
    "starts-twice": (entry(starts=["model.layers.0.self_attn.q_proj"] * 2), "started with a part of their weights"),
    "base-null": (entry(base=None), BASE),
    "base-a-text": (entry(base="llama"), BASE),
    "base-empty": (entry(base={}), BASE),
    "base-no-base64": (base(parameters="???"), BASE),
    "base-numbers": (base(parameters=1, samples=2), BASE),
    "base-not-packed": (base(parameters=base64.b64encode(b"abc").decode()), BASE),
    "base-a-bomb": (base(parameters=bomb(1 << 30)), BASE),
    "base-nested": (base(parameters=base64.b64encode(zlib.compress(b"[" * 5000)).decode()), BASE),
    "base-other-rows": (base(parameters=base64.b64encode(zlib.compress(b'[["a",[1],"float32"]]')).decode()), BASE),
    "base-samples-cut": (base(samples=base64.b64encode(b"12345").decode()), BASE),
    "base-no-samples": (base(samples=""), BASE),
    "base-digest-a-number": (base(sha256=5), BASE),
    "base-quantization-a-list": (base(quantization=[1]), BASE),
}


@pytest.mark.parametrize(("damage", "message"), ENTRIES.values(), ids=ENTRIES)
def test_entries_that_are_not_ours(folders, models, tmp_path, damage, message):
    refused(models, case(folders["ours"], tmp_path, damage), message)


@pytest.mark.parametrize("key", [META, DIGEST])
def test_an_entry_without_its_other_half(folders, models, tmp_path, key):
    target = case(folders["ours"], tmp_path, change_header(lambda fields: fields["__metadata__"].pop(key)))
    refused(models, target, "entry is not what was written: its SHA-256 differs")


# ---- the configuration --------------------------------------------------------------------------------------------------

CONFIGS = {
    "no-json": (text_of(CONFIG, "{'r': 8}"), "is no JSON"),
    "empty": (text_of(CONFIG, ""), "is no JSON"),
    "no-utf8": (text_of(CONFIG, b'{"r": "\xff\xfe"}'), "is no JSON"),
    "utf16": (text_of(CONFIG, '{"r": 8}'.encode("utf-16")), "is no JSON"),
    "a-pickle": (text_of(CONFIG, pickle.dumps({"r": 8})), "is no JSON"),
    "a-list": (text_of(CONFIG, "[1, 2]"), "holds a list, not the fields of a LoraConfig"),
    "a-number": (text_of(CONFIG, "8"), "holds a int"),
    "null": (text_of(CONFIG, "null"), "holds a NoneType"),
    "nested": (text_of(CONFIG, "[" * 100_000 + "]" * 100_000), "is no JSON"),
    "nested-fields": (text_of(CONFIG, '{"a":' * 100_000 + "1" + "}" * 100_000), "is no JSON"),
    "huge": (text_of(CONFIG, "{" + " " * (17 << 20) + "}"), "has 17825794 bytes, which is too much"),
    "a-huge-number": (text_of(CONFIG, '{"peft_type": "LORA", "r": ' + "9" * 5000 + "}"), "is no JSON"),
    "r-missing": (without("r"), "r must be a positive integer, got None"),
    "r-0": (config(r=0), "r must be a positive integer, got 0"),
    "r-negative": (config(r=-1), "r must be a positive integer, got -1"),
    "r-true": (config(r=True), "r must be a positive integer, got True"),
    "r-text": (config(r="8"), "r must be a positive integer, got '8'"),
    "r-float": (config(r=4.0), r"r must be a positive integer, got 4\.0"),
    "r-huge": (config(r=int(1e9)), r"\(4, 32\) in the file, and \(1000000000, 32\) here|r is 1000000000 in"),
    "r-beyond-floats": (config(r=10**400), "r must be a positive integer"),
    "r-nested": (config(r=[[[[[[[[8]]]]]]]]), "r must be a positive integer"),
    "alpha-missing": (without("lora_alpha"), "lora_alpha must be a finite number and not 0, got None"),
    "alpha-nan": (config(lora_alpha=float("nan")), "lora_alpha must be a finite number and not 0, got nan"),
    "alpha-inf": (config(lora_alpha=float("inf")), "lora_alpha must be a finite number"),
    "alpha-0": (config(lora_alpha=0), "lora_alpha must be a finite number and not 0, got 0"),
    "alpha-true": (config(lora_alpha=True), "lora_alpha must be a finite number"),
    "alpha-beyond-floats": (config(lora_alpha=10**400), "lora_alpha must be a finite number"),
    "dropout-1": (config(lora_dropout=1.0), r"lora_dropout must be in \[0, 1\), got 1.0"),
    "dropout-beyond-floats": (config(lora_dropout=10**400), "lora_dropout must be in"),
    "dora-a-text": (config(use_dora="yes"), "use_dora must be true or false, got 'yes'"),
    "bias-unknown": (config(bias="some"), "bias must be none, all or lora_only, got 'some'"),
    "bias-a-list": (config(bias=["all"]), "bias must be none, all or lora_only"),
    "targets-numbers": (config(target_modules=[1, 2]), r"target_modules must be a list of names, got \[1, 2\]"),
    "targets-a-mapping": (config(target_modules={"q_proj": 1}), "target_modules must be a list of names"),
    "saved-a-text": (config(modules_to_save="lm_head"), "modules_to_save must be a list of names, got 'lm_head'"),
    "ranks-a-list": (config(rank_pattern=["q"]), "rank_pattern must map names to numbers"),
    "ranks-texts": (config(rank_pattern={"q_proj": "8"}), "rank_pattern must map names to numbers"),
    "alphas-beyond-floats": (config(alpha_pattern={"q_proj": 10**400}), "alpha_pattern must map names to numbers"),
    "layers-texts": (config(layers_to_transform=["0"]), "layers_to_transform must hold layer indices"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["ours", "peft"])
@pytest.mark.parametrize(("damage", "message"), CONFIGS.values(), ids=CONFIGS)
def test_configurations_that_are_none(folders, models, tmp_path, kind, damage, message):
    refused(models, case(folders[kind], tmp_path, damage), message)


def test_nesting_that_python_can_just_read(folders, models, tmp_path):
    """What is read near the limit of recursion has to be compared and shown as well."""
    target = case(folders["peft"], tmp_path, lambda folder: None)
    fields = json.dumps(json.loads((target / CONFIG).read_text()))[:-1]
    for depth in (5, 100, 200, *range(400, 1000, 7)):
        (target / CONFIG).write_text(f'{fields}, "layer_replication": {"[" * depth}{"]" * depth}}}')
        with unchanged(models["bare"]), pytest.raises((ll.UnsupportedError, ll.CheckpointError), match=CONFIG):
            ll.load_adapter(models["bare"], target)


@pytest.mark.parametrize(
    ("field", "value"),
    {
        "layer_replication": [[0, 2], [1, 2]],
        "use_qalora": True,
        "alora_invocation_tokens": [5, 6],
        "lora_bias": True,
        "use_bdlora": {"target_modules_bd_a": ["q_proj"]},
        "arrow_config": {"top_k": 2},
        "something_of_next_year": {"a": [1] * 1000},
        "x" * 100_000: "y" * 100_000,
    }.items(),
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_fields_that_change_the_mathematics(folders, models, tmp_path, field, value):
    target = case(folders["peft"], tmp_path, config(**{field: value}))
    refused(models, target, f"{field[:80]}=.* is not supported, and would change", ll.UnsupportedError)


@pytest.mark.parametrize("kind", ["LOHA", "XLORA", "P_TUNING", "lora", None, 5, ["LORA"], "x" * 1_000_000])
def test_other_kinds_of_adapters(folders, models, tmp_path, kind):
    target = case(folders["peft"], tmp_path, config(peft_type=kind))
    refused(models, target, "is of peft_type .*: only LORA", ll.UnsupportedError)


@pytest.mark.parametrize("init", ["pissa_niter_16", "corda", "lora_ga", "loftq"])
def test_starts_that_cannot_be_done_again(folders, models, tmp_path, init):
    target = case(folders["peft"], tmp_path, config(init_lora_weights=init))
    refused(models, target, "changed the base in a way that can't be done again", ll.UnsupportedError)


PATTERNS = {
    "no-regex": "(((",
    "backtracking": r"(.|\w|[^A-Z])+[A-Z]",
    "recursion": "(?R)",
    "nested": "(" * 5000,
    "repeats": "a{0,99999999999999999999}",
    "long": "ab?" * 100_000,
}


@pytest.mark.parametrize(
    "field", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "modules_to_save"]
)
@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_patterns_that_are_none_or_take_for_ever(folders, models, tmp_path, pattern, field):
    value = {pattern: 4} if field.endswith("_pattern") else [pattern] if field == "modules_to_save" else pattern
    target = case(folders["peft"], tmp_path, config(**{field: value}))
    refused({"bare": models["bare"]}, target, f"{CONFIG}: (the pattern .* can't be used|its patterns take longer)")


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("field", ["rank_pattern", "target_modules", "exclude_modules", "modules_to_save"])
def test_many_patterns(folders, models, tmp_path, field, plain):
    names = [f"n{i}" if plain else f"(a+)+b{i}" for i in range(60_000)]
    value = dict.fromkeys(names, 4) if field == "rank_pattern" else names
    target = case(folders["peft"], tmp_path, config(**{field: value}))
    model = build()
    started = time.process_time()
    with suppress(ll.CheckpointError):  # or loaded, where names that match nothing do no harm
        ll.load_adapter(model, target)
    assert time.process_time() - started < SECONDS


def test_the_textbook_of_patterns(tmp_path):
    """On a name for which it takes for ever in the module that is not used here."""
    name = "a" * 40 + "b"
    model = nn.ModuleDict({name: nn.Linear(4, 4)})
    get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules=[name])).save_pretrained(tmp_path / "peft")
    for field in ("target_modules", "exclude_modules", "rank_pattern"):
        target = tmp_path / field
        shutil.copytree(tmp_path / "peft", target)
        config(**{field: {"(a+)+$": 2} if field == "rank_pattern" else "(a+)+$"})(target)
        named = field != "target_modules"
        with limited(), nullcontext() if named else pytest.raises(ll.CheckpointError, match="left over: a+b"):
            ll.load_adapter(copy.deepcopy(model), target)


@pytest.mark.parametrize(
    "edit",
    [
        {"layers_pattern": "a|layers", "layers_to_transform": [0, 1]},  # a pattern without an index
        {"layers_to_transform": [0]},
        {"exclude_modules": ["layers.1.self_attn.q_proj"]},
        {"target_modules": ["q_proj"]},
        {"target_modules": ["("]},
    ],
)
def test_tensors_that_peft_leaves_out(edit, models, folders, tmp_path):
    target = case(folders["peft"], tmp_path, config(**edit))
    refused(models, target, "tensors are left over: .* have some, and adapter_config.json does not name them")


EDITS = {
    "r": 8,
    "lora_alpha": 7,
    "use_dora": False,
    "use_rslora": True,
    "bias": "lora_only",
    "lora_dropout": 0.5,
    "rank_pattern": {"q_proj": 2},
    "alpha_pattern": {"q_proj": 12},
    "target_modules": ["q_proj"],
    "exclude_modules": "(a+)+$",
    "modules_to_save": None,
    "init_lora_weights": "pissa",
}


@pytest.mark.parametrize(("field", "value"), EDITS.items(), ids=EDITS)
def test_configurations_that_were_edited(folders, models, tmp_path, field, value):
    target = case(folders["ours"], tmp_path, config(**{field: value}))
    refused(models, target, f"{field} is .* in {CONFIG}, and was written as ")


def test_what_says_nothing_about_the_mathematics_may_be_edited(folders, tmp_path):
    fields = {"base_model_name_or_path": "/elsewhere", "task_type": None, "revision": "main", "inference_mode": False}
    target = case(folders["ours"], tmp_path, config(**fields))
    ll.load_adapter(build(), target)


# ---- nothing is run, imported or downloaded -------------------------------------------------------------------------------


def test_no_import_and_no_download(folders, tmp_path, monkeypatch):
    (tmp_path / "evil_module.py").write_text("import pathlib\npathlib.Path('evil').touch()\n")
    monkeypatch.syspath_prepend(str(tmp_path))

    def connect(*args):
        raise AssertionError("a connection")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    fields = {
        "auto_mapping": {"base_model_class": "Evil", "parent_library": "evil_module"},
        "base_model_name_or_path": "someone/something",
        "revision": "main",
        "corda_config": {"cache_file": "http://localhost/a"},
        "megatron_core": "evil_module",
        "loftq_config": {"import": "evil_module"},
        "runtime_config": {"ephemeral_gpu_offload": True},
    }
    target = case(folders["peft"], tmp_path, config(**fields))
    ll.load_adapter(build(), target)
    assert "evil_module" not in sys.modules
    assert not Path("evil").exists()


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil",)


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt"])
def test_pickles_are_not_read(folders, models, tmp_path, name):
    def damage(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        torch.save({A: Evil()}, folder / name)

    target = case(folders["peft"], tmp_path, damage)
    refused(models, target, "is a pickle, which can run code when it is read: make adapter_model.safetensors of it")
    assert not Path("evil").exists()


# ---- what is no file ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("kind", ["missing", "folder", "dangling", "loop", "pipe", "device"])
def test_what_is_no_file(folders, models, tmp_path, name, kind):
    def damage(folder: Path) -> None:
        path = folder / name
        path.unlink()
        if kind == "folder":
            path.mkdir()
        elif kind == "pipe":
            os.mkfifo(path)
        elif kind != "missing":
            path.symlink_to({"dangling": folder / "nowhere", "loop": path, "device": "/dev/zero"}[kind])

    target = case(folders["ours"], tmp_path, damage)
    refused(models, target, "holds no adapter_config.json" if name == CONFIG else "does not exist", FileNotFoundError)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_links_to_files_are_files(folders, tmp_path, name):
    def damage(folder: Path) -> None:
        (folder / name).rename(tmp_path / name)
        (folder / name).symlink_to(tmp_path / name)

    ll.load_adapter(build(), case(folders["ours"], tmp_path, damage))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_what_may_not_be_read(folders, models, tmp_path, name):
    target = case(folders["ours"], tmp_path, lambda folder: (folder / name).chmod(0))
    refused(models, target, "Permission denied")


@pytest.mark.parametrize(
    "source", ["nowhere", "./nowhere", "/nowhere/at/all", "runs/last.ckpt", "a/adapter_model.safetensors", "a\0b", ""]
)
def test_nowhere(models, monkeypatch, source):
    """Nothing that can't be a hub id is looked for on the hub."""
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **kwargs: pytest.fail("a download"))
    refused(models, source, "give a PEFT folder, a checkpoint, or a hub id", FileNotFoundError)


# ---- another base, other names ---------------------------------------------------------------------------------------------


def test_another_base_of_equal_shapes(folders, tmp_path):
    def other(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return FAMILIES["llama"].build().eval()

    saved = with_adapter("default")
    models = {"bare": other(1), "same": other(2)}
    ll.inject(models["same"], ll.LoRAConfig(**OPTIONS, modules_to_save=["lm_head"]))
    message = r"(?s)other values: .*embed_tokens.weight.*allow_base_mismatch=True"
    refused(models, folders["ours"], message, ll.BaseMismatchError)
    for model in models.values():
        ll.load_adapter(model, folders["ours"], allow_base_mismatch=True)
        ours, theirs = ll.adapter_state_dict(model), ll.adapter_state_dict(saved)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_one_weight_of_another_base(folders, models):
    model = build()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.neg_()
    message = r"1 of \d+ weights have other values: model.layers.1.mlp.up_proj.weight"
    refused({"bare": model}, folders["ours"], message, ll.BaseMismatchError)


def test_a_model_of_other_shapes(folders):
    import transformers as tf

    model = tf.AutoModelForCausalLM.from_config(
        tf.LlamaConfig(vocab_size=61, hidden_size=16, intermediate_size=48, num_attention_heads=4)
    )
    refused({"bare": model}, folders["ours"], r"A is \(4, 32\) in the file, and \(4, 16\) here")
    refused({"bare": FAMILIES["gpt2"].make()}, folders["ours"], "the model has no model.layers")
    refused({"bare": nn.Sequential(nn.Linear(3, 3))}, folders["ours"], "the model has no model.layers")


@pytest.mark.parametrize(
    "name",
    ["", " ", "a.b", "a/b", "..", "../a", "a\\b", "a\0b", "a\n", "-a", "keys", "pop", "__class__", "forward", "A" + "ö." * 9, 3, True, b"a", ["a"], {}],
    ids=repr,
)  # fmt: skip
def test_names_that_cannot_be_used(folders, models, name):
    for model in models.values():
        with unchanged(model), limited(), pytest.raises(ll.ConfigError, match="can't be used: letters, digits"):
            ll.load_adapter(model, folders["ours"], name)


@pytest.mark.parametrize("name", ["default", "korean", "q_proj", "lora", "weight", "A", "1", "ö", "a-b"])
def test_names_that_can(folders, name):
    model = build()
    ll.load_adapter(model, folders["ours"], name)
    assert list(ll.adapters(model)) == [name]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 8}, "q_proj: dora, r=4, scale 1.5 in the file -> dora, r=8, scale 0.75 in the model"),
        ({"use_dora": False}, "dora, r=4, scale 1.5 in the file -> lora, r=4"),
        (
            {"target_modules": ["q_proj"]},
            "adapter 'default' is not on model.layers.*down_proj.*: give the target_modules",
        ),
        ({"target_modules": ["q_proj", "down_proj", "k_proj"]}, "adapter 'default' is also on model.layers.*k_proj"),
    ],
)
def test_names_that_another_adapter_has(folders, options, message):
    refused({"same": with_adapter("default", **options)}, folders["ours"], message)


def test_while_adapters_are_merged(folders):
    model = with_adapter("other")
    ll.merge(model)
    with unchanged(model), pytest.raises(ll.ConfigError, match="call ll.unmerge before others are loaded"):
        ll.load_adapter(model, folders["ours"])


def test_a_layer_with_two_names(tmp_path):
    """PEFT has an adapter where it is called by the first; here it is one layer."""
    model = nn.ModuleDict({"a": nn.Linear(4, 4)})
    model["b"] = model["a"]
    get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules=["a"])).save_pretrained(tmp_path / "peft")
    refused({"bare": model}, tmp_path / "peft", "a is b too, where PEFT leaves it as it is")
    retensor(tmp_path / "peft", lambda values: values.update({k.replace("a.lora", "b.lora"): v + 1 for k, v in values.items()}))  # fmt: skip
    refused({"bare": model}, tmp_path / "peft", "a and b are one layer, and the file has an adapter for each")


# ---- the hub --------------------------------------------------------------------------------------------------------------


def test_a_hub_id(folders, models, monkeypatch):
    asked = []

    def download(repository, **options):
        asked.append((repository, options))
        return str(folders["ours"])

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    model = build()
    ll.load_adapter(model, "someone/something")
    assert list(ll.adapters(model)) == ["default"]
    assert asked == [("someone/something", {"allow_patterns": [CONFIG, WEIGHTS]})]

    def fails(repository, **options):
        raise OSError("no route to host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fails)
    message = "is no folder here, and the hub does not give it: OSError: no route to host"
    refused(models, "someone/something", message, FileNotFoundError)
    refused(models, "someone/something-v1.5", message, FileNotFoundError)


def test_a_hub_id_without_a_network(models):
    refused(models, "someone/something", "is no folder here, and the hub does not give it", FileNotFoundError)


# ---- checkpoints ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> tuple[Path, pl.LightningModule]:
    """Of a short run, and the module as it was at its end."""
    path = tmp_path_factory.mktemp("checkpoint") / "a.ckpt"
    torch.manual_seed(0)
    module = Wrapped(build)
    run = trainer(ll.LoRA(**OPTIONS, modules_to_save=["lm_head"]), max_epochs=1)
    run.fit(module, one_batch(FAMILIES["llama"].batch(module.net)))
    run.save_checkpoint(path)
    return path, module.eval()


@pytest.fixture(scope="module")
def several(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("several") / "a.ckpt"
    module = Wrapped(build)
    names = {"korean": {"r": 2}, "coding": {"r": 3, "use_dora": False}}
    callbacks = [ll.LoRA(**{**OPTIONS, **o}, adapter_name=n, modules_to_save=None) for n, o in names.items()]
    run = trainer(*callbacks, max_epochs=1)
    run.fit(module, one_batch(FAMILIES["llama"].batch(module.net)))
    run.save_checkpoint(path)
    return path


def test_a_checkpoint_into_a_part_of_its_model(checkpoint):
    path, module = checkpoint
    ids = torch.randint(3, 61, (2, 7))
    for model in (build(), Wrapped(build).eval()):
        ll.load_adapter(model, path)
        net = getattr(model, "net", model)
        assert torch.equal(net(ids).logits, module.net(ids).logits)
        assert not net.training
    again = with_adapter("default")
    ll.load_adapter(again, path)
    assert torch.equal(again(ids).logits, module.net(ids).logits)


def test_one_of_several_in_a_checkpoint(several, models):
    for name, r in {"korean": 2, "coding": 3}.items():
        model = build()
        ll.load_adapter(model, several, name)
        assert {n: config.r for n, config in ll.adapters(model).items()} == {name: r}
    message = "holds the adapters korean, coding"
    refused(models, several, f"{message}. Say which by adapter_name")
    known = r"there is no adapter 'koraen'. Did you mean 'korean'\? Known: \['korean', 'coding'\]"
    refused(models, several, known, adapter_name="koraen")


def test_the_only_one_in_a_checkpoint_may_have_another_name(checkpoint):
    model = build()
    ll.load_adapter(model, checkpoint[0], "korean")
    assert list(ll.adapters(model)) == ["korean"]


def test_a_checkpoint_of_another_model(checkpoint):
    refused({"bare": FAMILIES["gpt2"].make()}, checkpoint[0], "the model has no net.model.layers")
    torch.manual_seed(3)
    other = FAMILIES["llama"].build()
    refused({"bare": other}, checkpoint[0], "weights have other values", ll.BaseMismatchError)
    ll.load_adapter(other, checkpoint[0], allow_base_mismatch=True)


def test_checkpoints_without_adapters(tmp_path, models):
    module = Wrapped(build)
    run = trainer(max_steps=1)
    run.fit(module, one_batch(FAMILIES["llama"].batch(module.net)))
    run.save_checkpoint(tmp_path / "full.ckpt")
    refused(models, tmp_path / "full.ckpt", "holds no adapters: it is a checkpoint of a whole model")
    torch.save([1], tmp_path / "list.ckpt")
    refused(models, tmp_path / "list.ckpt", "holds a list, not a checkpoint")


def test_a_checkpoint_that_would_run_code(tmp_path, models):
    torch.save({"state_dict": {}, "lightning_lora": Evil()}, tmp_path / "zip.ckpt")
    (tmp_path / "pickle.ckpt").write_bytes(pickle.dumps({"state_dict": Evil()}))
    torch.save({"state_dict": Evil()}, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    for name in ("zip.ckpt", "pickle.ckpt", "old.ckpt"):
        refused(models, tmp_path / name, "can't be read")
    assert not Path("evil").exists()


def test_a_checkpoint_that_is_cut(checkpoint, models, tmp_path):
    data, path = checkpoint[0].read_bytes(), tmp_path / "a.ckpt"
    for length in (0, 1, 100, *range(1000, len(data), len(data) // 20), len(data) - 1):
        path.write_bytes(data[:length])
        refused({"bare": models["bare"]}, path, "can't be read")


def test_a_checkpoint_with_a_flipped_bit(checkpoint, models, tmp_path):
    """Where nothing depends on it (in names of a zip's records, say) the adapter is what it was."""
    data, path = checkpoint[0].read_bytes(), tmp_path / "a.ckpt"
    expected, caught = {k.removeprefix("net."): v for k, v in ll.adapter_state_dict(checkpoint[1]).items()}, 0
    for place in range(0, len(data), len(data) // 150):
        damaged = bytearray(data)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        model = build()
        try:
            ll.load_adapter(model, path)
        except ll.CheckpointError:
            caught += 1
        else:
            found = ll.adapter_state_dict(model)
            assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert caught > 100


def test_a_flipped_bit_is_seen_by_all_who_load(checkpoint, tmp_path):
    """Torch does not compare what it reads with the sums that the file has of it."""
    values = next(v for key, v in ll.adapter_state_dict(checkpoint[1]).items() if key.endswith("A"))
    data, path = bytearray(checkpoint[0].read_bytes()), tmp_path / "a.ckpt"
    data[data.index(values.numpy().tobytes()) + 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ll.CheckpointError, match="in it is damaged, copy the file again"):
        ll.load_from_checkpoint(Wrapped, path, build=build)
    module = Wrapped(build)
    batches = one_batch(FAMILIES["llama"].batch(module.net))
    with pytest.raises(ll.CheckpointError, match="in it is damaged, copy the file again"):
        trainer(ll.LoRA(**OPTIONS, modules_to_save=["lm_head"]), max_epochs=2).fit(module, batches, ckpt_path=path)


def test_a_packed_record(checkpoint, models, tmp_path):
    """torch unpacks what it finds, however large."""
    with (
        zipfile.ZipFile(checkpoint[0]) as old,
        zipfile.ZipFile(tmp_path / "a.ckpt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for info in old.infolist():
            new.writestr(info.filename, old.read(info.filename))
        new.writestr("archive/more", bytes(200 << 20))
    refused(models, tmp_path / "a.ckpt", "in it is damaged|is packed")


def test_pickles_with_other_bytes(checkpoint, models, tmp_path):
    """Under right sums: torch raises whatever the next opcode runs into."""
    path, random = tmp_path / "a.ckpt", torch.Generator().manual_seed(0)
    with zipfile.ZipFile(checkpoint[0]) as file:
        records = {info.filename: file.read(info.filename) for info in file.infolist()}
    pickled = next(name for name in records if name.endswith("data.pkl"))
    caught = 0
    for _ in range(300):
        data = bytearray(records[pickled])
        data[int(torch.randint(len(data), (), generator=random))] = int(torch.randint(256, (), generator=random))
        with zipfile.ZipFile(path, "w") as file:
            for name, record in {**records, pickled: bytes(data)}.items():
                file.writestr(name, record)
        with suppress(ll.CheckpointError):
            ll.load_adapter(build(), path)
            continue
        caught += 1
    assert caught > 100
    assert not Path("evil").exists()


META_KINDS = {
    "no-state": (lambda c: c.pop("state_dict"), "its state_dict does not name its tensors"),
    "state-a-list": (lambda c: c.update(state_dict=[1]), "its state_dict does not name its tensors"),
    "state-numbers": (lambda c: c["state_dict"].update({5: torch.ones(1)}), "its state_dict does not name its tensors"),
    "state-empty": (lambda c: c.update(state_dict={}), "holds no tensors of adapter 'default'"),
    "format": (lambda c: c["lightning_lora"].update(format=2), "reads adapter checkpoints of format 1, the file has 2"),
    "entry-a-list": (lambda c: c.update(lightning_lora=[1]), "reads adapter checkpoints of format 1"),
    "no-adapters": (lambda c: c["lightning_lora"].pop("adapters"), "does not name its adapters"),
    "adapters-empty": (lambda c: c["lightning_lora"].update(adapters={}), "does not name its adapters"),
    "adapters-a-list": (lambda c: c["lightning_lora"].update(adapters=["default"]), "does not name its adapters"),
    "adapters-numbers": (lambda c: c["lightning_lora"].update(adapters={1: {}}), "does not name its adapters"),
    "in-full-a-list": (lambda c: c["lightning_lora"].update(in_full=["a"]), "does not name what is trained in full"),
    "in-full-lists": (lambda c: c["lightning_lora"].update(in_full={"other": [["a"]]}), "does not name what is trained"),
    "config-a-list": (lambda c: c["lightning_lora"]["adapters"].update(default=[1]), "of adapter 'default' can't be used"),
    "config-unknown": (lambda c: c["lightning_lora"]["adapters"]["default"].update(rank=1), "unknown field 'rank'"),
    "config-wrong": (lambda c: c["lightning_lora"]["adapters"]["default"].update(r="8"), "r must be a positive integer"),
    "config-huge": (lambda c: c["lightning_lora"]["adapters"]["default"].update(lora_alpha=10**400), "can't be used"),
    "no-base": (lambda c: c["lightning_lora"].pop("base"), BASE),
    "base-a-list": (lambda c: c["lightning_lora"].update(base=[1]), BASE),
    "base-empty": (lambda c: c["lightning_lora"].update(base={}), BASE),
    "base-garbage": (lambda c: c["lightning_lora"]["base"].update(parameters=torch.ones(9, dtype=torch.uint8)), BASE),
    "base-samples": (lambda c: c["lightning_lora"]["base"].update(samples=torch.ones(2)), BASE),
    "base-fewer-samples": (lambda c: c["lightning_lora"]["base"].update(samples=torch.ones(2, 4)), BASE),
    "base-on-meta": (lambda c: c["lightning_lora"]["base"].update(samples=torch.ones(2, 4, device="meta")), BASE),
    "alpha-backtracks": (
        lambda c: c["lightning_lora"]["adapters"]["default"].update(alpha_pattern={r"(.|\w|[^A-Z])+[A-Z]": 3.0}),
        "the pattern .* can't be used",
    ),
}  # fmt: skip
STATE = "net.model.layers.0.self_attn.q_proj.lora.default.{}"
IN_STATE = {
    "a-number": (5, "lora.default.A is a int, not a tensor"),
    "a-text": ("A", "lora.default.A is a str, not a tensor"),
    "on-meta": (torch.ones(4, 32, device="meta"), "lora.default.A is no plain tensor"),
    "sparse": (torch.ones(4, 32).to_sparse(), "lora.default.A is no plain tensor"),
    "expanded": (torch.ones(1).expand(1 << 40, 32), "lora.default.A claims more values than the file has"),
    "nan": (torch.full((4, 32), float("nan")), "lora.default.A holds NaN or infinite values"),
    "int8": (torch.ones(4, 32, dtype=torch.int8), "A is int8, which no adapter is"),
    "float8": (torch.ones(4, 32).to(torch.float8_e4m3fn), "A is float8_e4m3fn, which no adapter is"),
    "complex": (torch.ones(4, 32, dtype=torch.complex64), "A is complex64, which no adapter is"),
    "transposed": (torch.ones(32, 4), r"A is \(32, 4\) in the file"),
    "empty": (torch.ones(0), r"A is \(0,\) in the file"),
    "scalar": (torch.tensor(1.0), r"A is \(\) in the file"),
}
META_KINDS |= {
    f"A-{name}": (lambda c, value=value: c["state_dict"].update({STATE.format("A"): value}), message)
    for name, (value, message) in IN_STATE.items()
}
META_KINDS |= {
    "long-name": (lambda c: c["state_dict"].update({"a" * 1001: torch.ones(1)}), "its state_dict does not name its tensors"),
    "A-missing": (lambda c: c["state_dict"].pop(STATE.format("A")), "needs A, B, magnitude, and the file has B, magnitude"),
    "layer-unknown": (lambda c: c["state_dict"].update({STATE.format("A").replace("q_", "w_"): torch.ones(4, 32)}), "the model has no"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), META_KINDS.values(), ids=META_KINDS)
def test_checkpoints_whose_contents_are_not_ours(checkpoint, models, tmp_path, damage, message):
    path = tmp_path / "a.ckpt"
    held = torch.load(checkpoint[0], weights_only=True)
    damage(held)
    torch.save(held, path)
    refused({"bare": models["bare"], "same": models["same"]}, path, message)


# ---- saves that fail --------------------------------------------------------------------------------------------------------


def test_a_full_disk(folders, tmp_path, monkeypatch):
    """Half a file is written, and then there is no more room."""
    target = case(folders["ours"], tmp_path, lambda folder: (folder / "tokenizer.json").write_text("mine"))
    before = {path.name: path.read_bytes() for path in target.iterdir()}

    def full(path, mode):
        file = open(path, mode)  # noqa: SIM115

        def write(data):
            raise OSError(28, "No space left on device")

        Path(path).write_bytes(b"half")
        monkeypatch.setattr(file, "write", write, raising=False)
        return file

    monkeypatch.setattr("lightning_lora.formats.tensor_write.open", full, raising=False)
    model = with_adapter("default")
    for folder in (target, tmp_path / "new"):
        with unchanged(model), pytest.raises(OSError, match="No space left"):
            ll.save_adapter(model, folder)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_where_nothing_can_be_written(folders, tmp_path, monkeypatch):
    """As in a folder that is read only, which does not stop root."""
    target = case(folders["ours"], tmp_path, lambda folder: None)
    before = {path.name: path.read_bytes() for path in target.iterdir()}

    def denied(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied")

    model = with_adapter("default")
    monkeypatch.setattr("lightning_lora.formats.folder.exchanged", lambda *folders: False)
    for name in ("mkdir", "rename"):
        with monkeypatch.context() as patch:
            patch.setattr(Path, name, denied)
            if name == "mkdir":
                patch.setattr("lightning_lora.formats.folder.shutil.copytree", denied)
            with pytest.raises(PermissionError):
                ll.save_adapter(model, target)
        assert {path.name: path.read_bytes() for path in target.iterdir()} == before
        assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_rename_that_fails_half_way(folders, tmp_path, monkeypatch):
    """The old folder is out of the way, and the new one can't take its place."""
    target = case(folders["ours"], tmp_path, lambda folder: None)
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    rename = Path.rename

    def second_fails(self, to):
        if ".tmp-" in self.name:
            raise OSError(5, "Input/output error")
        return rename(self, to)

    monkeypatch.setattr("lightning_lora.formats.folder.exchanged", lambda *folders: False)
    monkeypatch.setattr(Path, "rename", second_fails)
    with pytest.raises(OSError, match="Input/output"):
        ll.save_adapter(with_adapter("default"), target)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_the_folder_is_there_all_the_time(folders, tmp_path, monkeypatch):
    """For whoever reads meanwhile, and after a kill at any moment."""
    target = case(folders["ours"], tmp_path, lambda folder: None)
    model, rename = with_adapter("default"), Path.rename

    def watched(self, to):
        rename(self, to)
        assert (target / CONFIG).exists()

    monkeypatch.setattr(Path, "rename", watched)
    ll.save_adapter(model, target)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize("char", ["a", "€"])
def test_names_as_long_as_they_may_be(char, tmp_path):
    """What is staged beside them has a name too."""
    name = (250 // len(char.encode())) * char
    model = with_adapter("default")
    ll.save_adapter(model, tmp_path / name)
    ll.save_adapter(model, tmp_path / name)
    files.write({"a": 1}, tmp_path / f"{name[:-5]}.ckpt")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, f"{name[:-5]}.ckpt"])


def test_saves_into_one_folder_at_once(tmp_path):
    """The last one has it; none fails, and nothing is left."""
    models = [with_adapter("default") for _ in range(6)]
    with ThreadPoolExecutor(6) as pool:
        for _ in range(5):
            list(pool.map(lambda model: ll.save_adapter(model, tmp_path / "adapter"), models))
            ll.load_adapter(build(), tmp_path / "adapter")
            assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
            shutil.rmtree(tmp_path / "adapter")


def test_other_files_stay(folders, tmp_path):
    def more(folder: Path) -> None:
        (folder / "tokenizer.json").write_text("mine")
        (folder / "more").mkdir()
        (folder / "more" / WEIGHTS).write_text("mine too")
        (folder / "link").symlink_to("tokenizer.json")

    target = case(folders["peft"], tmp_path, more)
    ll.save_adapter(with_adapter("default"), target)
    assert (target / "tokenizer.json").read_text() == (target / "link").read_text() == "mine"
    assert (target / "link").is_symlink()
    assert (target / "more" / WEIGHTS).read_text() == "mine too"
    ll.load_adapter(build(), target)


def test_what_is_too_large_for_the_adapter_that_is_there(tmp_path):
    """It keeps its dtype, in which the value would be infinite."""
    first, second = build(), build()
    for model in (first, second):
        ll.inject(model, ll.LoRAConfig(r=2, target_modules=["q_proj"], modules_to_save=None))
    adapter, there = (model.model.layers[0].self_attn.q_proj.lora["default"] for model in (first, second))
    adapter.B.data[0, 0] = 1e5
    ll.save_adapter(first, tmp_path / "a")
    for _, layer in lora_layers(second):
        layer.lora["default"].master_dtype = torch.float16
        layer.lora["default"].to(torch.float16)
    before = there.B.clone()
    with pytest.raises(ll.CheckpointError, match="layers.0.self_attn.q_proj: B is too large for float16"):
        ll.load_adapter(second, tmp_path / "a")
    assert torch.equal(there.B, before)
