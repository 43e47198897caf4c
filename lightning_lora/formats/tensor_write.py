"""A safetensors file, written: the same bytes as the library's, in which the SHA-256 of each tensor stands too.

A file is eight bytes with the size of its header, the header (JSON), and the tensors one after the other. That of ours
is as long whatever the digests are: so the tensors go to the file while other threads hash them, and the header last.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_lora.errors import UnsupportedError

META = "lightning_lora"  # the key of our own entry in a file's metadata: JSON
DIGEST = f"{META}_sha256"  # ... and that of its SHA-256
THREADS = 4  # that hash: more than a disk can keep up with
NAMES = {  # in the library's order: what needs the most alignment comes first
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_RANKS = {dtype: rank for rank, dtype in enumerate(NAMES)}


def write_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], entry: Mapping[str, Any]) -> None:
    """Writes tensors with the SHA-256 of each and an entry of plain types beside them. PEFT reads such a file too.

    Args:
        path: The file.
        tensors: By name; tied ones are written under each of their names.
        entry: What there is to say about them.
    """
    if odd := [key for key, tensor in tensors.items() if tensor.dtype not in NAMES]:
        raise UnsupportedError(f"{odd[0]} is {tensors[odd[0]].dtype}, which a safetensors file can't hold")
    keys = sorted(tensors, key=lambda key: (_RANKS[tensors[key].dtype], key))
    parts = [bytes_of(tensors[key].detach().cpu()) for key in keys]
    whole = dict(zip(keys, (tensors[key] for key in keys), strict=True))
    start = len(_header(whole, entry, dict.fromkeys(keys, "0" * 64)))
    hashers = min(THREADS, os.cpu_count() or 1)
    Path(path).unlink(missing_ok=True)  # tensors may be read from what is there: a new file leaves that to them
    with open(path, "xb") as file, ThreadPoolExecutor(hashers) as pool:
        shares = [pool.submit(_digests, parts[first::hashers]) for first in range(hashers)]
        file.seek(start)
        for part in parts:
            file.write(part)
        digests: dict[str, str] = {}
        for first, share in enumerate(shares):
            digests |= zip(keys[first::hashers], share.result(), strict=True)
        file.seek(0)
        file.write(_header(whole, entry, digests))


def bytes_of(tensor: Tensor) -> Any:
    """The bytes of a tensor on the CPU: a view of them where it is contiguous."""
    flat = tensor.contiguous().view(-1)
    return flat.view(torch.uint8).numpy() if flat.numel() else b""


def _digests(parts: Sequence[Any]) -> list[str]:
    return [hashlib.sha256(part).hexdigest() for part in parts]


def _header(tensors: Mapping[str, Tensor], entry: Mapping[str, Any], digests: Mapping[str, str]) -> bytes:
    """All that comes before the tensors, which are given in their order."""
    described = {**entry, "sha256": {key: digests[key] for key in tensors}}
    text = json.dumps(described, sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(text.encode()).hexdigest()
    header: dict[str, Any] = {"__metadata__": {"format": "pt", META: text, DIGEST: digest}}
    at = 0
    for key, tensor in tensors.items():
        place = [at, at := at + tensor.nbytes]
        header[key] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": place}
    return header_bytes(header)


def header_bytes(header: Mapping[str, Any]) -> bytes:
    """The header of a safetensors file, and its length in front of it."""
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    return len(text).to_bytes(8, "little") + text
